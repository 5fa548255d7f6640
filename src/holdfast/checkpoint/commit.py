"""Writing and opening step directories: images, then the index (twice), then the root.

Order and names make it safe: a checkpoint exists when its root does. Images carry incarnation and generation in their
names, and so does the second copy of the index: what an older generation still writes overwrites nothing that a root
relies on alone. Every write is durable before the next one starts, and the root is created once.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

from holdfast.checkpoint.catalog import Catalog
from holdfast.checkpoint.image import ImageLayout, ImageMeta, block_checksums, header_digest, pack_pieces
from holdfast.checkpoint.index import (
    IMAGE_NAME,
    MAX_INDEX_BYTES,
    ImageRecord,
    Index,
    build_index,
    decode_index,
    encode_index,
    image_file_name,
    saved_tensors,
)
from holdfast.checkpoint.objects import decode_objects
from holdfast.checkpoint.places import place
from holdfast.checkpoint.root import ROOT_NAME, IndexFile, Root, decode_root, encode_root
from holdfast.checkpoint.source import Source
from holdfast.checkpoint.steps import (
    MAX_SMALL_BYTES,
    StepInfo,
    abandon_after,
    abandon_step,
    history_id,
    list_steps,
    newest_step,
    read_step_info,
    step_dir_name,
)
from holdfast.checkpoint.storage import TEMPORARY_PREFIX, Storage, storage_of
from holdfast.checkpoint.verified import OpenImage
from holdfast.checkpoint.version import Version
from holdfast.errors import CheckpointError, CorruptError, StorageError

if TYPE_CHECKING:
    from holdfast.checkpoint.share import Share

__all__ = [
    "ImageRecord",
    "StepInfo",
    "abandon_after",
    "abandon_step",
    "commit_step",
    "history_id",
    "image_file_name",
    "list_steps",
    "newest_step",
    "open_checkpoint",
    "read_step_info",
    "step_dir_name",
    "subset_image",
    "write_image",
]

logger = logging.getLogger(__name__)

INDEX_NAME = "index.json.zst"
INDEX_COPY = re.compile(r"index-i\d{2,18}-[0-9a-f]{8}-g\d{4,18}\.json\.zst", re.ASCII)


def write_image(
    directory: str | Path,
    name: str,
    meta: ImageMeta,
    chunks: Iterable[bytes | memoryview],
    *,
    storage: Storage | None = None,
) -> ImageRecord:
    """Write one image of a step durably.

    Args:
        directory: the step directory; made where it is missing.
        name: from `image_file_name`.
        meta: of the image.
        chunks: all its bytes in order, header first, cut anywhere.
        storage: where to.

    Returns:
        What `commit_step` needs of it.

    Raises:
        StorageError: it cannot be written, or the step is committed already.
        CorruptError: from `chunks`, or they are not the image that `meta` describes.
    """
    directory = place(directory)
    storage = storage or storage_of(directory)
    if not IMAGE_NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name of an image")
    refuse_committed(storage, directory)
    objects = bytearray()
    storage.write(directory / name, _checked(meta, chunks, objects))
    return image_record(name, meta, bytes(objects))


def image_record(
    name: str, meta: ImageMeta, objects: bytes | memoryview, *, pieces: bytes | None = None
) -> ImageRecord:
    """What `commit_step` needs of an image file.

    Args:
        name: of the file.
        meta: of the image.
        objects: the used part of its objects blob.
        pieces: what `pack_pieces` gives for its pieces, where that is known.

    Raises:
        CorruptError: the objects do not parse.
    """
    return ImageRecord(
        name=name,
        size_bytes=meta.size_bytes,
        header_digest=meta.header_digest,
        version=meta.version,
        global_rank=meta.global_rank,
        world_size=meta.world_size,
        pieces=pack_pieces(meta.pieces) if pieces is None else pieces,
        objects={
            key: xxhash.xxh3_128_digest(record.data)
            for key, record in (decode_objects(objects) if len(objects) else {}).items()
            if not record.per_rank
        },
    )


def refuse_committed(storage: Storage, directory: Path) -> None:
    """
    Raises:
        StorageError: there is a checkpoint.
    """
    if any(entry.name == ROOT_NAME for entry in storage.list(directory)):
        raise StorageError(f"{directory} holds a committed checkpoint, which is never changed: save to another name")


def _checked(meta: ImageMeta, chunks: Iterable[bytes | memoryview], objects: bytearray) -> Iterator[bytes | memoryview]:
    """Pass chunks on; collect the objects blob; refuse before the file gets its name if they are not this image."""
    digest = xxhash.xxh3_128()
    position = 0
    blob_start, blob_end = meta.objects_offset, meta.objects_offset + meta.objects_bytes
    for chunk in chunks:
        view = memoryview(chunk).cast("B")
        end = position + view.nbytes
        if position < meta.data_start:
            digest.update(view[: meta.data_start - position])
        if end > blob_start and position < blob_end:
            objects += view[max(blob_start - position, 0) : blob_end - position]
        position = end
        yield chunk
    if position != meta.size_bytes or digest.digest() != meta.header_digest:
        raise CorruptError(f"an image of {meta.size_bytes} bytes was to be written, {position} bytes of another came")


def subset_image(meta: ImageMeta, source: Source) -> tuple[ImageMeta, Iterator[bytes | memoryview]]:
    """The job-scope subset of an image in memory, as an image of its own.

    Args:
        meta: of the image.
        source: its bytes.

    Returns:
        What to give to `write_image`: the subset's meta, and its bytes. Everything is verified: where all pieces go to
        storage, while the bytes stream (a straight copy); else before this function returns.

    Raises:
        CorruptError: the image does not match its checksums; from the iterator too.
    """
    image = OpenImage(f"the image of rank {meta.global_rank} in memory", meta, source)
    if all(piece.job for piece in meta.pieces):
        return meta, _whole_image(image)
    starts = dict(zip(meta.pieces, meta.piece_offsets, strict=True))
    kept = [piece for piece in meta.pieces if piece.job]
    layout = ImageLayout.plan(kept, objects_capacity=meta.objects_capacity, block_bytes=meta.block_bytes)
    ranges = _merged(
        [(starts[piece], piece.size_bytes) for piece in layout.pieces] + [(meta.objects_offset, meta.objects_capacity)]
    )
    checksums = block_checksums(_ranges(image, ranges), layout.block_bytes)
    header = layout.header(
        version=meta.version,
        global_rank=meta.global_rank,
        world_size=meta.world_size,
        checksums=checksums,
        objects_bytes=meta.objects_bytes,
    )
    subset = layout.meta(
        header,
        version=meta.version,
        global_rank=meta.global_rank,
        world_size=meta.world_size,
        checksums=checksums,
        objects_bytes=meta.objects_bytes,
    )
    return subset, _with_header(header, _ranges(image, ranges))


def _whole_image(image: OpenImage) -> Iterator[bytes | memoryview]:
    header = image.source.read(0, image.meta.data_start)
    if header_digest(header) != image.meta.header_digest:
        raise CorruptError(f"{image.name}: its header has changed since it was read")
    yield header
    yield from image.windows(image.meta.data_start, image.meta.size_bytes - image.meta.data_start)


def _with_header(header: bytes, data: Iterator[memoryview]) -> Iterator[bytes | memoryview]:
    yield header
    yield from data


def _merged(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same (start, length) ranges with neighbours joined."""
    merged: list[tuple[int, int]] = []
    for start, length in ranges:
        if merged and sum(merged[-1]) == start:
            merged[-1] = (merged[-1][0], merged[-1][1] + length)
        elif length:
            merged.append((start, length))
    return merged


