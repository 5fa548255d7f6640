"""Ranks hand on what they read: each unit is read from storage by one rank and sent to the others that want it.

Every rank handles units in the same order and asks for at most a few at a time; a reader keeps what it has read until
all have asked for it, at most a few units too. So memory is bounded on both sides, and nobody waits in a circle: the
first unfinished unit is always among those that its reader reads and its wanters ask for.

Messages go over ZeroMQ, straight between ranks. Each carries a random key that its receiver told through the process
group's store; what does not is dropped. Bytes were verified by the reader; a digest of the message guards the way.
"""

from __future__ import annotations

import secrets
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from datetime import timedelta
from typing import Any, Literal

import msgspec
import xxhash
import zmq

from holdfast.checkpoint.wants import Unit
from holdfast.errors import PeerTimeout

_READERS = 4
_AHEAD = 8
"""Units that a reader holds, and that a rank has asked for."""
_POLL_MS = 1
_IDLE_POLL_MS = 50

Key = tuple[int, int]
"""Image and first block of a unit."""


class _Message(msgspec.Struct, frozen=True, array_like=True):
    """The first frame; for ``data`` the bytes are the second."""

    key: bytes
    kind: Literal["ask", "data"]
    rank: int
    """Who sends it."""
    image: int
    first: int
    digest: bytes = b""
    """xxh3_64 of the data."""


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(_Message)


class Post:
    """A rank's sockets for one load; for the thread that loads."""

    def __init__(self, rank: int, address: str) -> None:
        """
        Args:
            rank: this one.
            address: at which the other ranks reach this host.
        """
        self._rank = rank
        self._context = zmq.Context()
        self._key = secrets.token_bytes(16)
        self._inbox = self._context.socket(zmq.PULL)
        self._inbox.setsockopt(zmq.RCVHWM, 0)
        port = self._inbox.bind_to_random_port(f"tcp://{address}")
        self.endpoint = msgspec.msgpack.encode((f"tcp://{address}:{port}", self._key))
        """What others need to reach this rank."""
        self._endpoints: Sequence[bytes] = ()
        self._outboxes: dict[int, tuple[zmq.Socket[bytes], bytes]] = {}
        self.dropped = 0
        """Messages that were none of ours."""

    def know(self, endpoints: Sequence[bytes]) -> None:
        """Take the `endpoint` of every rank."""
        self._endpoints = endpoints

    def ask(self, rank: int, unit: Unit) -> None:
        """Tell a reader that this rank is ready for a unit."""
        outbox, key = self._outbox(rank)
        outbox.send(_encoder.encode(_Message(key, "ask", self._rank, unit.image, unit.first)))

    def give(self, rank: int, unit: Unit, data: memoryview) -> None:
        """Send a unit to a rank that asked for it; the bytes are copied."""
        outbox, key = self._outbox(rank)
        digest = xxhash.xxh3_64_digest(data)
        outbox.send(_encoder.encode(_Message(key, "data", self._rank, unit.image, unit.first, digest)), zmq.SNDMORE)
        outbox.send(data, copy=True)

    def receive(self, timeout_ms: int) -> tuple[_Message, memoryview] | None:
        """The next message of ours, None where none comes in time."""
        while self._inbox.poll(timeout_ms):
            timeout_ms = 0
            frames = self._inbox.recv_multipart(copy=False)
            try:
                message = _decoder.decode(frames[0].buffer)
            except msgspec.MsgspecError:
                self.dropped += 1
                continue
            data = frames[1].buffer if len(frames) == 2 else memoryview(b"")
            sound = message.key == self._key and (
                message.kind == "ask" or xxhash.xxh3_64_digest(data) == message.digest
            )
            if sound:
                return message, data
            self.dropped += 1
        return None

    def close(self) -> None:
        """Close all sockets; what was not taken by then is dropped."""
        self._context.destroy(linger=0)

    def _outbox(self, rank: int) -> tuple[zmq.Socket[bytes], bytes]:
        known = self._outboxes.get(rank)
        if known is None:
            endpoint, key = msgspec.msgpack.decode(self._endpoints[rank], type=tuple[str, bytes])
            outbox = self._context.socket(zmq.PUSH)
            outbox.setsockopt(zmq.SNDHWM, 0)
            outbox.connect(endpoint)
            known = self._outboxes[rank] = (outbox, key)
        return known


