"""Ranks hand on what they read: each unit is read from storage by one rank and sent to the others that want it.

Every rank handles units in the same order and asks for at most a few at a time; a reader keeps what it has read until
all have asked for it, at most a few units too. So memory is bounded on both sides, and nobody waits in a circle: the
first unfinished unit is always among those that its reader reads and its wanters ask for.

Units of one file are read one after the other, as the system expects of whom it reads ahead for; files side by side.

Ranks of one host look at what was read where the reader has it (`holdfast.checkpoint.slab`), to others it is sent.
Messages go over ZeroMQ, straight between ranks. Each carries a random key that its receiver told through the process
group's store; what does not is dropped. Bytes were verified by the reader; a tag of the message guards the way.
"""

from __future__ import annotations

import mmap
import os
import secrets
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from hmac import compare_digest
from itertools import islice
from threading import Lock
from typing import Any, Literal, NamedTuple, Self

import msgspec
import xxhash
import zmq
from msgspec.structs import replace

from holdfast.checkpoint.slab import Place, SeenSlab, Slab
from holdfast.checkpoint.wants import UNIT_BYTES, Unit
from holdfast.errors import DECODE_ERRORS, PeerError, PeerTimeout

_READERS = 4
_AHEAD = 4
"""Units that a reader holds, and that a rank has asked for."""
_HINTED = 8
"""Units that the system is asked to read ahead."""
_CHECK_MS = 50
"""How long to wait before looking whether another rank has failed."""

Key = tuple[int, int]
"""Image and first block of a unit."""


class _Message(msgspec.Struct, frozen=True, array_like=True):
    """The first frame; for ``data`` the bytes are the second."""

    key: bytes
    kind: Literal["ask", "data", "look", "seen"]
    rank: int
    """Who sends it."""
    image: int
    first: int
    number: int = 0
    """With ``data``: of the sender's messages; makes each another one."""
    tag: bytes = b""
    """Of the data."""
    sees: bool = False
    """With ``ask``: the sender can look into the receiver's slab."""
    slot: int = -1
    """With ``look``: of the sender's slab."""
    length: int = 0
    """With ``look``: bytes in it."""


class _Endpoint(msgspec.Struct, frozen=True, array_like=True):
    """What others need to reach a rank."""

    address: str
    slab: Place

    @property
    def key(self) -> bytes:
        return self.slab.key


Tagger = Callable[[bytes, memoryview], bytes]
"""Makes the tag of data that belong to a message, given as bytes that no other message has."""


def digest(message: bytes, data: memoryview) -> bytes:
    """A tag that notices flipped bits, not enemies."""
    return xxhash.xxh3_64_digest(data)


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(_Message)


