"""A training script on a world of any size: an `ElasticSampler` behind a DataLoader; DDP, FSDP2, FSDP2 with TP.

Each rank appends a line for every step that it finishes to ``steps-<rank>.jsonl`` in ``--out``: generation, step, the
samples that it trained on, its loss. Rank 0 adds the digest of the whole state, gathered over all ranks, and writes one
such line (``restored``) right after a restore: a digest does not depend on how many ranks hold the state.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import holdfast

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script, it finds only what is beside it

from support.light_torch import spare_compiler
from support.pacing import paced

WIDTH = 12


def build(parallel: str) -> tuple[nn.Module, dict[str, int]]:
    """Sizes whose shards begin elsewhere in each world; and this rank's place for the sampler."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(WIDTH, 44), nn.Tanh(), nn.Linear(44, 29), nn.LayerNorm(29), nn.Linear(29, 1))
    place: dict[str, int] = {}
    if parallel == "ddp":
        return nn.parallel.DistributedDataParallel(model), place
    if parallel in ("fsdp2", "tp"):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

        world_size = dist.get_world_size()
        mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("data",))
        if parallel == "tp":
            both = init_device_mesh("cpu", (world_size // 2, 2), mesh_dim_names=("data", "tensor"))
            parallelize_module(model, both["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
            mesh = both["data"]
            place = {"rank": mesh.get_local_rank(), "world_size": mesh.size()}
        for layer in (model[0], model[2]):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model, place


def dataset(num_samples: int) -> TensorDataset:
    """Sample numbers, inputs and targets."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(num_samples, WIDTH, generator=generator)
    return TensorDataset(torch.arange(num_samples), inputs, inputs.sin().sum(1, keepdim=True))


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def tell(path: Path, step: int) -> None:
    """Replace what the file says; a reader never sees half of it."""
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(str(step))
    temporary.rename(path)


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
    parser.add_argument("--parallel", choices=("none", "ddp", "fsdp2", "tp"), default="ddp")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--samples", type=int, default=50)
    parser.add_argument("--loader-workers", type=int, default=0)
    parser.add_argument("--step-seconds", type=float, default=0.0)
    parser.add_argument("--paced", action="store_true", help="wait for the snapshots of the node (pacing.py)")
    parser.add_argument("--checkpoints")
    parser.add_argument("--persist-every", type=int)
    parser.add_argument("--progress", type=Path, help="a folder where each rank keeps the number of its finished steps")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--end-file", type=Path, help="training ends, by the script's own choice, once this exists")
    return parser.parse_args()


def main() -> None:
    options = parse()
    torch.set_num_threads(1)
    spare_compiler()
    if options.parallel != "none":
        dist.init_process_group("gloo")
    rank = int(os.environ.get("RANK", 0))
    model, place = build(options.parallel)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    data = dataset(options.samples)
    sampler = holdfast.ElasticSampler(data, global_batch_size=options.batch, seed=5, **place)
    loader = DataLoader(data, batch_sampler=sampler, num_workers=options.loader_workers)
    options.out.mkdir(parents=True, exist_ok=True)
    speaks = options.parallel != "tp" or rank % 2 == 0  # the two ranks of a tensor group train on the same samples
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
        steps = session.steps(options.steps)
        batches = sampler.batches(loader)
        for step, (numbers, inputs, targets) in zip(paced(steps) if options.paced else steps, batches, strict=False):
            time.sleep(options.step_seconds)
            loss = nn.functional.mse_loss(model(inputs), targets) * sampler.loss_scale
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            state = digest(model, optimizer)
            write(
                event="step",
                step=step + 1,
                numbers=numbers.tolist() if speaks else [],
                loss=float(whole(loss)),
                digest=state,
            )
            if options.progress is not None:
                tell(options.progress / str(rank), step + 1)
            if options.end_file is not None and options.end_file.exists():
                session.stop()
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
