"""Writer and reader for `torch.distributed.checkpoint`: its `save`, `load` and `async_save` with our files.

::

    dcp.save(state_dict, storage_writer=HoldfastWriter(path))
    dcp.load(state_dict, storage_reader=HoldfastReader(path))

Planning, deduplication and the meeting of ranks stay DCP's. What changes is what lies on storage: images with checksums
instead of zip files, objects through `holdfast.checkpoint.objects` instead of pickle, a root that is created once
instead of a metadata file that is replaced, range reads instead of whole chunks.

Objects of an image, both per rank:

    dcp.objects     {FQN: value} of what this rank's plan held besides tensors
    dcp.mappings    {FQN: path of keys} of the nested state, for the items of this rank's plan
"""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from holdfast.checkpoint.boxes import Box, whole
from holdfast.checkpoint.catalog import Catalog, TensorRecord
from holdfast.checkpoint.commit import commit_step, open_checkpoint, refuse_committed
from holdfast.checkpoint.index import ImageRecord
from holdfast.checkpoint.meeting import store_errors
from holdfast.checkpoint.objects import ObjectRecord, decode, encode
from holdfast.checkpoint.pieces import Piece
from holdfast.checkpoint.places import is_place, place
from holdfast.checkpoint.saving import Ranks, write_own
from holdfast.checkpoint.steps import step_of
from holdfast.checkpoint.storage import storage_of
from holdfast.checkpoint.tensors import (
    check_tensor,
    contiguous_on_cpu,
    dtype_name,
    empty_for,
    tensor_bytes,
    torch_dtype,
)
from holdfast.checkpoint.version import GenerationId, Version, new_nonce
from holdfast.errors import CorruptError, MismatchError, StateError, UsageError

_DCP_VERSION: str | None = getattr(filesystem, "CURRENT_DCP_VERSION", None)
"""What DCP's own writer notes in the metadata; earlier versions of torch know none."""
OBJECTS = "dcp.objects"
MAPPINGS = "dcp.mappings"

_RECORD = MetadataIndex("__holdfast_image__")
_process_nonce = new_nonce()
"""Of saves without a process group."""
_saves: Counter[str] = Counter()
"""Saves of this process by path: all ranks set up their writers together, so the counts agree."""


@dataclass(frozen=True)
class _Place:
    """What the coordinator tells each rank, inside of its plan."""

    rank: int
    world_size: int


