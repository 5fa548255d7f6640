"""The bytes that a node gives to others: images in its slots, its coded streams and parities.

A stream or a parity is laid out as *extents*: ranges of slot files or of a parity buffer, one after the other. What
leaves of them has just matched the checksums of its image, or of its parity, so a reader that decodes never mixes a
damaged shard in; it is told, and takes another one.
"""

from __future__ import annotations

import mmap
import os
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import xxhash

from holdfast.checkpoint.image import ImageMeta, header_digest, read_header
from holdfast.checkpoint.version import Version
from holdfast.errors import CorruptError, PeerError
from holdfast.snapshot.arena import EMPTY_HEADER, SLOT_HEADER_BYTES, SlotHeader, SlotState, read_slot_header
from holdfast.snapshot.bulk import ParityRange, Range, SlotRange, StreamRange
from holdfast.snapshot.parity import PARITY_BLOCK_BYTES

_KEPT_FILES: Final = 64
_KEPT_METAS: Final = 64
_KEPT_SOUND: Final = 256
_SOUND_S: Final = 0.2


@dataclass(frozen=True)
class SlotExtent:
    """Bytes of an image in a slot."""

    path: Path
    offset: int
    """From the start of the image."""
    length: int


@dataclass(frozen=True)
class ParityExtent:
    """Bytes of a whole parity buffer."""

    path: Path
    offset: int
    """From the start of the parities."""
    length: int
    checksums: bytes = field(repr=False)
    """Of the whole buffer."""
    size_bytes: int
    """Of all parities in it."""


Extent = SlotExtent | ParityExtent


@dataclass
class _Mapped:
    inode: tuple[int, int]
    mapping: mmap.mmap
    view: memoryview
    raw: bytes = b""
    """The slot header as it was read last, and what it says: it is read with every range, and changes with versions."""
    header: SlotHeader = EMPTY_HEADER