class Post:
    """A rank's sockets for one load; for the thread that loads."""

    def __init__(self, rank: int, address: str, host: str, tagger: Tagger = digest) -> None:
        """
        Args:
            rank: this one.
            address: at which the other ranks reach this host.
            host: names it.
            tagger: the same on all ranks.
        """
        self._rank = rank
        self._host = host
        self._tagger = tagger
        self._sent = 0
        self._context = zmq.Context()
        self._key = secrets.token_bytes(16)
        self._inbox = self._context.socket(zmq.PULL)
        self._inbox.setsockopt(zmq.RCVHWM, 0)
        port = self._inbox.bind_to_random_port(f"tcp://{address}")
        self.slab = Slab(_AHEAD, host=host, key=self._key)
        self.endpoint = msgspec.msgpack.encode(_Endpoint(f"tcp://{address}:{port}", self.slab.place))
        """What others need to reach this rank."""
        self._endpoints: Sequence[bytes] = ()
        self._outboxes: dict[int, tuple[zmq.Socket[bytes], bytes]] = {}
        self._seen: dict[int, SeenSlab | None] = {}
        self.dropped = 0
        """Messages that were none of ours."""

    def know(self, endpoints: Sequence[bytes]) -> None:
        """Take the `endpoint` of every rank."""
        self._endpoints = endpoints

    def ask(self, rank: int, unit: Unit) -> None:
        """Tell a reader that this rank is ready for a unit."""
        self._tell(rank, unit, "ask", sees=self._slab_of(rank) is not None)

    def show(self, rank: int, unit: Unit, slot: int, length: int) -> None:
        """Tell a rank that asked and can look where it finds a unit."""
        self._tell(rank, unit, "look", slot=slot, length=length)

    def look(self, rank: int, slot: int, length: int) -> memoryview:
        """What a rank shows.

        Raises:
            PeerError: there is nothing.
        """
        slab = self._slab_of(rank)
        data = None if slab is None else slab.slot(slot, length)
        if data is None:
            raise PeerError(f"rank {rank} shows {length} bytes in slot {slot}, which is not there")
        return data

    def seen(self, rank: int, unit: Unit) -> None:
        """Tell a reader that this rank has looked."""
        self._tell(rank, unit, "seen")

    def _tell(
        self,
        rank: int,
        unit: Unit,
        kind: Literal["ask", "look", "seen"],
        *,
        sees: bool = False,
        slot: int = -1,
        length: int = 0,
    ) -> None:
        outbox, key = self._outbox(rank)
        message = _Message(key, kind, self._rank, unit.image, unit.first, sees=sees, slot=slot, length=length)
        outbox.send(_encoder.encode(message))

    def _slab_of(self, rank: int) -> SeenSlab | None:
        if rank not in self._seen:
            self._seen[rank] = SeenSlab.see(self._endpoint_of(rank).slab, self._host)
        return self._seen[rank]

    def _endpoint_of(self, rank: int) -> _Endpoint:
        return msgspec.msgpack.decode(self._endpoints[rank], type=_Endpoint)

    def give(self, rank: int, unit: Unit, data: memoryview) -> None:
        """Send a unit to a rank that asked for it; the bytes are copied."""
        outbox, key = self._outbox(rank)
        self._sent += 1
        message = _Message(key, "data", self._rank, unit.image, unit.first, self._sent)
        outbox.send(_encoder.encode(replace(message, tag=self._tag(message, data))), zmq.SNDMORE)
        outbox.send(data, copy=True)

    @property
    def inbox(self) -> zmq.Socket[bytes]:
        """Readable when there is something to receive; for a poller."""
        return self._inbox

    def receive(self, timeout_ms: int) -> tuple[_Message, memoryview] | None:
        """The next message of ours, None where none comes in time."""
        while self._inbox.poll(timeout_ms):
            timeout_ms = 0
            frames = self._inbox.recv_multipart(copy=False)
            try:
                message = _decoder.decode(frames[0].buffer)
            except DECODE_ERRORS:
                self.dropped += 1
                continue
            data = frames[1].buffer if len(frames) == 2 else memoryview(b"")
            if message.key == self._key and (message.kind != "data" or self._is_sound(message, data)):
                return message, data
            self.dropped += 1
        return None

    def _is_sound(self, message: _Message, data: memoryview) -> bool:
        return compare_digest(self._tag(replace(message, tag=b""), data), message.tag)

    def _tag(self, message: _Message, data: memoryview) -> bytes:
        return self._tagger(_encoder.encode(message), data)

    def close(self) -> None:
        """Close all sockets; what was not taken by then is dropped."""
        self._context.destroy(linger=0)
        for slab in self._seen.values():
            if slab is not None:
                slab.close()
        self.slab.close()

    def _outbox(self, rank: int) -> tuple[zmq.Socket[bytes], bytes]:
        known = self._outboxes.get(rank)
        if known is None:
            endpoint = self._endpoint_of(rank)
            outbox = self._context.socket(zmq.PUSH)
            outbox.setsockopt(zmq.SNDHWM, 0)
            outbox.connect(endpoint.address)
            known = self._outboxes[rank] = (outbox, endpoint.key)
        return known


