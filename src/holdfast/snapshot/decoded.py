"""Images of nodes that are gone, read by range: only the wanted bytes of any k shards are fetched and decoded.

An image lies in its node's coded state, which is cut into chunks; chunk j is shard j of some stripe, and any k of a
stripe's k + m shards give back the others (`holdfast.erasure.groups`). So a range of the image is a few ranges of
shards, and each is decoded from the same range of k others. What is not coded, because enough nodes hold it anyway,
is not here: the reader takes it from their images.
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

import msgspec
import zmq

from holdfast.checkpoint.version import Version
from holdfast.erasure import Recovery, ReedSolomon
from holdfast.errors import CorruptError, HoldfastError, PeerError, PeerTimeout
from holdfast.snapshot.bulk import BulkClient, ParityRange, Range, StreamRange
from holdfast.snapshot.keys import JobKeys

_log = logging.getLogger(__name__)
_BLOCK_BYTES: Final = 1 << 20
_WINDOW: Final = 4
"""Blocks under way at a time: k questions each."""


class ShardAt(msgspec.Struct, frozen=True, kw_only=True):
    """A shard that can be read."""

    shard: int
    endpoint: str
    """Of the bulk server that gives it."""
    start: int
    """Of a data shard: where it begins in the stream of its node."""
    length: int
    """Bytes; shorter shards of a stripe count as followed by zeros."""


class StripeAt(msgspec.Struct, frozen=True, kw_only=True):
    """One stripe, and which of its shards can be read."""

    index: int
    num_data: int
    num_parity: int
    shards: tuple[ShardAt, ...]
    """Data shards of length 0 need no node and are listed too."""


class CodedPart(msgspec.Struct, frozen=True, kw_only=True):
    """A run of bytes of the image that lies in one shard."""

    start: int
    """In the image."""
    length: int
    stripe: int
    shard: int
    offset: int
    """In the shard."""


class DecodePlan(msgspec.Struct, frozen=True, kw_only=True):
    """Where the bytes of an image can be decoded from."""

    size_bytes: int
    header_digest: bytes
    ranges: tuple[CodedPart, ...]
    """Ascending, without overlap; what lies between them is not coded."""
    stripes: tuple[StripeAt, ...]


@dataclass
class _Block:
    """One block that is being fetched."""

    start: int
    """In the output."""
    length: int
    stripe: int
    recovery: Recovery
    parts: dict[int, memoryview | bytes] = field(default_factory=dict)
    """By shard."""
    failed: dict[int, HoldfastError] = field(default_factory=dict)

    @property
    def done(self) -> bool:
        return len(self.parts) + len(self.failed) == len(self.recovery.sources)


class DecodedSource:
    """One image of a lost node; a `holdfast.checkpoint.source.Source`. One thread at a time.

    Args:
        context: whose sockets to use; stays the caller's.
        image: where the bytes are.
        version: of the image.
        keys: of the job.
        timeout: for each answer.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        image: DecodePlan,
        version: Version,
        *,
        keys: JobKeys,
        timeout: timedelta,
    ) -> None:
        self._context, self._image, self._version, self._keys = context, image, version, keys
        self._timeout_s = timeout.total_seconds()
        self._stripes = {stripe.index: stripe for stripe in image.stripes}
        self._clients: dict[str, BulkClient] = {}
        self._bad: dict[tuple[int, int], HoldfastError] = {}
        """Shards that failed, by stripe and shard: not asked again."""

    @property
    def failures(self) -> Mapping[tuple[int, int], HoldfastError]:
        """Shards that could not be used, by stripe and shard, and why."""
        return self._bad

    def read(self, offset: int, length: int) -> memoryview:
        """Exactly `length` bytes at `offset` from the start of the image, decoded.

        Raises:
            PeerError: some of them are not coded, or fewer than k shards can be read.
            CorruptError: fewer than k shards are sound.
        """
        data = bytearray(length)
        view = memoryview(data)
        end, at = offset + length, offset
        for one in self._image.ranges:
            if one.start + one.length <= at or one.start >= end:
                continue
            if one.start > at:
                break
            taken = min(end, one.start + one.length) - at
            self._decode(one, at - one.start, view[at - offset : at - offset + taken])
            at += taken
        if at < end:
            raise PeerError(f"bytes {at} to {end} of an image of {self._version} are not coded: other nodes hold them")
        return view

    def _decode(self, one: CodedPart, skip: int, out: memoryview) -> None:
        """Decode `out` from byte `skip` of a coded range on, `_WINDOW` blocks at a time under way."""
        starts = iter(range(0, len(out), _BLOCK_BYTES))
        under_way: deque[_Block] = deque()
        asked: dict[tuple[str, int], tuple[_Block, int]] = {}
        try:
            while True:
                for start in itertools.islice(starts, _WINDOW - len(under_way)):
                    length = min(_BLOCK_BYTES, len(out) - start)
                    under_way.append(self._ask(one, skip, start, length, asked))
                if not under_way:
                    return
                if not under_way[0].done:
                    self._wait(asked)
                    continue
                block = under_way.popleft()
                if block.failed:
                    under_way.appendleft(self._ask(one, skip, block.start, block.length, asked))
                else:
                    parts = [block.parts[source] for source in block.recovery.sources]
                    block.recovery.transform.apply(parts, [out[block.start : block.start + block.length]])
        finally:
            for endpoint, number in asked:
                self._clients[endpoint].forget(number)

    def _ask(
        self, one: CodedPart, skip: int, start: int, length: int, asked: dict[tuple[str, int], tuple[_Block, int]]
    ) -> _Block:
        stripe = self._stripes[one.stripe]
        usable = {at.shard: at for at in stripe.shards if (one.stripe, at.shard) not in self._bad}
        if len(usable) < stripe.num_data:
            raise self._too_few(stripe)
        recovery = _code(stripe.num_data, stripe.num_parity).recovery(tuple(sorted(usable)), (one.shard,))
        offset = one.offset + skip + start
        block = _Block(start, length, one.stripe, recovery)
        for shard in recovery.sources:
            at = usable[shard]
            there = max(0, min(length, at.length - offset))
            if not there:
                block.parts[shard] = b""
                continue
            number = self._client(at.endpoint).ask(self._range(stripe, at, offset, there))
            asked[at.endpoint, number] = (block, shard)
        return block

    def _range(self, stripe: StripeAt, at: ShardAt, offset: int, length: int) -> Range:
        if at.shard < stripe.num_data:
            return StreamRange(version=self._version, offset=at.start + offset, length=length)
        number = at.shard - stripe.num_data
        return ParityRange(version=self._version, stripe=stripe.index, number=number, offset=offset, length=length)

    def _wait(self, asked: dict[tuple[str, int], tuple[_Block, int]]) -> None:
        """Take the answers that are there, at least one; whoever gives none within the limit counts as failed."""
        waiting = {endpoint for endpoint, _ in asked}
        poller = zmq.Poller()
        for endpoint in waiting:
            poller.register(self._clients[endpoint].socket, zmq.POLLIN)
        deadline = time.monotonic() + self._timeout_s
        while True:
            left_s = deadline - time.monotonic()
            if left_s <= 0 or not poller.poll(max(1, round(left_s * 1000))):
                for (endpoint, number), (block, shard) in asked.items():
                    self._clients[endpoint].forget(number)
                    self._note(block, shard, PeerTimeout(f"{endpoint} sent nothing for {self._timeout_s:.0f} s"))
                asked.clear()
                return
            if sum(self._take(endpoint, asked) for endpoint in waiting):
                return

    def _take(self, endpoint: str, asked: dict[tuple[str, int], tuple[_Block, int]]) -> int:
        count = 0
        while (answer := self._clients[endpoint].receive()) is not None:
            number, data = answer
            block, shard = asked.pop((endpoint, number))
            count += 1
            if isinstance(data, HoldfastError):
                self._note(block, shard, data)
            else:
                block.parts[shard] = data
        return count

    def _note(self, block: _Block, shard: int, error: HoldfastError) -> None:
        block.failed[shard] = error
        self._bad[block.stripe, shard] = error
        _log.warning("shard %d of stripe %d of %s is passed over: %s", shard, block.stripe, self._version, error)

    def _too_few(self, stripe: StripeAt) -> HoldfastError:
        reasons = {shard: error for (index, shard), error in self._bad.items() if index == stripe.index}
        told = "; ".join(f"shard {shard}: {error}" for shard, error in sorted(reasons.items()))
        kind = CorruptError if any(isinstance(error, CorruptError) for error in reasons.values()) else PeerError
        return kind(
            f"{self._version}: stripe {stripe.index} needs {stripe.num_data} shards, "
            f"{len(stripe.shards) - len(reasons)} can be read{': ' if told else ''}{told}"
        )

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
