"""`holdfast.checkpoint.save`, `async_save` and `load`: a state to a directory and back, without a Session.

The state is a nested mapping. Tensors and DTensors in it are saved as pieces: DTensors once per byte in the job, plain
tensors once per rank-0 copy (they are taken to be equal on all ranks). Everything else goes through `objects`. Objects
with ``state_dict`` and ``load_state_dict`` are asked for and given theirs.
"""

from __future__ import annotations

import logging
import secrets
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from holdfast.checkpoint.boxes import Box
from holdfast.checkpoint.catalog import Catalog
from holdfast.checkpoint.commit import open_checkpoint
from holdfast.checkpoint.objects import ObjectRecord, decode, encode, join_tensors, split_tensors
from holdfast.checkpoint.ownership import Shard, own
from holdfast.checkpoint.pieces import Piece
from holdfast.checkpoint.places import place
from holdfast.checkpoint.saving import Ranks, agree, refuse_save, save_pieces
from holdfast.checkpoint.steps import StepInfo, step_of
from holdfast.checkpoint.tensors import (
    contiguous_on_cpu,
    dtype_name,
    empty_for,
    layout_shard,
    plain_shard,
    tensor_bytes,
)
from holdfast.checkpoint.version import GenerationId
from holdfast.errors import MismatchError

logger = logging.getLogger(__name__)

TREE = "state"
"""The object that holds the state, with `TensorRef` in the place of tensors."""
_calls: Counter[tuple[str, int]] = Counter()
"""Saves of this process by (path, world size): ranks that save together agree on the count. Main thread only."""


def save(
    state: Mapping[str, Any],
    path: str | Path,
    *,
    process_group: Any = None,
    timeout: timedelta = timedelta(minutes=30),
) -> StepInfo:
    """Save a state into the new directory `path`. Every rank of the group calls it.

    Args:
        state: nested; see the head of this module. Any: that is the point.
        path: becomes one checkpoint; saving to an existing one is an error.
        process_group: whose ranks save (None: the default group, or this process alone).
        timeout: how long to wait for the slowest rank.

    Raises:
        StateError: something in the state cannot be stored; names its key.
        StorageError: a rank could not write, or `path` holds a checkpoint.
        PeerTimeout: a rank did not come; named.
    """
    attempt = _Attempt.begin(path, process_group, timeout)
    return attempt.run(attempt.prepare(state, process_group))


def async_save(
    state: Mapping[str, Any],
    path: str | Path,
    *,
    process_group: Any = None,
    timeout: timedelta = timedelta(minutes=30),
) -> SaveHandle:
    """Save a state while training goes on. Every rank of the group calls it, from its main thread.

    What this rank writes is copied before the call returns: the state may change right after. A thread of its own
    writes; it uses the group's store, no collective. The interpreter does not exit before it has ended.

    Args:
        state: as `save` takes it.
        path: as `save` takes it.
        process_group: as `save` takes it.
        timeout: as `save` takes it.

    Returns:
        A handle. Whatever any rank met, a state that cannot be stored included, is the error of every rank's handle.

    Raises:
        UsageError: this rank is not in the group.
    """
    attempt = _Attempt.begin(path, process_group, timeout)
    prepared = attempt.prepare(state, process_group, copy=True)
    return SaveHandle(attempt.path, lambda: attempt.run(prepared))


class SaveHandle:
    """A save under way. Any thread may ask it."""

    def __init__(self, path: Path, run: Callable[[], StepInfo]) -> None:
        """Starts the thread that runs `run`; called by `async_save` only."""
        self.path = path
        self._future: Future[StepInfo] = Future()
        self._thread = threading.Thread(target=self._write, args=(run,), name=f"holdfast-save-{path.name}")
        self._thread.start()

    def _write(self, run: Callable[[], StepInfo]) -> None:
        try:
            info = run()
        except BaseException as error:  # noqa: BLE001  # a thread's border: whoever asks the handle learns of it, and the log
            logger.error("%s was not saved: %s", self.path, error)
            self._future.set_exception(error)
        else:
            self._future.set_result(info)

    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return self._future.done()

    def result(self, timeout: timedelta | None = None) -> StepInfo:
        """Wait for the end.

        Args:
            timeout: how long; None: as long as the save itself may take.

        Raises:
            TimeoutError: it has not ended yet; it goes on.
            HoldfastError: what any rank met; the checkpoint does not exist.
        """
        return self._future.result(None if timeout is None else timeout.total_seconds())

    def error(self) -> BaseException | None:
        """What any rank met; None where it ended well or has not ended."""
        return self._future.exception() if self._future.done() else None


@dataclass(frozen=True)
class _Prepared:
    """What one rank writes; its tensors hold the values to be written."""

    pieces: tuple[Piece, ...]
    data: Callable[[Piece], memoryview]
    tree: bytes


