"""``copy``: a checkpoint to another place, verified on the way, root last."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import xxhash

from holdfast.checkpoint.belongings import refuse_foreign
from holdfast.checkpoint.commit import open_checkpoint, read_step_info, refuse_committed
from holdfast.checkpoint.places import place
from holdfast.checkpoint.root import ROOT_NAME, Root, decode_root, encode_root
from holdfast.checkpoint.steps import MAX_SMALL_BYTES, TAG_NAME, check_step_name
from holdfast.checkpoint.storage import Storage, remove_leftovers, storage_of
from holdfast.checkpoint.tools.native import open_native
from holdfast.checkpoint.tools.parallel import in_parallel, workers_within
from holdfast.checkpoint.tools.units import Progress, argument, human, parse_size
from holdfast.checkpoint.verified import OpenImage
from holdfast.errors import CheckpointError, CorruptError

EXAMPLE = "holdfast ckpt copy checkpoints/step-00000100 s3://bucket/archive/step-00000100"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare them."""
    parser.add_argument("source", type=argument(place), help="one of our checkpoints: a directory or a URL")
    parser.add_argument("destination", type=argument(place), help="a new directory or URL")
    parser.add_argument("--workers", type=int, default=2, help="images copied at the same time (default 2)")
    parser.add_argument(
        "--max-memory", metavar="SIZE", type=argument(parse_size), default="2GiB", help="bound (default 2GiB)"
    )


def run(arguments: argparse.Namespace) -> int:
    """0."""
    workers = workers_within(arguments.workers, arguments.max_memory, arguments.destination)
    state = open_native(arguments.source)
    state.close()
    copy_checkpoint(state.path, arguments.destination, workers=workers)
    info = read_step_info(arguments.destination)
    sys.stdout.write(f"{arguments.destination}: {human(info.size_bytes)}, every checksum matched\n")
    return 0


def copy_checkpoint(source: Path, destination: Path, *, workers: int = 1) -> None:
    """Copy images, index and root, in this order. An image that is there already and sound is not copied again.

    Raises:
        CorruptError: the source is damaged; the destination has no root then.
        StorageError: the destination holds a checkpoint or other files, or cannot be written.
        UsageError: it has the name of another step.
    """
    storage, target = storage_of(source), storage_of(destination)
    root, _ = decode_root(storage.read(source / ROOT_NAME, limit=MAX_SMALL_BYTES))
    check_step_name(destination, root.version.step)
    refuse_committed(target, destination)
    refuse_foreign(target, destination)
    there = {entry.name: entry.size_bytes for entry in target.list(destination)}
    with open_checkpoint(source) as catalog, Progress("copying", root.size_bytes) as progress:

        def copy(image: OpenImage, worker: int) -> None:
            path = destination / Path(image.name).name
            if there.get(path.name) == image.meta.size_bytes and _is_sound(target, path, image):
                progress.add(image.meta.size_bytes)
            else:
                target.write(path, _Bytes(image, progress))

        in_parallel(copy, catalog.images, range(workers), "copy", progress)
    data = _sound_index(storage, source, root)
    for copy_of in root.index_copies:
        target.write(destination / copy_of.name, [data])
    if root.tag is None and read_step_info(source).tag is not None:
        target.write(destination / TAG_NAME, [storage.read(source / TAG_NAME, limit=MAX_SMALL_BYTES)])
    remove_leftovers(target, destination)
    target.write(destination / ROOT_NAME, [encode_root(root)], exclusive=True)


def _sound_index(storage: Storage, source: Path, root: Root) -> bytes:
    names = {entry.name: entry.size_bytes for entry in storage.list(source)}
    for copy in root.index_copies:
        if copy.name in names:
            data = storage.read(source / copy.name, limit=max(copy.size_bytes, names[copy.name]))
            if xxhash.xxh3_128_digest(data) == root.index_digest:
                return data
    raise CorruptError(f"{source}: no copy of the index matches its digest")


class _Bytes:
    """The bytes of an image; can be had again, which an upload that failed needs."""

    def __init__(self, image: OpenImage, progress: Progress) -> None:
        self._image, self._progress = image, progress
        self._counted = 0

    def __iter__(self) -> Iterator[memoryview]:
        meta = self._image.meta
        self._progress.add(-self._counted)
        self._counted = 0
        yield self._count(self._image.source.read(0, meta.data_start))
        for window in self._image.windows(meta.data_start, meta.size_bytes - meta.data_start):
            yield self._count(window)

    def _count(self, chunk: memoryview) -> memoryview:
        self._counted += len(chunk)
        self._progress.add(len(chunk))
        return chunk


def _is_sound(storage: Storage, path: Path, image: OpenImage) -> bool:
    found = OpenImage(str(path), None, storage.source(path), expected_digest=image.meta.header_digest)
    try:
        found.verify()
        return True
    except CheckpointError:
        return False  # it is copied again
    finally:
        found.close()
