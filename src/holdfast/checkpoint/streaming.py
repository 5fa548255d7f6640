"""Checksums while bytes stream to storage: each byte is gone through once, by two threads side by side."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import xxhash

_SMALL_BYTES = 1 << 18
"""Chunks below this are joined: one system call and one checksum call for many of them."""
_PACK_BYTES = 4 << 20
_LARGEST_BYTES = 8 << 20


class BlockHasher:
    """The checksums of a data section that is given part by part."""

    def __init__(self, block_bytes: int) -> None:
        self._block_bytes = block_bytes
        self._digests: list[bytes] = []
        self._block = xxhash.xxh3_64()
        self._room = block_bytes

    def update(self, view: memoryview) -> None:
        """Take the next bytes."""
        while view.nbytes:
            if self._room == self._block_bytes and view.nbytes >= self._block_bytes:
                self._digests.append(xxhash.xxh3_64_digest(view[: self._block_bytes])[::-1])
                view = view[self._block_bytes :]
                continue
            part = view[: self._room]
            self._block.update(part)
            self._room -= part.nbytes
            view = view[part.nbytes :]
            if self._room == 0:
                self._end_block()

    def digests(self) -> bytes:
        """All checksums, in the form that `ImageLayout.header` takes; once, after the last byte."""
        if self._room < self._block_bytes:
            self._end_block()
        return b"".join(self._digests)

    def _end_block(self) -> None:
        self._digests.append(self._block.digest()[::-1])
        self._block.reset()
        self._room = self._block_bytes


def hashed(chunks: Iterable[bytes | memoryview], hasher: BlockHasher) -> Iterator[memoryview]:
    """The same bytes in parts that suit a file; a thread hashes each while the caller writes it."""
    with ThreadPoolExecutor(1, thread_name_prefix="holdfast-hash") as pool:
        before: Future[None] | None = None
        for part in packed(chunks):
            now = pool.submit(hasher.update, part)
            if before is not None:
                before.result()
            before = now
            yield part
        if before is not None:
            before.result()


def packed(chunks: Iterable[bytes | memoryview]) -> Iterator[memoryview]:
    """The same bytes, small chunks joined, large ones cut."""
    small: list[memoryview] = []
    size = 0
    for chunk in chunks:
        view = memoryview(chunk).cast("B")
        if view.nbytes < _SMALL_BYTES:
            small.append(view)
            size += view.nbytes
            if size < _PACK_BYTES:
                continue
        if size:
            yield memoryview(b"".join(small))
            small, size = [], 0
        if view.nbytes >= _SMALL_BYTES:
            for start in range(0, view.nbytes, _LARGEST_BYTES):
                yield view[start : start + _LARGEST_BYTES]
    if size:
        yield memoryview(b"".join(small))
