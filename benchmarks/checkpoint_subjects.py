"""What `checkpoint.py` compares: savers and loaders of one state, holdfast's, those of libraries, and raw files.

A saver takes the state of its rank and a path; the checkpoint is on disk when it returns. A loader fills the state that
it is given. All ranks of the process group call them together.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.tensor import DTensor

import holdfast.checkpoint as hc

READ_BYTES = 8 << 20

State = dict[str, Any]
Saver = Callable[[State, Path], None]


def locals_of(state: State) -> dict[str, torch.Tensor]:
    return {n: t.to_local() if isinstance(t, DTensor) else getattr(t, "tensor", t) for n, t in state.items()}


# --- savers: (state, path) -> None; the checkpoint is on disk when they return ---


def raw_save(state: State, path: Path) -> None:
    path.mkdir(exist_ok=True)
    descriptor = os.open(path / f"raw-{dist.get_rank()}", os.O_WRONLY | os.O_CREAT, 0o666)
    views = [memoryview(tensor.numpy()).cast("B") for tensor in locals_of(state).values()]
    for first in range(0, len(views), 512):
        _write(descriptor, views[first : first + 512])
    os.fsync(descriptor)
    os.close(descriptor)


def _write(descriptor: int, views: list[memoryview]) -> None:
    while views:
        done = os.writev(descriptor, views)
        while views and done >= views[0].nbytes:
            done -= views.pop(0).nbytes
        if done:
            views[0] = views[0][done:]


def holdfast_save(state: State, path: Path) -> None:
    hc.save(state, path)


def dcp_save(state: State, path: Path) -> None:
    dcp.save(state, checkpoint_id=path)


def dcp_async_save(state: State, path: Path) -> None:
    pending: Any = dcp.async_save(state, checkpoint_id=path)
    pending.result()


def torchsnapshot_save(state: State, path: Path) -> None:
    from torchsnapshot import Snapshot, StateDict

    Snapshot.take(str(path), {"state": StateDict(**locals_of(state))})
    _sync_all(path)


def torch_checkpointing_save(state: State, path: Path) -> None:
    from torch_checkpointing import CheckpointManager
    from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

    config = CheckpointManager.Config.with_sync_save()
    config.storage_config = LocalFileSystemStorageConfig(use_direct_io=False)
    manager = config.build()
    manager.save(str(path), {"model": locals_of(state)})
    manager.close()
    _sync_all(path)


def bytecheckpoint_save(state: State, path: Path) -> None:
    """It takes modules and optimizers in a framework's wrappers, and not without GPUs; tried to see what it says."""
    import bytecheckpoint as bcp

    bcp.save(str(path), {"model": state}, framework="fsdp2")


def _sync_all(path: Path) -> None:
    for file in path.rglob("*") if dist.get_rank() == 0 else ():
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)


SAVERS: dict[str, Saver] = {
    "raw": raw_save, "holdfast": holdfast_save, "dcp.save": dcp_save, "dcp.async_save": dcp_async_save,
    "torchsnapshot": torchsnapshot_save, "torch_checkpointing": torch_checkpointing_save,
    "bytecheckpoint": bytecheckpoint_save,
}  # fmt: skip


# --- loaders: (state, path) -> None ---


def raw_load(state: State, path: Path) -> None:
    files = sorted(path.glob("raw-*"))
    wanted = sum(tensor.nbytes for tensor in locals_of(state).values())
    at = dist.get_rank() * wanted
    for tensor in locals_of(state).values():
        view, done = memoryview(tensor.numpy()).cast("B"), 0
        while done < len(view):
            number, offset = divmod(at, files[0].stat().st_size)
            with open(files[number % len(files)], "rb", buffering=0) as file:
                file.seek(offset)
                count = file.readinto(view[done : done + READ_BYTES])
            assert count, "the raw files are too short"
            done, at = done + count, at + count


def holdfast_load(state: State, path: Path) -> None:
    hc.load(state, path)


def dcp_load(state: State, path: Path) -> None:
    dcp.load(state, checkpoint_id=path)


def torchsnapshot_load(state: State, path: Path) -> None:
    from torchsnapshot import Snapshot, StateDict

    Snapshot(str(path)).restore({"state": StateDict(**locals_of(state))})


LOADERS: dict[str, Saver] = {
    "raw": raw_load, "holdfast": holdfast_load, "dcp": dcp_load, "torchsnapshot": torchsnapshot_load,
}  # fmt: skip
SAVER_OF = {"raw": "raw", "holdfast": "holdfast", "dcp": "dcp.save", "torchsnapshot": "torchsnapshot"}
