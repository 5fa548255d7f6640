"""DDP, FSDP2 and a pipeline of two stages over gloo against one process."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.distributed.tensor import DTensor

from holdfast.errors import UsageError
from holdfast.runtime.guidance import LateToEarly
from support.guidance_models import Model, expected, gradients, loss_of, student, teacher, tokens
from support.ranks import processes

WORLD = 2
ROWS = 4


def guided(model: nn.Module, other: nn.Module, **options: Any) -> LateToEarly:
    return LateToEarly(model, other, **{"layer": "blocks.1", "teacher_layer": "norm", "stop_step": 4, **options})


def whole(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in found.items()}


def check(found: dict[str, Tensor], reference: dict[str, Tensor]) -> None:
    torch.testing.assert_close(whole(found), reference, rtol=1e-9, atol=1e-14)


def mine(rank: int, step: int) -> Tensor:
    """Rows of this rank out of the batch of all."""
    return tokens(step, rows=ROWS).chunk(WORLD)[rank]


def sharded(model: Model) -> nn.Module:
    for block in model.blocks:
        fully_shard(block)
    return fully_shard(model)


def checkpointed_and_sharded(model: Model) -> nn.Module:
    for at in range(len(model.blocks)):
        model.blocks[at] = checkpoint_wrapper(model.blocks[at])
    return sharded(model)


def data_parallel(rank: int, wrap: Callable[[Model], nn.Module], wrap_teacher: Callable[[Model], nn.Module]) -> None:
    for attached in (False, True):
        model = wrap(student())
        other = wrap_teacher(teacher())
        guide = guided(model, other)
        for step in range(6):
            model.zero_grad()
            if attached:
                guide.attach(step=step)
            loss = loss_of(model, mine(rank, step))
            (loss if attached else guide(loss, step)).backward()
            reference = expected(step) if step < 4 else plain(step)
            check(gradients(model), reference)
        assert not guide.active


def plain(step: int) -> dict[str, Tensor]:
    model = student()
    loss_of(model, tokens(step, rows=ROWS)).backward()
    return gradients(model)


def ddp(rank: int) -> None:
    data_parallel(rank, nn.parallel.DistributedDataParallel, lambda module: module)


def fsdp2_replicated_teacher(rank: int) -> None:
    data_parallel(rank, sharded, lambda module: module)


def fsdp2_sharded_teacher(rank: int) -> None:
    data_parallel(rank, sharded, lambda module: sharded(module).eval())


def fsdp2_checkpointed(rank: int) -> None:
    data_parallel(rank, checkpointed_and_sharded, lambda module: module)


def identity_of_a_sharded_teacher(rank: int) -> None:
    one = guided(student(), teacher())
    other = guided(student(), sharded(teacher()).eval())
    assert one.state_dict() == other.state_dict()


def learned_projection(rank: int) -> None:
    """Its gradient is the mean over ranks, under DDP, FSDP2 and a group that is given."""
    model = student()
    alone = guided(model, teacher(), match="learned", process_group=dist.new_subgroups(1)[0])
    alone(loss_of(model, tokens(1, rows=ROWS)), 1).backward()
    (reference,) = (p.grad for p in alone.parameters())
    for wrap in (nn.parallel.DistributedDataParallel, sharded, None):
        model = student() if wrap is None else wrap(student())
        guide = guided(model, teacher(), match="learned", process_group=dist.group.WORLD if wrap is None else None)
        optimizer = torch.optim.AdamW([{"params": model.parameters()}, {"params": guide.parameters()}])
        for _ in range(2):
            optimizer.zero_grad()
            guide(loss_of(model, mine(rank, 1)), 1).backward()
            if _ == 0:
                (found,) = (p.grad for p in guide.parameters())
                torch.testing.assert_close(found, reference, rtol=1e-6, atol=1e-9)
            optimizer.step()
        (weight,) = guide.parameters()
        weights = [torch.empty_like(weight) for _ in range(WORLD)]
        dist.all_gather(weights, weight.detach())
        assert torch.equal(*weights)
        assert not torch.equal(weight, next(alone.parameters()))
    with pytest.raises(UsageError, match="give process_group, the data-parallel ranks"):
        guided(student(), teacher(), match="learned")


def unequal_tokens(rank: int) -> None:
    """With masks of unequal length the mean over all tokens is had by giving their number."""
    mask = torch.ones(ROWS, 5)
    mask[ROWS // 2 :, 2:] = 0  # rank 1 has fewer
    single = student()
    guide = guided(single, teacher())
    single(tokens()[:, :-1])
    guide(torch.zeros((), dtype=torch.float64), 0, mask=mask).backward()
    model = nn.parallel.DistributedDataParallel(student(), find_unused_parameters=False)
    guide = guided(model, teacher())
    logits = model(mine(rank, 0)[:, :-1])
    loss = guide(logits.sum() * 0, 0, mask=mask.chunk(WORLD)[rank], num_tokens=mask.sum() / WORLD)
    loss.backward()
    found = gradients(model)
    check({name: found[name] for name in gradients(single)}, gradients(single))


class First(nn.Module):
    """Embedding and two blocks: the stage that owns the layer."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.embed = model.embed
        self.blocks = nn.ModuleList(model.blocks[:2])

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens).cumsum(1)
        for block in self.blocks:
            x = block(x)
        return x


