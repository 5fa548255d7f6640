"""One file of `torch.save`, larger than memory: torch writes it with room for the data, which is then filled in."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from holdfast.checkpoint.objects import TensorRef, join_tensors
from holdfast.checkpoint.storage import TEMPORARY_PREFIX, make_folders, refuse, sync_folder
from holdfast.checkpoint.tensors import torch_dtype
from holdfast.checkpoint.tools.exported import Export
from holdfast.errors import StorageError


def export_torch(export: Export, path: Path) -> None:
    """Write it beside its place, then rename it.

    Raises:
        StorageError: the file exists, or cannot be written.
    """
    if path.exists():
        raise StorageError(f"{path} exists already: give another name")
    # torch puts the file's name into the file: a folder of its own for it, not a name of its own.
    folder = path.with_name(f"{TEMPORARY_PREFIX}{path.name}")
    temporary = folder / path.name
    try:
        shutil.rmtree(folder, ignore_errors=True)
        make_folders(folder.absolute())
        tree = export.nested()
        _write_skeleton(export, tree, temporary)
        _fill(export, _offsets(tree, temporary), temporary)
        os.link(temporary, path)
        sync_folder(path.absolute().parent)
    except OSError as error:
        refuse("written", path, error)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# Any, here and below: whatever was saved.
def _write_skeleton(export: Export, tree: Any, path: Path) -> None:
    by_name = {item.name: item for item in export.items}
    made: dict[str, torch.Tensor] = {}
    with FakeTensorMode():

        def fake(name: str) -> torch.Tensor:
            if name not in made:
                item = by_name[name]
                made[name] = torch.empty(item.saved.shape, dtype=torch_dtype(item.dtype))
            return made[name]

        skeleton = join_tensors(tree, fake)
        with torch.serialization.skip_data(materialize_fake_tensors=True):
            torch.save(skeleton, path)


def _offsets(tree: Any, path: Path) -> dict[str, int]:
    """Where the data of each tensor starts in the file. It was written just now, by us: reading it back is safe."""
    loaded = torch.load(path, map_location="cpu", mmap=True, weights_only=False)
    pointers: dict[str, int] = {}
    _walk(tree, loaded, pointers)
    if not pointers:
        return {}
    # All are parts of one map of the file, and torch writes storages in the order of their keys.
    reader: Any = torch._C.PyTorchFileReader(str(path))
    records = [name for name in reader.get_all_records() if name.startswith("data/")]
    base = min(pointers.values()) - min(int(reader.get_record_offset(name)) for name in records)
    return {name: pointer - base for name, pointer in pointers.items()}


def _walk(tree: Any, loaded: Any, pointers: dict[str, int]) -> None:
    if type(tree) is TensorRef:
        if loaded.numel():
            pointers[tree.name] = loaded.data_ptr()
    elif isinstance(tree, dict):
        for key, item in tree.items():
            _walk(item, loaded[key], pointers)
    elif type(tree) in (list, tuple):
        for item, value in zip(tree, loaded, strict=True):
            _walk(item, value, pointers)


def _fill(export: Export, offsets: dict[str, int], path: Path) -> None:
    with open(path, "r+b", buffering=0) as file:
        for item in export.items:
            position = offsets.get(item.name)
            for _, data in export.parts(item) if position is not None else ():
                file.seek(position or 0)
                file.write(data)
                position = (position or 0) + len(data)
        os.fsync(file.fileno())
