"""Loops of many kinds, each with and without holdfast; each rank writes digests of all that it ends with.

python equality_script.py CASE PARALLEL OUT [--plain] [--steps N]
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

WIDTH, BATCH = 32, 8
FIRST_ROUTED = 12
OVERFLOW_STEP = 5


class Network(nn.Module):
    """Linear layers of even sizes, batch statistics, dropout, and an expert that is routed late."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, 64)
        self.norm = nn.BatchNorm1d(64)
        self.drop = nn.Dropout(0.1)
        self.expert = nn.Linear(64, 64)
        self.outer = nn.Linear(64, 4)
        self.routed = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(torch.tanh(self.norm(self.inner(x))))
        if self.routed:
            x = x + self.expert(x)
        return self.outer(x)


def optimizers_of(case: str, model: nn.Module) -> dict[str, Optimizer]:
    parameters = list(model.parameters())
    match case:
        case "adamw":
            return {"all": torch.optim.AdamW(parameters, lr=1e-2, foreach=False)}
        case "adamw-foreach" | "expert" | "scaler":
            return {"all": torch.optim.AdamW(parameters, lr=1e-2, foreach=True)}
        case "adamw-fused":
            return {"all": torch.optim.AdamW(parameters, lr=1e-2, fused=True)}
        case "sgd":
            return {"all": torch.optim.SGD(parameters, lr=1e-2, momentum=0.9, nesterov=True)}
        case "muon":
            flat = [parameter for parameter in parameters if parameter.ndim == 2]
            rest = [parameter for parameter in parameters if parameter.ndim != 2]
            return {"muon": torch.optim.Muon(flat, lr=1e-2), "adamw": torch.optim.AdamW(rest, lr=1e-2)}
        case "lbfgs":
            return {"all": torch.optim.LBFGS(parameters, lr=0.1, max_iter=3, history_size=4)}
        case _:
            raise SystemExit(f"unknown case {case}")


def wrap(model: Network, parallel: str, case: str) -> nn.Module:
    if parallel == "ddp":
        return nn.parallel.DistributedDataParallel(model, find_unused_parameters=case == "expert")
    if parallel == "fsdp2":
        from torch.distributed.fsdp import fully_shard

        for layer in (model.inner, model.expert, model.outer):
            fully_shard(layer)
        return fully_shard(model)
    return model


def steps_of(options: argparse.Namespace, **state: object) -> contextlib.AbstractContextManager[Iterator[int]]:
    if options.plain:
        return contextlib.nullcontext(iter(range(options.steps)))
    return held(options, **state)


@contextlib.contextmanager
def held(options: argparse.Namespace, **state: object) -> Iterator[Iterator[int]]:
    import holdfast

    sys.path.insert(0, str(Path(__file__).parents[1]))  # a script finds only what is beside it
    from support.pacing import paced

    with holdfast.Session(**state, snapshot_every=1) as session:  # type: ignore[arg-type]
        yield paced(session.steps(until=options.steps))


def train(options: argparse.Namespace, rank: int) -> dict[str, str]:
    torch.manual_seed(rank)
    network = Network()
    model = wrap(network, options.parallel, options.case)
    optimizers = optimizers_of(options.case, model)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=6, enabled=options.case == "scaler")
    state = {"model": model, "optimizer": optimizers if len(optimizers) > 1 else optimizers["all"]}
    if options.case == "scaler":
        state["extra"] = {"scaler": scaler}
    with steps_of(options, **state) as steps:
        for step in steps:
            network.routed = options.case != "expert" or step >= FIRST_ROUTED
            one_step(options, model, optimizers, scaler, step, rank)
    return digests(model, optimizers) | {"scale": repr(scaler.get_scale())}


def one_step(
    options: argparse.Namespace,
    model: nn.Module,
    optimizers: dict[str, Optimizer],
    scaler: torch.amp.GradScaler,
    step: int,
    rank: int,
) -> None:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    inputs = torch.randn(BATCH, WIDTH, generator=generator)
    targets = torch.randint(0, 4, (BATCH,), generator=generator)

    def closure() -> Tensor:
        for optimizer in optimizers.values():
            optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), targets)
        if options.case == "scaler" and step == OVERFLOW_STEP:
            loss = loss * float("inf")
        scaler.scale(loss).backward()
        return loss

    if options.case == "lbfgs":
        optimizers["all"].step(closure)  # type: ignore[arg-type]
        return
    closure()
    for optimizer in optimizers.values():
        scaler.step(optimizer)
    if scaler.is_enabled():
        scaler.update()


def digests(model: nn.Module, optimizers: dict[str, Optimizer]) -> dict[str, str]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {f"model.{name}": digest(tensor) for name, tensor in model.state_dict().items()}
    for key, optimizer in optimizers.items():
        for parameter, state in optimizer.state.items():
            for field, value in state.items():
                found[f"{key}.{names[parameter]}.{field}"] = digest(value)
    found["rng"] = digest(torch.get_rng_state())
    return found


def digest(value: object) -> str:
    """Digest of the bytes of tensors, also in lists; of the repr of anything else."""
    if isinstance(value, list | tuple):
        return " ".join(digest(item) for item in value)
    if isinstance(value, DTensor):
        value = value.to_local()
    if isinstance(value, Tensor):
        raw = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return hashlib.sha256(raw).hexdigest()[:16]
    return repr(value)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("case")
    parser.add_argument("parallel", choices=("none", "ddp", "fsdp2"))
    parser.add_argument("out", type=Path)
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--steps", type=int, default=25)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rank = int(os.environ.get("RANK", 0))
    if options.parallel != "none":
        dist.init_process_group("gloo")
    cases = options.case.split(",")
    assert options.plain or len(cases) == 1, "one Session per process"
    for case in cases:
        options.case = case
        found = train(options, rank)
        folder = options.out / case
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"rank-{rank}.json").write_text(json.dumps(found, indent=1))
    if options.plain and "holdfast" in sys.modules:
        raise SystemExit("the plain run imported holdfast")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
