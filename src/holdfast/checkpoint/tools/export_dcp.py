"""A directory of `torch.distributed.checkpoint`, written by its own `FileSystemWriter`, tensor by tensor."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint.state_dict_saver as saver
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from holdfast.checkpoint.boxes import Box, cut_rows, whole
from holdfast.checkpoint.dtypes import itemsize
from holdfast.checkpoint.objects import join_tensors
from holdfast.checkpoint.retries import first_line
from holdfast.checkpoint.storage import TEMPORARY_PREFIX, PosixStorage, make_folders
from holdfast.checkpoint.tensors import torch_dtype
from holdfast.checkpoint.tools.exported import Export, Item
from holdfast.checkpoint.tools.units import free_beside
from holdfast.errors import HoldfastError, StorageError


def export_dcp(export: Export, directory: Path) -> None:
    """Write it beside its place, then rename it.

    Raises:
        StorageError: the directory exists, or something cannot be written.
    """
    if directory.exists():
        raise StorageError(f"{directory} exists already: give another directory")
    temporary = directory.with_name(f"{TEMPORARY_PREFIX}{directory.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        make_folders(directory.absolute().parent)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that this is one process; others of torch's own about its internals
            writer = FileSystemWriter(temporary, single_file_per_rank=True, thread_count=1)
            saver.save({}, storage_writer=writer, planner=_Planner(export), no_dist=True)
        PosixStorage().move(temporary, directory)
    except CheckpointException as error:  # no Exception: it would pass through everything
        failed = next(iter(error.failures.values()))[0]
        if isinstance(failed, HoldfastError) or not isinstance(failed, Exception):
            raise failed from error
        raise StorageError(f"{directory} cannot be written: {first_line(failed)}; {free_beside(directory)}") from error
    except OSError as error:
        raise StorageError(f"{directory} cannot be written: {error.strerror}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


class _Planner(DefaultSavePlanner):
    """Plans from the export's table, and reads a part when the writer asks for it."""

    def __init__(self, export: Export) -> None:
        super().__init__()
        self._export = export
        self._items: dict[str, Item] = {}
        self._boxes: dict[tuple[str, tuple[int, ...]], Box] = {}

    def set_up_planner(self, *args: Any, **kwargs: Any) -> None:  # Any: as in the base class
        by_name = {item.name: item for item in self._export.items}
        stands: dict[int, str] = {}
        kept: list[torch.Tensor] = []  # so that no id is used twice

        def stand_in(name: str) -> torch.Tensor:
            kept.append(torch.empty(by_name[name].saved.shape, dtype=torch_dtype(by_name[name].dtype), device="meta"))
            stands[id(kept[-1])] = name
            return kept[-1]

        tree = join_tensors(self._export.nested(), stand_in)
        self.state_dict, self.mappings = flatten_state_dict(tree if isinstance(tree, dict) else {"state": tree})
        for fqn, value in self.state_dict.items():
            if isinstance(value, torch.Tensor):
                self._items[fqn] = by_name[stands[id(value)]]
        self.is_coordinator = True

    def create_local_plan(self) -> SavePlan:
        items = [item for fqn in self.state_dict for item in self._write_items(fqn)]
        self.plan = SavePlan(items, planner_data=self.mappings)
        return self.plan

    def _write_items(self, fqn: str) -> list[WriteItem]:
        item = self._items.get(fqn)
        if item is None:
            return [WriteItem(index=MetadataIndex(fqn), type=WriteItemType.BYTE_IO)]
        size = torch.Size(item.saved.shape)
        properties = TensorProperties(dtype=torch_dtype(item.dtype))
        wide = max(itemsize(item.dtype), itemsize(item.saved.dtype))
        found: list[WriteItem] = []
        box = whole(item.saved.shape)
        for part in [box] if box.is_empty else cut_rows(box, max(self._export.max_bytes // wide, 1)):
            chunk = ChunkStorageMetadata(torch.Size(part.offsets), torch.Size(part.lengths))
            index = MetadataIndex(fqn, part.offsets)
            self._boxes[fqn, part.offsets] = part
            found.append(
                WriteItem(index=index, type=WriteItemType.SHARD, tensor_data=TensorWriteData(chunk, properties, size))
            )
        return found

    def resolve_data(self, write_item: WriteItem) -> Any:  # Any: as in the base class
        if write_item.type is WriteItemType.BYTE_IO:
            return self.transform_object(write_item, self.state_dict[write_item.index.fqn])
        item = self._items[write_item.index.fqn]
        box = self._boxes[write_item.index.fqn, tuple(write_item.index.offset or ())]
        data = self._export.read(item, box)
        if not len(data):
            return torch.empty(box.lengths, dtype=torch_dtype(item.dtype))
        return torch.frombuffer(data, dtype=torch.uint8).view(torch_dtype(item.dtype)).view(box.lengths)