def _ranges(image: OpenImage, ranges: Iterable[tuple[int, int]]) -> Iterator[memoryview]:
    for start, length in ranges:
        yield from image.windows(start, length)


def commit_step(
    directory: str | Path,
    records: Sequence[ImageRecord] | Share,
    *,
    version: Version,
    world_size: int,
    metrics: Mapping[str, float] | None = None,
    tag: str | None = None,
    history: str | None = None,
    storage: Storage | None = None,
) -> StepInfo:
    """Write index and root of a step whose images are all written: after it returns the checkpoint exists.

    Called by one process, the leader's.

    Args:
        directory: the step directory.
        records: one of each rank, from `write_image`; or what all ranks' shares are together.
        version: of all images.
        world_size: number of ranks of the version.
        metrics: names and values, about 2 KiB in all with the tag.
        tag: for people and retention.
        history: `history_id` of the checkpoint directory.
        storage: where to.

    Raises:
        MismatchError: the images together are not the whole state (`build_index`).
        StorageError: something cannot be written, or the step is committed already; other checkpoints are as they were.
        UsageError: tag and metrics do not fit.
    """
    directory = place(directory)
    storage = storage or storage_of(directory)
    refuse_committed(storage, directory)
    index = build_index(records, version=version, world_size=world_size)
    if index.divergence:
        logger.warning("%s: replicas disagree about %s; rank 0's is kept", version, ", ".join(index.divergence))
    data = encode_index(index)
    names = (INDEX_NAME, f"index-{version.generation}.json.zst")
    root = Root(
        version=version,
        world_size=world_size,
        num_images=len(index.images),
        size_bytes=sum(image.size_bytes for image in index.images),
        index_digest=xxhash.xxh3_128_digest(data),
        index_copies=tuple(IndexFile(name=name, size_bytes=len(data)) for name in names),
        time=time.time(),
        history=history,
        tag=tag,
        metrics=dict(metrics or {}),
    )
    root_data = encode_root(root)
    for name in names:
        storage.write(directory / name, [data])
    storage.write(directory / ROOT_NAME, [root_data], exclusive=True)
    _sweep(storage, directory, {image.name for image in index.images} | set(names))
    return read_step_info(directory, storage=storage)


