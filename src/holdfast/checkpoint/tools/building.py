"""Makes one of our checkpoints from a plan, part by part, and goes on with one that was interrupted.

An image file is written to a temporary name, data first, its header last, and gets its name when it is durable. An
object cannot be filled in later: it is made as a file without a name first (in TMPDIR, else /var/tmp) and sent from
there, so that the source is read once, wherever it lies. The generation in the names comes from the source and the
options: an image that is there already under its name, and matches plan and checksums, is kept; what another source or
other options left is removed after the commit.
"""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import xxhash

from holdfast.checkpoint.belongings import refuse_foreign
from holdfast.checkpoint.boxes import Box, cut_rows
from holdfast.checkpoint.commit import commit_step, image_record, refuse_committed
from holdfast.checkpoint.dtypes import itemsize
from holdfast.checkpoint.image import ImageLayout, ImageMeta, block_checksums
from holdfast.checkpoint.index import ImageRecord, image_file_name
from holdfast.checkpoint.objects import ObjectRecord, encode_objects
from holdfast.checkpoint.pieces import Piece
from holdfast.checkpoint.places import UrlPath
from holdfast.checkpoint.steps import StepInfo, check_step_name
from holdfast.checkpoint.storage import TEMPORARY_PREFIX, make_folders, refuse, storage_of, sync_folder
from holdfast.checkpoint.tools.parallel import LEAST_MEMORY_BYTES, in_parallel, share_of
from holdfast.checkpoint.tools.units import Progress, human
from holdfast.checkpoint.verified import OpenImage
from holdfast.checkpoint.version import GenerationId, Version
from holdfast.environment import spool_folder
from holdfast.errors import CheckpointError, StorageError, UsageError

_WRITE_BUFFER_BYTES = 4 << 20
_RESERVED_BYTES = 48 << 20
"""What a tool needs beside its buffer: interpreter state, windows and blocks of the reader."""

Read = Callable[[Piece, Box, memoryview], None]
"""Fills a buffer with a box of a piece (in indices of the global tensor)."""


