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
from contextlib import contextmanager
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
        store = dist.distributed_c10d._get_process_group_store(
            process_group or dist.distributed_c10d._get_default_group()
        )
        return cls(rank, world_size, store)


def agree(ranks: Ranks, name: str, make: Callable[[], str], timeout: timedelta) -> str:
    """A short text of rank 0's that all ranks get.

    Args:
        ranks: who agree.
        name: of the text; a new one each time.
        make: called on rank 0.
        timeout: how long other ranks wait for it.

    Raises:
        PeerTimeout: rank 0 did not come.
        PeerError: the store does not answer.
    """
    if ranks.world_size == 1:
        return make()
    key = f"holdfast/agree/{name}"
    if ranks.rank == 0:
        text = make()
        with _store_errors():
            ranks.store.set(key, text.encode())
        return text
    for _ in _polls(timeout):
        with _store_errors():
            if ranks.store.check([key]):
                return str(ranks.store.get(key).decode())
    raise PeerTimeout(f"rank 0 did not come to {name} within {timeout}")


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
    meeting = _Meeting(ranks, directory, version, attempt) if ranks.world_size > 1 else None
    try:
        record = write_own(directory, ranks, version, pieces, data, objects, storage)
        if meeting is None:
            records = [record]
        elif ranks.rank == 0:
            records = [record, *meeting.records(timeout)]
        else:
            meeting.say(_Part(record=record.encode()))
            # Rank 0 may learn of a missing rank only at its own limit.
            meeting.wait_end(timeout + max(timedelta(seconds=30), timeout / 10))
            return read_step_info(directory, storage=storage)
        info = commit_step(
            directory,
            records,
            version=version,
            world_size=ranks.world_size,
            metrics=metrics,
            tag=tag,
            history=history,
            storage=storage,
        )
    except Exception as error:  # the other ranks learn of it here, ours by the raise
        if meeting is not None:
            meeting.fail(error)
        raise
    if meeting is not None:
        meeting.end()
    return info


def refuse_save(directory: str | Path, error: Exception, *, ranks: Ranks, version: Version, attempt: int) -> None:
    """Take part in a save in which this rank cannot: the others, in `save_pieces` with the same values, fail at once.

    Called instead of `save_pieces`, by a rank whose state cannot be stored.
    """
    if ranks.world_size > 1:
        _Meeting(ranks, Path(directory), version, attempt).fail(error)


def write_own(
    directory: Path,
    ranks: Ranks,
    version: Version,
    pieces: Sequence[Piece],
    data: Callable[[Piece], memoryview],
    objects: Mapping[str, ObjectRecord],
    storage: Storage | None = None,
) -> ImageRecord:
    """Write this rank's image of a step, without meeting anyone; arguments as `save_pieces` takes them.

    Raises:
        StorageError: it cannot be written, or the step is committed already.
    """
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
        """Other ranks: tell what this one did."""
        self._set(f"part/{self._ranks.rank}", part)

    def fail(self, error: Exception) -> None:
        """Tell that this rank failed; a store that does not answer any more is not waited for."""
        part = _Part(error=str(error) or repr(error), kind=type(error).__name__)
        try:
            self._set("end" if self._ranks.rank == 0 else f"part/{self._ranks.rank}", part)
        except PeerError as silent:
            logger.warning("%s: the other ranks could not be told that the save failed: %s", self._directory, silent)

    def end(self) -> None:
        """Rank 0: tell that the checkpoint is there."""
        self._set("end", _Part())

    def records(self, timeout: timedelta) -> list[ImageRecord]:
        """Rank 0: what each other rank wrote, as soon as all have said it or one has said that it failed.

        Raises:
            PeerTimeout: ranks that did not say.
            HoldfastError: what a rank met.
        """
        records: dict[int, ImageRecord] = {}
        missing = list(range(1, self._ranks.world_size))
        for _ in _polls(timeout):
            for rank in [rank for rank in missing if self._is_there(f"part/{rank}")]:
                part = self._get(f"part/{rank}")
                _raise(part, rank)
                records[rank] = ImageRecord.decode(part.record)
            missing = [rank for rank in missing if rank not in records]
            if not missing:
                return [records[rank] for rank in sorted(records)]
        raise PeerTimeout(
            f"{self._directory}: rank {', '.join(map(str, missing[:10]))} did not finish its part of the save within "
            f"{timeout}; the checkpoint was not made, older ones are as they were"
        )

    def wait_end(self, timeout: timedelta) -> None:
        """Other ranks: wait for rank 0.

        Raises:
            PeerTimeout: it did not say how it ended.
            HoldfastError: how it ended.
        """
        for _ in _polls(timeout):
            if self._is_there("end"):
                _raise(self._get("end"), 0)
                return
        raise PeerTimeout(f"{self._directory}: rank 0 did not finish the save within {timeout}")

    @property
    def _store(self) -> Any:  # see Ranks.store
        return self._ranks.store

    def _set(self, name: str, part: _Part) -> None:
        with _store_errors():
            self._store.set(f"{self._prefix}/{name}", msgspec.msgpack.encode(part))

    def _is_there(self, name: str) -> bool:
        with _store_errors():
            return bool(self._store.check([f"{self._prefix}/{name}"]))

    def _get(self, name: str) -> _Part:
        with _store_errors():
            data = self._store.get(f"{self._prefix}/{name}")
        try:
            return msgspec.msgpack.decode(data, type=_Part)
        except msgspec.MsgspecError as error:
            raise PeerError(f"what another rank left under {name} does not parse: {error}") from error


@contextmanager
def _store_errors() -> Iterator[None]:
    """The store's own errors (it lives in one of the ranks or in the launcher) as ours."""
    try:
        yield
    except RuntimeError as error:
        raise PeerError(f"the store of the process group does not answer: {error}") from error


def _polls(timeout: timedelta) -> Iterator[None]:
    """Once at the start, then every few milliseconds, later every 0.1 s, and once more at the end.

    Polling, because a store's own wait holds its connection, and writes a warning for each time-out.
    """
    deadline = time.monotonic() + timeout.total_seconds()
    pause = 0.002
    while time.monotonic() < deadline:
        yield
        time.sleep(max(0.0, min(pause, deadline - time.monotonic())))
        pause = min(pause * 1.5, 0.1)
    yield
