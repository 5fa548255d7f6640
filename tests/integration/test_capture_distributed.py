"""DDP and FSDP2 over two processes: names, resuming bit for bit, and another number of ranks, through one catalog."""

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
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.multiprocessing.spawn import ProcessException
from torch.utils._python_dispatch import TorchDispatchMode

from holdfast.runtime.capture import TrainingState
from holdfast.runtime.rng import read_rng
from support.images import catalog_of, differences, save_image, tensors_in
from support.ranks import processes

WORLD = 2


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 8)
        self.down = nn.Linear(8, 6)
        self.drop = nn.Dropout(0.1)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += x.mean().detach()
        return x + self.drop(self.down(torch.relu(self.up(x))))


class Model(nn.Module):
    """5 rows of embedding over two ranks are uneven; the scalar-like bias of one row leaves rank 1 an empty shard."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 6)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.scale = nn.Parameter(torch.ones(1, 6))
        self.head = nn.Linear(6, 5, bias=False)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens) * self.scale
        for block in self.blocks:
            x = block(x)
        return self.head(self.frozen(x))


def plain() -> nn.Module:
    return Model()


def ddp() -> nn.Module:
    return nn.parallel.DistributedDataParallel(Model())


def fsdp2() -> nn.Module:
    model = Model()
    model.blocks[0] = checkpoint_wrapper(model.blocks[0])
    for block in model.blocks:
        fully_shard(block)
    return fully_shard(model)


def fsdp2_compiled_blocks() -> nn.Module:
    model = Model()
    for at in range(2):
        model.blocks[at] = torch.compile(model.blocks[at], backend="eager")
        fully_shard(model.blocks[at])
    return fully_shard(model)


def hsdp() -> nn.Module:
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    model = Model()
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def tensor_parallel() -> nn.Module:
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
    model = Model()
    for block in model.blocks:
        parallelize_module(block, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        fully_shard(block, mesh=mesh["dp"])
    return fully_shard(model, mesh=mesh["dp"])


class Even(nn.Module):
    """Every dimension splits evenly over two ranks: torch's LBFGS fails on uneven shards."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = nn.Linear(4, 4, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.tanh(self.a(x)))


def fsdp2_even() -> nn.Module:
    return fully_shard(Even())


LAYOUTS: dict[str, Callable[[], nn.Module]] = {
    "ddp": ddp,
    "fsdp2": fsdp2,
    "fsdp2-compiled": fsdp2_compiled_blocks,
    "hsdp": hsdp,
    "tp": tensor_parallel,
    "fsdp2-lbfgs": fsdp2_even,
    "fsdp2-muon": fsdp2_even,
}

FULL = ["ddp", "fsdp2", "hsdp", "tp"]
"""Layouts of the same model and optimizer, which can take each other's state."""


Optimizers = list[torch.optim.Optimizer]


def make_optimizer(model: nn.Module, name: str = "") -> Optimizers:
    if name.endswith("lbfgs"):
        return [torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=2, history_size=2)]
    if name.endswith("muon"):
        matrices = [p for p in model.parameters() if p.dim() == 2]
        rest = [p for p in model.parameters() if p.dim() != 2]
        return [torch.optim.Muon(matrices), torch.optim.AdamW(rest)]
    return [torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.01)]


def train(model: nn.Module, optimizers: Optimizers, steps: int) -> None:
    for _ in range(steps):
        tokens, target = torch.randint(0, 5, (4,)), torch.randint(0, 5, (4,))
        data = torch.randn(3, 4)

        def closure(tokens: Any = tokens, target: Any = target, data: Any = data) -> torch.Tensor:
            for optimizer in optimizers:
                optimizer.zero_grad()
            if isinstance(model, Even):
                loss = model(data).square().mean()
            else:
                loss = nn.functional.cross_entropy(model(tokens), target)
            loss.backward()
            return loss.detach()

        if isinstance(optimizers[0], torch.optim.LBFGS):
            optimizers[0].step(closure)
        else:
            closure()
            for optimizer in optimizers:
                optimizer.step()