@dataclass(frozen=True, kw_only=True)
class Build:
    """A checkpoint to be made."""

    directory: Path
    images: Sequence[Sequence[Piece]]
    """Of each rank of the new checkpoint."""
    objects: Sequence[Mapping[str, ObjectRecord]]
    """Of each rank."""
    readers: Sequence[Read]
    """One for each worker: as many images are made at a time."""
    identity: str
    """Of the source and the options."""
    step: int = 0
    tag: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    history: str | None = None
    max_memory_bytes: int

    @property
    def buffer_bytes(self) -> int:
        """Of one worker."""
        return buffer_bytes(share_of(self.max_memory_bytes, len(self.readers), self.directory))


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
        StorageError: the directory holds a checkpoint or other files, or cannot be written.
        UsageError: too little memory, or the directory has the name of another step.
        CheckpointError: from a reader.
    """
    check_step_name(build.directory, build.step)
    refuse_committed(storage_of(build.directory), build.directory)
    refuse_foreign(storage_of(build.directory), build.directory)
    nonce = f"{xxhash.xxh3_64_intdigest(build.identity.encode()) & 0xFFFFFFFF:08x}"
    version = GenerationId(incarnation=1, nonce=nonce, generation=1).at(build.step)
    total = sum(piece.size_bytes for pieces in build.images for piece in pieces)
    records: dict[int, ImageRecord] = {}
    with Progress("writing", total) as progress:

        def make(rank: int, read: Read) -> None:
            records[rank] = _Image(build, version, rank, read, progress).record()

        in_parallel(make, range(len(build.images)), build.readers, "build", progress)
    return commit_step(
        build.directory,
        [records[rank] for rank in sorted(records)],
        version=version,
        world_size=len(build.images),
        metrics=build.metrics,
        tag=build.tag,
        history=build.history,
    )


class _Image:
    """One image on its way."""

    def __init__(self, build: Build, version: Version, rank: int, read: Read, progress: Progress) -> None:
        self._build, self._version, self._rank = build, version, rank
        self._read, self._progress = read, progress
        self._blob = encode_objects(build.objects[rank])
        self._layout = ImageLayout.plan(build.images[rank], objects_capacity=len(self._blob))
        self._name = image_file_name(version.generation, rank, len(build.images))
        self._path = build.directory / self._name

    def record(self) -> ImageRecord:
        """Make it, unless it is there; what a commit needs of it."""
        meta = self._finished()
        if meta is None:
            meta = self._upload() if isinstance(self._path, UrlPath) else self._write()
        else:
            self._progress.add(meta.size_bytes)
        return image_record(self._name, meta, self._blob)

    def _finished(self) -> ImageMeta | None:
        """An image that an interrupted run left whole; None where it must be written."""
        storage = storage_of(self._path)
        sizes = {entry.name: entry.size_bytes for entry in storage.list(self._path.parent)}
        if self._name not in sizes:
            return None
        image = OpenImage(str(self._path), None, storage.source(self._path))
        try:
            meta = image.meta
            if (
                meta.pieces != self._layout.pieces
                or meta.size_bytes != sizes[self._name]
                or bytes(image.objects_blob()) != self._blob
            ):
                return None
            image.verify()
            return meta
        except CheckpointError:
            return None  # it is written again
        finally:
            image.close()

    def _write(self) -> ImageMeta:
        path = self._path
        temporary = path.with_name(f"{TEMPORARY_PREFIX}{path.name}-{os.getpid()}-{secrets.token_hex(4)}")
        try:
            make_folders(path.parent)
            with open(temporary, "xb", buffering=_WRITE_BUFFER_BYTES) as file:
                meta = self._fill(file)
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync_folder(path.parent)
        except OSError as error:
            refuse("written", path, error)
        finally:
            with suppress(OSError):
                os.unlink(temporary)
        return meta

    def _upload(self) -> ImageMeta:
        folder = spool_folder()
        try:
            with tempfile.TemporaryFile(buffering=_WRITE_BUFFER_BYTES, dir=folder) as file:
                meta = self._fill(file)
                storage_of(self._path).write(self._path, _Parts(file.fileno(), meta.size_bytes))
        except OSError as error:
            raise StorageError(
                f"{self._path} cannot be prepared in {folder}: {error.strerror or error}; set TMPDIR to a folder with "
                f"{human(self._layout.size_bytes)} of room for each worker"
            ) from error
        return meta

    def _fill(self, file: IO[bytes]) -> ImageMeta:
        """Write the data, then the header before it."""
        file.seek(self._layout.data_start)
        checksums = block_checksums(_into(file, self._data()), self._layout.block_bytes)
        header = self._header(checksums)
        file.seek(0)
        file.write(header)
        file.flush()
        return self._meta(header, checksums)

    def _data(self) -> Iterator[memoryview]:
        """The data section; each part is good until the next."""
        buffer = memoryview(bytearray(min(self._build.buffer_bytes, _longest(self._layout))))
        for piece in self._layout.pieces:
            if piece.box.is_empty:
                continue
            for box in cut_rows(piece.box, len(buffer) // itemsize(piece.dtype)):
                part = buffer[: box.volume * itemsize(piece.dtype)]
                self._read(piece, box, part)
                self._progress.add(len(part))
                yield part
        yield memoryview(self._blob)

    def _header(self, checksums: bytes) -> bytes:
        return self._layout.header(
            version=self._version,
            global_rank=self._rank,
            world_size=len(self._build.images),
            checksums=checksums,
            objects_bytes=len(self._blob),
        )

    def _meta(self, header: bytes, checksums: bytes) -> ImageMeta:
        return self._layout.meta(
            header,
            version=self._version,
            global_rank=self._rank,
            world_size=len(self._build.images),
            checksums=checksums,
            objects_bytes=len(self._blob),
        )


class _Parts:
    """The bytes of a file; can be had again, which an upload that failed needs."""

    def __init__(self, fd: int, size_bytes: int) -> None:
        self._fd, self._size_bytes = fd, size_bytes

    def __iter__(self) -> Iterator[bytes]:
        for start in range(0, self._size_bytes, _WRITE_BUFFER_BYTES):
            yield os.pread(self._fd, min(_WRITE_BUFFER_BYTES, self._size_bytes - start), start)


def _into(file: IO[bytes], data: Iterator[memoryview]) -> Iterator[memoryview]:
    for part in data:
        file.write(part)
        yield part


def _longest(layout: ImageLayout) -> int:
    return max((piece.size_bytes for piece in layout.pieces), default=0) or 1