@dataclass(frozen=True)
class _Attempt:
    """One call of `save` or `async_save`, which other ranks make too."""

    path: Path
    ranks: Ranks
    number: int
    timeout: timedelta

    @classmethod
    def begin(cls, path: str | Path, process_group: Any, timeout: timedelta) -> _Attempt:
        ranks = Ranks.of(process_group)
        _calls[str(path), ranks.world_size] += 1
        return cls(place(path), ranks, _calls[str(path), ranks.world_size], timeout)

    def prepare(self, state: Mapping[str, Any], process_group: Any, *, copy: bool = False) -> _Prepared | Exception:
        """An error is returned, not raised: `run` tells the other ranks first, which would wait for this one."""
        try:
            return _prepare(state, self.ranks, process_group, copy)
        except Exception as error:  # noqa: BLE001  # raised by `run`, on every rank
            return error

    def run(self, prepared: _Prepared | Exception) -> StepInfo:
        """Meet the other ranks, write and commit."""
        nonce = agree(self.ranks, f"{self.path}/{self.number}", lambda: secrets.token_hex(4), self.timeout)
        version = GenerationId(incarnation=1, nonce=nonce, generation=self.number).at(step_of(self.path))
        if isinstance(prepared, Exception):
            refuse_save(self.path, prepared, ranks=self.ranks, version=version, attempt=self.number)
            raise prepared
        return save_pieces(
            self.path,
            ranks=self.ranks,
            version=version,
            pieces=prepared.pieces,
            data=prepared.data,
            objects={TREE: ObjectRecord(prepared.tree)},
            attempt=self.number,
            timeout=self.timeout,
        )


class _Bytes:
    """The bytes of pieces of the caller's tensors; views are kept, because a save asks twice, copies are not."""

    def __init__(self, held: Mapping[str, _Held]) -> None:
        self._held = held
        self._views: dict[Piece, memoryview] = {}

    def __call__(self, piece: Piece) -> memoryview:
        known = self._views.get(piece)
        if known is not None:
            return known
        view = self._held[piece.name].view(piece.box)
        part = contiguous_on_cpu(view)
        data = tensor_bytes(part)
        if part.data_ptr() == view.data_ptr() and part.device == view.device:
            self._views[piece] = data
        return data


def _prepare(state: Mapping[str, Any], ranks: Ranks, process_group: Any, copy: bool) -> _Prepared:
    tree, tensors = split_tensors("", _state_of(state))
    local, shards = _local(tensors, ranks, process_group)
    pieces = tuple(piece for piece in own(shards, global_rank=ranks.rank, node_of=lambda rank: rank) if piece.job)
    held = {shard.name: part for shard, part in zip(shards, local, strict=True)}
    encoded = encode(tree)
    if not copy:
        return _Prepared(pieces, _Bytes(held), encoded)
    copies = {piece: held[piece.name].copy(piece.box) for piece in pieces}
    return _Prepared(pieces, lambda piece: tensor_bytes(copies[piece]), encoded)


def load(state: Mapping[str, Any], path: str | Path, *, process_group: Any = None) -> dict[str, Any]:
    """Load a checkpoint into `state`: tensors and DTensors in place, whatever parallelism saved them.

    Args:
        state: nested, with the same keys as the saved one; its tensors are filled in place.
        path: the checkpoint.
        process_group: whose ranks load.

    Returns:
        A state like the saved one, which holds the tensors of `state` and the saved other values. Objects with
        ``load_state_dict`` have been given theirs and stand in it themselves.

    Raises:
        MismatchError: tensors are missing or unexpected, or have other shapes or dtypes; lists them. Nothing was
            loaded.
        CorruptError, StorageError: the checkpoint cannot be read; tensors of `state` may have been filled.
    """
    ranks = Ranks.of(process_group)
    tree, tensors = split_tensors("", _state_of(state))
    del tree
    local, shards = _local(tensors, ranks, process_group)
    with open_checkpoint(path) as catalog:
        _check_same(catalog, tensors)
        saved = _saved_tree(catalog, path, ranks.rank)
        for shard, part in zip(shards, local, strict=True):
            for box in shard.boxes:
                _read_into(catalog, part.view(box), shard, box)
    loaded = join_tensors(saved, lambda name: tensors[name])
    return {key: _give(value, loaded[key]) if key in loaded else value for key, value in state.items()}


def _state_of(state: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: dict(value.state_dict()) if hasattr(value, "state_dict") and hasattr(value, "load_state_dict") else value
        for key, value in state.items()
    }


def _give(value: Any, loaded: Any) -> Any:
    if hasattr(value, "state_dict") and hasattr(value, "load_state_dict"):
        value.load_state_dict(loaded)
        return value
    return loaded


