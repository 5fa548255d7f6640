"""Parity buffers in the arena: two of them, so that the old parity stays until the new one is whole everywhere.

    parity-<n>           as a slot file: 4096 bytes of header (version; FILLING or CLEAN), then the parities
    parity-<n>.record    what a successor and a reader must know of it; the header names its digest

The header says CLEAN only after the last byte and the record are there; what a daemon finds FILLING it discards, for
nobody knows which sources it had absorbed. Checksums of the parities are in the record's first part, per block.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
import xxhash

from holdfast.checkpoint.version import Version
from holdfast.errors import DECODE_ERRORS, CorruptError
from holdfast.snapshot.arena import SLOT_HEADER_BYTES, Arena, Slot, SlotState

_log = logging.getLogger(__name__)
PARITY_BLOCK_BYTES: Final = 1 << 20
"""Unit of verification, and of what is sent and absorbed at once."""
NUM_BUFFERS: Final = 2
_GRAIN: Final = 64 << 10


class _Record(msgspec.Struct, frozen=True):
    """What lies in the record file."""

    checksums: bytes
    """xxh3_64 of each block of the buffer, 8 bytes little-endian each."""
    map: bytes
    """What the exchange stored with it."""


@dataclass(frozen=True, kw_only=True)
class WholeParity:
    """A buffer that holds all of a version's parities of this node."""

    number: int
    version: Version
    size_bytes: int
    checksums: bytes
    map: bytes


class ParityStore:
    """The two buffers. The exchange's thread fills them; the bulk server reads through `path` and `WholeParity`."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._open: dict[int, Slot] = {}

    def path(self, number: int) -> Path:
        """Where buffer `number` lies."""
        return self._arena.directory / f"parity-{number}"

    def adopt(self) -> list[WholeParity]:
        """What a predecessor left whole; the rest is cleared."""
        found = []
        for number in range(NUM_BUFFERS):
            if self.path(number).exists():
                whole = self._adopt_one(number)
                if whole is None:
                    self.clear(number)
                else:
                    found.append(whole)
        return found

    def _adopt_one(self, number: int) -> WholeParity | None:
        header = self._slot(number).read_header()
        if header.state is not SlotState.CLEAN or header.version is None:
            return None
        try:
            data = self._record_path(number).read_bytes()
            if xxhash.xxh3_128_digest(data) != header.header_digest:
                raise CorruptError("its record does not match the digest in its header")
            record = msgspec.msgpack.decode(data, type=_Record)
        except (OSError, CorruptError, *DECODE_ERRORS) as error:
            _log.warning("parity of %s in %s is discarded: %s", header.version, self.path(number), error)
            return None
        return WholeParity(
            number=number,
            version=header.version,
            size_bytes=header.size_bytes,
            checksums=record.checksums,
            map=record.map,
        )

    def capacity(self, number: int) -> int:
        """Bytes of parity that the buffer has room for; 0 where it is not there."""
        try:
            return max(0, os.stat(self.path(number)).st_size - SLOT_HEADER_BYTES)
        except FileNotFoundError:
            return 0

    def reserve(self, number: int, size_bytes: int, room: Callable[[], int]) -> str | None:
        """Make room for `size_bytes` in a buffer that holds nothing needed; with real pages behind it. Blocks.

        Args:
            room: bytes that the node's limit still gives; asked only where more memory is needed.

        Returns:
            None, or why there is no room.
        """
        if self.capacity(number) >= max(1, size_bytes):
            return None
        self._forget(number)
        self._arena.drop([self.path(number), self._record_path(number)])
        wanted = max(1, -(-size_bytes // _GRAIN)) * _GRAIN
        if room() < wanted:
            return f"{wanted} bytes of parity do not fit into the {max(0, room())} bytes that are left"
        if not self._arena.reserve_file(self.path(number), wanted):
            return f"{wanted} bytes of parity could not be reserved"
        self._slot(number).prefault()
        return None

    def begin(self, number: int, version: Version, size_bytes: int) -> memoryview:
        """The buffer is being filled with parities of `version`; a writable view of its `size_bytes`."""
        slot = self._slot(number)
        slot.begin(version, 0, 0)
        return slot.image[:size_bytes]

    def finish(self, number: int, version: Version, size_bytes: int, map_: bytes) -> WholeParity:
        """All sources are in: checksum, record, header, in this order.

        Raises:
            OSError: the record cannot be written.
        """
        slot = self._slot(number)
        checksums = parity_checksums(slot.image[:size_bytes])
        record = msgspec.msgpack.encode(_Record(checksums, map_))
        temporary = self._arena.directory / f"making-parity-{number}.record"
        temporary.write_bytes(record)
        os.chmod(temporary, 0o600)
        os.replace(temporary, self._record_path(number))
        slot.finish(max(1, size_bytes), xxhash.xxh3_128_digest(record))
        return WholeParity(number=number, version=version, size_bytes=size_bytes, checksums=checksums, map=map_)

    def clear(self, number: int) -> None:
        """Nothing in the buffer counts."""
        if self.path(number).exists():
            self._slot(number).clear()

    def close(self) -> None:
        """Unmap."""
        for number in list(self._open):
            self._forget(number)

    def _slot(self, number: int) -> Slot:
        if number not in self._open:
            self._open[number] = Slot.open(self.path(number))
        return self._open[number]

    def _forget(self, number: int) -> None:
        slot = self._open.pop(number, None)
        if slot is not None:
            slot.close()

    def _record_path(self, number: int) -> Path:
        return self._arena.directory / f"parity-{number}.record"


def parity_checksums(parity: memoryview) -> bytes:
    """xxh3_64 of each block of `PARITY_BLOCK_BYTES`, 8 bytes little-endian each."""
    return b"".join(
        xxhash.xxh3_64_intdigest(parity[start : start + PARITY_BLOCK_BYTES]).to_bytes(8, "little")
        for start in range(0, len(parity), PARITY_BLOCK_BYTES)
    )
