"""Images on other nodes, read by range over the tcp socket of that node's daemon."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Container
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
        starts = iter(range(0, length, RANGE_BYTES))
        asked: dict[int, int] = {}  # request -> start in `data`; answers come in any order
        while True:
            for start in itertools.islice(starts, _WINDOW - len(asked)):
                asked[self._ask(offset + start, min(RANGE_BYTES, length - start))] = start
            if not asked:
                return memoryview(data)
            answer = self._answer(asked)
            start = asked.pop(answer.request)
            expected = min(RANGE_BYTES, length - start)
            if answer.error is not None:
                raise PeerError(f"{self._endpoint} cannot serve {self._path} of {self._version}: {answer.error}")
            if len(answer.data) != expected:
                raise PeerError(
                    f"{self._endpoint} sent {len(answer.data)} bytes of {self._path}, asked were {expected}"
                )
            data[start : start + expected] = answer.data

    def _ask(self, offset: int, length: int) -> int:
        self._request += 1
        message = ReadRange(
            request=self._request,
            path=self._path,
            version=self._version,
            offset=self._offset + offset,
            length=length,
        )
        self._socket.send(encode(message))
        return self._request

    def _answer(self, asked: Container[int]) -> RangeData:
        """The next answer to one of `asked`; those to reads that were given up are passed over."""
        deadline = time.monotonic() + self._timeout_s
        while True:
            left_s = deadline - time.monotonic()
            if left_s <= 0 or not self._socket.poll(max(1, round(left_s * 1000))):
                raise PeerTimeout(f"{self._endpoint} sent no part of {self._path} within {self._timeout_s:.0f} s")
            message = decode(self._socket.recv())
            if isinstance(message, RangeData) and message.request in asked:
                return message

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
