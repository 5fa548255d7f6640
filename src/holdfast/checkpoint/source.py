"""Where the bytes of an image come from."""

from __future__ import annotations

import os
from contextlib import suppress
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Protocol, runtime_checkable

from holdfast.errors import CorruptError, StorageError

_HINT_BYTES = 128 << 10
"""Linux cuts a hint to what it reads ahead by itself, mostly this."""
_DEEP_BYTES = 2 << 20
"""A system that reads so far ahead by itself needs hints for jumps only."""


class Source(Protocol):
    """An image, readable by range. These two methods are the whole surface; one thread at a time calls them."""

    def read(self, offset: int, length: int) -> memoryview:
        """Exactly `length` bytes at `offset` from the start of the image; called for each range that a reader needs.

        Raises:
            StorageError, PeerError, CorruptError: they cannot be had (the reader then tries another image).
        """
        ...

    def close(self) -> None:
        """Release what it holds; called once, when the reader is done."""
        ...


@runtime_checkable
class FarSource(Protocol):
    """A source that is worth telling what is read soon."""

    def will_read(self, offset: int, length: int) -> None:
        """`read` will be called for exactly this range; ranges are told in order, by one thread at a time."""
        ...


class FileSource:
    """An image in a file, from byte `offset` on. The file is opened at the first read and stays open. Any thread may
    read."""

    def __init__(self, path: str | Path, offset: int = 0) -> None:
        self._path = Path(path)
        self._offset = offset
        self._fd: int | None = None
        self._opening = Lock()
        self._ahead_bytes: int | None = None
        """How far the system reads ahead; None: not looked up yet."""
        self._told = 0
        """End of the range that `will_read` was told last, in the file."""

    def read(self, offset: int, length: int) -> memoryview:
        """See `Source.read`.

        Raises:
            StorageError: the file cannot be opened or read.
            CorruptError: it ends before the range does.
        """
        view = memoryview(bytearray(length))
        self.read_into(offset, view)
        return view

    def read_into(self, offset: int, view: memoryview) -> None:
        """The same into memory that is there already: new memory is slower than the file where that is cached.

        Raises:
            StorageError, CorruptError: as `read`.
        """
        length = len(view)
        done = 0
        try:
            fd = self._open()
            while done < length:
                count = os.preadv(fd, [view[done:]], self._offset + offset + done)
                if count == 0:
                    break
                done += count
        except OSError as error:
            raise StorageError(f"{self._path} cannot be read: {error.strerror}") from error
        if done < length:
            raise CorruptError(f"{self._path} ends {length - done} bytes short of {self._offset + offset + length}")

    def will_read(self, offset: int, length: int) -> None:
        """Have the system begin to read a range that is read soon; ranges are told in order, by one thread at a time. A
        hint: nothing comes of it where that fails.

        Where the system reads far ahead by itself, only what lies beyond that is told. What is read in order it keeps
        in large pages, what it is told about in small ones, which take several times as long.
        """
        with suppress(OSError):
            fd = self._open()
            if self._ahead_bytes is None:
                self._ahead_bytes = _read_ahead_bytes(os.fstat(fd).st_dev)
            start, end = self._offset + offset, self._offset + offset + length
            skipped, self._told = start - self._told, end
            if self._ahead_bytes >= _DEEP_BYTES and 0 <= skipped <= self._ahead_bytes:
                return
            step = max(_HINT_BYTES, self._ahead_bytes)
            for at in range(start, end, step):
                os.posix_fadvise(fd, at, min(step, end - at), os.POSIX_FADV_WILLNEED)

    def _open(self) -> int:
        with self._opening:
            if self._fd is None:
                self._fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
            return self._fd

    def close(self) -> None:
        """Close the file; a later read opens it again."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


@cache
def _read_ahead_bytes(device: int) -> int:
    """How far the system reads ahead in files of a device; 0 where it does not say."""
    number = f"{os.major(device)}:{os.minor(device)}"
    for place in (f"block/{number}/queue", f"block/{number}/../queue", f"../class/bdi/{number}"):
        with suppress(OSError, ValueError):
            return int(Path(f"/sys/dev/{place}/read_ahead_kb").read_text()) << 10
    return 0


class MemorySource:
    """An image in memory (a mapped slot) that does not change while it is read; reads are views of it."""

    def __init__(self, image: memoryview) -> None:
        self._image = image.cast("B")

    def read(self, offset: int, length: int) -> memoryview:
        """See `Source.read`; no copy.

        Raises:
            CorruptError: the range is not within the memory.
        """
        if offset < 0 or length < 0 or offset + length > len(self._image):
            raise CorruptError(f"bytes {offset} to {offset + length} of an image of {len(self._image)} bytes")
        return self._image[offset : offset + length]

    def close(self) -> None:
        """Let go of the memory."""
        self._image.release()
