"""Our own checkpoints as the tools see them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import xxhash

from holdfast.checkpoint.boxes import Box, whole
from holdfast.checkpoint.catalog import Catalog
from holdfast.checkpoint.commit import open_checkpoint, read_step_info
from holdfast.checkpoint.objects import ObjectRecord, TensorRef, decode
from holdfast.checkpoint.pieces import Piece
from holdfast.checkpoint.root import ROOT_NAME
from holdfast.checkpoint.steps import MAX_SMALL_BYTES
from holdfast.checkpoint.storage import storage_of
from holdfast.checkpoint.tools.states import SavedState, SavedTensor, open_state
from holdfast.errors import UsageError

TREE = "state"
"""Object of `holdfast.checkpoint.save`: the nested state."""
DCP_OBJECTS = "dcp.objects"
DCP_MAPPINGS = "dcp.mappings"
ALIASES = "aliases"
"""Object of a Session: further names of tied tensors."""


class NativeState:
    """A step directory."""

    format = "holdfast"

    def __init__(self, path: Path) -> None:
        """
        Raises:
            CheckpointError: it cannot be opened.
        """
        self.path = path
        self.info = read_step_info(path)
        self.step = self.info.step
        self.catalog: Catalog = open_checkpoint(path)
        self.fingerprint = xxhash.xxh3_128_hexdigest(storage_of(path).read(path / ROOT_NAME, limit=MAX_SMALL_BYTES))
        saved = self.catalog.saved
        self.tensors = tuple(SavedTensor(entry.name, entry.rank, entry.dtype, entry.shape) for entry in saved)
        self._placements = {(entry.name, entry.rank): entry.placement for entry in saved}

    def read(self, tensor: SavedTensor, box: Box, out: memoryview) -> None:
        """See `SavedState.read`."""
        self.catalog.read(tensor.name, box, out, rank=tensor.rank)

    def objects(self) -> list[dict[str, ObjectRecord]]:
        """Of each rank that saved, encoded."""
        return [self.catalog.object_records(rank) for rank in range(self.catalog.world_size)]

    def pieces(self) -> list[list[Piece]]:
        """What the image of each rank holds, each region once."""
        by_rank: list[list[Piece]] = [[] for _ in range(self.catalog.world_size)]
        for entry in self.catalog.saved:
            box = whole(entry.shape)
            if box.is_empty:
                by_rank[entry.rank or 0].append(Piece(entry.name, entry.dtype, entry.shape, box, entry.rank))
            for tile, number in entry.placement.overlapping(box):
                piece = Piece(entry.name, entry.dtype, entry.shape, tile, entry.rank)
                by_rank[self.catalog.ranks[number]].append(piece)
        return by_rank

    def writers(self, tensor: SavedTensor) -> list[int]:
        """The ranks whose images hold something of a tensor."""
        placement = self._placements[tensor.name, tensor.rank]
        return sorted({self.catalog.ranks[number] for _, number in placement.overlapping(whole(tensor.shape))})

    def nested(self) -> Any:
        """See `SavedState.nested`. Of state that each rank has of its own, rank 0's."""
        records = self.catalog.objects(0)
        if TREE in records:
            return decode(records[TREE])
        if DCP_MAPPINGS in records:
            return self._dcp()
        return self._session(records)

    def _dcp(self) -> Any:
        values: dict[str, Any] = {tensor.name: TensorRef(tensor.name) for tensor in self.tensors}
        paths: dict[str, tuple[str | int, ...]] = {}
        for records in self.objects():
            values.update(decode(records[DCP_OBJECTS].data))
            paths.update(decode(records[DCP_MAPPINGS].data))
        return unflatten(values, paths)

    def _session(self, records: dict[str, bytes]) -> Any:
        """``{"model": {names: tensors, further names of tied ones too}, …}``; the rest by its full names."""
        aliases: dict[str, str] = decode(records[ALIASES]) if ALIASES in records else {}
        names = {tensor.name: tensor.name for tensor in self.tensors} | aliases
        model = {n.removeprefix("model."): TensorRef(t) for n, t in sorted(names.items()) if n.startswith("model.")}
        rest = {n: TensorRef(t) for n, t in sorted(names.items()) if not n.startswith("model.")}
        objects = {name: decode(data) for name, data in records.items() if name != ALIASES}
        return {"model": model, **rest, **objects}

    def close(self) -> None:
        """See `SavedState.close`."""
        self.catalog.close()


def open_native(path: str | Path) -> NativeState:
    """Open one of our own checkpoints.

    Raises:
        UsageError: it is something else.
        CheckpointError: it cannot be read.
    """
    state: SavedState = open_state(path)
    if not isinstance(state, NativeState):
        state.close()
        raise UsageError(f"{path} is a {state.format} checkpoint: bring it into our form with `holdfast ckpt import`")
    return state


def open_several(path: str | Path, number: int) -> list[NativeState]:
    """The same checkpoint several times, for as many threads: a state is for one thread at a time.

    Raises:
        UsageError: it is something else.
        CheckpointError: it cannot be read.
    """
    return [open_native(path) for _ in range(number)]


class _Node(msgspec.Struct):
    items: dict[str | int, Any]


def unflatten(values: dict[str, Any], paths: dict[str, tuple[str | int, ...]]) -> Any:
    """Nest flat values: whole-number keys make lists, as in DCP's mappings. Any: whatever was saved."""
    root = _Node({})
    for name, value in values.items():
        node, path = root, paths.get(name) or (name,)
        for key in path[:-1]:
            child = node.items.setdefault(key, _Node({}))
            if not isinstance(child, _Node):
                break
            node = child
        node.items[path[-1]] = value
    return _plain(root)


def _plain(value: Any) -> Any:
    if not isinstance(value, _Node):
        return value
    keys = list(value.items)
    numbers = sorted(key for key in keys if type(key) is int)
    if keys and numbers == list(range(len(keys))):
        return [_plain(value.items[i]) for i in numbers]
    return {key: _plain(item) for key, item in value.items.items()}
