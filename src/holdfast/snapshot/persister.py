"""Writing versions from slots to storage: what the daemon's persist lane runs.

A node writes the job-scope part of its images (each byte of the job once), and that of images whose node is gone and
which it is told to decode; the leader writes index and root when all parts are there. Block checksums are verified
while the bytes stream, so that what was damaged in memory never becomes a checkpoint. Whatever goes wrong, older
checkpoints stay as they were.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from holdfast.checkpoint.commit import (
    ImageRecord,
    StepInfo,
    abandon_step,
    commit_step,
    image_file_name,
    read_step_info,
    step_dir_name,
    subset_image,
    write_image,
)
from holdfast.checkpoint.image import ImageMeta, read_header
from holdfast.checkpoint.places import place
from holdfast.checkpoint.retention import Retention
from holdfast.checkpoint.root import ROOT_NAME
from holdfast.checkpoint.source import MemorySource, Source
from holdfast.checkpoint.steps import tag_step
from holdfast.checkpoint.verified import OpenImage
from holdfast.checkpoint.version import Version
from holdfast.errors import CheckpointError, CorruptError, FenceError
from holdfast.snapshot.arena import SLOT_HEADER_BYTES, SlotState, read_slot_header

_log = logging.getLogger(__name__)
LIMIT_S: Final = 1800.0
"""How long a node may take for its part, and the leader for index and root. Storage that hangs is given up after it."""


@dataclass(frozen=True)
class Part:
    """What one node writes of a version."""

    version: Version
    attempt: int
    directory: Path
    """The step directory."""
    slots: tuple[Path, ...]
    """Slot files that hold the version clean; pinned until this has ended."""
    lost: tuple[Callable[[], OpenImage], ...] = ()
    """Each opens an image that no node has any more."""
    lost_ranks: tuple[int, ...] = ()
    """Whose images these are."""
    cancelled: threading.Event = field(default_factory=threading.Event)
    """Set by the event loop: the slots may be written again, stop reading."""

    @property
    def key(self) -> tuple[Version, int, tuple[int, ...]]:
        """The same for an order that comes again. A new generation may count its attempts from the same number, and
        want more written."""
        return (self.version, self.attempt, self.lost_ranks)


@dataclass(frozen=True)
class Commit:
    """What the leader writes when all parts are there."""

    version: Version
    directory: Path
    records: tuple[bytes, ...]
    world_size: int
    metrics: dict[str, float]
    tag: str | None
    history: str | None
    keep: str
    """Retention policy, encoded; "" keeps everything."""


def step_directory(checkpoint_dir: str, step: int) -> Path:
    """Where the checkpoint of `step` lies."""
    return place(checkpoint_dir) / step_dir_name(step)


def write_part(part: Part) -> tuple[bytes, ...]:
    """Write the images; their encoded records.

    Raises:
        FenceError: cancelled.
        CorruptError: a slot does not hold what it should.
        StorageError: the storage refused.
    """
    if existing(part.directory, part.version) is not None:
        return ()  # committed by an attempt whose end nobody heard of
    lost = [_write_lost(part, opened) for opened in part.lost]  # first: what they are decoded from may go
    return tuple(record.encode() for record in (*lost, *(_write_one(part, slot) for slot in part.slots)))


def _write_lost(part: Part, opened: Callable[[], OpenImage]) -> ImageRecord:
    image = opened()
    try:
        return _write_image(part, image.meta, image.source)
    finally:
        image.close()


def _write_one(part: Part, slot: Path) -> ImageRecord:
    with mapped_image(slot, part.version) as (image, digest):
        source = MemorySource(image)
        try:
            meta = read_header(source.read, expected_digest=digest)
            if meta.version != part.version:
                raise CorruptError(f"{slot} holds an image of {meta.version}, not of {part.version}")
            return _write_image(part, meta, source)
        finally:
            source.close()


def _write_image(part: Part, meta: ImageMeta, source: Source) -> ImageRecord:
    subset, chunks = subset_image(meta, source)
    name = image_file_name(part.version.generation, meta.global_rank, meta.world_size)
    return write_image(part.directory, name, subset, _until_cancelled(part, chunks))


def _until_cancelled(part: Part, chunks: Iterable[memoryview | bytes]) -> Iterator[memoryview | bytes]:
    for chunk in chunks:
        if part.cancelled.is_set():
            raise FenceError(f"persisting {part.version} was stopped: its slots are needed")
        yield chunk


@contextlib.contextmanager
def mapped_image(slot: Path, version: Version) -> Iterator[tuple[memoryview, bytes]]:
    """The image of `version` in `slot`, mapped for reading, and the digest of its header.

    Raises:
        CorruptError: the slot does not hold `version` clean.
    """
    try:
        descriptor = os.open(slot, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        raise CorruptError(f"{version} is gone from memory: {error}") from error
    try:
        mapping = mmap.mmap(descriptor, 0, prot=mmap.PROT_READ)
    finally:
        os.close(descriptor)
    view = memoryview(mapping)
    header = read_slot_header(view[:SLOT_HEADER_BYTES])
    if header.state is not SlotState.CLEAN or header.version != version:
        raise CorruptError(f"{slot} holds {header.version} ({header.state.name.lower()}), not {version}")
    if not 0 < header.size_bytes <= len(view) - SLOT_HEADER_BYTES:
        raise CorruptError(f"{slot} says that its image has {header.size_bytes} bytes")
    try:
        yield view[SLOT_HEADER_BYTES : SLOT_HEADER_BYTES + header.size_bytes], header.header_digest
    finally:
        with contextlib.suppress(BufferError):  # a reader that still holds a view keeps the mapping until it goes
            view.release()
            mapping.close()


def commit(order: Commit) -> StepInfo:
    """Write index and root, then delete what the retention policy does not keep. What is there already gets the tag.

    Raises:
        CheckpointError: the checkpoint does not exist, or has another tag.
    """
    info = existing(order.directory, order.version) or commit_step(
        order.directory,
        [ImageRecord.decode(record) for record in order.records],
        version=order.version,
        world_size=order.world_size,
        metrics=order.metrics,
        tag=order.tag,
        history=order.history,
    )
    if order.tag is not None and info.tag != order.tag:
        info = tag_step(order.directory, order.tag)
    if order.keep:
        try:
            Retention.decode(order.keep).apply(order.directory.parent)
        except (CheckpointError, OSError, ValueError) as error:
            _log.warning("old checkpoints could not be deleted: %s", error)
    return info


def existing(directory: Path, version: Version) -> StepInfo | None:
    """The checkpoint in `directory` if it is complete and of `version`."""
    info = read_step_info(directory) if (directory / ROOT_NAME).exists() else None
    return info if info is not None and info.complete and info.version == version else None


def clear_way(directory: Path, version: Version, *, wanted: Callable[[], bool] = lambda: True) -> None:
    """Move a checkpoint of another version out of the way: it is off the chain, or `version` would not be made.

    Args:
        directory: of the step.
        version: that is to be written there.
        wanted: asked before anything is moved.

    Raises:
        StorageError: it cannot be moved.
        FenceError: it is not wanted any more.
    """
    if (directory / ROOT_NAME).exists() and existing(directory, version) is None:
        abandon_step(directory.parent, version.step, wanted=wanted)
