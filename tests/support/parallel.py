"""One small model under every parallelism, trained to the same numbers, through `holdfast.Session`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import holdfast
from holdfast.checkpoint.boxes import whole
from holdfast.checkpoint.commit import open_checkpoint
from holdfast.checkpoint.tensors import empty_for, tensor_bytes
from holdfast.runtime.capture import TrainingState

WIDTH = 10
HIDDEN = 12
"""Tensor parallelism shards it over one to four ranks; the other sizes leave uneven shards."""
BATCH = 12
NUM_TENSORS = 19 * 4
"""Parameters, each with two moments and a step."""
BEFORE, AFTER = 3, 5
"""Steps before the layout changes, and after."""


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Model(nn.Module):
    """In double precision: sums in another order differ by 1e-16, which five steps of Adam do not make visible."""

    def __init__(self, first: int = 0, end: int = 4) -> None:
        super().__init__()
        torch.manual_seed(3)
        blocks = [Block().double() for _ in range(4)]
        self.blocks = nn.ModuleDict({str(i): blocks[i] for i in range(first, end)})
        scale = nn.Parameter(torch.linspace(0.5, 1.5, 7, dtype=torch.float64))
        if end == 4:
            self.head = nn.Linear(WIDTH, 7).double()
            self.scale = scale
        self.last = end == 4

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks.values():
            x = block(x)
        return self.head(x) * self.scale if self.last else x


@dataclass
class Run:
    """A model under one parallelism, and how a rank takes part in a step."""

    model: nn.Module
    parts: int = 1
    """Into which the batch is cut."""
    part: int = 0
    average: bool = True
    """Whether the wrapper averages gradients over the parts."""
    stage: tuple[int, int] | None = None
    """Place in a pipeline, and its length."""


def _ddp() -> Run:
    return Run(nn.parallel.DistributedDataParallel(Model()), dist.get_world_size(), dist.get_rank())


def _fsdp1(use_orig_params: bool, strategy: ShardingStrategy = ShardingStrategy.FULL_SHARD) -> Run:
    model = FullyShardedDataParallel(
        Model(),
        device_id=torch.device("cpu"),
        use_orig_params=use_orig_params,
        auto_wrap_policy=ModuleWrapPolicy({Block}),
        sharding_strategy=strategy,
    )
    return Run(model, dist.get_world_size(), dist.get_rank())


def _fsdp2() -> Run:
    model = Model()
    for block in model.blocks.values():
        fully_shard(block)
    return Run(fully_shard(model), dist.get_world_size(), dist.get_rank())


def _hsdp() -> Run:
    world = dist.get_world_size()
    replicas = 2 if world % 2 == 0 else 1
    mesh = init_device_mesh("cpu", (replicas, world // replicas), mesh_dim_names=("replicate", "shard"))
    model = Model()
    for block in model.blocks.values():
        fully_shard(block, mesh=mesh)
    return Run(fully_shard(model, mesh=mesh), world, dist.get_rank())


def _tp(data_parallel: int = 1) -> Run:
    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (data_parallel, world // data_parallel), mesh_dim_names=("dp", "tp"))
    model = Model()
    for block in model.blocks.values():
        parallelize_module(block, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    if data_parallel == 1:
        return Run(model)
    for block in model.blocks.values():
        fully_shard(block, mesh=mesh["dp"])
    return Run(fully_shard(model, mesh=mesh["dp"]), data_parallel, mesh["dp"].get_local_rank())


def _fsdp2_tp() -> Run:
    return _tp(2 if dist.get_world_size() % 2 == 0 else 1)


def _pp() -> Run:
    rank, world = dist.get_rank(), dist.get_world_size()
    return Run(Model(4 * rank // world, 4 * (rank + 1) // world), stage=(rank, world))


LAYOUTS: dict[str, Callable[[], Run]] = {
    "ddp": _ddp,
    "fsdp1": lambda: _fsdp1(True),
    "fsdp1-flat": lambda: _fsdp1(False),
    "fsdp2": _fsdp2,
    "hsdp": _hsdp,
    "tp": _tp,
    "fsdp2-tp": _fsdp2_tp,
    "pp": _pp,
}


def _batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    make = {"generator": generator, "dtype": torch.float64}
    return torch.randn(BATCH, WIDTH, **make), torch.randn(BATCH, 7, **make)  # type: ignore[call-overload]


def _train_step(run: Run, optimizer: torch.optim.Optimizer, step: int) -> None:
    optimizer.zero_grad()
    inputs, targets = (tensor.chunk(run.parts)[run.part] for tensor in _batch(step))
    if run.stage is None:
        (run.model(inputs) - targets).square().mean().backward()
    else:
        _pipeline_step(run, inputs, targets)
    optimizer.step()


def _pipeline_step(run: Run, inputs: torch.Tensor, targets: torch.Tensor) -> None:
    assert run.stage is not None
    stage, length = run.stage
    x = inputs.clone()
    if stage > 0:
        dist.recv(x, stage - 1)
        x.requires_grad_()
    y = run.model(x)
    if stage < length - 1:
        dist.send(y.detach(), stage + 1)
        gradient = torch.empty_like(y)
        dist.recv(gradient, stage + 1)
        y.backward(gradient)
    else:
        (y - targets).square().mean().backward()
    if stage > 0:
        assert x.grad is not None
        dist.send(x.grad, stage - 1)


def train(layout: str, directory: Path, *, resume: Path | None = None) -> None:
    """As one rank: train from the start, or on from `resume`, to the last step; the state goes to `directory`."""
    run = LAYOUTS[layout]()
    optimizer = torch.optim.AdamW(run.model.parameters(), lr=0.01, foreach=False)
    with holdfast.Session(
        model=run.model,
        optimizer=optimizer,
        checkpoint_dir=directory,
        persist_every=BEFORE if resume is None else None,
        keep=9,
        resume="auto" if resume is None else str(resume),
    ) as session:
        if resume is not None:
            check_live(run.model, optimizer, resume)
        for step in session.steps(until=BEFORE + AFTER):
            _train_step(run, optimizer, step)


def check_live(model: nn.Module, optimizer: torch.optim.Optimizer, path: Path) -> None:
    """Check that this rank's part of the state is, bit for bit, what a checkpoint holds."""
    ranks = tuple(range(dist.get_world_size()))
    state = TrainingState(model=model, optimizer=optimizer, ranks=ranks, global_rank=dist.get_rank())
    compared = 0
    with open_checkpoint(path) as catalog:
        for entry in state.entries():
            for box in entry.boxes:
                expected = empty_for(entry.dtype, box.lengths)
                catalog.read(entry.name, box, tensor_bytes(expected))
                assert torch.equal(entry.view(box), expected), (entry.name, box)
                compared += 1
    assert compared or dist.get_world_size() > 1


def compare(a: Path, b: Path, *, exact: bool, tolerance: float = 1e-9) -> None:
    """Check that two checkpoints hold the same tensors, whatever layouts saved them."""
    with open_checkpoint(a) as ours, open_checkpoint(b) as theirs:
        assert ours.tensors == theirs.tensors
        assert len(ours.tensors) == NUM_TENSORS
        for name, record in ours.tensors.items():
            one, other = empty_for(record.dtype, record.shape), empty_for(record.dtype, record.shape)
            for catalog, tensor in ((ours, one), (theirs, other)):
                catalog.read(name, whole(record.shape), tensor_bytes(tensor))
            if exact:
                assert torch.equal(one, other), name
            else:
                difference = (one - other).abs().max().item()
                assert difference <= tolerance * max(1.0, one.abs().max().item()), (name, difference)
