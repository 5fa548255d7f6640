"""``copy``: a checkpoint to another place, verified on the way, root last."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import xxhash

from holdfast.checkpoint.commit import open_checkpoint, read_step_info, refuse_committed
from holdfast.checkpoint.root import ROOT_NAME, decode_root, encode_root
from holdfast.checkpoint.source import FileSource
from holdfast.checkpoint.steps import MAX_SMALL_BYTES
from holdfast.checkpoint.storage import PosixStorage, remove_leftovers
from holdfast.checkpoint.tools.native import open_native
from holdfast.checkpoint.tools.units import Progress, human, parse_size
from holdfast.checkpoint.verified import OpenImage
from holdfast.errors import CheckpointError, CorruptError, UsageError

EXAMPLE = "holdfast ckpt copy checkpoints/step-00000100 /archive/step-00000100"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare them."""
    parser.add_argument("source", help="one of our checkpoints")
    parser.add_argument("destination", help="a new directory")
    parser.add_argument("--max-memory", metavar="SIZE", type=parse_size, default="2GiB", help="bound (default 2GiB)")


def run(arguments: argparse.Namespace) -> int:
    """0."""
    if "://" in arguments.destination:
        raise UsageError(f"{arguments.destination}: only directories can be copied to yet")
    state = open_native(arguments.source)
    state.close()
    copy_checkpoint(state.path, Path(arguments.destination))
    info = read_step_info(Path(arguments.destination))
    sys.stdout.write(f"{arguments.destination}: {human(info.size_bytes)}, every checksum matched\n")
    return 0


def copy_checkpoint(source: Path, destination: Path) -> None:
    """Copy images, index and root, in this order. An image that is there already and sound is not copied again.

    Raises:
        CorruptError: the source is damaged; the destination has no root then.
        StorageError: the destination holds a checkpoint, or cannot be written.
    """
    storage = PosixStorage()
    refuse_committed(storage, destination)
    root, _ = decode_root(storage.read(source / ROOT_NAME, limit=MAX_SMALL_BYTES))
    with open_checkpoint(source) as catalog, Progress("copying", root.size_bytes) as progress:
        for image in catalog.images:
            target = destination / Path(image.name).name
            if not _is_there(target, image):
                storage.write(target, _counted(_bytes(image), progress))
    data = _sound_index(storage, source, root.index_copies[0].size_bytes, root.index_digest)
    for copy in root.index_copies:
        storage.write(destination / copy.name, [data])
    remove_leftovers(storage, destination)
    storage.write(destination / ROOT_NAME, [encode_root(root)], exclusive=True)


def _sound_index(storage: PosixStorage, source: Path, size_bytes: int, digest: bytes) -> bytes:
    for file in sorted(source.glob("index*.json.zst")):
        data = storage.read(file, limit=max(size_bytes, file.stat().st_size))
        if xxhash.xxh3_128_digest(data) == digest:
            return data
    raise CorruptError(f"{source}: no copy of the index matches its digest")


def _bytes(image: OpenImage) -> Iterator[memoryview]:
    meta = image.meta
    yield image.source.read(0, meta.data_start)
    yield from image.windows(meta.data_start, meta.size_bytes - meta.data_start)


def _counted(chunks: Iterator[memoryview], progress: Progress) -> Iterator[memoryview]:
    for chunk in chunks:
        progress.add(len(chunk))
        yield chunk


def _is_there(target: Path, image: OpenImage) -> bool:
    if not target.exists() or target.stat().st_size != image.meta.size_bytes:
        return False
    found = OpenImage(str(target), None, FileSource(target), expected_digest=image.meta.header_digest)
    try:
        found.verify()
        return True
    except CheckpointError:
        return False  # it is copied again
    finally:
        found.close()