class Last(nn.Module):
    def __init__(self, model: Model) -> None:
        super().__init__()
        self.block, self.norm, self.head = model.blocks[2], model.norm, model.head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.block(x)))


def pipeline(rank: int) -> None:
    """Only the first stage has the guide; the last one has the loss, and knows nothing of it."""
    names = {"block.": "blocks.2."} if rank else {}
    for kind in (ScheduleGPipe, Schedule1F1B):
        part = First(student()) if rank == 0 else Last(student())
        stage = PipelineStage(part, rank, WORLD, torch.device("cpu"))
        guide = guided(part, teacher()) if rank == 0 else None
        schedule = kind(stage, ROWS, loss_fn=lambda out, y: nn.functional.cross_entropy(out.flatten(0, 1), y.flatten()))
        for step in range(6):
            part.zero_grad()
            if guide is not None:
                guide.attach(step=step)
            chunk = tokens(step, rows=ROWS)
            if rank == 0:
                schedule.step(chunk[:, :-1])
            else:
                schedule.step(target=chunk[:, 1:])
            reference = expected(step) if step < 4 else plain(step)
            found = gradients(part)
            for old, new in names.items():
                found = {name.replace(old, new): gradient for name, gradient in found.items()}
            check(found, {name: reference[name] for name in found})
            assert len(found) == (13 if rank == 0 else 9)
        assert guide is None or not guide.active


CASES = [
    ddp,
    fsdp2_replicated_teacher,
    fsdp2_sharded_teacher,
    fsdp2_checkpointed,
    identity_of_a_sharded_teacher,
    learned_projection,
    unequal_tokens,
    pipeline,
]


def worker(rank: int, folder: str) -> None:
    """Run the cases one after the other, each with a file that says how it ended."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=240))
    try:
        for case in CASES:
            said = Path(folder, f"{case.__name__}-{rank}")
            try:
                case(rank)
            except BaseException:
                said.write_text(traceback.format_exc())
                raise  # the other rank may wait for this one in the middle of a collective call
            said.write_text("")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What each case said on each rank: two processes for all cases, because importing torch costs more than a case."""
    folder = tmp_path_factory.mktemp("cases")
    with contextlib.suppress(mp.ProcessRaisedException):
        processes(worker, (str(folder),), WORLD)
    return folder


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_two_processes_get_the_gradients_of_one(case: Callable[[int], None], ended: Path) -> None:
    said = [path.read_text() for path in sorted(ended.glob(f"{case.__name__}-*"))]
    assert not any(said), "\n".join(said)
    assert len(said) == WORLD, "it did not run to its end: see the first case that failed"
