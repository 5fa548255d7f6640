"""Images on other nodes, read by range over the tcp socket of that node's daemon."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from pathlib import Path
from typing import Final

import zmq

from holdfast.checkpoint.version import Version
from holdfast.errors import PeerError, PeerTimeout
from holdfast.snapshot.arena import SLOT_HEADER_BYTES, SlotState, read_slot_header
from holdfast.snapshot.messages import MAX_MESSAGE_BYTES, RangeData, ReadRange, decode, encode

RANGE_BYTES: Final = 4 << 20
_WINDOW: Final = 4


class PeerSource:
    """One image in a slot of another node; a `holdfast.checkpoint.source.Source`. One thread at a time.

    Args:
        context: whose sockets to use; stays the caller's.
        endpoint: tcp:// endpoint of the daemon.
        path: slot file on that node.
        version: what the slot must hold while it is read.
        offset: where the image starts in the file (bytes).
        timeout: for each answer.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        endpoint: str,
        path: str,
        version: Version,
        offset: int,
        timeout: timedelta,
    ) -> None:
        self._endpoint, self._path, self._version, self._offset = endpoint, path, version, offset
        self._timeout_s = timeout.total_seconds()
        self._request = 0
        self._socket = context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        self._socket.connect(endpoint)

    def read(self, offset: int, length: int) -> memoryview:
        """Exactly `length` bytes at `offset` from the start of the image.

        Raises:
            PeerError: the slot does not hold the version any more.
            PeerTimeout: the daemon did not answer.
        """
        data = bytearray(length)
        starts = list(range(0, length, RANGE_BYTES))
        first = self._request + 1
        asked = 0
        for done, start in enumerate(starts):
            while asked < len(starts) and asked < done + _WINDOW:
                self._ask(offset + starts[asked], min(RANGE_BYTES, length - starts[asked]))
                asked += 1
            data[start : start + RANGE_BYTES] = self._answer(first + done, min(RANGE_BYTES, length - start))
        return memoryview(data)

    def _ask(self, offset: int, length: int) -> None:
        self._request += 1
        message = ReadRange(
            request=self._request,
            path=self._path,
            version=self._version,
            offset=self._offset + offset,
            length=length,
        )
        self._socket.send(encode(message))

    def _answer(self, request: int, length: int) -> bytes:
        deadline = time.monotonic() + self._timeout_s
        while True:
            left_s = deadline - time.monotonic()
            if left_s <= 0 or not self._socket.poll(max(1, round(left_s * 1000))):
                raise PeerTimeout(
                    f"{self._endpoint} did not send a part of {self._path} within {self._timeout_s:.0f} s"
                )
            message = decode(self._socket.recv())
            if not isinstance(message, RangeData) or message.request < request:
                continue  # the answer to a read that was given up
            if message.error is not None:
                raise PeerError(f"{self._endpoint} cannot serve {self._path} of {self._version}: {message.error}")
            if len(message.data) != length:
                raise PeerError(f"{self._endpoint} sent {len(message.data)} bytes of {self._path}, asked were {length}")
            return message.data

    def close(self) -> None:
        """Close the connection."""
        self._socket.close(0)


def serve_range(directory: Path, message: ReadRange) -> bytes:
    """The encoded answer to a range read of a slot in the arena `directory`; runs in a lane of the daemon.

    The header is read before and after: bytes of another version never leave as this one's.
    """
    path = Path(message.path)
    if path.parent != directory or not path.name.startswith("slot-"):
        return _error(message, "that is no slot of this node")
    if not 0 < message.length <= RANGE_BYTES or message.offset < 0:
        return _error(message, f"{message.length} bytes at {message.offset} are no range")
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        return _error(message, str(error))
    try:
        before = _holds(descriptor, message.version)
        data = os.pread(descriptor, message.length, message.offset) if before else b""
        if not before or not _holds(descriptor, message.version):
            return _error(message, "the slot holds another version")
    finally:
        os.close(descriptor)
    return encode(RangeData(request=message.request, data=data))


def _holds(descriptor: int, version: Version) -> bool:
    header = read_slot_header(os.pread(descriptor, SLOT_HEADER_BYTES, 0))
    return header.state is SlotState.CLEAN and header.version == version


def _error(message: ReadRange, reason: str) -> bytes:
    return encode(RangeData(request=message.request, error=reason))
