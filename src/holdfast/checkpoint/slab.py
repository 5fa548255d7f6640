"""Memory for what is being read, which other processes of the host can look into: nothing is sent where one machine
holds both.

A slab is a few slots in an anonymous file (memfd), so that nothing has a name and nothing stays behind. Another process
opens it through ``/proc/<pid>/fd``, read-only, and knows it by the key at its start. Where that does not work (another
host, another container, another user) it is told None, and the bytes have to be sent.
"""

from __future__ import annotations

import mmap
import os
import stat
from contextlib import suppress

import msgspec

from holdfast.checkpoint.wants import UNIT_BYTES

_HEADER_BYTES = mmap.PAGESIZE
_MAX_SLOTS = 1 << 10


class Place(msgspec.Struct, frozen=True, array_like=True):
    """Where a slab is found."""

    host: str
    pid: int
    fd: int
    slots: int
    key: bytes


class Slab:
    """Slots of `UNIT_BYTES`; its owner writes into them and says which may be looked at. Any thread; each slot one."""

    def __init__(self, slots: int, *, host: str, key: bytes) -> None:
        """
        Args:
            slots: their number.
            host: names this machine.
            key: random.
        """
        self._fd = os.memfd_create("holdfast-load", os.MFD_CLOEXEC)
        size = _HEADER_BYTES + slots * UNIT_BYTES
        try:
            os.ftruncate(self._fd, size)
            self._map = mmap.mmap(self._fd, size)
        except BaseException:
            os.close(self._fd)
            raise
        self._map[: len(key)] = key
        self.place = Place(host, os.getpid(), self._fd, slots, key)

    def slot(self, number: int) -> memoryview:
        """Its memory."""
        start = _HEADER_BYTES + number * UNIT_BYTES
        return memoryview(self._map)[start : start + UNIT_BYTES]

    def close(self) -> None:
        """Let go of it; who looks into it now still sees it."""
        with suppress(BufferError):  # an error is on its way, whose traceback holds a view
            self._map.close()
        os.close(self._fd)


class SeenSlab:
    """Another process's slab. For one thread."""

    def __init__(self, mapping: mmap.mmap) -> None:
        """Called by `see`."""
        self._map = mapping

    @classmethod
    def see(cls, place: Place, host: str) -> SeenSlab | None:
        """The slab; None where this process cannot look into it."""
        if place.host != host or not 0 < place.slots <= _MAX_SLOTS or not place.key:
            return None
        size = _HEADER_BYTES + place.slots * UNIT_BYTES
        try:
            fd = os.open(f"/proc/{place.pid}/fd/{place.fd}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError:
            return None
        try:
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode) or found.st_size != size:
                return None
            mapping = mmap.mmap(fd, size, prot=mmap.PROT_READ)
        except (OSError, ValueError):
            return None
        finally:
            os.close(fd)
        if mapping[: len(place.key)] != place.key:
            mapping.close()
            return None
        return cls(mapping)

    def slot(self, number: int, length: int) -> memoryview | None:
        """The first `length` bytes of a slot; None where there is none such."""
        start = _HEADER_BYTES + number * UNIT_BYTES
        if not 0 <= length <= UNIT_BYTES or not number >= 0 or start + length > len(self._map):
            return None
        return memoryview(self._map)[start : start + length]

    def close(self) -> None:
        """Stop looking."""
        with suppress(BufferError):  # as above
            self._map.close()
