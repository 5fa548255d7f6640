"""One file of `torch.save`, larger than memory: torch writes it with room for the data, which is then filled in."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from holdfast.checkpoint.objects import join_tensors
from holdfast.checkpoint.retries import first_line
from holdfast.checkpoint.storage import TEMPORARY_PREFIX, make_folders, refuse, sync_folder
from holdfast.checkpoint.tensors import torch_dtype
from holdfast.checkpoint.tools.exported import Export
from holdfast.checkpoint.tools.states import tensor_names
from holdfast.checkpoint.tools.units import free_beside
from holdfast.errors import StateError, StorageError


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
        _fill(export, _offsets(export, tree, temporary), temporary)
        os.link(temporary, path)
        sync_folder(path.absolute().parent)
    except OSError as error:
        refuse("written", path, error)
    except RuntimeError as error:  # of torch's writer, which does not say what the system said
        raise StorageError(f"{path} cannot be written: {first_line(error)}; {free_beside(path)}") from error
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


def _offsets(export: Export, tree: Any, path: Path) -> dict[str, int]:
    """Where the data of each tensor starts in the file: torch numbers storages in the order in which it meets them."""
    reader: Any = torch._C.PyTorchFileReader(str(path))
    sizes = {item.name: item.size_bytes for item in export.items}
    names = list(dict.fromkeys(tensor_names(tree)))
    offsets = {name: int(reader.get_record_offset(f"data/{number}")) for number, name in enumerate(names)}
    ends = [*sorted(offsets.values())[1:], path.stat().st_size]
    for (name, start), end in zip(sorted(offsets.items(), key=lambda item: item[1]), ends, strict=True):
        if start + sizes[name] > end:
            raise StateError(f"this torch ({torch.__version__}) leaves no room for {name}: export dcp or hf instead")
    return offsets


def _fill(export: Export, offsets: dict[str, int], path: Path) -> None:
    with open(path, "r+b", buffering=0) as file:
        for item in export.items:
            position = offsets.get(item.name)
            for _, data in export.parts(item) if position is not None else ():
                file.seek(position or 0)
                file.write(data)
                position = (position or 0) + len(data)
        os.fsync(file.fileno())
