"""A small job whose end each test asks for: by `stop`, `break`, an exception, or with a tagged save on the way.

Ranks train one replicated model by adding up gradients themselves, so that no wrapper hides what the Session does. Each
rank writes the versions that became clean and those that were missed, and a digest of what it ended with.
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
from torch import nn

import holdfast

sys.path.insert(0, str(Path(__file__).parents[1]))  # a script finds only what is beside it

from holdfast.checkpoint.source import FileSource
from holdfast.snapshot.client import SnapshotClient
from support.light_torch import spare_compiler
from support.pacing import paced


def watch_versions() -> dict[str, list[int]]:
    """Steps that were committed and missed by this rank, as the client is told."""
    heard: dict[str, list[int]] = {"committed": [], "missed": []}
    committed, missed = SnapshotClient.committed, SnapshotClient.missed

    def on_committed(self: SnapshotClient, version: object, *rest: object) -> None:
        heard["committed"].append(version.step)
        committed(self, version, *rest)

    def on_missed(self: SnapshotClient, version: object) -> None:
        heard["missed"].append(version.step)
        missed(self, version)

    SnapshotClient.committed, SnapshotClient.missed = on_committed, on_missed
    return heard


def watch_reads() -> list[int]:
    """Sizes of what this rank reads of images in storage."""
    sizes: list[int] = []
    read_into = FileSource.read_into

    def counted(self: FileSource, offset: int, view: memoryview) -> None:
        sizes.append(len(view))
        read_into(self, offset, view)

    FileSource.read_into = counted
    return sizes


def digest(model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    found = hashlib.sha256()
    for tensor in model.state_dict().values():
        found.update(tensor.numpy().tobytes())
    for state in optimizer.state_dict()["state"].values():
        for key in sorted(state):
            found.update(state[key].numpy().tobytes())
    return found.hexdigest()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--checkpoints")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--end", choices=("normal", "stop", "break", "raise"), default="normal")
    parser.add_argument("--end-at", type=int, default=6)
    parser.add_argument("--end-rank", type=int, default=0)
    parser.add_argument("--save-at", type=int)
    parser.add_argument("--step-seconds", type=float, default=0.02)
    parser.add_argument("--paced", action="store_true", help="wait for the snapshots of the node (support/pacing.py)")
    parser.add_argument("--persist-every", type=int)
    parser.add_argument("--hidden", type=int, default=30)
    return parser.parse_args()


def main() -> None:
    options = parse()
    torch.set_num_threads(1)
    spare_compiler()
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world_size > 1:
        dist.init_process_group("gloo")
    heard, read = watch_versions(), watch_reads()
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(6, options.hidden), nn.Dropout(0.2), nn.Linear(options.hidden, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    told: list[list[object]] = []
    handle = None
    session = holdfast.Session(
        model=model,
        optimizer=optimizer,
        checkpoint_dir=options.checkpoints,
        snapshot_every=1,
        persist_every=options.persist_every,
    )
    with session:
        session.on_persisted(lambda persisted: told.append([persisted.step, persisted.tag]))
        steps = session.steps(until=options.steps)
        for step in paced(steps) if options.paced else steps:
            time.sleep(options.step_seconds)
            loss = model(torch.randn(4, 6) + rank).square().mean()
            loss.backward()
            for parameter in model.parameters():
                if world_size > 1:
                    dist.all_reduce(parameter.grad)
            optimizer.step()
            optimizer.zero_grad()
            if step == options.save_at and rank == options.end_rank:
                handle = session.save(tag="kept", metrics={"loss": float(loss)})
            if step == options.end_at:
                if options.end == "stop" and rank == options.end_rank:
                    session.stop()
                if options.end == "break":
                    break
                if options.end == "raise":
                    raise ValueError("the script's own")
    result = {
        "rank": rank,
        "step": session.step,
        "restored": None if session.restored is None else [session.restored.tier, session.restored.step],
        "saved": None if handle is None else [handle.step, handle.result().path.name],
        "told": told,
        "digest": digest(model, optimizer),
        "read_bytes": sum(read),
        **heard,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"rank-{rank}.json").write_text(json.dumps(result))
    if world_size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
