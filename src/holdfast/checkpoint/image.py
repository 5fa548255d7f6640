"""Images: one rank's part of the state at a step, as the bytes of a valid safetensors file.

Layout, from the start of the image::

    0            8 bytes, little-endian: length of the JSON header
    8            JSON header, padded with spaces so that the data starts at a multiple of 4096
    data_start   pieces, larger item sizes first: no holes, each aligned to its item size
                 (within an item size those that go to storage first, so that their subset is a few long ranges)
                 objects blob in its reserved capacity, zero padded; tensor ``__objects__``
    size_bytes   end

Any safetensors reader sees the pieces as tensors (`Piece.key`). What holdfast itself reads stands in ``__metadata__``:

    holdfast.digest     xxh3_128 of the header's bytes with this value as zeros
    holdfast.format     "1"
    holdfast.image      version, rank, world size, used bytes of the objects blob; padded to a fixed width
    holdfast.checksums  base64: xxh3_64 (little-endian) of each block of the data section
    holdfast.pieces     base64 of zstd of msgpack: the piece table, in image order

Offsets are not stored for our own reader: pieces lie in table order without holes, so no table can name bytes outside
of the data section, or the same bytes twice. Values that change with each version have a fixed width, so a header is
the plan's template with a few values put in.
"""

from __future__ import annotations

import base64
import binascii
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from math import prod
from operator import add, gt

import msgspec
import xxhash
import zstandard

from holdfast.checkpoint.boxes import Box
from holdfast.checkpoint.dtypes import DTYPES, dtype_info
from holdfast.checkpoint.pieces import Piece
from holdfast.checkpoint.version import GenerationId, Version
from holdfast.errors import CorruptError, StateError

__all__ = ["BLOCK_BYTES", "ImageLayout", "ImageMeta", "Piece", "block_checksums", "header_digest", "read_header"]

BLOCK_BYTES = 1 << 20
"""Unit of verification: a reader checks whole blocks."""
MAX_HEADER_BYTES = 100_000_000
"""What safetensors itself accepts."""
OBJECTS_KEY = "__objects__"

_ALIGNMENT = 4096
_IMAGE_WIDTH = 128
_NO_DIGEST = b"0" * 32
_MAX_TABLE_BYTES = 1 << 30
MAX_BLOCK_BYTES = 1 << 30
_MAX_IMAGE_BYTES = 1 << 50
_MAX_DIMS = 64
_IMAGE = re.compile(r"(i\d+-[0-9a-f]{8}-g\d+)-step-(\d+) rank (\d+) of (\d+) objects (\d+) *", re.ASCII)
_DIGEST = re.compile(rb'\A.{8}\{"__metadata__":\{"holdfast\.digest":"([0-9a-f]{32})"', re.DOTALL)
_DIGEST_AT = 8 + len(b'{"__metadata__":{"holdfast.digest":"')


class _Table(msgspec.Struct):
    """The piece table, by column. Whole pieces have an empty box."""

    block_bytes: int
    objects_capacity: int
    dtypes: list[str]
    """Names that `dtype` indexes."""
    name: list[str]
    dtype: list[int]
    shape: list[list[int]]
    offsets: list[list[int]]
    lengths: list[list[int]]
    rank: list[int]
    """-1: not per rank."""
    job: list[bool]
    node_sets: list[list[int]] = []
    """Distinct `Piece.nodes`. In memory only: an image with nothing but job pieces has none."""
    nodes: list[int] = []
    """By piece: index into `node_sets`; empty where there are none."""


class _Header(msgspec.Struct):
    """The part of the JSON that we read; the tensors' own entries are for other readers."""

    metadata: dict[str, str] = msgspec.field(name="__metadata__")


_table_encoder = msgspec.msgpack.Encoder()
_table_decoder = msgspec.msgpack.Decoder(_Table)
_header_decoder = msgspec.json.Decoder(_Header)