class NoCommunication(TorchDispatchMode):
    """Any collective inside is an error."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "c10d" in func.namespace:
            raise AssertionError(f"{func} communicates")
        return func(*args, **(kwargs or {}))


def local_state(model: nn.Module, optimizers: Optimizers) -> dict[str, Any]:
    return tensors_in({"m": model.state_dict(), "o": [o.state_dict() for o in optimizers], "rng": read_rng()})


def full_state(state: TrainingState, model: nn.Module) -> dict[str, Any]:
    """Every parameter and its optimizer state whole, by name (communicates)."""
    found: dict[str, Any] = {}
    fqns = state._fqns
    for parameter in (p for p in model.parameters() if p.requires_grad):
        named = {"": parameter}
        for optimizer in state.optimizers:
            named.update(optimizer.state.get(parameter, {}))
        for key, value in named.items():
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            found[f"{fqns[id(parameter)]}.{key}".replace("_orig_mod.", "")] = whole.detach().clone()
    return found


def make_state(model: nn.Module, optimizer: Optimizers, rank: int, world: int) -> TrainingState:
    return TrainingState(model=model, optimizer=optimizer, ranks=tuple(range(world)), global_rank=rank)


def check_names(name: str, rank: int) -> None:
    model, other = LAYOUTS[name](), LAYOUTS[name]()
    optimizers, other_optimizers = make_optimizer(model, name), make_optimizer(other, name)
    train(model, optimizers, 1)
    state = make_state(model, optimizers, rank, WORLD)
    names = {entry.name for entry in state.entries()}
    assert set(state.names) == {f"model.{name}" for name in get_model_state_dict(other)}
    if name.endswith("lbfgs"):  # torch's helper has no names for nested state
        return
    expected = get_optimizer_state_dict(other, other_optimizers)  # steps: hence a copy
    assert {n for n in names if n.startswith("optimizer")} == {
        f"optimizer.state.{fqn}.{key}" for fqn, of_fqn in expected["state"].items() for key in of_fqn
    }


def expect_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    different = differences(a, b)
    assert not different, different


def check_resume(name: str, rank: int, directory: Path) -> None:
    torch.manual_seed(1)  # HSDP does not make replicas equal
    model = LAYOUTS[name]()
    torch.manual_seed(1 if name == "tp" else 1 + rank)
    optimizer = make_optimizer(model, name)
    train(model, optimizer, 2)
    state = make_state(model, optimizer, rank, WORLD)
    with NoCommunication():
        image = save_image(state, 2, global_rank=rank, world_size=WORLD)
    (directory / f"{name}-{rank}.image").write_bytes(image)
    at_save = local_state(model, optimizer)
    if name in FULL:
        whole = full_state(state, model)
        if rank == 0:
            torch.save(whole, directory / f"{name}.whole")
    train(model, optimizer, 2)
    undisturbed = local_state(model, optimizer)
    dist.barrier()

    torch.manual_seed(50)
    model = LAYOUTS[name]()
    optimizer = make_optimizer(model, name)
    state = make_state(model, optimizer, rank, WORLD)
    with torch.no_grad():  # leaves FSDP's root unsharded
        model(torch.zeros(2, 4) if isinstance(model, Even) else torch.zeros(2, dtype=torch.long))
    images = [(directory / f"{name}-{r}.image").read_bytes() for r in range(WORLD)]
    with NoCommunication():
        assert state.restore(catalog_of(images)) == 2
    expect_same(local_state(model, optimizer), at_save)
    train(model, optimizer, 2)
    expect_same(local_state(model, optimizer), undisturbed)


def check_growth(name: str, rank: int, directory: Path) -> None:
    model = LAYOUTS[name]()
    optimizer = make_optimizer(model)
    state = make_state(model, optimizer, rank, WORLD)
    state.restore(catalog_of([(directory / "single.image").read_bytes()]))
    expected = torch.load(directory / "single.whole", weights_only=True)
    expect_same(full_state(state, model), expected)


def run_layout(name: str, rank: int, directory: Path) -> None:
    check_names(name, rank)
    check_resume(name, rank, directory)
    if name in FULL:
        check_growth(name, rank, directory)


def worker(rank: int, directory: Path) -> None:
    """Runs all layouts in one pair of processes; each that succeeds leaves a file."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(directory / "store"), WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=240))
    try:
        for name in LAYOUTS:
            try:
                run_layout(name, rank, directory)
            except BaseException:  # the other rank waits in a collective: the parent ends it
                (directory / f"failed-{rank}").write_text(f"{name}: {traceback.format_exc()}")
                raise
            (directory / f"{name}-{rank}.ok").touch()
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks left after running every layout."""
    directory = tmp_path_factory.mktemp("two-ranks")
    torch.manual_seed(9)
    single = plain()
    optimizer = make_optimizer(single)
    train(single, optimizer, 2)
    state = make_state(single, optimizer, 0, 1)
    (directory / "single.image").write_bytes(save_image(state, 2))
    torch.save(full_state(state, single), directory / "single.whole")
    with contextlib.suppress(ProcessException):  # the tests tell which layout failed
        processes(worker, (directory,), WORLD)
    return directory


@pytest.mark.parametrize("name", LAYOUTS)
def test_two_ranks_have_torchs_names_and_resume_bit_for_bit_without_communication(name: str, directory: Path) -> None:
    failures = [failed.read_text() for failed in directory.glob("failed-*")]
    for rank in range(WORLD):
        assert (directory / f"{name}-{rank}.ok").exists(), "\n".join(failures)


@pytest.mark.parametrize("name", FULL)
def test_one_rank_takes_up_what_two_saved(name: str, directory: Path) -> None:
    single = plain()
    state = make_state(single, make_optimizer(single), 0, 1)
    images = [(directory / f"{name}-{rank}.image").read_bytes() for rank in range(WORLD)]
    state.restore(catalog_of(images))
    expect_same(full_state(state, single), torch.load(directory / f"{name}.whole", weights_only=True))


@pytest.mark.parametrize("saved", FULL)
@pytest.mark.parametrize("wanted", ["ddp"])
def test_layouts_of_one_model_store_the_same_tensors(saved: str, wanted: str, directory: Path) -> None:
    def shapes(name: str) -> dict[str, tuple[int, ...]]:
        images = [(directory / f"{name}-{rank}.image").read_bytes() for rank in range(WORLD)]
        return {key: record.shape for key, record in catalog_of(images).tensors.items()}

    assert shapes(saved) == shapes(wanted)
