"""Makes one of our checkpoints from a plan, part by part, and goes on with one that was interrupted.

Every image is written to a temporary name, data first, its header last, and gets its name when it is durable. The
generation in the names comes from the source and the options: an image that is there already under its name, and
matches plan and checksums, is kept; what another source or other options left is removed after the commit.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import xxhash

from holdfast.checkpoint.boxes import Box, cut_rows
from holdfast.checkpoint.commit import commit_step, image_record, refuse_committed
from holdfast.checkpoint.dtypes import itemsize
from holdfast.checkpoint.image import ImageLayout, ImageMeta, block_checksums
from holdfast.checkpoint.index import ImageRecord, image_file_name
from holdfast.checkpoint.objects import ObjectRecord, encode_objects
from holdfast.checkpoint.pieces import Piece
from holdfast.checkpoint.source import FileSource
from holdfast.checkpoint.steps import StepInfo
from holdfast.checkpoint.storage import TEMPORARY_PREFIX, PosixStorage, make_folders, refuse, sync_folder
from holdfast.checkpoint.tools.units import Progress
from holdfast.checkpoint.verified import OpenImage
from holdfast.checkpoint.version import GenerationId, Version
from holdfast.errors import CheckpointError, UsageError

_WRITE_BUFFER_BYTES = 4 << 20
_RESERVED_BYTES = 48 << 20
"""What a tool needs beside its buffer: interpreter state, windows and blocks of the reader."""
LEAST_MEMORY_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True)
class Build:
    """A checkpoint to be made."""

    directory: Path
    images: Sequence[Sequence[Piece]]
    """Of each rank of the new checkpoint."""
    objects: Sequence[Mapping[str, ObjectRecord]]
    """Of each rank."""
    read: Callable[[Piece, Box, memoryview], None]
    """Fills a buffer with a box of a piece (in indices of the global tensor)."""
    identity: str
    """Of the source and the options."""
    step: int = 0
    tag: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    history: str | None = None
    max_memory_bytes: int


def buffer_bytes(max_memory_bytes: int) -> int:
    """How large one buffer may be.

    Raises:
        UsageError: the bound is less than 64 MiB.
    """
    if max_memory_bytes < LEAST_MEMORY_BYTES:
        raise UsageError(f"--max-memory {max_memory_bytes}: at least 64MiB are needed")
    return min((max_memory_bytes - _RESERVED_BYTES) // 2, 64 << 20)


def build_checkpoint(build: Build) -> StepInfo:
    """Write all images, index and root.

    Raises:
        StorageError: the directory holds a checkpoint, or cannot be written.
        UsageError: too little memory.
        CheckpointError: from `Build.read`.
    """
    refuse_committed(PosixStorage(), build.directory)
    nonce = f"{xxhash.xxh3_64_intdigest(build.identity.encode()) & 0xFFFFFFFF:08x}"
    version = GenerationId(incarnation=1, nonce=nonce, generation=1).at(build.step)
    total = sum(piece.size_bytes for pieces in build.images for piece in pieces)
    with Progress("writing", total) as progress:
        records = [_image(build, version, rank, progress) for rank in range(len(build.images))]
    return commit_step(
        build.directory,
        records,
        version=version,
        world_size=len(build.images),
        metrics=build.metrics,
        tag=build.tag,
        history=build.history,
    )


def _image(build: Build, version: Version, rank: int, progress: Progress) -> ImageRecord:
    blob = encode_objects(build.objects[rank])
    layout = ImageLayout.plan(build.images[rank], objects_capacity=len(blob))
    name = image_file_name(version.generation, rank, len(build.images))
    path = build.directory / name
    meta = _finished(path, layout, blob)
    if meta is None:
        meta = _write(build, path, layout, blob, version, rank, progress)
    else:
        progress.add(meta.size_bytes)
    return image_record(name, meta, blob)


def _finished(path: Path, layout: ImageLayout, blob: bytes) -> ImageMeta | None:
    """An image that an interrupted run left whole; None where it must be written."""
    if not path.exists():
        return None
    image = OpenImage(str(path), None, FileSource(path))
    try:
        meta = image.meta
        if (
            meta.pieces != layout.pieces
            or meta.size_bytes != path.stat().st_size
            or bytes(image.objects_blob()) != blob
        ):
            return None
        image.verify()
        return meta
    except CheckpointError:
        return None  # it is written again
    finally:
        image.close()


def _write(
    build: Build, path: Path, layout: ImageLayout, blob: bytes, version: Version, rank: int, progress: Progress
) -> ImageMeta:
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{path.name}-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        make_folders(path.parent)
        with open(temporary, "xb", buffering=_WRITE_BUFFER_BYTES) as file:
            file.seek(layout.data_start)
            checksums = block_checksums(_data(build, layout, blob, file, progress), layout.block_bytes)
            world = len(build.images)
            header = layout.header(
                version=version, global_rank=rank, world_size=world, checksums=checksums, objects_bytes=len(blob)
            )
            file.seek(0)
            file.write(header)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        refuse("written", path, error)
    finally:
        with suppress(OSError):
            os.unlink(temporary)
    return layout.meta(
        header, version=version, global_rank=rank, world_size=world, checksums=checksums, objects_bytes=len(blob)
    )


def _data(build: Build, layout: ImageLayout, blob: bytes, file: BinaryIO, progress: Progress) -> Iterator[memoryview]:
    """The data section, written to the file as it goes by."""
    buffer = memoryview(bytearray(min(buffer_bytes(build.max_memory_bytes), _longest(layout))))
    for piece in layout.pieces:
        if piece.box.is_empty:
            continue
        for box in cut_rows(piece.box, len(buffer) // itemsize(piece.dtype)):
            part = buffer[: box.volume * itemsize(piece.dtype)]
            build.read(piece, box, part)
            file.write(part)
            progress.add(len(part))
            yield part
    file.write(blob)
    yield memoryview(blob)


def _longest(layout: ImageLayout) -> int:
    return max((piece.size_bytes for piece in layout.pieces), default=0) or 1