class Handing:
    """Reads, gives and takes the units that one rank wants; used by the thread that loads."""

    def __init__(
        self,
        rank: int,
        post: Post | None,
        *,
        read: Callable[[Unit, memoryview], memoryview],
        will_read: Callable[[Unit], None],
        take: Callable[[Unit, memoryview], None],
        check: Callable[[], None],
        timeout: timedelta,
    ) -> None:
        """
        Args:
            rank: this one.
            post: None where this process loads alone.
            read: gives the bytes of a unit, verified, in the memory that it is given where they fit; called by reading
                threads, for the units of one image in their order and never two at once: so the system sees a file that
                is read from its start to its end, and reads ahead.
            will_read: is told which units are to be read soon; called by reading threads, too, before `read`.
            take: uses them, here; the bytes are good until it returns.
            check: raises when another rank has failed; called now and then while this one waits.
            timeout: how long nothing may come.
        """
        self._rank = rank
        self._post = post
        self._read = read
        self._will_read = will_read
        self._take = take
        self._check = check
        self._timeout = timeout
        self._asked: dict[Key, dict[int, bool]] = {}
        """Ranks that asked for a unit before it was read, and whether they can look."""
        self._slots = [memoryview(b"")] * _AHEAD
        """Memory to read into, made when it is first used."""
        self._free = list(range(_AHEAD))
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
        with (
            _Bell(self._post) as bell,
            ThreadPoolExecutor(_READERS, thread_name_prefix="holdfast-load") as pool,
        ):
            lanes = _Lanes(pool, self._read_unit)
            try:
                self._loop(turn, lanes, bell)
            finally:
                for future in turn.reading:
                    future.cancel()

    def _loop(self, turn: _Turn, lanes: _Lanes, bell: _Bell) -> None:
        heard = time.monotonic()
        while turn.is_open:
            self._begin(turn, lanes, bell)
            rung, called = bell.wait(_CHECK_MS)
            ended, came = rung and self._end_reads(turn), called and self._hear(turn)
            if ended or came:
                heard = time.monotonic()
            elif turn.waits_for_others:
                self._check()
                if time.monotonic() - heard > self._timeout.total_seconds():
                    ranks = sorted({unit.reader for unit in turn.asked.values()} | turn.silent())
                    raise PeerTimeout(f"nothing came from or was taken by rank {', '.join(map(str, ranks[:10]))}")

    def _begin(self, turn: _Turn, lanes: _Lanes, bell: _Bell) -> None:
        while turn.to_read and self._free:
            unit, slot = turn.to_read.popleft(), self._free.pop()  # the one used last: its memory is warm
            future = lanes.submit(_Read(unit, self._memory(slot), turn.take_following(_HINTED)))
            turn.reading[future] = unit, slot
            future.add_done_callback(bell.ring)
        while turn.to_ask and len(turn.asked) < _AHEAD:
            unit = turn.to_ask.popleft()
            turn.asked[unit.image, unit.first] = unit
            assert self._post is not None
            self._post.ask(unit.reader, unit)

    def _read_unit(self, read: _Read) -> memoryview:
        """For reading threads."""
        for soon in read.following:
            self._will_read(soon)
        return self._read(read.unit, read.memory)

    def _memory(self, slot: int) -> memoryview:
        if not self._slots[slot]:
            # Memory that was never touched costs nothing: what is read straight into tensors needs no slot.
            self._slots[slot] = (
                memoryview(mmap.mmap(-1, UNIT_BYTES)) if self._post is None else self._post.slab.slot(slot)
            )
        return self._slots[slot]

    def _end_reads(self, turn: _Turn) -> bool:
        done = [future for future in turn.reading if future.done()]
        for future in done:
            unit, slot = turn.reading.pop(future)
            data = future.result()
            self.bytes_read += len(data)
            self._take(unit, data)
            others = set(unit.wanters) - {self._rank}
            if not others:
                self._free.append(slot)
                continue
            key = (unit.image, unit.first)
            turn.held[key] = _Held(unit, data, slot, others, data.obj is self._slots[slot].obj)
            for rank, sees in self._asked.pop(key, {}).items():
                self._give(turn, key, rank, sees=sees)
        return bool(done)

    def _give(self, turn: _Turn, key: Key, rank: int, *, sees: bool) -> None:
        assert self._post is not None
        held = turn.held[key]
        if sees and held.is_in_slot:
            self._post.show(rank, held.unit, held.slot, len(held.data))
        else:
            self._post.give(rank, held.unit, held.data)
            self._given(turn, key, rank)

    def _given(self, turn: _Turn, key: Key, rank: int) -> None:
        held = turn.held.get(key)
        if held is None:
            return
        held.left.discard(rank)
        if not held.left:
            del turn.held[key]
            self._free.append(held.slot)

    def _hear(self, turn: _Turn) -> bool:
        assert self._post is not None
        came = self._post.receive(0)
        if came is None:
            return False
        message, data = came
        key = (message.image, message.first)
        match message.kind:
            case "data" | "look":
                self._receive(turn, message, data)
            case "seen":
                self._given(turn, key, message.rank)
            case "ask" if key in turn.held:
                self._give(turn, key, message.rank, sees=message.sees)
            case "ask":
                self._asked.setdefault(key, {})[message.rank] = message.sees
        return True

    def _receive(self, turn: _Turn, message: _Message, data: memoryview) -> None:
        assert self._post is not None
        unit = turn.asked.pop((message.image, message.first), None)
        if unit is None:
            return
        if message.kind == "look":
            data = self._post.look(unit.reader, message.slot, message.length)
        self.bytes_received += len(data)
        self._take(unit, data)
        if message.kind == "look":
            self._post.seen(unit.reader, unit)


