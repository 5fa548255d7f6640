"""Where the bytes of an image come from (stub: bodies follow)."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol


class Source(Protocol):
    """An image, readable by range. These two methods are the whole surface; both may be called from one thread only."""

    def read(self, offset: int, length: int) -> memoryview:
        """Exactly `length` bytes at `offset` from the start of the image.

        Raises:
            StorageError, PeerError, CorruptError: they cannot be had (the reader then tries another image).
        """
        ...

    def close(self) -> None:
        """Release what it holds."""
        ...


class FileSource:
    """An image in a file, from byte `offset` on; opened at the first read."""

    def __init__(self, path: str | Path, offset: int = 0) -> None:
        raise NotImplementedError

    def read(self, offset: int, length: int) -> memoryview:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError


class MemorySource:
    """An image in memory (a mapped slot) that does not change while it is read; reads are views of it."""

    def __init__(self, image: memoryview) -> None:
        raise NotImplementedError

    def read(self, offset: int, length: int) -> memoryview:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError
