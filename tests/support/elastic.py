"""A training script on a world of any size: an `ElasticSampler` behind a DataLoader, DDP or FSDP2.

Each rank appends a line for every step that it finishes to ``steps-<rank>.jsonl`` in ``--out``: generation, step, the
samples that it trained on, its loss. Rank 0 adds the digest of the whole state, gathered over all ranks, and writes one
such line (``restored``) right after a restore: a digest does not depend on how many ranks hold the state.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, TensorDataset

import holdfast

WIDTH = 12


def build(parallel: str) -> nn.Module:
    """Odd sizes, so that shards of different worlds begin in different places."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(WIDTH, 37), nn.Tanh(), nn.Linear(37, 29), nn.LayerNorm(29), nn.Linear(29, 1))
    if parallel == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    if parallel == "fsdp2":
        from torch.distributed.fsdp import fully_shard

        for layer in (model[0], model[2]):
            fully_shard(layer)
        fully_shard(model)
    return model


def dataset(num_samples: int) -> TensorDataset:
    """Sample numbers, inputs and targets."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(num_samples, WIDTH, generator=generator)
    return TensorDataset(torch.arange(num_samples), inputs, inputs.sin().sum(1, keepdim=True))


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def digest(model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """Of weights and optimizer state, whatever their layout. A collective call where they are sharded."""
    found = hashlib.sha256()
    for name, parameter in model.named_parameters():
        for key, tensor in [("", parameter), *sorted(optimizer.state[parameter].items())]:
            found.update(f"{name.removeprefix('module.')} {key} {tuple(tensor.shape)}".encode())
            found.update(whole(tensor).detach().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--parallel", choices=("none", "ddp", "fsdp2"), default="ddp")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--samples", type=int, default=50)
    parser.add_argument("--loader-workers", type=int, default=0)
    parser.add_argument("--step-seconds", type=float, default=0.0)
    parser.add_argument("--checkpoints")
    parser.add_argument("--persist-every", type=int)
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def main() -> None:
    options = parse()
    torch.set_num_threads(1)
    if options.parallel != "none":
        dist.init_process_group("gloo")
    rank = int(os.environ.get("RANK", 0))
    model = build(options.parallel)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    data = dataset(options.samples)
    sampler = holdfast.ElasticSampler(data, global_batch_size=options.batch, seed=5)
    loader = DataLoader(data, batch_sampler=sampler, num_workers=options.loader_workers)
    options.out.mkdir(parents=True, exist_ok=True)
    line = {"generation": os.environ.get("HOLDFAST_GENERATION", ""), "rank": rank}

    def write(**fields: object) -> None:
        with (options.out / f"steps-{rank}.jsonl").open("a") as file:
            file.write(json.dumps({**line, "world_size": int(os.environ.get("WORLD_SIZE", 1)), **fields}) + "\n")

    with holdfast.Session(
        model=model,
        optimizer=optimizer,
        extra={"sampler": sampler},
        checkpoint_dir=options.checkpoints,
        persist_every=options.persist_every,
        snapshot_every=1,
    ) as session:
        if session.restored is not None:
            state = digest(model, optimizer)
            write(
                event="restored", step=session.step, tier=session.restored.tier, digest=state, samples=sampler.samples
            )
        for step, (numbers, inputs, targets) in zip(
            session.steps(options.steps), sampler.batches(loader), strict=False
        ):
            time.sleep(options.step_seconds)
            loss = nn.functional.mse_loss(model(inputs), targets) * sampler.loss_scale
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            state = digest(model, optimizer)
            write(event="step", step=step + 1, numbers=numbers.tolist(), loss=loss.item(), digest=state)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