class Handing:
    """Reads, gives and takes the units that one rank wants; used by the thread that loads."""

    def __init__(
        self,
        rank: int,
        post: Post | None,
        *,
        read: Callable[[Unit], memoryview],
        take: Callable[[Unit, memoryview], None],
        free: Callable[[Unit, memoryview], None],
        check: Callable[[], None],
        timeout: timedelta,
    ) -> None:
        """
        Args:
            rank: this one.
            post: None where this process loads alone.
            read: gives the verified bytes of a unit; called by reading threads, never two at once for one image.
            take: uses them, here; the bytes are good until it returns.
            free: called with what `read` gave once nobody here or elsewhere needs it any more.
            check: raises when another rank has failed; called now and then while this one waits.
            timeout: how long nothing may come.
        """
        self._rank = rank
        self._post = post
        self._read = read
        self._take = take
        self._free = free
        self._check = check
        self._timeout = timeout
        self._asked: dict[Key, set[int]] = {}
        """Ranks that asked for a unit before it was read."""
        self.bytes_read = 0
        self.bytes_received = 0

    def run(self, wanted: Iterable[Unit]) -> None:
        """Handle all units that this rank wants.

        Raises:
            PeerTimeout: nothing came for long; names the ranks that are waited for.
            HoldfastError: from `read`, or of another rank.
        """
        units = sorted(wanted)
        turn = _Turn(
            to_read=deque(unit for unit in units if unit.reader == self._rank),
            to_ask=deque(unit for unit in units if unit.reader != self._rank),
        )
        with ThreadPoolExecutor(_READERS, thread_name_prefix="holdfast-load") as pool:
            try:
                self._loop(turn, pool)
            finally:
                for future in turn.reading:
                    future.cancel()

    def _loop(self, turn: _Turn, pool: ThreadPoolExecutor) -> None:
        heard = time.monotonic()
        while turn.is_open:
            self._begin(turn, pool)
            if self._end_reads(turn) or self._hear(turn):
                heard = time.monotonic()
            elif turn.waits_for_others:
                self._check()
                if time.monotonic() - heard > self._timeout.total_seconds():
                    ranks = sorted({unit.reader for unit in turn.asked.values()} | turn.silent())
                    raise PeerTimeout(f"nothing came from or was taken by rank {', '.join(map(str, ranks[:10]))}")

    def _begin(self, turn: _Turn, pool: ThreadPoolExecutor) -> None:
        while turn.to_read and len(turn.reading) + len(turn.held) < _AHEAD:
            unit = turn.to_read.popleft()
            turn.reading[pool.submit(self._read, unit)] = unit
        while turn.to_ask and len(turn.asked) < _AHEAD:
            unit = turn.to_ask.popleft()
            turn.asked[unit.image, unit.first] = unit
            assert self._post is not None
            self._post.ask(unit.reader, unit)

    def _end_reads(self, turn: _Turn) -> bool:
        if not turn.reading:
            return False
        patience = None if self._post is None else 0.0
        done, _ = wait(turn.reading, timeout=patience, return_when=FIRST_COMPLETED)
        for future in done:
            unit = turn.reading.pop(future)
            data = future.result()
            self.bytes_read += len(data)
            self._take(unit, data)
            others = set(unit.wanters) - {self._rank}
            if others:
                turn.held[unit.image, unit.first] = (unit, data, others)
                for rank in self._asked.pop((unit.image, unit.first), ()):
                    self._give(turn, (unit.image, unit.first), rank)
            else:
                self._free(unit, data)
        return bool(done)

    def _give(self, turn: _Turn, key: Key, rank: int) -> None:
        assert self._post is not None
        unit, data, left = turn.held[key]
        self._post.give(rank, unit, data)
        left.discard(rank)
        if not left:
            del turn.held[key]
            self._free(unit, data)

    def _hear(self, turn: _Turn) -> bool:
        if self._post is None:
            return False
        came = self._post.receive(_POLL_MS if turn.reading else _IDLE_POLL_MS)
        if came is None:
            return False
        message, data = came
        key = (message.image, message.first)
        if message.kind == "data":
            unit = turn.asked.pop(key, None)
            if unit is not None:
                self.bytes_received += len(data)
                self._take(unit, data)
        elif key in turn.held:
            self._give(turn, key, message.rank)
        else:
            self._asked.setdefault(key, set()).add(message.rank)
        return True


class _Turn:
    """How far one `Handing.run` is."""

    def __init__(self, to_read: deque[Unit], to_ask: deque[Unit]) -> None:
        self.to_read = to_read
        self.to_ask = to_ask
        self.reading: dict[Future[memoryview], Unit] = {}
        self.held: dict[Key, tuple[Unit, memoryview, set[int]]] = {}
        """Read, and the ranks that have not asked for it yet."""
        self.asked: dict[Key, Unit] = {}

    @property
    def is_open(self) -> bool:
        return bool(self.to_read or self.to_ask or self.reading or self.held or self.asked)

    @property
    def waits_for_others(self) -> bool:
        return not self.reading

    def silent(self) -> set[int]:
        return set[int]().union(*(left for _, _, left in self.held.values()))


_ANYWHERE = "192.0.2.1"
"""An address of no host (RFC 5737); no packet is sent to it."""


def own_address(store: Any) -> str:  # Any: torch ships no usable type for its stores
    """The address at which other ranks reach this host: the one from which it reaches the store's."""
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    host = str(getattr(store, "host", "localhost"))
    address = _route_to(host)
    if address.startswith("127.") and host not in ("localhost", "127.0.0.1"):
        # The store is on this host, whose own name means loopback to itself and something else to others.
        address = _route_to(_ANYWHERE)
    return f"[{address}]" if ":" in address else address


def _route_to(host: str) -> str:
    """This host's address on the way to another."""
    try:
        family, _, _, _, target = socket.getaddrinfo(host, 1, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(target)
            return str(probe.getsockname()[0])
    except OSError:
        return "127.0.0.1"
