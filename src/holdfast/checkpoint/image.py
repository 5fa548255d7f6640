"""Image layout and header (stub: bodies follow)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from holdfast.checkpoint.pieces import Piece
from holdfast.checkpoint.version import Version

__all__ = ["BLOCK_BYTES", "ImageLayout", "ImageMeta", "Piece", "read_header"]

BLOCK_BYTES = 1 << 20


@dataclass(frozen=True, eq=False)
class ImageLayout:
    """Where every byte of an image lies; planned once, good for every version with the same pieces."""

    pieces: tuple[Piece, ...]
    """In image order, which is not the order given to `plan`."""
    piece_offsets: tuple[int, ...]
    """Bytes from the start of the image, parallel to `pieces`."""
    data_start: int
    """Bytes; multiple of 4096."""
    objects_offset: int
    objects_capacity: int
    size_bytes: int
    block_bytes: int

    @property
    def num_blocks(self) -> int:
        raise NotImplementedError

    @classmethod
    def plan(cls, pieces: Sequence[Piece], *, objects_capacity: int, block_bytes: int = BLOCK_BYTES) -> ImageLayout:
        raise NotImplementedError

    def header(
        self, *, version: Version, global_rank: int, world_size: int, checksums: bytes | bytearray, objects_bytes: int
    ) -> bytes:
        """Exactly `data_start` bytes. The objects blob must be zero padded to its capacity before checksums are taken."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class ImageMeta:
    """What the header of an image says."""

    version: Version
    global_rank: int
    world_size: int
    pieces: tuple[Piece, ...]
    piece_offsets: tuple[int, ...]
    data_start: int
    objects_offset: int
    objects_capacity: int
    objects_bytes: int
    size_bytes: int
    block_bytes: int
    checksums: bytes
    """xxh3_64 of each block of the data section, 8 bytes little-endian each."""
    header_digest: bytes
    """xxh3_128 of the first `data_start` bytes (16 bytes, big-endian as xxhash's digest())."""


def header_digest(header: bytes | memoryview) -> bytes:
    """xxh3_128 of a header (16 bytes): what the slot header and the index record."""
    raise NotImplementedError


def read_header(
    read: Callable[[int, int], bytes | bytearray | memoryview], *, expected_digest: bytes | None = None
) -> ImageMeta:
    """Read and check the header of an image; ``read(offset, length)`` is image-relative.

    Raises:
        CorruptError: it is no image, a field is out of bounds, or it does not match its digest.
    """
    raise NotImplementedError
