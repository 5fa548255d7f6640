"""Two ranks that hold different tensors: pipeline stages, an expert routed on one rank, parts under the same names."""

from __future__ import annotations

import contextlib
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.spawn import ProcessException

from holdfast.checkpoint.commit import newest_step, open_checkpoint
from holdfast.checkpoint.saving import Ranks
from holdfast.errors import MismatchError, UsageError
from holdfast.faults import Injector
from holdfast.runtime.capture import TrainingState
from holdfast.runtime.census import Census, HolderWatch, meet
from holdfast.runtime.huddle import Huddle
from holdfast.runtime.mode import Context
from holdfast.runtime.options import Options
from holdfast.runtime.results import ListOfCallbacks
from holdfast.runtime.session import Session
from support.images import catalog_of, differences, save_image, tensors_in
from support.ranks import processes

WORLD = 2
WIDTH = 600
"""A square matrix of it is over 1 MiB of float32, so that its pieces are cut."""

Models = dict[str, nn.Module]


def stages(rank: int) -> Models:
    """A pipeline: each rank has a stage, one with a buffer and tied weights."""
    first = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    second = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    second[1].weight = second[0].weight
    return {"first": first} if rank == 0 else {"second": second}


def expert(rank: int) -> Models:
    """Both ranks have all; only the second routes to the expert, whose learning rate is still 0."""
    return {"both": nn.Linear(WIDTH, WIDTH), "expert": nn.Linear(WIDTH, 8)}


def same_names(rank: int) -> Models:
    """Parts of a model, sharded by hand, under the same names on each rank."""
    torch.manual_seed(torch.initial_seed() + rank)
    model = nn.Linear(8, 8)
    nn.init.zeros_(model.bias)
    return {"part": model}


KINDS: dict[str, Callable[[int], Models]] = {"stages": stages, "expert": expert, "same-names": same_names}