class HoldfastWriter(StorageWriter):
    """DCP's `StorageWriter` that makes a holdfast checkpoint.

    One checkpoint per directory: saving into an existing one is refused, an interrupted one may be repeated. Saves with
    ``use_collectives=False`` are refused, because nobody would commit.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        """
        Args:
            path: the directory that becomes one checkpoint; ``checkpoint_id`` of `dcp.save` comes before it.
        """
        self.path = None if path is None else place(path)
        self._generation: GenerationId | None = None

    @property
    def checkpoint_id(self) -> str | os.PathLike[str]:
        """Where it writes, as DCP's loggers ask for it."""
        return self._directory

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """See `StorageWriter.reset`."""
        if checkpoint_id is not None:
            self.path = place(checkpoint_id)

    # Any: DCP's own signature.
    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """See `StorageWriter.set_up_storage_writer`.

        Raises:
            UsageError: there is no path, or the save is one without collectives.
        """
        if not kwargs.get("use_collectives", True):
            raise UsageError("a HoldfastWriter needs use_collectives=True: one rank commits what all wrote")
        place = str(self._directory)
        _saves[place] += 1
        # Not from the coordinator: with DCP's plan caching, what it puts into plans does not reach ranks whose plan has
        # not changed.
        self._generation = GenerationId(incarnation=1, nonce=_attempt(), generation=_saves[place])

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """See `StorageWriter.prepare_local_plan`.

        Raises:
            StorageError: the path holds a checkpoint.
        """
        refuse_committed(storage_of(self._directory), self._directory)
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """See `StorageWriter.prepare_global_plan`."""
        return [replace(plan, storage_data=_Place(rank, len(plans))) for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """See `StorageWriter.write_data`.

        Raises:
            StateError: an item cannot be stored; names its key.
            StorageError: the image cannot be written.
        """
        place = plan.storage_data
        assert isinstance(place, _Place)
        tensors, objects = _sorted_out(plan.items)
        held = {piece: item for item in tensors for piece in [_piece(item)] if _is_stored(piece)}
        record = write_own(
            self._directory,
            Ranks(place.rank, place.world_size, None),
            self._version,
            tuple(held),
            lambda piece: _resolved(planner, held[piece], piece),
            {
                OBJECTS: ObjectRecord(encode({i.index.fqn: _object(planner, i) for i in objects}), per_rank=True),
                MAPPINGS: ObjectRecord(encode(_mappings(plan)), per_rank=True),
            },
        )
        results = [
            WriteResult(index=item.index, size_in_bytes=item.tensor_storage_size() or 0, storage_data=None)
            for item in plan.items
        ]
        results.append(WriteResult(index=_RECORD, size_in_bytes=record.size_bytes, storage_data=record.encode()))
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """See `StorageWriter.finish`: writes index and root.

        Raises:
            MismatchError: what the ranks wrote is not the whole state.
            StorageError: it cannot be committed.
        """
        records = [
            ImageRecord.decode(result.storage_data) for of_rank in results for result in of_rank if _is_record(result)
        ]
        commit_step(self._directory, records, version=self._version, world_size=len(results))

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether it is a path of a file system, or a URL of an object store."""
        return is_place(checkpoint_id)

    @property
    def _directory(self) -> Path:
        if self.path is None:
            raise UsageError("where to save: give HoldfastWriter a path, or dcp.save a checkpoint_id")
        return self.path

    @property
    def _version(self) -> Version:
        assert self._generation is not None, "DCP sets a writer up before it writes"
        return self._generation.at(step_of(self._directory))


class HoldfastReader(StorageReader):
    """DCP's `StorageReader` for holdfast checkpoints, whoever wrote them: `HoldfastWriter`, `save` or a Session.

    Of state that each rank has of its own (a Session's buffers that differ), rank 0's is given.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None, *, cast: bool = False) -> None:
        """
        Args:
            path: the checkpoint; ``checkpoint_id`` of `dcp.load` comes before it.
            cast: convert tensors to the dtype that the state has; else another dtype is an error.
        """
        self.path = None if path is None else place(path)
        self.cast = cast
        self._catalog: Catalog | None = None
        self._objects: dict[str, Any] = {}  # Any: whatever was saved

    @property
    def checkpoint_id(self) -> str | os.PathLike[str] | None:
        """What it reads, as DCP's loggers ask for it."""
        return self.path

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """See `StorageReader.reset`."""
        if checkpoint_id is not None:
            self.path = place(checkpoint_id)
        self._close()

    # Any: DCP's own signature.
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """See `StorageReader.read_metadata`: the index as DCP's metadata; images are not read, but their objects are.

        Raises:
            StorageError: there is no checkpoint.
            CorruptError: root, index or objects are damaged.
        """
        catalog = self._open()
        self._objects, mappings = dcp_objects(catalog)
        state: dict[str, Any] = {name: _tensor_metadata(catalog, name) for name in catalog.tensors}
        state.update({name: BytesStorageMetadata() for name in self._objects})
        planner_data = {name: mappings.get(name, (name,)) for name in state}
        metadata = Metadata(state_dict_metadata=state, planner_data=planner_data)
        if _DCP_VERSION is not None:
            metadata.version = _DCP_VERSION
        return metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """See `StorageReader.set_up_storage_reader`."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """See `StorageReader.prepare_local_plan`."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """See `StorageReader.prepare_global_plan`."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """See `StorageReader.read_data`.

        Raises:
            MismatchError: a tensor has another dtype and `cast` was not given, or a region is not saved.
            CorruptError: something does not match its checksum.
        """
        catalog = self._open()
        # In the order in which the images hold them, so that a block is read once.
        for item in sorted(plan.items, key=lambda item: item.storage_index.fqn):
            if item.type is LoadItemType.BYTE_IO:
                planner.load_bytes(item, self._as_torch_file(item.storage_index.fqn))
            else:
                self._read_tensor(catalog, item, planner)
        self._close()
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether it is a path of a file system, or a URL of an object store."""
        return is_place(checkpoint_id)

    def _open(self) -> Catalog:
        if self.path is None:
            raise UsageError("what to load: give HoldfastReader a path, or dcp.load a checkpoint_id")
        if self._catalog is None:
            self._catalog = open_checkpoint(self.path)
        return self._catalog

    def _close(self) -> None:
        if self._catalog is not None:
            self._catalog.close()
            self._catalog = None

    def _as_torch_file(self, name: str) -> io.BytesIO:
        """An object the way DCP's planners take it. It is made here from checked data: no pickle was stored."""
        if name not in self._objects:
            raise MismatchError(f"no object {name!r} is saved")
        file = io.BytesIO()
        torch.save(self._objects[name], file)
        file.seek(0)
        return file

    def _read_tensor(self, catalog: Catalog, item: ReadItem, planner: LoadPlanner) -> None:
        name = item.storage_index.fqn
        record = catalog.tensors[name]
        target = planner.resolve_tensor(item).detach()
        base = item.storage_index.offset or (0,) * len(record.shape)
        offsets = tuple(int(o + s) for o, s in zip(base, item.storage_offsets, strict=True))
        box = Box(offsets, tuple(int(n) for n in item.lengths))
        if target.numel() != box.volume:
            raise MismatchError(f"{name}{box} has {box.volume} elements, the state wants {tuple(target.shape)}")
        self._check_dtype(name, record, target)
        direct = dtype_name(target.dtype) == record.dtype and target.device.type == "cpu" and target.is_contiguous()
        read = target if direct else empty_for(record.dtype, box.lengths)
        catalog.read(name, box, tensor_bytes(read))
        if not direct:
            target.copy_(read.view(target.shape))
        planner.commit_tensor(item, target)

    def _check_dtype(self, name: str, record: TensorRecord, target: torch.Tensor) -> None:
        wanted = dtype_name(target.dtype)
        if wanted != record.dtype and not self.cast:
            raise MismatchError(
                f"{name} is saved as {record.dtype}, the state has {wanted}: "
                f"HoldfastReader(path, cast=True) converts explicitly"
            )


def dcp_objects(catalog: Catalog) -> tuple[dict[str, Any], dict[str, tuple[str | int, ...]]]:
    """The objects of a checkpoint that `HoldfastWriter` made, and where everything stands in the nested state.

    Both are empty where another made it. Any: whatever was saved.

    Raises:
        CorruptError, StorageError: they cannot be read.
    """
    objects: dict[str, Any] = {}
    mappings: dict[str, tuple[str | int, ...]] = {}
    for rank in range(catalog.world_size):
        records = catalog.objects(rank)
        if OBJECTS not in records or MAPPINGS not in records:
            break
        objects.update(decode(records[OBJECTS]))
        mappings.update(decode(records[MAPPINGS]))
    return objects, mappings


def _attempt() -> str:
    """A nonce that all ranks share and no other start of the job has: whoever comes first puts it into the default
    group's store. What an earlier start still writes, it writes under other names."""
    if not (dist.is_available() and dist.is_initialized()):
        return _process_nonce
    store = dist.distributed_c10d._get_default_store()
    with store_errors():
        return bytes(store.compare_set("holdfast/dcp/attempt", "", new_nonce())).decode()


def _is_record(result: WriteResult) -> bool:
    return bool(result.index.fqn == _RECORD.fqn)


def _sorted_out(items: Iterable[WriteItem]) -> tuple[list[WriteItem], list[WriteItem]]:
    """(tensors, objects)."""
    tensors: list[WriteItem] = []
    objects: list[WriteItem] = []
    for item in items:
        (objects if item.type is WriteItemType.BYTE_IO else tensors).append(item)
    return tensors, objects


def _piece(item: WriteItem) -> Piece:
    data = item.tensor_data
    if data is None:
        raise StateError(f"DCP's plan says nothing of the tensor {item.index.fqn}")
    box = Box(tuple(map(int, data.chunk.offsets)), tuple(map(int, data.chunk.sizes)))
    return Piece(item.index.fqn, dtype_name(data.properties.dtype), tuple(map(int, data.size)), box)


def _is_stored(piece: Piece) -> bool:
    """Empty parts hold nothing, but a tensor without elements must be saved by the rank that has its whole box."""
    return not piece.box.is_empty or piece.is_whole


def _resolved(planner: SavePlanner, item: WriteItem, piece: Piece) -> memoryview:
    tensor = planner.resolve_data(item)
    assert isinstance(tensor, torch.Tensor)
    check_tensor(item.index.fqn, tensor)
    if tensor.numel() != piece.box.volume or dtype_name(tensor.dtype) != piece.dtype:
        raise StateError(f"{piece.key} is {tensor.dtype}{list(tensor.shape)} now, which is not what was planned")
    return tensor_bytes(contiguous_on_cpu(tensor))


# Any: whatever stands in the state.
def _object(planner: SavePlanner, item: WriteItem) -> Any:
    if isinstance(planner, DefaultSavePlanner) and type(planner).resolve_data is DefaultSavePlanner.resolve_data:
        return planner.lookup_object(item.index)
    data = planner.resolve_data(item)
    assert isinstance(data, io.BytesIO)
    data.seek(0)
    try:
        return torch.load(data, weights_only=True)
    except Exception as error:  # torch.load documents none: whatever it was, it is not plain data
        raise StateError(f"{item.index.fqn} is no plain data, which is all that is stored: {error}") from error


def _mappings(plan: SavePlan) -> dict[str, tuple[str | int, ...]]:
    known = plan.planner_data if isinstance(plan.planner_data, dict) else {}
    return {item.index.fqn: tuple(known[item.index.fqn]) for item in plan.items if item.index.fqn in known}


def _tensor_metadata(catalog: Catalog, name: str) -> TensorStorageMetadata:
    record = catalog.tensors[name]
    # Of a tensor, for newer releases of torch keep strides there, too.
    example = torch.empty(record.shape, dtype=torch_dtype(record.dtype), device="meta")
    return TensorStorageMetadata(
        properties=TensorProperties.create_from_tensor(example),
        size=torch.Size(record.shape),
        chunks=list(_chunks(catalog, name, record)),
    )


def _chunks(catalog: Catalog, name: str, record: TensorRecord) -> Iterator[ChunkStorageMetadata]:
    boxes = dict.fromkeys(catalog.boxes(name)) or {whole(record.shape): None}
    if sum(box.volume for box in boxes) != whole(record.shape).volume:
        raise CorruptError(f"the parts of {name} do not add up to its shape {list(record.shape)}")
    for box in boxes:
        yield ChunkStorageMetadata(offsets=torch.Size(box.offsets), sizes=torch.Size(box.lengths))
