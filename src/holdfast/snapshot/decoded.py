"""Images that are lost, read by range: only the wanted bytes of any k shards are fetched and decoded.

Where the bytes lie is `holdfast.snapshot.coding`'s to say (`degraded_reads`); here they are asked for, several blocks
at a time, and decoded as they come. A shard that fails is passed over for good, and another one is taken. What is not
coded, because enough nodes hold it anyway, is not here: the reader takes it from their images.
"""

from __future__ import annotations

import functools
import itertools
import logging
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Final

import zmq

from holdfast.erasure import ReedSolomon
from holdfast.errors import CorruptError, HoldfastError, PeerError, PeerTimeout
from holdfast.snapshot.bulk import BulkClient, ParityRange, Range, StreamRange
from holdfast.snapshot.coding import DegradedRead, Rebuild, SourceRead, degraded_reads
from holdfast.snapshot.keys import JobKeys

_log = logging.getLogger(__name__)
_BLOCK_BYTES: Final = 1 << 20
_WINDOW: Final = 4
"""Reads under way at a time: k questions each."""


@dataclass
class _Read:
    """One range that is being fetched."""

    what: DegradedRead
    parts: dict[int, memoryview | bytes] = field(default_factory=dict)
    """By shard."""
    failed: bool = False

    @property
    def done(self) -> bool:
        return self.failed or len(self.parts) == len(self.what.sources)


_Asked = dict[tuple[str, int], tuple[_Read, int]]
"""(endpoint, number of the question) -> what it is for, and its shard."""


