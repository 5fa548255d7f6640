"""Saves by all ranks of a process group, inside the training processes and without any collective call.

Ranks meet in the group's store (set, get, wait), under names that carry the directory and the attempt:

- every rank writes its image, then says its record, or the error that it met; records go up a tree to rank 0;
- rank 0 waits for all, commits, and answers; the others wait for its answer.

Any rank's error fails the save on every rank. A rank that does not come is named. Older checkpoints are never touched.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from itertools import chain
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import xxhash

from holdfast.checkpoint.commit import commit_step, image_record, read_step_info, refuse_committed, write_image
from holdfast.checkpoint.image import ImageLayout, ImageMeta, block_checksums, pack_pieces
from holdfast.checkpoint.index import ImageRecord, image_file_name
from holdfast.checkpoint.meeting import Meeting, Ranks, agree
from holdfast.checkpoint.objects import ObjectRecord, encode_objects
from holdfast.checkpoint.pieces import Piece
from holdfast.checkpoint.places import place
from holdfast.checkpoint.share import Share, join_shares
from holdfast.checkpoint.steps import StepInfo
from holdfast.checkpoint.storage import PosixStorage, Storage, storage_of
from holdfast.checkpoint.streaming import BlockHasher, hashed
from holdfast.checkpoint.version import Version

__all__ = ["Ranks", "agree", "refuse_save", "save_pieces", "write_own"]


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
        data: the bytes of a piece in C order, good until the call returns; asked for once or twice. They must not
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
    directory = place(directory)
    meeting = _meeting(ranks, directory, version, attempt, timeout)
    try:
        record = write_own(directory, ranks, version, pieces, data, objects, storage)
        said = meeting.collect(Share.of(record).encode(), join=join_shares)
        if said is None:
            meeting.wait()
            return read_step_info(directory, storage=storage)
        info = commit_step(
            directory,
            Share.decode(said[0]),
            version=version,
            world_size=ranks.world_size,
            metrics=metrics,
            tag=tag,
            history=history,
            storage=storage,
        )
    except Exception as error:  # the other ranks learn of it here, ours by the raise
        meeting.fail(error)
        raise
    meeting.announce()
    return info


def _meeting(ranks: Ranks, directory: Path, version: Version, attempt: int, timeout: timedelta) -> Meeting:
    place = xxhash.xxh3_64_hexdigest(os.fsencode(str(directory)))
    return Meeting(ranks, f"save/{place}/{version}/{attempt}", what=f"{directory}: the save", timeout=timeout)


def refuse_save(directory: str | Path, error: Exception, *, ranks: Ranks, version: Version, attempt: int) -> None:
    """Take part in a save in which this rank cannot: the others, in `save_pieces` with the same values, fail at once.

    Called instead of `save_pieces`, by a rank whose state cannot be stored.
    """
    _meeting(ranks, place(directory), version, attempt, timedelta(0)).fail(error)


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
    plan = _plans.of(tuple(piece for piece in pieces if piece.job), len(blob))
    layout = plan.layout
    name = image_file_name(version.generation, ranks.rank, ranks.world_size)

    def header(checksums: bytes) -> bytes:
        return layout.header(
            version=version,
            global_rank=ranks.rank,
            world_size=ranks.world_size,
            checksums=checksums,
            objects_bytes=len(blob),
        )

    def meta(checksums: bytes, header: bytes) -> ImageMeta:
        return layout.meta(
            header,
            version=version,
            global_rank=ranks.rank,
            world_size=ranks.world_size,
            checksums=checksums,
            objects_bytes=len(blob),
        )

    storage = storage or storage_of(directory)
    if type(storage) is not PosixStorage:
        # An object store takes its first part first: the data is gone through twice.
        checksums = block_checksums(_data(layout, data, blob), layout.block_bytes)
        first = header(checksums)
        chunks = chain([first], _data(layout, data, blob))
        return write_image(directory, name, meta(checksums, first), chunks, storage=storage)
    refuse_committed(storage, directory)
    hasher = BlockHasher(layout.block_bytes)
    made: list[tuple[bytes, bytes]] = []

    def last() -> bytes:
        checksums = hasher.digests()
        made.append((checksums, header(checksums)))
        return made[0][1]

    storage.write_header_last(directory / name, layout.data_start, last, hashed(_data(layout, data, blob), hasher))
    return image_record(name, meta(*made[0]), blob, pieces=plan.packed)


class _Plan(NamedTuple):
    """Where every byte of an image lies, and its piece table for the index."""

    pieces: tuple[Piece, ...]
    """As they were given."""
    layout: ImageLayout
    packed: bytes


class _Plans:
    """The last few plans: a state that is saved again is not planned again. Any thread."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._known: list[_Plan] = []

    def of(self, pieces: tuple[Piece, ...], objects_bytes: int) -> _Plan:
        """The plan for these pieces, with room for the objects."""
        with self._lock:
            for number, plan in enumerate(self._known):
                # Equal tuples hold the same objects mostly, which makes this a matter of microseconds.
                if plan.pieces == pieces and objects_bytes <= plan.layout.objects_capacity:
                    self._known.insert(0, self._known.pop(number))
                    return plan
        # Objects grow a little from step to step; zeros fill what they leave.
        capacity = -(-(objects_bytes + objects_bytes // 8) // _OBJECTS_UNIT) * _OBJECTS_UNIT
        layout = ImageLayout.plan(pieces, objects_capacity=capacity)
        plan = _Plan(pieces, layout, pack_pieces(layout.pieces))
        with self._lock:
            self._known = [plan, *self._known[: _KEPT_PLANS - 1]]
        return plan


_KEPT_PLANS = 4
_OBJECTS_UNIT = 256
_plans = _Plans()


def _data(layout: ImageLayout, data: Callable[[Piece], memoryview], blob: bytes) -> Iterator[bytes | memoryview]:
    for piece in layout.pieces:
        view = data(piece)
        assert view.nbytes == piece.size_bytes, (piece, view.nbytes)
        yield view
    yield blob
    yield bytes(layout.objects_capacity - len(blob))
