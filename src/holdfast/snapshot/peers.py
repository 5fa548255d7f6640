"""Images on other nodes, read by range from the bulk server of that node."""

from __future__ import annotations

import itertools
from datetime import timedelta
from typing import Final

import zmq

from holdfast.checkpoint.version import Version
from holdfast.errors import HoldfastError
from holdfast.snapshot.bulk import MAX_RANGE_BYTES, BulkClient, SlotRange
from holdfast.snapshot.keys import JobKeys

_RANGE_BYTES: Final = MAX_RANGE_BYTES
_WINDOW: Final = 4


class PeerSource:
    """One image in a slot of another node; a `holdfast.checkpoint.source.Source`. One thread at a time.

    Args:
        context: whose sockets to use; stays the caller's.
        endpoint: tcp:// endpoint of the node's bulk server.
        path: slot file on that node.
        version: what the slot must hold while it is read.
        offset: where the image starts in the file (bytes).
        keys: of the job.
        timeout: for each answer.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        endpoint: str,
        path: str,
        version: Version,
        offset: int,
        *,
        keys: JobKeys,
        timeout: timedelta,
    ) -> None:
        self._path, self._version, self._offset = path, version, offset
        self._timeout_s = timeout.total_seconds()
        self._client = BulkClient(context, endpoint, keys)

    def read(self, offset: int, length: int) -> memoryview:
        """Exactly `length` bytes at `offset` from the start of the image.

        Raises:
            PeerError: the slot does not hold the version any more.
            PeerTimeout: the daemon did not answer.
            CorruptError: what came does not match its tag.
        """
        data = bytearray(length)
        starts = iter(range(0, length, _RANGE_BYTES))
        asked: dict[int, int] = {}  # question -> start in `data`; answers come in any order
        try:
            while True:
                for start in itertools.islice(starts, _WINDOW - len(asked)):
                    asked[self._ask(offset + start, min(_RANGE_BYTES, length - start))] = start
                if not asked:
                    return memoryview(data)
                number, answer = self._client.wait(self._timeout_s)
                start = asked.pop(number)
                if isinstance(answer, HoldfastError):
                    raise answer
                data[start : start + len(answer)] = answer
        finally:
            for number in asked:
                self._client.forget(number)

    def _ask(self, offset: int, length: int) -> int:
        return self._client.ask(
            SlotRange(path=self._path, version=self._version, offset=self._offset + offset, length=length)
        )

    def close(self) -> None:
        """Close the connection."""
        self._client.close()