class DecodedSource:
    """One lost image; a `holdfast.checkpoint.source.Source`. One thread at a time.

    Args:
        context: whose sockets to use; stays the caller's.
        rebuild: the image, and what is left to decode it from.
        endpoints: node rank -> endpoint of its bulk server.
        keys: of the job.
        timeout: for each answer.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        rebuild: Rebuild,
        endpoints: Mapping[int, str],
        *,
        keys: JobKeys,
        timeout: timedelta,
    ) -> None:
        self._context, self._rebuild, self._endpoints, self._keys = context, rebuild, endpoints, keys
        group = rebuild.coded.group
        self._num_data = group.num_data
        self._code = _code(group.num_data, group.num_parity)
        self._timeout_s = timeout.total_seconds()
        self._clients: dict[str, BulkClient] = {}
        self._failed: dict[tuple[int, int], HoldfastError] = {}

    @property
    def failed(self) -> Mapping[tuple[int, int], HoldfastError]:
        """Shards that were passed over, by stripe and shard, and why."""
        return self._failed

    def read(self, offset: int, length: int) -> memoryview:
        """Exactly `length` bytes at `offset` from the start of the image, decoded.

        Raises:
            PeerError: some of them are not coded, or fewer than k shards can be read.
            CorruptError: fewer than k shards are sound.
        """
        out = memoryview(bytearray(length))
        blocks = iter(range(offset, offset + length, _BLOCK_BYTES))
        under_way: deque[_Read] = deque()
        asked: _Asked = {}
        try:
            while True:
                for start in itertools.islice(blocks, max(0, _WINDOW - len(under_way))):
                    under_way.extend(self._ask_all(start, min(_BLOCK_BYTES, offset + length - start), asked))
                if not under_way:
                    return out
                if not under_way[0].done:
                    self._wait(asked)
                    continue
                read = under_way.popleft()
                if read.failed:
                    under_way.extendleft(reversed(self._ask_all(read.what.offset, read.what.length, asked)))
                else:
                    self._decode(read, out[read.what.offset - offset :][: read.what.length])
        finally:
            for endpoint, number in asked:
                self._clients[endpoint].forget(number)

    def _decode(self, read: _Read, out: memoryview) -> None:
        plan = self._code.recovery(tuple(read.parts), (read.what.shard,))
        plan.transform.apply([read.parts[shard] for shard in plan.sources], [out])

    def _ask_all(self, offset: int, length: int, asked: _Asked) -> list[_Read]:
        reads = degraded_reads(self._rebuild, offset, length, failed=self._failed.keys())
        if reads is None:
            raise self._too_few()
        at = offset
        for read in reads:
            if read.offset != at:
                break
            at += read.length
        if at != offset + length:
            version = self._rebuild.coded.version
            raise PeerError(f"bytes from {at} on of rank {self._rebuild.global_rank} of {version} are not coded")
        return [self._ask(read, asked) for read in reads]

    def _ask(self, what: DegradedRead, asked: _Asked) -> _Read:
        read = _Read(what)
        for source in what.sources:
            if not source.length:
                read.parts[source.shard] = b""
                continue
            client = self._client(self._endpoints.get(source.node_rank, ""))
            asked[client.endpoint, client.ask(self._range(what, source))] = (read, source.shard)
        return read

    def _range(self, what: DegradedRead, source: SourceRead) -> Range:
        coded = self._rebuild.coded
        if source.shard < self._num_data:
            start = coded.shard_range(what.stripe, source.shard).start + what.shard_offset
            node_rank = coded.shard_node(what.stripe, source.shard)
            return StreamRange(version=coded.version, node_rank=node_rank, offset=start, length=source.length)
        return ParityRange(
            version=coded.version,
            stripe=what.stripe,
            number=source.shard - self._num_data,
            offset=what.shard_offset,
            length=source.length,
        )

    def _wait(self, asked: _Asked) -> None:
        """Take the answers that are there, at least one; whoever gives none within the limit has failed."""
        waiting = {endpoint for endpoint, _ in asked}
        poller = zmq.Poller()
        for endpoint in waiting:
            poller.register(self._clients[endpoint].socket, zmq.POLLIN)
        deadline = time.monotonic() + self._timeout_s
        while not sum(self._take(endpoint, asked) for endpoint in waiting):
            left_s = deadline - time.monotonic()
            if left_s <= 0 or not poller.poll(max(1, round(left_s * 1000))):
                for (endpoint, number), (read, shard) in list(asked.items()):
                    self._clients[endpoint].forget(number)
                    self._note(read, shard, PeerTimeout(f"{endpoint} sent nothing for {self._timeout_s:.0f} s"))
                asked.clear()
                return

    def _take(self, endpoint: str, asked: _Asked) -> int:
        count = 0
        while (answer := self._clients[endpoint].receive()) is not None:
            number, data = answer
            read, shard = asked.pop((endpoint, number))
            count += 1
            if isinstance(data, HoldfastError):
                self._note(read, shard, data)
            else:
                read.parts[shard] = data
        return count

    def _note(self, read: _Read, shard: int, error: HoldfastError) -> None:
        read.failed = True
        if (read.what.stripe, shard) not in self._failed:
            self._failed[read.what.stripe, shard] = error
            version = self._rebuild.coded.version
            _log.warning("shard %d of stripe %d of %s is passed over: %s", shard, read.what.stripe, version, error)

    def _too_few(self) -> HoldfastError:
        failed = sorted(self._failed.items())
        told = "; ".join(f"shard {shard} of stripe {stripe}: {error}" for (stripe, shard), error in failed)
        corrupt = any(isinstance(error, CorruptError) for _, error in failed)
        kind = CorruptError if corrupt else PeerError
        coded = self._rebuild.coded
        return kind(f"{coded.version}: fewer than {self._num_data} shards of a stripe can be read: {told}")

    def _client(self, endpoint: str) -> BulkClient:
        if endpoint not in self._clients:
            self._clients[endpoint] = BulkClient(self._context, endpoint, self._keys)
        return self._clients[endpoint]

    def close(self) -> None:
        """Close the connections."""
        for client in self._clients.values():
            client.close()
        self._clients.clear()


@functools.cache
def _code(num_data: int, num_parity: int) -> ReedSolomon:
    return ReedSolomon(num_data, num_parity)
