"""An open image whose bytes are given out only after they matched their checksums."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator

import xxhash

from holdfast.checkpoint.image import ImageMeta, read_header
from holdfast.checkpoint.source import FarSource, FileSource, MemorySource, Source
from holdfast.errors import CorruptError, HoldfastError

WINDOW_BYTES = 8 << 20
"""Most bytes that are asked of a source at once."""
_CACHED_BLOCKS = 16
_CACHED_BYTES = 256 << 10
"""What is read of a file before its checksum goes on over it: it is still in the processor's cache then."""


class OpenImage:
    """An image to read from.

    One thread at a time. Blocks of a `MemorySource`, which does not change while it is read, are verified once; those
    of any other source each time they are read, and the last few are kept.
    """

    def __init__(
        self,
        name: str,
        meta: ImageMeta | None,
        source: Source,
        *,
        expected_digest: bytes | None = None,
        expected_size: int | None = None,
    ) -> None:
        """
        Args:
            name: for messages: file name or slot path.
            meta: from `read_header`; None: it is read when it is first needed, and checked against the expected values.
            source: closed by `close`.
            expected_digest: what the index says of the header.
            expected_size: what the index says of the image, in bytes.
        """
        self.name = name
        self.source = source
        self._far = source if isinstance(source, FarSource) else None
        self._meta = meta
        self._expected_digest = expected_digest
        self._expected_size = expected_size
        self._broken: HoldfastError | None = None
        self._sound = bytearray()
        self.damaged = False
        """A block did not match its checksum."""
        self._cache: OrderedDict[int, memoryview] = OrderedDict()
        self._objects: memoryview | None = None

    @property
    def is_known(self) -> bool:
        """Whether `meta` needs no reading."""
        return self._meta is not None

    @property
    def meta(self) -> ImageMeta:
        """What the header says.

        Raises:
            CorruptError, StorageError, PeerError: it cannot be read or does not match what is expected.
        """
        if self._meta is None:
            self._meta = self._read_meta(self.source.read)
        return self._meta

    def _read_meta(self, read: Callable[[int, int], memoryview]) -> ImageMeta:
        if self._broken is not None:
            raise self._broken
        try:
            meta = read_header(read, expected_digest=self._expected_digest)
            if self._expected_size is not None and meta.size_bytes != self._expected_size:
                raise CorruptError(f"its header speaks of {meta.size_bytes} bytes, the index of {self._expected_size}")
        except CorruptError as error:
            self._broken = CorruptError(f"{self.name}: {error}")
            raise self._broken from error
        except HoldfastError as error:
            self._broken = error
            raise
        return meta

    def range(self, start: int, length: int) -> memoryview:
        """Bytes of the data section that match their checksums; a view, good until `close`.

        Args:
            start: from the start of the image, not before its data section.
            length: bytes.

        Raises:
            CorruptError: a block does not match its checksum; names image and block.
            StorageError, PeerError: the source cannot give them.
        """
        meta = self.meta
        assert meta.data_start <= start <= start + length <= meta.size_bytes, (start, length)
        if length == 0:
            return memoryview(b"")
        first = (start - meta.data_start) // meta.block_bytes
        last = (start + length - 1 - meta.data_start) // meta.block_bytes
        if isinstance(self.source, MemorySource):
            self._verify_memory(first, last)
            return self.source.read(start, length)
        base = meta.data_start + first * meta.block_bytes
        data = self._block(first) if first == last else self._blocks(first, last)
        return data[start - base : start - base + length]

    def windows(self, start: int, length: int) -> Iterator[memoryview]:
        """The same as `range`, in parts that end at block boundaries and are at most `WINDOW_BYTES` or a block long."""
        meta = self.meta
        step = max(meta.block_bytes, WINDOW_BYTES // meta.block_bytes * meta.block_bytes)
        end = start + length
        while start < end:
            stop = min(end, start + step - (start - meta.data_start) % meta.block_bytes)
            yield self.range(start, stop - start)
            start = stop

    def blocks(self, first: int, end: int, into: memoryview | None = None) -> memoryview:
        """Whole blocks ``first <= i < end``, verified, in memory of their own (of a `MemorySource`: a view).

        Args:
            first: block.
            end: block.
            into: memory to use, where it is large enough and the source can.

        Raises:
            CorruptError: one does not match its checksum; names image and block.
            StorageError, PeerError: the source cannot give them.
        """
        start, length = self.extent(first, end)
        if into is None or len(into) < length or not isinstance(self.source, FileSource):
            data = self.source.read(start, length)
            self._check_all(first, data)
            return data
        size = self.meta.block_bytes
        for at in range(0, length, size):
            block = into[at : min(at + size, length)]
            self._compare(first + at // size, _read_hashed(self.source, start + at, block))
        return into[:length]

    def _check_all(self, first: int, data: memoryview) -> None:
        size = self.meta.block_bytes
        for at in range(0, len(data), size):
            self._check(first + at // size, data[at : at + size])

    def will_read(self, first: int, end: int) -> None:
        """`blocks` will be called for these."""
        if self._far is not None:
            self._far.will_read(*self.extent(first, end))

    def header(self) -> memoryview:
        """The bytes of the header, for `adopt` of another rank's.

        Raises:
            CorruptError, StorageError, PeerError: it cannot be read or does not match what is expected.
        """
        return self.source.read(0, self.meta.data_start)

    def adopt(self, header: memoryview) -> None:
        """Take the header as another rank read it; checked against the expected values.

        Raises:
            CorruptError: it is not this image's.
        """
        if self._meta is None:
            self._meta = self._read_meta(lambda offset, length: header[offset : offset + length])

    def objects_blob(self) -> memoryview:
        """The used part of the objects blob."""
        if self._objects is not None:
            return self._objects
        return self.range(self.meta.objects_offset, self.meta.objects_bytes)

    @property
    def has_objects(self) -> bool:
        """Whether `objects_blob` needs no reading."""
        return self._objects is not None

    def adopt_objects(self, blob: memoryview) -> None:
        """Take the used part of the objects blob, which somebody has read and verified."""
        self._objects = blob

    def verify(self) -> None:
        """Read everything once.

        Raises:
            CorruptError: something does not match its checksum.
            StorageError, PeerError: the source cannot give it.
        """
        meta = self.meta
        for _ in self.windows(meta.data_start, meta.size_bytes - meta.data_start):
            pass

    def close(self) -> None:
        """Close the source."""
        self._cache.clear()
        self.source.close()

    def extent(self, first: int, end: int) -> tuple[int, int]:
        """Where whole blocks lie: first byte, from the start of the image, and how many."""
        return self._extent(first, end - 1)

    def _extent(self, first: int, last: int) -> tuple[int, int]:
        meta = self.meta
        start = meta.data_start + first * meta.block_bytes
        return start, min(meta.data_start + (last + 1) * meta.block_bytes, meta.size_bytes) - start

    def _check(self, block: int, data: memoryview) -> None:
        self._compare(block, xxhash.xxh3_64_intdigest(data))

    def _compare(self, block: int, checksum: int) -> None:
        expected = self.meta.checksums[8 * block : 8 * block + 8]
        if checksum != int.from_bytes(expected, "little"):
            self.damaged = True
            raise CorruptError(
                f"{self.name}: block {block} (bytes {self._extent(block, block)[0]} on) does not match its checksum"
            )

    def _verify_memory(self, first: int, last: int) -> None:
        if not self._sound:
            self._sound = bytearray(self.meta.num_blocks)
        for block in range(first, last + 1):
            if not self._sound[block]:
                self._check(block, self.source.read(*self._extent(block, block)))
                self._sound[block] = 1

    def _block(self, block: int) -> memoryview:
        data = self._cache.get(block)
        if data is None:
            data = self.source.read(*self._extent(block, block))
            self._check(block, data)
            self._keep(block, data)
        else:
            self._cache.move_to_end(block)
        return data

    def _blocks(self, first: int, last: int) -> memoryview:
        data = self.source.read(*self._extent(first, last))
        size = self.meta.block_bytes
        self._check_all(first, data)
        # The neighbours of this range begin or end in its outer blocks: keep copies, not the whole range.
        self._keep(first, memoryview(bytes(data[:size])))
        self._keep(last, memoryview(bytes(data[(last - first) * size :])))
        return data

    def _keep(self, block: int, data: memoryview) -> None:
        self._cache[block] = data
        while len(self._cache) > _CACHED_BLOCKS:
            self._cache.popitem(last=False)


def _read_hashed(source: FileSource, offset: int, into: memoryview) -> int:
    """Read a range; its xxh3_64."""
    checksum = xxhash.xxh3_64()
    for at in range(0, len(into), _CACHED_BYTES):
        part = into[at : at + _CACHED_BYTES]
        source.read_into(offset + at, part)
        checksum.update(part)
    return checksum.intdigest()