def make(name: str, rank: int, seed: int) -> tuple[Models, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    models = KINDS[name](rank)
    lr = 0.01 * (1 + rank if name == "stages" else 1)
    groups = [
        {"params": list(model.parameters()), "lr": 0.0 if key == "expert" else lr} for key, model in models.items()
    ]
    return models, torch.optim.AdamW(groups)


def train(models: Models, optimizer: torch.optim.Optimizer, rank: int) -> None:
    optimizer.zero_grad()
    for key, model in models.items():
        data = torch.randn(4, next(model.parameters()).shape[-1])
        if key != "expert" or rank == 1:
            model(data + rank * (key == "part")).square().mean().backward()
    optimizer.step()


def state_of(models: Models, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    state = optimizer.state_dict()
    return tensors_in({"m": {key: model.state_dict() for key, model in models.items()}, "o": state})


def key_orders(optimizer: torch.optim.Optimizer) -> list[list[str]]:
    return [list(state) for state in optimizer.state.values()]


def expect_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a.keys() == b.keys()
    assert not differences(a, b)


def through_storage(name: str, rank: int, directory: Path) -> None:
    def run(until: int, seed: int, path: Path | None) -> tuple[Session, Models, torch.optim.Optimizer]:
        models, optimizer = make(name, rank, seed)
        with Session(model=models, optimizer=optimizer, checkpoint_dir=path) as session:
            torch.manual_seed(100) if session.restored is None else None
            for _ in session.steps(until):
                train(models, optimizer, rank)
        return session, models, optimizer

    path = directory / name
    expected = run(5, 1, None)
    run(3, 1, path)
    session, models, optimizer = run(5, 30, path)
    assert session.restored is not None
    assert session.restored.step == 3
    expect_same(state_of(models, optimizer), state_of(*expected[1:]))
    assert key_orders(optimizer) == key_orders(expected[2])
    dist.barrier()
    step = newest_step(path)
    assert step is not None
    with open_checkpoint(step.path) as catalog:
        catalog.check_complete()
        catalog.verify()


def context_of(models: Models, optimizer: torch.optim.Optimizer, rank: int) -> Context:
    state = TrainingState(model=models, optimizer=optimizer, ranks=(0, 1), global_rank=rank)
    options = Options.of(
        checkpoint_dir=None, snapshot_every=1, persist_every=None, keep=1, init_from=None, resume="auto"
    )
    return Context(
        state=state,
        options=options,
        ranks=(0, 1),
        global_rank=rank,
        process_group=None,
        injector=Injector.for_worker(None, global_rank=rank),
        callbacks=ListOfCallbacks(),
    )


def exchange_images(state: TrainingState, step: int, rank: int, directory: Path, name: str) -> list[bytes]:
    (directory / f"{name}-{step}-{rank}").write_bytes(save_image(state, step, global_rank=rank, world_size=WORLD))
    dist.barrier()
    return [(directory / f"{name}-{step}-{r}").read_bytes() for r in range(WORLD)]


def through_memory(name: str, rank: int, directory: Path) -> None:
    ranks = Ranks.of()
    models, optimizer = make(name, rank, 1)
    context = context_of(models, optimizer, rank)
    huddle = Huddle(ranks, f"memory/{name}")
    meet(context, huddle, sample=True)
    census = Census(ranks, f"census/{name}")
    watch = HolderWatch(context.state, (0, 1), census)
    sizes = []
    for step in (1, 2):
        train(models, optimizer, rank)
        images = exchange_images(context.state, step, rank, directory, name)
        sizes.append(sum(map(len, images)))
        check_restored(name, rank, images, state_of(models, optimizer))
        watch.look()
        deadline = time.monotonic() + 200
        while not census.news and not watch.is_settled and time.monotonic() < deadline:
            time.sleep(0.01)
        if rank == 0:  # at the next step one rank shares the work and the other does not know yet
            watch.look()
        dist.barrier()
    watch.look()
    train(models, optimizer, rank)
    images = exchange_images(context.state, 3, rank, directory, name)
    sizes.append(sum(map(len, images)))
    check_restored(name, rank, images, state_of(models, optimizer))
    census.close()
    if name == "expert":  # what both have is kept once in the end
        assert sizes[2] < 0.75 * sizes[0], sizes
        assert sizes[2] < sizes[1] < sizes[0], sizes


def check_restored(name: str, rank: int, images: list[bytes], expected: dict[str, Any]) -> None:
    models, optimizer = make(name, rank, 70)
    context = context_of(models, optimizer, rank)
    meet(context, Huddle(Ranks.of(), f"restored/{name}/{next(numbers)}"))
    catalog = catalog_of(images)
    catalog.check_complete()
    context.state.restore(catalog)
    expect_same(state_of(models, optimizer), expected)


numbers = iter(range(1000))


def one_rank_takes_both_stages(rank: int, directory: Path) -> None:
    """Rank 0 alone trains what two ranks did, in the same two groups."""
    if rank != 0:
        return
    models = {**stages(0), **stages(1)}
    groups = [{"params": list(model.parameters()), "lr": 1.0} for model in models.values()]
    optimizer = torch.optim.AdamW(groups)
    state = TrainingState(model=models, optimizer=optimizer)
    images = [(directory / f"stages-3-{r}").read_bytes() for r in range(WORLD)]
    assert state.restore(catalog_of(images)) == 3
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.02]
    assert len(optimizer.state) == len(list(nn.ModuleDict(models).parameters()))


def a_stranger_is_refused(rank: int, directory: Path) -> None:
    """What no rank trains is unknown still, though ranks differ."""
    models, optimizer = make("stages", rank, 1)
    if rank == 1:
        models = {"other": models["second"]}
    context = context_of(models, optimizer, rank)
    meet(context, Huddle(Ranks.of(), "stranger"))
    images = [(directory / f"stages-3-{r}").read_bytes() for r in range(WORLD)]
    with pytest.raises(MismatchError, match="second"):
        context.state.restore(catalog_of(images))


def groups_have_sessions_of_their_own(rank: int, directory: Path) -> None:
    """A group's second rank saves as the first of one; both together take it up, though one has had more Sessions."""
    alone = dist.new_group([1])
    path = directory / "group"

    def run(until: int, group: dist.ProcessGroup | None) -> tuple[Session, dict[str, Any]]:
        torch.manual_seed(5)
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        with Session(model=model, optimizer=optimizer, checkpoint_dir=path, process_group=group) as session:
            for _ in session.steps(until):
                train({"m": model}, optimizer, 0)
        return session, state_of({"m": model}, optimizer)

    if rank == 1:
        with pytest.raises(UsageError, match="nobody/none"):
            Session(model=nn.Linear(2, 2), checkpoint_dir=path, process_group=alone, resume="nobody/none").__enter__()
        _, left = run(2, alone)
        session, again = run(2, alone)
        assert session.restored is not None
        expect_same(again, left)
        with open_checkpoint(path / "step-00000002") as catalog:
            assert (catalog.world_size, catalog.version.step) == (1, 2)
    dist.barrier()
    session, _ = run(4, None)
    assert session.restored is not None
    assert session.restored.step == 2
    with open_checkpoint(path / "step-00000004") as catalog:
        assert catalog.world_size == WORLD
        assert catalog.tensors["model.1.running_mean"].per_rank
    dist.barrier()
    if rank == 1:
        session, _ = run(5, alone)
        assert session.restored is not None
        assert session.restored.step == 4


CASES: dict[str, Callable[[int, Path], None]] = {
    **{f"{name}-storage": lambda rank, at, name=name: through_storage(name, rank, at) for name in KINDS},
    **{f"{name}-memory": lambda rank, at, name=name: through_memory(name, rank, at) for name in KINDS},
    "groups": groups_have_sessions_of_their_own,
    "one-rank": one_rank_takes_both_stages,
    "stranger": a_stranger_is_refused,
}


def worker(rank: int, directory: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(directory / "store"), WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=240))
    try:
        for name, case in CASES.items():
            try:
                case(rank, directory)
            except BaseException:  # the other rank waits: the parent ends it
                (directory / f"failed-{rank}").write_text(f"{name}: {traceback.format_exc()}")
                raise
            (directory / f"{name}-{rank}.ok").touch()
            dist.barrier()
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks left after running every case."""
    directory = tmp_path_factory.mktemp("parts")
    with contextlib.suppress(ProcessException):  # the tests tell which case failed
        processes(worker, (directory,), WORLD)
    return directory


@pytest.mark.parametrize("name", CASES)
def test_ranks_that_hold_different_tensors_lose_none(name: str, directory: Path) -> None:
    failures = [failed.read_text() for failed in directory.glob("failed-*")]
    for rank in range(WORLD):
        assert (directory / f"{name}-{rank}.ok").exists(), "\n".join(failures)
