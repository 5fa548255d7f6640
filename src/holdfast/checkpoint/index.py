"""The index of a checkpoint: every tensor's dtype, shape and tiling, every image's exact name, size and digest.

zstd of JSON, so that ``zstdcat index.json.zst`` shows it. Stored twice. Nothing in it says which parallelism made it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import msgspec
import zstandard

from holdfast.checkpoint.catalog import Saved
from holdfast.checkpoint.compressed import unpacked
from holdfast.checkpoint.dtypes import DTYPES
from holdfast.checkpoint.tiles import Placement, Tiling
from holdfast.checkpoint.version import GenerationId, Version
from holdfast.errors import DECODE_ERRORS, CorruptError, MismatchError

if TYPE_CHECKING:
    from holdfast.checkpoint.share import Share

MAX_INDEX_BYTES = 1 << 32
IMAGE_NAME = re.compile(r"i\d{2,18}-[0-9a-f]{8}-g\d{4,18}-rank-\d{5,18}-of-\d{5,18}\.safetensors", re.ASCII)
"""The only names that an index can give: none that leaves the directory."""


class ImageRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What the leader must know of an image file that was written."""

    name: str
    """Of the file in the step directory."""
    size_bytes: int
    header_digest: bytes
    """`holdfast.checkpoint.image.header_digest`."""
    version: Version
    global_rank: int
    world_size: int
    pieces: bytes
    """Packed by `holdfast.checkpoint.image.pack_pieces`."""
    objects: dict[str, bytes] = {}
    """xxh3_128 of the replicated objects: they should be the same in all images."""

    def encode(self) -> bytes:
        """For `PersistPart.records`."""
        return msgspec.msgpack.encode(self)

    @classmethod
    def decode(cls, data: bytes) -> ImageRecord:
        """
        Raises:
            CorruptError: `data` is none.
        """
        try:
            return msgspec.msgpack.decode(data, type=cls)
        except DECODE_ERRORS as error:
            raise CorruptError(f"an image record does not parse: {error}") from error


class IndexedImage(msgspec.Struct, frozen=True, kw_only=True):
    """One image file."""

    name: str
    rank: int
    size_bytes: int
    header_digest: str
    """Hexadecimal."""


class IndexedTensor(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One tensor of the job, or of one rank."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    tiling: Tiling
    rank: int | None = None


class Index(msgspec.Struct, frozen=True, kw_only=True):
    """The whole index."""

    format: int = 1
    version: Version
    world_size: int
    images: tuple[IndexedImage, ...]
    tensors: tuple[IndexedTensor, ...]
    divergence: tuple[str, ...] = ()
    """Replicated objects whose bytes differed between ranks."""


def image_file_name(generation: GenerationId, rank: int, world_size: int) -> str:
    """``i01-7f3a9c02-g0004-rank-00003-of-00008.safetensors``: a writer of another generation cannot overwrite it."""
    return f"{generation}-rank-{rank:05d}-of-{world_size:05d}.safetensors"


def build_index(records: Sequence[ImageRecord] | Share, *, version: Version, world_size: int) -> Index:
    """Put the images of all ranks together.

    Raises:
        MismatchError: they are not what this version needs: an image of another version or world size, a rank without
            image, a region of a tensor in no image or in two, dtypes or shapes that differ.
        CorruptError: a record's piece table does not parse.
    """
    from holdfast.checkpoint.share import Share  # with numpy, which those that only read an index do without

    if not isinstance(records, Share):
        records = Share.joined([Share.of(record) for record in records]) if records else Share([], b"")
    ordered = sorted(records.images, key=lambda record: (record.global_rank, record.name))
    for record in ordered:
        if (record.version, record.world_size) != (version, world_size) or not IMAGE_NAME.fullmatch(record.name):
            raise MismatchError(
                f"image {record.name} is of {record.version} with {record.world_size} ranks, "
                f"not of {version} with {world_size}"
            )
    missing = sorted(set(range(world_size)) - {record.global_rank for record in ordered})
    if missing:
        raise MismatchError(f"{version}: no image of rank {missing[0]} was written ({len(missing)} are missing)")
    place = {record.name: number for number, record in enumerate(ordered)}
    tensors = _tensors(records.pieces, tuple(place[record.name] for record in records.images))
    return Index(
        version=version,
        world_size=world_size,
        images=tuple(
            IndexedImage(name=r.name, rank=r.global_rank, size_bytes=r.size_bytes, header_digest=r.header_digest.hex())
            for r in ordered
        ),
        tensors=tensors,
        divergence=_divergence(ordered),
    )


@lru_cache(2)
def _tensors(pieces: bytes, order: tuple[int, ...]) -> tuple[IndexedTensor, ...]:
    """The tensors of a `Share` whose images get these places. Kept: the next save has the same mostly."""
    from holdfast.checkpoint.share import placed

    tensors = tuple(
        IndexedTensor(name=of.name, rank=of.rank, dtype=of.dtype, shape=of.shape, tiling=of.tiling())
        for of in placed(pieces, order)
    )
    for tensor in tensors:
        Placement(tensor.shape, tensor.tiling, len(order)).check_once(tensor.name)
    return tensors


def _divergence(records: Sequence[ImageRecord]) -> tuple[str, ...]:
    seen: dict[str, bytes] = {}
    differing: set[str] = set()
    for record in records:
        for name, digest in record.objects.items():
            if seen.setdefault(name, digest) != digest:
                differing.add(name)
    return tuple(sorted(differing))


def encode_index(index: Index) -> bytes:
    """The bytes of an index file."""
    return zstandard.compress(msgspec.json.encode(index), 3)


def decode_index(data: bytes) -> Index:
    """Read an index file back (its digest was checked against the root).

    Raises:
        CorruptError: it does not parse, or says what cannot be.
    """
    try:
        index = msgspec.json.decode(unpacked(data, limit_bytes=MAX_INDEX_BYTES, what="the index"), type=Index)
    except DECODE_ERRORS as error:
        raise CorruptError(f"the index does not parse: {error}") from error
    if index.format != 1:
        raise CorruptError(f"index format {index.format} is newer than this holdfast reads (1)")
    if index.world_size < 1 or not index.images:
        raise CorruptError(f"the index names {len(index.images)} images of {index.world_size} ranks")
    for image in index.images:
        if not 0 <= image.rank < index.world_size:
            raise CorruptError(f"the index names an image of rank {image.rank} of {index.world_size}")
        if not IMAGE_NAME.fullmatch(image.name) or not re.fullmatch(r"[0-9a-f]{32}", image.header_digest):
            raise CorruptError(f"the index names the image {image.name!r}, which is no name of an image")
    return index


def saved_tensors(index: Index) -> list[Saved]:
    """The tensors of an index, for a Catalog.

    Raises:
        CorruptError: a tiling does not fit, or a dtype is unknown.
    """
    saved: list[Saved] = []
    for tensor in index.tensors:
        if tensor.dtype not in DTYPES or any(n < 0 for n in tensor.shape):
            raise CorruptError(f"the index gives {tensor.name!r} as {tensor.dtype}{list(tensor.shape)}")
        placement = Placement(tensor.shape, tensor.tiling, len(index.images))
        saved.append(Saved(tensor.name, tensor.rank, tensor.dtype, tensor.shape, placement))
    return saved