def _sweep(storage: Storage, directory: Path, used: set[str]) -> None:
    """Remove what earlier, interrupted saves of this step left: they cannot be committed any more."""
    try:
        for entry in storage.list(directory):
            left = IMAGE_NAME.fullmatch(entry.name) or INDEX_COPY.fullmatch(entry.name)
            is_ours = left is not None or entry.name.startswith(TEMPORARY_PREFIX)
            if is_ours and entry.name not in used and not entry.is_folder:
                storage.remove(directory / entry.name)
    except StorageError as error:
        logger.warning("%s: what an interrupted save left could not be removed: %s", directory, error)


def open_checkpoint(path: str | Path, *, storage: Storage | None = None) -> Catalog:
    """A step directory as a Catalog. Image headers are read when something in them is wanted.

    Raises:
        StorageError: there is no root, or something cannot be read.
        CorruptError: root or both copies of the index are damaged.
    """
    return catalog_of(path, read_index(path, storage=storage), storage=storage)


def catalog_of(path: str | Path, index: Index, *, storage: Storage | None = None) -> Catalog:
    """The same for an index that was read before.

    Raises:
        CorruptError: the index says what cannot be.
    """
    path = place(path)
    storage = storage or storage_of(path)
    images = [
        OpenImage(
            str(path / image.name),
            None,
            storage.source(path / image.name),
            expected_digest=bytes.fromhex(image.header_digest),
            expected_size=image.size_bytes,
        )
        for image in index.images
    ]
    return Catalog(
        images,
        saved=saved_tensors(index),
        ranks=[image.rank for image in index.images],
        version=index.version,
        world_size=index.world_size,
    )


def read_index(path: str | Path, *, storage: Storage | None = None) -> Index:
    """The index of a step directory, as its root wants it.

    Raises:
        StorageError: there is no root, or something cannot be read.
        CorruptError: root or both copies of the index are damaged.
    """
    path = place(path)
    storage = storage or storage_of(path)
    root, corrected = decode_root(storage.read(path / ROOT_NAME, limit=MAX_SMALL_BYTES))
    if corrected:
        logger.warning("%s: the root record had wrong bytes, which were corrected; check the disk", path)
    return _read_index(storage, path, root)


def _read_index(storage: Storage, path: Path, root: Root) -> Index:
    problems: list[str] = []
    for copy in root.index_copies:
        try:
            data = storage.read(path / copy.name, limit=min(copy.size_bytes, MAX_INDEX_BYTES))
        except CheckpointError as error:
            problems.append(str(error))
            continue
        if xxhash.xxh3_128_digest(data) == root.index_digest:
            if problems:
                logger.warning("%s: the index was read from its copy: %s", path, "; ".join(problems))
            return decode_index(data)
        problems.append(f"{path / copy.name} does not match its digest")
    raise CorruptError(f"{path}: no copy of the index can be used: {'; '.join(problems)}")
