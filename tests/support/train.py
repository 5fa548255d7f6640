"""The training script of the fault matrix: small, deterministic, with everything that makes a resume hard.

``--plain`` runs the same loop without ever importing holdfast. Each rank writes what it ends with (weights, optimizer
state, buffers, generators) as digests, so that two runs are compared bit for bit.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script, it finds only what is beside it

from support.light_torch import spare_compiler

WIDTH = 24


def build(parallel: str) -> nn.Module:
    """A small network with dropout and batch statistics, wrapped as `parallel` says."""
    model = nn.Sequential(
        nn.Linear(WIDTH, 40),
        nn.BatchNorm1d(40),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Linear(40, 33),
        nn.Tanh(),
        nn.Linear(33, 5),
    )
    if parallel == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    if parallel == "fsdp2":
        from torch.distributed.fsdp import fully_shard

        for layer in (model[0], model[4]):
            fully_shard(layer)
        fully_shard(model)
    return model


def local(value: object) -> object:
    """This rank's part. The class of sharded tensors is not imported for it: that takes a second."""
    return value.to_local() if hasattr(value, "to_local") else value


def digest(value: object) -> str:
    """Hex digest of a tensor's bytes, or of the repr of anything else."""
    value = local(value)
    if isinstance(value, torch.Tensor):
        raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return hashlib.sha256(raw).hexdigest()[:16]
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


def fingerprint(model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: object) -> dict[str, str]:
    """Digests of everything that a resumed run must share with an undisturbed one."""
    found = {f"model.{name}": digest(tensor) for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            found[f"optimizer.{names[id(parameter)]}.{key}"] = digest(value)
    found["lr"] = repr([group["lr"] for group in optimizer.param_groups])
    found["scheduler"] = repr(sorted(scheduler.state_dict().items()))
    found["rng.torch"] = digest(torch.get_rng_state())
    found["rng.numpy"] = digest(np.random.get_state()[1].tolist())
    found["rng.random"] = digest(random.getstate())
    return found


def tell(path: Path, step: int) -> None:
    """Replace what the file says; a reader never sees half of it."""
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(str(step))
    temporary.rename(path)


@contextlib.contextmanager
def plain(options: argparse.Namespace) -> Iterator[Iterator[int]]:
    """The same steps, without holdfast."""
    yield iter(range(options.steps))


@contextlib.contextmanager
def held(
    options: argparse.Namespace, model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: object
) -> Iterator[Iterator[int]]:
    """The steps of a Session."""
    import holdfast
    from support.pacing import paced

    with holdfast.Session(
        model=model,
        optimizer=optimizer,
        extra={"scheduler": scheduler},
        checkpoint_dir=options.checkpoints,
        snapshot_every=options.snapshot_every,
        persist_every=options.persist_every,
    ) as session:
        if session.restored is not None and int(os.environ.get("RANK", 0)) == 0:
            sys.stderr.write(f"RESTORED tier={session.restored.tier} step={session.restored.step}\n")
        steps = session.steps(until=options.steps)
        yield paced(steps, standby_at=options.standby_at) if options.paced else steps


def wait_for(gate: Path) -> None:
    """Until a file exists; ten minutes at most."""
    deadline = time.monotonic() + 600
    while not gate.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{gate} does not come")
        time.sleep(0.01)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--parallel", choices=("none", "ddp", "fsdp2"), default="none")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--checkpoints")
    parser.add_argument("--snapshot-every", type=int, default=1)
    parser.add_argument("--persist-every", type=int)
    parser.add_argument("--step-seconds", type=float, default=0.0)
    parser.add_argument("--paced", action="store_true", help="wait for the snapshots of the node (pacing.py)")
    parser.add_argument("--standby-at", type=int, help="with --paced: the step before which a standby has to be ready")
    parser.add_argument("--gate", type=Path, help="the body of step --gate-at does not begin before this file exists")
    parser.add_argument("--gate-at", type=int)
    parser.add_argument("--progress", type=Path, help="a folder where each rank keeps the number of its finished steps")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def main() -> None:
    options = parse()
    torch.set_num_threads(1)
    spare_compiler()
    rank = int(os.environ.get("RANK", 0))
    if options.parallel != "none":
        dist.init_process_group("gloo")
    torch.manual_seed(7 + rank)
    np.random.seed(11 + rank)
    random.seed(13 + rank)
    model = build(options.parallel)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100)
    context = plain(options) if options.plain else held(options, model, optimizer, scheduler)
    with context as steps:
        for step in steps:
            if step == options.gate_at:
                wait_for(options.gate)
            generator = torch.Generator().manual_seed(1000 * step + rank)
            inputs = (
                torch.randn(8, WIDTH, generator=generator) + 0.01 * float(np.random.rand()) + 0.01 * random.random()
            )
            targets = torch.randint(0, 5, (8,), generator=generator)
            time.sleep(options.step_seconds)
            loss = nn.functional.cross_entropy(model(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            if options.progress is not None:
                tell(options.progress / str(rank), step + 1)
    options.out.mkdir(parents=True, exist_ok=True)
    found = fingerprint(model, optimizer, scheduler)
    temporary = options.out / f".rank-{rank}"
    temporary.write_text(json.dumps(found, indent=1))
    temporary.rename(options.out / f"rank-{rank}.json")
    if options.plain and any(name.split(".")[0] == "holdfast" for name in sys.modules):
        raise SystemExit("the plain run imported holdfast")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
