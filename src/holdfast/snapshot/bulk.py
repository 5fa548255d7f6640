"""Bulk data between nodes: ranges of slots and of shards, asked for and answered straight from shared memory.

A *bulk server* is one thread of the daemon with a socket of its own, so that gigabytes never stand in the way of the
ledgers' messages. Who wants bytes asks for a range of at most `MAX_RANGE_BYTES` and has several questions under way;
that is all the flow control there is, and a question that is asked again does no harm.

    question    [Ask, signature]          signed with the job's key; b"" without a token
    answer      [Answer, bytes]           the tag in Answer is that of the bytes and of this very question

A message that does not decode, is not signed or does not match its tag is counted and dropped (`Counters`), never fatal
and never delivered; the asker's time limit or its next source does the rest.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import msgspec
import zmq

from holdfast.checkpoint.version import Version
from holdfast.errors import CorruptError, HoldfastError, PeerError, PeerTimeout
from holdfast.snapshot.keys import Buffer, JobKeys

_log = logging.getLogger(__name__)
MAX_RANGE_BYTES: Final = 4 << 20
_MAX_ASK_BYTES: Final = 1 << 16
_POLL_MS: Final = 100
_LOGGED: Final = 10
_TRIES: Final = 3
"""An answer that does not match its tag is asked for again."""
_BATCH: Final = 64
_IDLE_S: Final = 1.0


class SlotRange(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Bytes of an image in a slot file."""

    path: str
    version: Version
    """What the slot must hold while it is read."""
    offset: int
    """In the file."""
    length: int


