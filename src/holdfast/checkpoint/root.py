"""The root record: a checkpoint exists when its root does.

At most 4 KiB, written last, created once. 4080 bytes: 16 Reed-Solomon codewords of 255 bytes (207 data, 48 parity: 24
wrong bytes each are corrected), interleaved, so that a burst of up to 384 bytes is corrected too. The code is
systematic: the file starts with the data itself::

    0     8     magic
    8     4     little-endian length of the record
    12    16    xxh3_128 of the record
    28    ...   record, msgpack; zeros up to 3312
    3312  768   parity
"""

from __future__ import annotations

import re
import struct
from functools import cache
from typing import TYPE_CHECKING

import msgspec
import xxhash

from holdfast.checkpoint.version import Version
from holdfast.errors import DECODE_ERRORS, CorruptError, UsageError

if TYPE_CHECKING:
    from reedsolo import RSCodec

ROOT_NAME = "root"
ROOT_BYTES = 4080
_MAGIC = b"HOLDFST1"
_WORDS = 16
_PARITY = 48
_DATA_BYTES = ROOT_BYTES - _WORDS * _PARITY
_HEAD = struct.Struct("<8sI16s")
_INDEX_NAME = re.compile(r"index[0-9a-z.-]*\.json\.zst", re.ASCII)
"""The only names that a root can give: tools write there, too."""


class IndexFile(msgspec.Struct, frozen=True, kw_only=True):
    """A copy of the index, by exact name."""

    name: str
    size_bytes: int


class Root(msgspec.Struct, frozen=True, kw_only=True):
    """What the root says. Images are named, with sizes and digests, in the index, whose digest stands here."""

    format: int = 1
    version: Version
    world_size: int
    num_images: int
    size_bytes: int
    """Of all images."""
    index_digest: bytes
    """xxh3_128 of the (compressed) index, the same for all copies."""
    index_copies: tuple[IndexFile, ...]
    time: float
    """Unix seconds of the commit."""
    history: str | None = None
    tag: str | None = None
    metrics: dict[str, float] = {}


@cache
def _codec() -> RSCodec:
    from reedsolo import RSCodec

    return RSCodec(_PARITY)


def encode_root(root: Root) -> bytes:
    """The bytes of the root file.

    Raises:
        UsageError: tag and metrics are too long to fit.
    """
    record = msgspec.msgpack.encode(root)
    if _HEAD.size + len(record) > _DATA_BYTES:
        raise UsageError(
            f"tag and {len(root.metrics)} metrics take {len(record)} bytes in the root record, at most "
            f"{_DATA_BYTES - _HEAD.size} fit: give fewer or shorter ones"
        )
    data = _HEAD.pack(_MAGIC, len(record), xxhash.xxh3_128_digest(record)) + record
    data = data.ljust(_DATA_BYTES, b"\0")
    whole = bytearray(ROOT_BYTES)
    for word in range(_WORDS):
        whole[word::_WORDS] = _codec().encode(data[word::_WORDS])
    return bytes(whole)


def decode_root(data: bytes) -> tuple[Root, bool]:
    """Read a root file back.

    Returns:
        The root, and whether bytes of its record had to be corrected.

    Raises:
        CorruptError: it is no root, or too much of it is wrong.
    """
    root = _parse(data)
    if root is not None:
        return root, False
    root = _parse(_corrected(data))
    if root is None:
        raise CorruptError("the root record is damaged beyond repair")
    return root, True


def _parse(data: bytes) -> Root | None:
    """The record, None where it does not match its digest."""
    if len(data) < _HEAD.size:
        return None
    magic, length, digest = _HEAD.unpack_from(data)
    record = data[_HEAD.size : _HEAD.size + length]
    if magic != _MAGIC or len(record) != length or xxhash.xxh3_128_digest(record) != digest:
        return None
    try:
        root = msgspec.msgpack.decode(record, type=Root)
    except DECODE_ERRORS as error:
        raise CorruptError(f"the root record does not parse: {error}") from error
    if root.format != 1:
        raise CorruptError(f"checkpoint format {root.format} is newer than this holdfast reads (1)")
    for copy in root.index_copies:
        if not _INDEX_NAME.fullmatch(copy.name):
            raise CorruptError(f"the root names the index {copy.name!r}, which is not in its directory")
    return root


def _corrected(data: bytes) -> bytes:
    from reedsolo import ReedSolomonError

    whole = bytearray(data[:ROOT_BYTES].ljust(ROOT_BYTES, b"\0"))
    for word in range(_WORDS):
        try:
            whole[word::_WORDS] = _codec().decode(bytes(whole[word::_WORDS]))[1]
        except ReedSolomonError as error:
            raise CorruptError("the root record is damaged beyond repair") from error
    return bytes(whole)
