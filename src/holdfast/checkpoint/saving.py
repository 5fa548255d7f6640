"""Saves by all ranks of a process group, inside the training processes and without any collective call.

Ranks meet in the group's store (set, get, wait), under names that carry the directory and the attempt:

- every rank writes its image, then sets ``part/<rank>`` to its record, or to the error that it met;
- rank 0 waits for all parts, commits, then sets ``end``; the others wait for ``end``.

Any rank's error fails the save on every rank. A rank that does not come is named. Older checkpoints are never touched.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec
import xxhash

from holdfast.checkpoint.commit import commit_step, read_step_info, write_image
from holdfast.checkpoint.image import ImageLayout, block_checksums
from holdfast.checkpoint.index import ImageRecord, image_file_name
from holdfast.checkpoint.objects import ObjectRecord, encode_objects
from holdfast.checkpoint.pieces import Piece
from holdfast.checkpoint.steps import StepInfo
from holdfast.checkpoint.storage import Storage
from holdfast.checkpoint.version import Version
from holdfast.errors import (
    CheckpointError,
    CorruptError,
    HoldfastError,
    MismatchError,
    PeerError,
    PeerTimeout,
    StateError,
    StorageError,
    UsageError,
)

logger = logging.getLogger(__name__)

_ERRORS: dict[str, type[HoldfastError]] = {
    error.__name__: error
    for error in (
        UsageError,
        StateError,
        CheckpointError,
        CorruptError,
        MismatchError,
        StorageError,
        PeerError,
        PeerTimeout,
    )
}
_SLICE = timedelta(seconds=1)


@dataclass(frozen=True)
class Ranks:
    """The ranks that save together."""

    rank: int
    """This one, in the group: 0 <= rank < world_size. Images are named by it."""
    world_size: int
    store: Any
    """torch.distributed.Store; None where world_size is 1. Any: torch ships no usable type for its stores."""

    @classmethod
    def alone(cls) -> Ranks:
        """One process."""
        return cls(0, 1, None)

    @classmethod
    def of(cls, process_group: Any = None) -> Ranks:
        """Of a process group (None: the default one; alone where torch.distributed is not initialised).

        Raises:
            UsageError: this rank is not in the group.
        """
        import torch.distributed as dist

        if not dist.is_available() or not dist.is_initialized():
            return cls.alone()
        rank = dist.get_rank(process_group)
        if rank < 0:
            raise UsageError("this rank is not in the process group: only its ranks may save")
        world_size = dist.get_world_size(process_group)
        if world_size == 1:
            return cls.alone()
        store = dist.distributed_c10d._get_process_group_store(process_group or dist.group.WORLD)
        return cls(rank, world_size, store)


class _Part(msgspec.Struct, frozen=True):
    """What a rank says: its record or its error."""

    record: bytes = b""
    error: str = ""
    kind: str = ""


def save_pieces(
    directory: str | Path,
    *,
    ranks: Ranks,
    version: Version,
    pieces: Sequence[Piece],
    data: Callable[[Piece], memoryview],
    objects: Mapping[str, ObjectRecord],
    metrics: Mapping[str, float] | None = None,
    tag: str | None = None,
    history: str | None = None,
    attempt: int = 0,
    timeout: timedelta = timedelta(minutes=30),
    storage: Storage | None = None,
) -> StepInfo:
    """Write a step directory. Every rank of `ranks` calls it; all return the same, or all raise.

    Args:
        directory: the step directory.
        ranks: who saves.
        version: of the state, equal on all ranks.
        pieces: of this rank, from `ownership.own`; those with ``job=False`` are left out.
        data: the bytes of a piece in C order, good until the call returns; called twice for each piece. They must not
            change until this function returns.
        objects: of this rank.
        metrics: rank 0's are taken.
        tag: rank 0's is taken.
        history: rank 0's is taken.
        attempt: another number when a save of the same directory is tried again, equal on all ranks.
        timeout: how long rank 0 waits for the slowest rank.
        storage: where to.

    Raises:
        StorageError: a rank could not write, or the step is committed already.
        MismatchError: the ranks' pieces together are not the whole state.
        PeerTimeout: a rank did not come; named.
        PeerError: a rank failed otherwise.
    """
    directory = Path(directory)
    try:
        part = _Part(record=_write_own(directory, ranks, version, pieces, data, objects, storage).encode())
        failure: HoldfastError | None = None
    except HoldfastError as error:
        part, failure = _Part(error=str(error), kind=type(error).__name__), error
    if ranks.world_size == 1:
        if failure is not None:
            raise failure
        return _commit(directory, [part], version, 1, metrics, tag, history, storage)
    meeting = _Meeting(ranks, directory, version, attempt)
    meeting.say(part)
    if ranks.rank == 0:
        try:
            parts = meeting.parts(timeout)
            info = _commit(directory, parts, version, ranks.world_size, metrics, tag, history, storage)
        except HoldfastError as error:
            meeting.end(_Part(error=str(error), kind=type(error).__name__))
            raise
        meeting.end(_Part())
        return info
    # Rank 0 may learn of a missing rank only at its own limit.
    meeting.wait_end(timeout + max(timedelta(seconds=30), timeout / 10))
    return read_step_info(directory, storage=storage)


def _write_own(
    directory: Path,
    ranks: Ranks,
    version: Version,
    pieces: Sequence[Piece],
    data: Callable[[Piece], memoryview],
    objects: Mapping[str, ObjectRecord],
    storage: Storage | None,
) -> ImageRecord:
    blob = encode_objects(objects)
    layout = ImageLayout.plan([piece for piece in pieces if piece.job], objects_capacity=len(blob))
    checksums = block_checksums(_data(layout, data, blob), layout.block_bytes)
    header = layout.header(
        version=version,
        global_rank=ranks.rank,
        world_size=ranks.world_size,
        checksums=checksums,
        objects_bytes=len(blob),
    )
    meta = layout.meta(
        header,
        version=version,
        global_rank=ranks.rank,
        world_size=ranks.world_size,
        checksums=checksums,
        objects_bytes=len(blob),
    )
    name = image_file_name(version.generation, ranks.rank, ranks.world_size)
    return write_image(directory, name, meta, _image(header, layout, data, blob), storage=storage)


def _data(layout: ImageLayout, data: Callable[[Piece], memoryview], blob: bytes) -> Iterator[bytes | memoryview]:
    for piece in layout.pieces:
        view = data(piece)
        assert view.nbytes == piece.size_bytes, (piece, view.nbytes)
        yield view
    yield blob


def _image(
    header: bytes, layout: ImageLayout, data: Callable[[Piece], memoryview], blob: bytes
) -> Iterator[bytes | memoryview]:
    yield header
    yield from _data(layout, data, blob)


def _commit(
    directory: Path,
    parts: Sequence[_Part],
    version: Version,
    world_size: int,
    metrics: Mapping[str, float] | None,
    tag: str | None,
    history: str | None,
    storage: Storage | None,
) -> StepInfo:
    return commit_step(
        directory,
        [ImageRecord.decode(part.record) for part in parts],
        version=version,
        world_size=world_size,
        metrics=metrics,
        tag=tag,
        history=history,
        storage=storage,
    )


def _raise(part: _Part, rank: int) -> None:
    if part.error:
        raise _ERRORS.get(part.kind, PeerError)(f"rank {rank}: {part.error}")


class _Meeting:
    """The names in the store of one attempt to save one directory."""

    def __init__(self, ranks: Ranks, directory: Path, version: Version, attempt: int) -> None:
        self._ranks = ranks
        place = xxhash.xxh3_64_hexdigest(str(directory).encode())
        self._prefix = f"holdfast/save/{place}/{version}/{attempt}"
        self._directory = directory

    def say(self, part: _Part) -> None:
        """Tell what this rank did."""
        self._set(f"part/{self._ranks.rank}", part)

    def end(self, part: _Part) -> None:
        """Rank 0: tell how it ended."""
        self._set("end", part)

    def parts(self, timeout: timedelta) -> list[_Part]:
        """Rank 0: what each rank did, as soon as all have said it or one has said that it failed.

        Raises:
            PeerTimeout: ranks that did not say.
            HoldfastError: what a rank met.
        """
        missing = set(range(self._ranks.world_size))
        parts: dict[int, _Part] = {}
        deadline = time.monotonic() + timeout.total_seconds()
        while missing:
            for rank in sorted(missing):
                if self._store.check([f"{self._prefix}/part/{rank}"]):
                    parts[rank] = self._get(f"part/{rank}")
                    _raise(parts[rank], rank)
            missing -= parts.keys()
            if missing and time.monotonic() > deadline:
                ranks = ", ".join(map(str, sorted(missing)[:10]))
                raise PeerTimeout(
                    f"{self._directory}: rank {ranks} did not finish its part of the save within {timeout}; "
                    f"the checkpoint was not made, older ones are as they were"
                )
            if missing:
                self._wait(f"part/{min(missing)}", _SLICE)
        return [parts[rank] for rank in range(self._ranks.world_size)]

    def wait_end(self, timeout: timedelta) -> None:
        """Other ranks: wait for rank 0.

        Raises:
            PeerTimeout: it did not say how it ended.
            HoldfastError: how it ended.
        """
        deadline = time.monotonic() + timeout.total_seconds()
        while not self._wait("end", _SLICE):
            if time.monotonic() > deadline:
                raise PeerTimeout(f"{self._directory}: rank 0 did not finish the save within {timeout}")
        _raise(self._get("end"), 0)

    @property
    def _store(self) -> Any:  # see Ranks.store
        return self._ranks.store

    def _set(self, name: str, part: _Part) -> None:
        try:
            self._store.set(f"{self._prefix}/{name}", msgspec.msgpack.encode(part))
        except RuntimeError as error:
            raise PeerError(f"the store of the process group is gone: {error}") from error

    def _get(self, name: str) -> _Part:
        try:
            return msgspec.msgpack.decode(self._store.get(f"{self._prefix}/{name}"), type=_Part)
        except (RuntimeError, msgspec.MsgspecError) as error:
            raise PeerError(f"the store of the process group gave no answer of a rank: {error}") from error

    def _wait(self, name: str, limit: timedelta) -> bool:
        """Whether the name is there within `limit`."""
        import torch.distributed as dist

        try:
            self._store.wait([f"{self._prefix}/{name}"], limit)
        except dist.DistStoreError:
            return False
        except RuntimeError as error:
            raise PeerError(f"the store of the process group is gone: {error}") from error
        return True