class Shelf:
    """Reads ranges for the bulk server, in its thread. The event loop replaces `streams` and `parities` as a whole, and
    never changes them."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.streams: dict[tuple[Version, int], Sequence[SlotExtent]] = {}
        """By version, and this node's rank in its generation."""
        self.parities: dict[tuple[Version, int, int], ParityExtent] = {}
        """By version, stripe and number."""
        self._files: OrderedDict[Path, _Mapped] = OrderedDict()
        self._metas: OrderedDict[tuple[Path, bytes], ImageMeta] = OrderedDict()
        self._sound: dict[tuple[Path, bytes, int], float] = {}
        """Blocks of images that were compared a moment ago: neighbouring chunks share one."""

    def read(self, range_: Range) -> memoryview | bytes:
        """The bytes of a range; a view of shared memory where they lie in one piece.

        Raises:
            PeerError: this node does not hold them.
            CorruptError: they do not match their checksum.
            OSError: a file cannot be opened.
        """
        match range_:
            case SlotRange():
                return self._slot_range(range_)
            case StreamRange():
                return self._joined(range_, self.streams.get((range_.version, range_.node_rank)))
            case ParityRange():
                extent = self.parities.get((range_.version, range_.stripe, range_.number))
                return self._joined(range_, None if extent is None else (extent,))

    # --- slots

    def _slot_range(self, range_: SlotRange) -> memoryview:
        path = Path(range_.path)
        if path.parent != self._directory or not path.name.startswith("slot-"):
            raise PeerError(f"{path} is no slot of this node")
        view, _ = self._slot(path, range_.version)
        if range_.offset + range_.length > len(view):
            raise PeerError(f"bytes {range_.offset} to {range_.offset + range_.length} of a slot of {len(view)} bytes")
        return view[range_.offset : range_.offset + range_.length]

    def _slot(self, path: Path, version: Version) -> tuple[memoryview, SlotHeader]:
        mapped = self._map(path)
        view, raw = mapped.view, bytes(mapped.view[:SLOT_HEADER_BYTES])
        if raw != mapped.raw:
            mapped.raw, mapped.header = raw, read_slot_header(raw)
        header = mapped.header
        if header.state is not SlotState.CLEAN or header.version != version:
            raise PeerError(f"{path.name} holds {header.version} ({header.state.name.lower()}), not {version}")
        return view, header

    # --- streams and parities

    def _joined(self, range_: StreamRange | ParityRange, extents: Sequence[Extent] | None) -> memoryview | bytes:
        if extents is None:
            raise PeerError(f"this node does not hold {range_}")
        parts = [
            self._checked(extent, start, length, range_.version)
            for extent, start, length in cut(extents, range_.offset, range_.length)
        ]
        if sum(map(len, parts)) != range_.length:
            raise PeerError(f"{range_} reaches past the end")
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _checked(self, extent: Extent, start: int, length: int, version: Version) -> memoryview:
        if isinstance(extent, ParityExtent):
            return self._checked_parity(extent, start, length, version)
        view, header = self._slot(extent.path, version)
        image = view[SLOT_HEADER_BYTES : SLOT_HEADER_BYTES + header.size_bytes]
        start += extent.offset
        self._check_image(image, self._meta(extent.path, image, header), start, length, extent.path)
        return image[start : start + length]

    def _checked_parity(self, extent: ParityExtent, start: int, length: int, version: Version) -> memoryview:
        view, _ = self._slot(extent.path, version)
        parity = view[SLOT_HEADER_BYTES : SLOT_HEADER_BYTES + extent.size_bytes]
        start += extent.offset
        for block in range(start // PARITY_BLOCK_BYTES, -(-(start + length) // PARITY_BLOCK_BYTES)):
            data = parity[block * PARITY_BLOCK_BYTES : (block + 1) * PARITY_BLOCK_BYTES]
            if xxhash.xxh3_64_intdigest(data).to_bytes(8, "little") != extent.checksums[8 * block : 8 * block + 8]:
                raise CorruptError(f"{extent.path}: block {block} of the parity of {version} does not match")
        return parity[start : start + length]

    def _meta(self, path: Path, image: memoryview, header: SlotHeader) -> ImageMeta:
        key = (path, header.header_digest)
        meta = self._metas.get(key)
        if meta is None:
            meta = read_header(
                lambda offset, length: image[offset : offset + length], expected_digest=header.header_digest
            )
            self._metas[key] = meta
            while len(self._metas) > _KEPT_METAS:
                self._metas.popitem(last=False)
        return meta

    def _check_image(self, image: memoryview, meta: ImageMeta, start: int, length: int, path: Path) -> None:
        """Compare the header, and each block of the data section, that the range touches."""
        if start < meta.data_start and header_digest(image[: meta.data_start]) != meta.header_digest:
            raise CorruptError(f"{path}: the image's header does not match its digest")
        first = max(0, start - meta.data_start) // meta.block_bytes
        last = -(-max(0, start + length - meta.data_start) // meta.block_bytes)
        now = time.monotonic()
        for block in range(first, last):
            key = (path, meta.header_digest, block)
            if now - self._sound.get(key, -_SOUND_S) < _SOUND_S:
                continue
            begin = meta.data_start + block * meta.block_bytes
            data = image[begin : min(begin + meta.block_bytes, meta.size_bytes)]
            if xxhash.xxh3_64_intdigest(data).to_bytes(8, "little") != meta.checksums[8 * block : 8 * block + 8]:
                raise CorruptError(f"{path}: block {block} does not match its checksum")
            if len(self._sound) >= _KEPT_SOUND:
                self._sound.clear()
            self._sound[key] = now

    # --- files

    def _map(self, path: Path) -> _Mapped:
        known = self._files.get(path)
        if known is None or known.inode != _inode(os.stat(path, follow_symlinks=False)):
            known = self._files[path] = _opened(path)
        self._files.move_to_end(path)
        while len(self._files) > _KEPT_FILES:  # views that are still being sent keep their mapping
            self._files.popitem(last=False)
        return known

    def forget(self) -> None:
        """Unmap files that are gone; called now and then by the server's thread."""
        for path in [path for path in self._files if not path.exists()]:
            del self._files[path]


def _inode(status: os.stat_result) -> tuple[int, int]:
    return (status.st_ino, status.st_size)


def _opened(path: Path) -> _Mapped:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        status = os.fstat(descriptor)
        mapping = mmap.mmap(descriptor, status.st_size, prot=mmap.PROT_READ)
        return _Mapped(_inode(status), mapping, memoryview(mapping))
    finally:
        os.close(descriptor)


def cut(extents: Sequence[Extent], offset: int, length: int) -> Iterator[tuple[Extent, int, int]]:
    """The parts of consecutive extents that make up `length` bytes from `offset` on: extent, start in it, bytes."""
    for extent in extents:
        if length <= 0:
            return
        if offset < extent.length:
            taken = min(length, extent.length - offset)
            yield extent, offset, taken
            offset, length = 0, length - taken
        else:
            offset -= extent.length