class StreamRange(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Bytes of the answering node's coded stream (`holdfast.snapshot.coding.Stream`) of a version."""

    version: Version
    node_rank: int
    """Whose stream, in the generation of the version: who was another node then does not answer."""
    offset: int
    length: int


class ParityRange(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Bytes of a whole parity that the answering node holds."""

    version: Version
    stripe: int
    number: int
    """0..m-1."""
    offset: int
    """In that parity."""
    length: int


Range = SlotRange | StreamRange | ParityRange


class Ask(msgspec.Struct, frozen=True, kw_only=True):
    """A question."""

    number: int
    nonce: bytes
    """Random, of the connection: two questions of a job never have the same bytes."""
    range: Range
    kinds: tuple[str, ...]
    """Kinds of tags that the asker can check, best first."""
    patient: bool = False
    """It may wait for the bandwidth limit."""


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What comes with the bytes, or instead of them."""

    number: int
    kind: str = ""
    tag: bytes = b""
    error: str | None = None
    corrupt: bool = False
    """The bytes are there and do not match their checksum."""


@dataclass
class Counters:
    """What one end has seen. Written by the thread of that end, read by anybody."""

    garbage: int = 0
    """Messages that did not decode or were not signed."""
    damaged: int = 0
    """Answers whose bytes did not match their tag."""
    corrupt: int = 0
    """Ranges in memory here that did not match their checksum."""
    sent_bytes: int = 0
    """Payload only."""
    patient_bytes: int = 0
    """The part of it that patient questions asked for: the exchange of chunks."""


class TokenBucket:
    """A limit on bytes per second, with bursts of a tenth of a second.

    Args:
        rate: bytes per second; 0: no limit.
    """

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._free_at = 0.0

    def wait_s(self, now: float) -> float:
        """Seconds until something may be sent; 0 where it may be now. `now`: `time.monotonic()`."""
        return max(0.0, self._free_at - 0.1 - now) if self._rate else 0.0

    def take(self, size_bytes: int, now: float) -> None:
        """`size_bytes` are sent now."""
        if self._rate:
            self._free_at = max(self._free_at, now) + size_bytes / self._rate


class BulkServer:
    """Answers questions in a thread named ``holdfast-bulk``; started and closed by the daemon's event loop.

    Args:
        context: the daemon's.
        address: where other nodes reach this one.
        endpoint: what a predecessor listened at, "" where there was none; taken over if it can be.
        keys: of the job.
        read: gives the bytes of a range, as a view that nobody changes while they are sent, or raises what is wrong;
            called in the thread.
        idle: called in the thread about once per second.
        damaged: called in the thread where what was asked for is here and does not match its checksum.
        rate: most bytes per second for patient questions; 0: no limit.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        address: str,
        endpoint: str,
        *,
        keys: JobKeys,
        read: Callable[[Range], Buffer],
        idle: Callable[[], None] = lambda: None,
        damaged: Callable[[str], None] = lambda text: None,
        rate: float = 0.0,
    ) -> None:
        self.counters = Counters()
        self._keys, self._read, self._idle, self._damaged = keys, read, idle, damaged
        self._idled = time.monotonic()
        self._bucket = TokenBucket(rate)
        self._waiting: deque[tuple[bytes, bytes, Ask]] = deque()  # patient questions; thread only
        self._socket = context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.MAXMSGSIZE, _MAX_ASK_BYTES)
        self._socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        if keys.encrypt_all:
            keys.serve(self._socket)
        self.endpoint = self._bind(address, endpoint)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="holdfast-bulk", daemon=True)

    def _bind(self, address: str, endpoint: str) -> str:
        if endpoint.startswith(f"tcp://{address}:"):
            with contextlib.suppress(zmq.ZMQError):
                self._socket.bind(endpoint)
                return endpoint
        return f"tcp://{address}:{self._socket.bind_to_random_port(f'tcp://{address}')}"

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def limit(self, rate: float) -> None:
        """Another limit on patient questions, in bytes per second."""
        self._bucket = TokenBucket(rate)

    def close(self, timeout_s: float = 2.0) -> None:
        """End the thread."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        self._socket.close(0)

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self._turn()
            except zmq.ContextTerminated:
                return
            except Exception:  # noqa: BLE001  the thread's border: the daemon goes on, and askers have time limits
                _log.exception("a question could not be answered")

    def _turn(self) -> None:
        if time.monotonic() - self._idled > _IDLE_S:
            self._idled = time.monotonic()
            self._idle()
        wait_s = self._bucket.wait_s(time.monotonic()) if self._waiting else _POLL_MS / 1000
        if self._socket.poll(max(1, round(min(wait_s, 0.1) * 1000)) if wait_s else 0):
            for _ in range(_BATCH):
                self._take(self._socket.recv_multipart(zmq.NOBLOCK))
                if not _waits(self._socket):
                    break
        while self._waiting and not self._bucket.wait_s(now := time.monotonic()):
            identity, encoded, ask = self._waiting.popleft()
            self._bucket.take(self._give(identity, encoded, ask), now)

    def _take(self, frames: list[bytes]) -> None:
        try:
            identity, encoded, signature = frames
            ask = _ask_decoder.decode(encoded)
            genuine = self._keys.sign(encoded) == signature
        except (ValueError, msgspec.MsgspecError):
            genuine = False
        if not genuine or not 0 < ask.range.length <= MAX_RANGE_BYTES or ask.range.offset < 0:
            self.counters.garbage += 1
            if self.counters.garbage <= _LOGGED:
                _log.warning("garbage on the bulk socket is dropped")
        elif ask.patient:
            self._waiting.append((identity, encoded, ask))
        else:
            self._give(identity, encoded, ask)

    def _give(self, identity: bytes, encoded: bytes, ask: Ask) -> int:
        """Answer; how many bytes that took."""
        data: Buffer = b""
        kind = next((kind for kind in self._keys.kinds if kind in ask.kinds), "")
        try:
            if not kind:
                raise PeerError(f"tags of kinds {', '.join(ask.kinds)} cannot be made here")
            data = self._read(ask.range)
            answer = Answer(number=ask.number, kind=kind, tag=self._keys.tag(kind, encoded, data))
        except (HoldfastError, OSError) as error:
            corrupt = isinstance(error, CorruptError)
            self.counters.corrupt += corrupt
            if corrupt:
                _log.warning("%s", error)
                self._damaged(str(error))
            answer = Answer(number=ask.number, error=str(error), corrupt=corrupt)
        with contextlib.suppress(zmq.Again):
            self._socket.send_multipart([identity, _encoder.encode(answer), data], zmq.NOBLOCK, copy=False)
        self.counters.sent_bytes += len(data)
        self.counters.patient_bytes += len(data) if ask.patient else 0
        return len(data)


@dataclass(frozen=True)
class _Open:
    """A question without an answer."""

    number: int
    """The one that `ask` gave."""
    encoded: bytes
    ask: Ask
    tries: int
    """How often it may be asked again where the answer is damaged."""


class BulkClient:
    """One connection to a bulk server. One thread at a time.

    Args:
        context: whose sockets to use; stays the caller's.
        endpoint: tcp:// endpoint of the server.
        keys: of the job.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str, keys: JobKeys) -> None:
        self.endpoint = endpoint
        self.counters = Counters()
        self._keys = keys
        self._number = 0
        self._nonce = os.urandom(16)
        self._asked: dict[int, _Open] = {}
        """By the number on the wire."""
        self.socket = context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.RECONNECT_IVL, 50)
        self.socket.setsockopt(zmq.MAXMSGSIZE, 2 * MAX_RANGE_BYTES)
        self.socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
        self.socket.setsockopt(zmq.SNDHWM, 0)
        if keys.encrypt_all:
            keys.dial(self.socket)
        self.socket.connect(endpoint)

    def ask(self, range_: Range, *, patient: bool = False) -> int:
        """Send a question; its number, under which `receive` gives the answer."""
        return self._send(range_, patient, None, _TRIES)

    def _send(self, range_: Range, patient: bool, number: int | None, tries: int) -> int:
        """Each message has a number of its own, so that no key of a tag is used for two answers."""
        self._number += 1
        ask = Ask(number=self._number, nonce=self._nonce, range=range_, kinds=self._keys.kinds, patient=patient)
        encoded = _encoder.encode(ask)
        number = self._number if number is None else number
        self._asked[self._number] = _Open(number, encoded, ask, tries - 1)
        self.socket.send_multipart([encoded, self._keys.sign(encoded)])
        return number

    def forget(self, number: int) -> None:
        """Its answer is not wanted any more."""
        self._asked = {sent: one for sent, one in self._asked.items() if one.number != number}

    def receive(self) -> tuple[int, memoryview | HoldfastError] | None:
        """The next answer that has come, to a question that is still open; None where none waits.

        The error is a `CorruptError` where memory there does not match its checksum, or the message does not again and
        again; a `PeerError` where the bytes are not to be had.
        """
        while _waits(self.socket):
            frames = self.socket.recv_multipart(zmq.NOBLOCK, copy=False)
            try:
                head, body = frames
                answer = _answer_decoder.decode(head.buffer)
            except (ValueError, msgspec.MsgspecError):
                self.counters.garbage += 1
                continue
            one = self._asked.pop(answer.number, None)
            if one is None:
                continue
            data = memoryview(body.buffer)
            if answer.error is not None:
                kind = CorruptError if answer.corrupt else PeerError
                return one.number, kind(f"{self.endpoint}: {answer.error}")
            sound = len(data) == one.ask.range.length
            if sound and self._keys.sound(answer.kind, one.encoded, data, answer.tag):
                return one.number, data
            self.counters.damaged += 1
            _log.warning("%s sent %d bytes that do not match their tag", self.endpoint, len(data))
            if not one.tries:
                return one.number, CorruptError(f"{self.endpoint} sends bytes that do not match their tag")
            self._send(one.ask.range, one.ask.patient, one.number, one.tries)
        return None

    def wait(self, timeout_s: float) -> tuple[int, memoryview | HoldfastError]:
        """As `receive`, but waits.

        Raises:
            PeerTimeout: nothing came within `timeout_s`.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            answer = self.receive()
            if answer is not None:
                return answer
            left_s = deadline - time.monotonic()
            if left_s <= 0 or not self.socket.poll(max(1, round(left_s * 1000))):
                raise PeerTimeout(f"{self.endpoint} sent nothing for {timeout_s:.0f} s")

    def close(self) -> None:
        """Close the connection."""
        self.socket.close(0)


def _waits(socket: zmq.Socket[bytes]) -> bool:
    """Whether a message is there; far cheaper than the exception where none is."""
    events = socket.get(zmq.EVENTS)
    assert isinstance(events, int)
    return bool(events & zmq.POLLIN)


_encoder = msgspec.msgpack.Encoder()
_ask_decoder = msgspec.msgpack.Decoder(Ask)
_answer_decoder = msgspec.msgpack.Decoder(Answer)