class _Held(NamedTuple):
    """A unit that was read."""

    unit: Unit
    data: memoryview
    slot: int
    left: set[int]
    """Ranks that have not had it yet."""
    is_in_slot: bool
    """Whether `data` lies in the slot."""


class _Read(NamedTuple):
    """A unit that is to be read."""

    unit: Unit
    memory: memoryview
    following: Sequence[Unit]
    """What the system is told of before."""


class _Lanes:
    """Reads of one image one after the other, in the order of `submit`, those of several side by side."""

    def __init__(self, pool: ThreadPoolExecutor, read: Callable[[_Read], memoryview]) -> None:
        """
        Args:
            pool: its threads read.
            read: gives the bytes.
        """
        self._pool = pool
        self._read = read
        self._lock = Lock()
        self._waiting: dict[int, deque[tuple[Future[memoryview], _Read]]] = {}
        """By image, of those of which a thread reads."""

    def submit(self, read: _Read) -> Future[memoryview]:
        """Have it read after those of its image; for one thread."""
        future = Future[memoryview]()
        with self._lock:
            lane = self._waiting.get(read.unit.image)
            if lane is not None:
                lane.append((future, read))
                return future
            self._waiting[read.unit.image] = deque([(future, read)])
        self._pool.submit(self._serve, read.unit.image)
        return future

    def _serve(self, image: int) -> None:
        """For reading threads: one goes on with an image until nothing waits, and no thread waits for another."""
        while (waiting := self._next(image)) is not None:
            future, read = waiting
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(self._read(read))
                except BaseException as error:  # noqa: BLE001  # raised by who takes the result
                    future.set_exception(error)

    def _next(self, image: int) -> tuple[Future[memoryview], _Read] | None:
        with self._lock:
            if self._waiting[image]:
                return self._waiting[image].popleft()
            del self._waiting[image]
            return None


class _Bell:
    """Wakes the thread that loads: a read has ended, or a message has come. Any thread may ring."""

    def __init__(self, post: Post | None) -> None:
        """
        Args:
            post: whose messages; None: there are none.
        """
        self._fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._poller = zmq.Poller()
        self._poller.register(self._fd, zmq.POLLIN)
        if post is not None:
            self._poller.register(post.inbox, zmq.POLLIN)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        os.close(self._fd)

    def ring(self, _: object) -> None:
        """A read has ended."""
        os.eventfd_write(self._fd, 1)

    def wait(self, timeout_ms: int) -> tuple[bool, bool]:
        """Whether reads have ended, and whether a message has come, in time."""
        came = dict(self._poller.poll(timeout_ms))
        rung = came.pop(self._fd, 0) != 0
        if rung:
            os.eventfd_read(self._fd)
        return rung, bool(came)


class _Turn:
    """How far one `Handing.run` is."""

    def __init__(self, to_read: deque[Unit], to_ask: deque[Unit]) -> None:
        self.to_read = to_read
        self.to_ask = to_ask
        self._hinted = 0
        """How many of `to_read` the system was told about."""
        self.reading: dict[Future[memoryview], tuple[Unit, int]] = {}
        """With the slot."""
        self.held: dict[Key, _Held] = {}
        self.asked: dict[Key, Unit] = {}

    def take_following(self, limit: int) -> list[Unit]:
        """Those of the next `limit` units to read that were not among them before; called after each `popleft`."""
        self._hinted = max(self._hinted - 1, 0)
        following = list(islice(self.to_read, self._hinted, limit))
        self._hinted += len(following)
        return following

    @property
    def is_open(self) -> bool:
        return bool(self.to_read or self.to_ask or self.reading or self.held or self.asked)

    @property
    def waits_for_others(self) -> bool:
        return not self.reading

    def silent(self) -> set[int]:
        return set[int]().union(*(held.left for held in self.held.values()))


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