@dataclass(frozen=True, slots=True)
class _Held:
    """The local part of a tensor, and the boxes of the global one that lie in it."""

    tensor: torch.Tensor
    boxes: tuple[Box, ...]
    origins: tuple[tuple[int, ...], ...]
    """For each box, the indices in `tensor` at which it begins."""

    def view(self, box: Box) -> torch.Tensor:
        """The elements of a region of the global tensor."""
        if box.lengths == self.tensor.shape:
            return self.tensor
        view = self.tensor
        for outer, origin in zip(self.boxes, self.origins, strict=True):
            if outer.contains(box) and not box.is_empty:
                for dim, (start, first, place) in enumerate(zip(box.offsets, outer.offsets, origin, strict=True)):
                    view = view.narrow(dim, start - first + place, box.lengths[dim])
                return view
        raise AssertionError(f"{box} does not lie in {self.boxes}")

    def copy(self, box: Box) -> torch.Tensor:
        """The elements of a region in memory of their own."""
        view = self.view(box)
        part = contiguous_on_cpu(view)
        # Bytes compare what matters: `part` may be a view of the caller's storage or already a copy of it.
        shared = part.untyped_storage().data_ptr() == view.untyped_storage().data_ptr()
        return part.clone(memory_format=torch.contiguous_format) if shared else part


def _local(tensors: Mapping[str, torch.Tensor], ranks: Ranks, process_group: Any) -> tuple[list[_Held], list[Shard]]:
    """The local parts of all tensors, and what of the global ones they are; in the same order."""
    # Importing it takes seconds; where it was not imported there is no DTensor.
    module = sys.modules.get("torch.distributed.tensor")
    everyone = tuple(range(ranks.world_size))
    local: list[_Held] = []
    shards: list[Shard] = []
    for name, tensor in tensors.items():
        if module is not None and isinstance(tensor, module.DTensor):
            from holdfast.checkpoint.layout import dtensor_layout, local_part

            layout = dtensor_layout(name, tensor)
            local.append(_Held(local_part(tensor).detach(), layout.boxes, layout.origins))
            shards.append(_in_group(layout_shard(name, tensor, layout), ranks, process_group))
        else:
            shard = plain_shard(name, tensor, holders=everyone)
            local.append(_Held(tensor.detach(), shard.boxes, ((0,) * tensor.dim(),)))
            shards.append(shard)
    return local, shards


def _in_group(shard: Shard, ranks: Ranks, process_group: Any) -> Shard:
    """A DTensor's shard with holders counted in the process group."""
    if process_group is None:
        return shard
    import torch.distributed as dist

    holders = tuple(sorted(dist.get_group_rank(process_group, rank) for rank in shard.holders))
    return Shard(shard.name, shard.dtype, shard.shape, shard.boxes, holders, shard.rank)


def _read_into(catalog: Catalog, local: torch.Tensor, shard: Shard, box: Box) -> None:
    if box.is_empty:
        return
    if local.device.type == "cpu" and local.is_contiguous():
        catalog.read(shard.name, box, tensor_bytes(local))
        return
    staging = empty_for(shard.dtype, box.lengths)
    catalog.read(shard.name, box, tensor_bytes(staging))
    with torch.no_grad():
        local.copy_(staging)


def _saved_tree(catalog: Catalog, path: str | Path, rank: int) -> Any:
    data = catalog.objects(rank).get(TREE)
    if data is None:
        raise MismatchError(
            f"{path} was not written by holdfast.checkpoint.save: load it with the Session or the HoldfastReader that "
            f"its writer belongs to, or bring it into this form with `holdfast ckpt export` and `import`"
        )
    return decode(data)


def _check_same(catalog: Catalog, tensors: Mapping[str, torch.Tensor]) -> None:
    problems = list(_differences(catalog, tensors))
    if problems:
        more = f" and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise MismatchError(f"the checkpoint is of another state: {'; '.join(problems[:10])}{more}")


def _differences(catalog: Catalog, tensors: Mapping[str, torch.Tensor]) -> Iterator[str]:
    for name in sorted(tensors.keys() - catalog.tensors.keys()):
        yield f"{name} is not saved"
    for name in sorted(catalog.tensors.keys() - tensors.keys()):
        yield f"{name} is saved but not in the state"
    for name in sorted(tensors.keys() & catalog.tensors.keys()):
        saved, tensor = catalog.tensors[name], tensors[name]
        if (saved.dtype, saved.shape) != (dtype_name(tensor.dtype), tuple(tensor.shape)):
            yield (
                f"{name} is saved as {saved.dtype}{list(saved.shape)}, "
                f"in the state it is {dtype_name(tensor.dtype)}{list(tensor.shape)}"
            )