@dataclass(frozen=True, eq=False, kw_only=True)
class ImageLayout:
    """Where every byte of an image lies; planned once, good for every version with the same pieces."""

    pieces: tuple[Piece, ...]
    """In image order, which is not the order given to `plan`."""
    piece_offsets: tuple[int, ...]
    """Bytes from the start of the image, parallel to `pieces`."""
    data_start: int
    """Bytes; a multiple of 4096."""
    objects_offset: int
    """Bytes from the start of the image."""
    objects_capacity: int
    size_bytes: int
    """Of the whole image."""
    block_bytes: int
    _tail: bytes = field(repr=False)
    """The header after the last value that changes."""

    @property
    def num_blocks(self) -> int:
        """Blocks of the data section; block i starts at ``data_start + i * block_bytes``, the last may be short."""
        return -(-(self.size_bytes - self.data_start) // self.block_bytes)

    @classmethod
    def plan(cls, pieces: Sequence[Piece], *, objects_capacity: int, block_bytes: int = BLOCK_BYTES) -> ImageLayout:
        """Lay out an image.

        Args:
            pieces: in any order; keys must be unique.
            objects_capacity: bytes reserved for the objects blob, at least its size.
            block_bytes: unit of verification.

        Raises:
            StateError: two pieces have one key, a name is reserved, a dtype cannot be stored, or there are so many
                pieces that the header would be over the 100 MB of safetensors.
        """
        assert objects_capacity >= 0
        assert 0 < block_bytes <= MAX_BLOCK_BYTES
        ordered = sorted(pieces, key=_order)
        sizes = [piece.size_bytes for piece in ordered]
        starts = list(accumulate(sizes, initial=0))
        end = starts[-1] + objects_capacity
        num_blocks = -(-end // block_bytes)
        tail = b"".join(
            (
                b'","holdfast.pieces":"',
                base64.b64encode(pack_pieces(ordered, objects_capacity=objects_capacity, block_bytes=block_bytes)),
                b'"},',
                _entries(ordered, starts, objects_capacity),
                b"}",
            )
        )
        used = len(_head(b"", bytes(8 * num_blocks), _NO_DIGEST, 0)) + len(tail)
        data_start = -(-used // _ALIGNMENT) * _ALIGNMENT
        if data_start > MAX_HEADER_BYTES:
            raise StateError(f"{len(ordered)} pieces in one image need a header of {data_start} bytes; at most 100 MB")
        return cls(
            pieces=tuple(ordered),
            piece_offsets=tuple(data_start + start for start in starts[:-1]),
            data_start=data_start,
            objects_offset=data_start + starts[-1],
            objects_capacity=objects_capacity,
            size_bytes=data_start + end,
            block_bytes=block_bytes,
            _tail=tail.ljust(len(tail) + data_start - used),
        )

    def header(
        self,
        *,
        version: Version,
        global_rank: int,
        world_size: int,
        checksums: bytes | bytearray | memoryview,
        objects_bytes: int,
    ) -> bytes:
        """The first `data_start` bytes of the image.

        Args:
            version: of the state in it.
            global_rank: whose image it is, ``0 <= global_rank < world_size``.
            world_size: number of ranks of the version.
            checksums: xxh3_64 of each block of the data section, 8 bytes little-endian each (`block_checksums`), taken
                with the objects blob zero padded to its capacity.
            objects_bytes: used length of the objects blob.
        """
        assert len(checksums) == 8 * self.num_blocks, (len(checksums), self.num_blocks)
        assert 0 <= objects_bytes <= self.objects_capacity, (objects_bytes, self.objects_capacity)
        image = f"{version} rank {global_rank} of {world_size} objects {objects_bytes}".encode()
        bare = _head(image, checksums, _NO_DIGEST, self.data_start)
        digest = xxhash.xxh3_128(bare)
        digest.update(self._tail)
        head = _head(image, checksums, digest.hexdigest().encode(), self.data_start)
        return b"".join((head, self._tail))

    def meta(
        self,
        header: bytes,
        *,
        version: Version,
        global_rank: int,
        world_size: int,
        checksums: bytes,
        objects_bytes: int,
    ) -> ImageMeta:
        """What `read_header` gives for a header made by `header` with the same values, without parsing it."""
        return ImageMeta(
            version=version,
            global_rank=global_rank,
            world_size=world_size,
            pieces=self.pieces,
            piece_offsets=self.piece_offsets,
            data_start=self.data_start,
            objects_offset=self.objects_offset,
            objects_capacity=self.objects_capacity,
            objects_bytes=objects_bytes,
            size_bytes=self.size_bytes,
            block_bytes=self.block_bytes,
            checksums=checksums,
            header_digest=header_digest(header),
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class ImageMeta:
    """What the header of an image says."""

    version: Version
    global_rank: int
    world_size: int
    pieces: tuple[Piece, ...]
    piece_offsets: tuple[int, ...]
    """Bytes from the start of the image, parallel to `pieces`."""
    data_start: int
    objects_offset: int
    objects_capacity: int
    objects_bytes: int
    size_bytes: int
    """Of the whole image; the file must be exactly this long."""
    block_bytes: int
    checksums: bytes
    """xxh3_64 of each block of the data section, 8 bytes little-endian each."""
    header_digest: bytes
    """What `header_digest` gives for the first `data_start` bytes."""

    @property
    def num_blocks(self) -> int:
        """Blocks of the data section."""
        return len(self.checksums) // 8


def header_digest(header: bytes | memoryview) -> bytes:
    """xxh3_128 (16 bytes) of the first `data_start` bytes of an image: what slot header and index record of it."""
    return xxhash.xxh3_128_digest(header)


def block_checksums(chunks: Iterable[bytes | memoryview], block_bytes: int) -> bytes:
    """The checksums of a data section, in the form that `ImageLayout.header` takes.

    Args:
        chunks: the data section from its start to its end, cut anywhere.
        block_bytes: unit of verification.
    """
    digests: list[bytes] = []
    block = xxhash.xxh3_64()
    room = block_bytes
    for chunk in chunks:
        view = memoryview(chunk)
        while view.nbytes:
            part = view[:room]
            block.update(part)
            room -= part.nbytes
            view = view[part.nbytes :]
            if room == 0:
                digests.append(block.digest()[::-1])
                block.reset()
                room = block_bytes
    if room < block_bytes:
        digests.append(block.digest()[::-1])
    return b"".join(digests)


def read_header(
    read: Callable[[int, int], bytes | bytearray | memoryview], *, expected_digest: bytes | None = None
) -> ImageMeta:
    """Read and check the header of an image.

    Args:
        read: ``read(offset, length)`` gives exactly these bytes of the image.
        expected_digest: what slot header or index say of it (`header_digest`); None: only the header's own digest.

    Raises:
        CorruptError: it is no image, does not match a digest, or a field is out of bounds.
        StorageError, PeerError: from `read`.
    """
    (length,) = struct.unpack("<Q", read(0, 8))
    data_start = 8 + length
    if data_start > MAX_HEADER_BYTES or data_start % _ALIGNMENT or length < 2:
        raise CorruptError(f"no image: a header of {length} bytes")
    header = bytes(read(0, data_start))
    digest = header_digest(header)
    if expected_digest is not None and digest != expected_digest:
        raise CorruptError(
            f"the image's header does not match its digest {expected_digest.hex()}: it is {digest.hex()}"
        )
    _check_own_digest(header)
    try:
        metadata = _header_decoder.decode(memoryview(header)[8:]).metadata
        return _meta(metadata, data_start, digest)
    except KeyError as error:
        raise CorruptError(f"the image's header lacks {error}") from error
    except (msgspec.MsgspecError, binascii.Error, zstandard.ZstdError, ValueError, OverflowError) as error:
        raise CorruptError(f"the image's header does not parse: {error}") from error


def _check_own_digest(header: bytes) -> None:
    match = _DIGEST.match(header)
    if match is None:
        raise CorruptError("no image of holdfast: its header does not start with its digest")
    digest = xxhash.xxh3_128(header[:_DIGEST_AT])
    digest.update(_NO_DIGEST)
    digest.update(memoryview(header)[_DIGEST_AT + len(_NO_DIGEST) :])
    if digest.hexdigest().encode() != match[1]:
        raise CorruptError(f"the image's header does not match its own digest {match[1].decode()}")


def _meta(metadata: dict[str, str], data_start: int, digest: bytes) -> ImageMeta:
    if metadata["holdfast.format"] != "1":
        raise CorruptError(f"image format {metadata['holdfast.format']} is newer than this holdfast reads (1)")
    match = _IMAGE.fullmatch(metadata["holdfast.image"])
    if match is None:
        raise CorruptError(f"the image's header says {metadata['holdfast.image']!r} of itself")
    checksums = base64.b64decode(metadata["holdfast.checksums"], validate=True)
    table = _unpack_table(base64.b64decode(metadata["holdfast.pieces"], validate=True))
    pieces = _pieces(table)
    starts = list(accumulate((piece.size_bytes for piece in pieces), initial=data_start))
    size_bytes = starts[-1] + table.objects_capacity
    rank, world_size, objects_bytes = int(match[3]), int(match[4]), int(match[5])
    if size_bytes > _MAX_IMAGE_BYTES:
        raise CorruptError(f"the image's header speaks of {size_bytes} bytes")
    if len(checksums) != 8 * -(-(size_bytes - data_start) // table.block_bytes):
        raise CorruptError(f"the image's header has {len(checksums)} bytes of checksums for {size_bytes} bytes")
    if objects_bytes > table.objects_capacity or rank >= world_size:
        raise CorruptError(f"the image's header contradicts itself: {match[0].strip()}")
    return ImageMeta(
        version=GenerationId.parse(match[1]).at(int(match[2])),
        global_rank=rank,
        world_size=world_size,
        pieces=pieces,
        piece_offsets=tuple(starts[:-1]),
        data_start=data_start,
        objects_offset=starts[-1],
        objects_capacity=table.objects_capacity,
        objects_bytes=objects_bytes,
        size_bytes=size_bytes,
        block_bytes=table.block_bytes,
        checksums=checksums,
        header_digest=digest,
    )


def _order(piece: Piece) -> tuple[int, bool, str, Box, int]:
    rank = -1 if piece.rank is None else piece.rank
    return (-dtype_info(piece.dtype).itemsize, not piece.job, piece.name, piece.box, rank)


def _head(image: bytes, checksums: bytes | bytearray | memoryview, digest: bytes, data_start: int) -> bytes:
    """The header up to and with the last value that changes; as long for every version of a layout."""
    return b"".join(
        (
            struct.pack("<Q", max(data_start - 8, 0)),
            b'{"__metadata__":{"holdfast.digest":"',
            digest,
            b'","holdfast.format":"1","holdfast.image":"',
            image.ljust(_IMAGE_WIDTH),
            b'","holdfast.checksums":"',
            base64.b64encode(checksums),
        )
    )


def _entries(pieces: list[Piece], starts: list[int], objects_capacity: int) -> bytes:
    """The tensors' entries for other readers: ``"key":{...},…`` without braces around."""
    entries: dict[str, dict[str, object]] = {}
    for piece, start in zip(pieces, starts, strict=False):
        itemsize, code = dtype_info(piece.dtype)
        lengths = piece.box.lengths
        raw = code == "U8" and itemsize > 1
        entries[piece.key] = {
            "dtype": code,
            "shape": (*lengths, itemsize) if raw else lengths,
            "data_offsets": (start, start + prod(lengths) * itemsize),
        }
    entries[OBJECTS_KEY] = {
        "dtype": "U8",
        "shape": (objects_capacity,),
        "data_offsets": (starts[-1], starts[-1] + objects_capacity),
    }
    if len(entries) != len(pieces) + 1 or "__metadata__" in entries:
        _refuse_keys(pieces)
    return msgspec.json.encode(entries)[1:-1]


def _refuse_keys(pieces: list[Piece]) -> None:
    seen: dict[str, Piece] = {}
    for piece in pieces:
        if piece.key in ("__metadata__", OBJECTS_KEY):
            raise StateError(f"a tensor cannot be named {piece.key}: rename it")
        if piece.key in seen:
            raise StateError(f"two pieces of the state have one key {piece.key!r}: {piece} and {seen[piece.key]}")
        seen[piece.key] = piece


def pack_pieces(pieces: Sequence[Piece], *, objects_capacity: int = 0, block_bytes: int = BLOCK_BYTES) -> bytes:
    """The piece table (zstd of msgpack), in the order given."""
    dtypes = sorted({piece.dtype for piece in pieces})
    index = {name: i for i, name in enumerate(dtypes)}
    in_memory = not all(piece.job for piece in pieces)
    node_sets = sorted({piece.nodes for piece in pieces}) if in_memory else []
    node_index = {nodes: i for i, nodes in enumerate(node_sets)}
    table = _Table(
        block_bytes=block_bytes,
        objects_capacity=objects_capacity,
        dtypes=dtypes,
        name=[piece.name for piece in pieces],
        dtype=[index[piece.dtype] for piece in pieces],
        shape=[list(piece.shape) for piece in pieces],
        offsets=[[] if piece.is_whole else list(piece.box.offsets) for piece in pieces],
        lengths=[[] if piece.is_whole else list(piece.box.lengths) for piece in pieces],
        rank=[-1 if piece.rank is None else piece.rank for piece in pieces],
        job=[piece.job for piece in pieces],
        node_sets=[list(nodes) for nodes in node_sets],
        nodes=[node_index[piece.nodes] for piece in pieces] if in_memory else [],
    )
    return zstandard.compress(_table_encoder.encode(table), 3)


def unpack_pieces(packed: bytes) -> tuple[Piece, ...]:
    """The pieces of a table.

    Raises:
        CorruptError: it does not parse, or places a piece outside of its tensor.
    """
    try:
        return _pieces(_unpack_table(packed))
    except (msgspec.MsgspecError, zstandard.ZstdError, ValueError, OverflowError) as error:
        raise CorruptError(f"a piece table does not parse: {error}") from error


def _unpack_table(packed: bytes) -> _Table:
    size = zstandard.frame_content_size(packed)
    if not 0 <= size <= _MAX_TABLE_BYTES:
        raise CorruptError(f"the image's piece table speaks of {size} bytes")
    table = _table_decoder.decode(zstandard.decompress(packed, max_output_size=size))
    columns = (table.dtype, table.shape, table.offsets, table.lengths, table.rank, table.job)
    if any(len(column) != len(table.name) for column in columns):
        raise CorruptError("the columns of the image's piece table differ in length")
    if table.nodes and (len(table.nodes) != len(table.name) or not _within(table.nodes, len(table.node_sets))):
        raise CorruptError("the image's piece table names sets of nodes that it does not have")
    if not 0 < table.block_bytes <= MAX_BLOCK_BYTES or not 0 <= table.objects_capacity <= _MAX_IMAGE_BYTES:
        raise CorruptError(f"blocks of {table.block_bytes} bytes, {table.objects_capacity} bytes for objects")
    unknown = [name for name in table.dtypes if name not in DTYPES]
    if unknown:
        raise CorruptError(f"the image holds dtypes that this holdfast does not know: {', '.join(unknown)}")
    return table


def _within(indices: list[int], stop: int) -> bool:
    return min(indices) >= 0 and max(indices) < stop


def piece_rows(packed: bytes) -> Iterator[tuple[str, int | None, str, list[int], list[int], list[int]]]:
    """The same as rows of (name, rank, dtype, shape, offsets, lengths), which are sooner made than pieces.

    Raises:
        CorruptError: it does not parse, or places a piece outside of its tensor.
    """
    try:
        table = _unpack_table(packed)
        for name, dtype, shape, offsets, lengths, rank, _, _ in _rows(table):
            yield name, rank if rank >= 0 else None, table.dtypes[dtype], shape, offsets, lengths
    except (msgspec.MsgspecError, zstandard.ZstdError, ValueError, OverflowError) as error:
        raise CorruptError(f"a piece table does not parse: {error}") from error


def _pieces(table: _Table) -> tuple[Piece, ...]:
    return tuple(
        Piece(
            name,
            table.dtypes[dtype],
            tuple(shape),
            Box(tuple(offsets), tuple(lengths)),
            rank if rank >= 0 else None,
            job,
            nodes,
        )
        for name, dtype, shape, offsets, lengths, rank, job, nodes in _rows(table)
    )


def _rows(
    table: _Table,
) -> Iterator[tuple[str, int, list[int], list[int], list[int], int, bool, tuple[int, ...]]]:
    """(name, dtype, shape, offsets, lengths, rank, job, nodes) of each piece, checked; whole boxes written out."""
    num_dtypes = len(table.dtypes)
    node_sets = [tuple(nodes) for nodes in table.node_sets]
    held_by = [node_sets[i] for i in table.nodes] if table.nodes else [()] * len(table.name)
    columns = (table.name, table.dtype, table.shape, table.offsets, table.lengths, table.rank, table.job, held_by)
    for name, dtype, shape, offsets, lengths, rank, job, nodes in zip(*columns, strict=True):
        is_whole = not lengths
        starts, sizes = ([0] * len(shape), shape) if is_whole else (offsets, lengths)
        sound = (
            0 <= dtype < num_dtypes
            and len(starts) == len(sizes) == len(shape) <= _MAX_DIMS
            and min(starts, default=0) >= 0
            and min(sizes, default=0) >= 0
            and (is_whole or not any(map(gt, map(add, starts, sizes), shape)))
        )
        if not sound:
            raise CorruptError(f"the image's piece table places {name!r} at {offsets}+{lengths} of shape {shape}")
        yield name, dtype, shape, starts, sizes, rank, job, nodes
