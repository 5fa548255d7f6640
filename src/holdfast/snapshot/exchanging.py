"""The thread that makes parity: it asks other nodes for chunks, adds them to the buffers, and seals these.

Decisions are the exchange's (`holdfast.snapshot.exchange`), which lives in this thread and nowhere else. The event loop
gives it events (`feed`, `protect`); what only the event loop can do (messages to other daemons, reservations, the
ledger) goes back to it through `Outside`. A chunk goes from the socket's memory straight into the parity, by a kernel
that runs without the interpreter lock.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import msgspec
import zmq

from holdfast.checkpoint.image import read_header
from holdfast.checkpoint.version import Version
from holdfast.errors import DECODE_ERRORS, CorruptError, HoldfastError
from holdfast.snapshot.bulk import BulkClient, StreamRange
from holdfast.snapshot.coding import (
    CHUNK_BYTES,
    Chunk,
    CodedImage,
    Extent,
    HeldParity,
    Parity,
    Stream,
    coded_ranges,
)
from holdfast.snapshot.exchange import Exchange
from holdfast.snapshot.exchange_events import (
    Absorb,
    AskStream,
    ChunkAbsorbed,
    ChunkArrived,
    ChunkRefused,
    DeclareDone,
    DropParity,
    ExchangeEvent,
    ExchangeInstruction,
    ExchangeStarted,
    Fetch,
    Finished,
    Nudged,
    ParityReserved,
    ParitySealed,
    ProtectWanted,
    ReserveParity,
    SealParity,
    SendStream,
    SourceReset,
    VersionFailed,
)
from holdfast.snapshot.headers import OwnImage
from holdfast.snapshot.keys import JobKeys
from holdfast.snapshot.messages import ParityMade
from holdfast.snapshot.parity import ParityStore, WholeParity
from holdfast.snapshot.persister import mapped_image
from holdfast.snapshot.shelf import ParityExtent, Shelf, SlotExtent

if TYPE_CHECKING:  # it needs numpy
    from holdfast.erasure import ReedSolomon

_log = logging.getLogger(__name__)
_CONNECTIONS: Final = 2
"""To each peer."""
_NUDGE_S: Final = 1.0
_SILENCE_S: Final = 5.0
"""Without an answer from a member that was asked: everything is asked again."""
_FENCE_S: Final = 10.0
_record_decoder = msgspec.msgpack.Decoder(HeldParity)


@dataclass(frozen=True, kw_only=True)
class Protecting:
    """What the stream of this node depends on, beside its images."""

    node_rank: int
    num_parity: int
    domains: Mapping[int, str]


@dataclass(frozen=True, kw_only=True)
class Outside:
    """What the thread hands to the event loop. Each may be called from the thread; it runs in the event loop.

    Attributes:
        send: an `AskStream` or a `SendStream` to another daemon.
        reserve: a `ReserveParity`; answered by feeding `ParityReserved`.
        done: a `DeclareDone`.
        made: a buffer was sealed.
        failed: a version cannot be protected, and why.
    """

    send: Callable[[AskStream | SendStream], None]
    reserve: Callable[[ReserveParity], None]
    done: Callable[[Version], None]
    made: Callable[[ParityMade], None]
    failed: Callable[[Version, str], None]


@dataclass
class Exchanged:
    """What the thread has done, for reports and tests. Written by the thread."""

    sealed: int = 0
    """Buffers that were sealed."""
    damaged: int = 0
    """Answers that did not match their tag, of connections that are closed."""


class StuckThread(Exception):
    """The thread cannot be fenced. No `HoldfastError`, with which the event loop would go on: the process ends, and its
    successor, which the agent starts and tells the generation again, adopts what lies in the arena."""


class ExchangeThread:
    """The thread ``holdfast-exchange``, its sockets and the machine. Made and closed by the event loop.

    `held` and `endpoints` are replaced as a whole; the thread writes the former, the event loop the latter.

    Args:
        context: the daemon's.
        keys: of the job.
        store: the parity buffers; this thread's but for reservations.
        shelf: where streams and parities are put up for others.
        outside: the event loop.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        keys: JobKeys,
        store: ParityStore,
        shelf: Shelf,
        outside: Outside,
    ) -> None:
        self.counters = Exchanged()
        self.held: tuple[HeldParity, ...] = ()
        self.endpoints: Mapping[int, str] = {}
        self._context, self._keys, self._store, self._shelf, self._outside = context, keys, store, shelf, outside
        self._machine = Exchange(chunk_bytes=CHUNK_BYTES)
        self._whole: dict[int, tuple[WholeParity, HeldParity]] = {}
        self._filling: _Filling | None = None
        self._clients: dict[int, _Member] = {}
        self._poller = zmq.Poller()
        self._jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._wakeup = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poller.register(self._wakeup, zmq.POLLIN)
        self._nudged = time.monotonic()
        self._stop = False
        self._thread = threading.Thread(target=self._run, name="holdfast-exchange", daemon=True)

    # --- for the event loop

    def adopt(self, images: Callable[[Version], Sequence[OwnImage]]) -> None:
        """Before the thread starts: put up what a predecessor left whole."""
        for whole in self._store.adopt():
            try:
                held = _record_decoder.decode(whole.map)
            except DECODE_ERRORS as error:
                _log.warning("parity of %s is discarded, its record does not parse: %s", whole.version, error)
                self._store.clear(whole.number)
                continue
            self._put_up(whole, held)
            self._put_up_stream(whole.version, held.coded.stream_of(held.holder), images(whole.version))

    @property
    def started(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def begin(self, event: ExchangeStarted) -> None:
        """Groups are formed; `finished` is filled in here."""
        self._submit(lambda: self._begin(event))

    def fence(self, event: ExchangeStarted) -> None:
        """A generation starts. As `begin`, but returns when what was under way is dropped: what an inventory lists
        afterwards stays.

        Raises:
            StuckThread: it was not within `_FENCE_S`.
        """
        begun = threading.Event()

        def job() -> None:
            try:
                self._begin(event)
            finally:
                begun.set()

        self._submit(job)
        if not begun.wait(_FENCE_S):
            raise StuckThread(f"thread {self._thread.name} did not stop within {_FENCE_S:.0f} s")

    def feed(self, event: ExchangeEvent) -> None:
        """Give the machine an event."""
        self._submit(lambda: self._handle(event))

    def protect(self, version: Version, images: Sequence[OwnImage], how: Protecting) -> None:
        """The ledger wants `version` protected."""
        self._submit(lambda: self._protect(version, images, how))

    def reserved(self, order: ReserveParity) -> None:
        """The buffer is there."""
        self._submit(lambda: self._reserved(order))

    def close(self, timeout_s: float = 2.0) -> None:
        """End the thread."""

        def stop() -> None:
            self._stop = True

        if self._thread.is_alive():
            self._submit(stop)
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                _log.warning("thread %s did not end within %.1f s", self._thread.name, timeout_s)
                return
        self._drop_clients()
        self._store.close()
        os.close(self._wakeup)

    def _submit(self, job: Callable[[], None]) -> None:
        self._jobs.put(job)
        os.eventfd_write(self._wakeup, 1)

    # --- the thread

    def _run(self) -> None:
        importlib.import_module("holdfast.erasure.reed_solomon")  # numpy, before anybody waits for it
        while not self._stop:
            try:
                self._turn()
            except zmq.ContextTerminated:
                return
            except Exception as error:  # noqa: BLE001  the thread's border: the ledger learns that this version failed
                _log.exception("the exchange failed")
                if self._machine.running is not None:
                    self._fail(self._machine.running, f"{type(error).__name__}: {error}")

    def _turn(self) -> None:
        ready = {source for source, _ in self._poller.poll(100)}
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wakeup)
        with contextlib.suppress(queue.Empty):
            while True:
                self._jobs.get_nowait()()
        for node_rank, member in list(self._clients.items()):
            for client in member.clients:
                if client.socket in ready and self._clients.get(node_rank) is member:
                    self._take(node_rank, member, client)
        now = time.monotonic()
        if self._machine.running is not None and now - self._nudged > _NUDGE_S:
            self._nudged = now
            self._handle(Nudged())
            silent: list[int] = []
            for node_rank, member in self._clients.items():
                if member.asked and now - member.heard > _SILENCE_S:
                    silent.append(node_rank)
            for node_rank in silent:  # connections anew: the endpoint may be another one
                self._close_member(node_rank)
                self._handle(SourceReset(node_rank=node_rank))

    def _begin(self, event: ExchangeStarted) -> None:
        self._drop_clients()
        finished = tuple(Finished(number, held.coded) for number, (_, held) in self._whole.items())
        self._handle(msgspec.structs.replace(event, finished=finished))

    def _handle(self, event: ExchangeEvent) -> None:
        for instruction in self._machine.handle(event):
            self._carry_out(instruction)

    def _carry_out(self, instruction: ExchangeInstruction) -> None:
        match instruction:
            case SendStream() | AskStream():
                self._outside.send(instruction)
            case ReserveParity():
                self._outside.reserve(instruction)
            case Fetch():
                self._fetch(instruction)
            case Absorb():
                raise AssertionError("chunks are absorbed where they arrive")
            case SealParity():
                self._seal(instruction)
            case DropParity(buffer=buffer):
                self._drop(buffer)
            case DeclareDone(version=version):
                self._outside.done(version)

    # --- our own stream

    def _protect(self, version: Version, images: Sequence[OwnImage], how: Protecting) -> None:
        try:
            coded = [_coded_image(version, one, how) for one in sorted(images, key=lambda one: one.global_rank)]
        except CorruptError as error:
            self._outside.failed(version, str(error))
            return
        stream = Stream(how.node_rank, tuple(coded))
        self._put_up_stream(version, stream, images)
        self._handle(ProtectWanted(version=version, stream=stream))

    def _put_up_stream(self, version: Version, stream: Stream, images: Sequence[OwnImage]) -> None:
        paths = {one.global_rank: one.path for one in images}
        segments = stream.segments(0, stream.size_bytes)
        if all(segment.global_rank in paths for segment in segments):
            extents = tuple(SlotExtent(paths[one.global_rank], one.offset, one.length) for one in segments)
            kept = {held.coded.version for _, held in self._whole.values()}
            others = {key: extents for key, extents in self._shelf.streams.items() if key[0] in kept}
            self._shelf.streams = {**others, (version, stream.node_rank): extents}

    # --- chunks

    def _fetch(self, fetch: Fetch) -> None:
        endpoint = self.endpoints.get(fetch.node_rank, "")
        if fetch.node_rank in self._clients and self._clients[fetch.node_rank].endpoint != endpoint:
            self._close_member(fetch.node_rank)
        if fetch.node_rank not in self._clients:
            clients = [BulkClient(self._context, endpoint, self._keys) for _ in range(_CONNECTIONS)]
            self._clients[fetch.node_rank] = _Member(endpoint, clients)
            for client in clients:
                self._poller.register(client.socket, zmq.POLLIN)
        self._clients[fetch.node_rank].ask(fetch)

    def _take(self, node_rank: int, member: _Member, client: BulkClient) -> None:
        while (answer := client.receive()) is not None:
            self._take_one(node_rank, member, client, *answer)
            del answer  # a chunk that is held while the next one is looked at is memory beside the arena

    def _take_one(
        self, node_rank: int, member: _Member, client: BulkClient, number: int, data: memoryview | HoldfastError
    ) -> None:
        member.heard = time.monotonic()
        version, chunk = member.asked.pop((client, number))
        if isinstance(data, CorruptError):
            self._fail(version, f"node {node_rank}: {data}")
            return
        if isinstance(data, HoldfastError):
            _log.info("node %d does not give a chunk: %s", node_rank, data)
            self._handle(ChunkRefused(version=version, chunk=chunk))
            return
        absorbed = False
        for instruction in self._machine.handle(ChunkArrived(version=version, chunk=chunk)):
            if isinstance(instruction, Absorb):
                self._absorb(instruction, data)
                absorbed = True
            else:
                self._carry_out(instruction)
        if absorbed:
            self._handle(ChunkAbsorbed(version=version, chunk=chunk))

    def _absorb(self, order: Absorb, data: memoryview) -> None:
        filling = self._filling
        assert filling is not None, "a chunk is absorbed before its buffer is there"
        assert filling.order.coded.version == order.version, (filling.order.coded.version, order)
        parity = filling.parities[order.parity]
        block = filling.view[parity.offset : parity.offset + parity.size_bytes]
        end = order.offset + order.length
        block[end : end + order.clear] = bytes(order.clear)
        filling.code.accumulate(
            order.chunk.shard, data, {parity.number: block}, offset=order.offset, overwrite=order.first
        )
        filling.fetched_bytes += len(data)

    def _fail(self, version: Version, reason: str) -> None:
        """The parity of a version can never be made."""
        if self._machine.running == version:
            self._handle(VersionFailed(version=version))
            self._outside.failed(version, reason)

    # --- buffers

    def _reserved(self, order: ReserveParity) -> None:
        """Mark the buffer as filling, before anything is asked for."""
        from holdfast.erasure import ReedSolomon

        coded = order.coded
        if self._machine.running != coded.version:
            return  # overtaken
        size_bytes = coded.buffer_bytes(order.node_rank)
        view = self._store.begin(order.buffer, coded.version, size_bytes)
        code = ReedSolomon(coded.group.num_data, coded.group.num_parity)
        self._filling = _Filling(order, view, coded.parities(order.node_rank), code)
        self._handle(ParityReserved(version=coded.version))

    def _seal(self, order: SealParity) -> None:
        held = HeldParity(coded=order.coded, holder=order.node_rank)
        size_bytes = order.coded.buffer_bytes(order.node_rank)
        filling, self._filling = self._filling, None
        assert filling is not None, "a buffer is sealed that was not filled"
        try:
            whole = self._store.finish(order.buffer, order.coded.version, size_bytes, msgspec.msgpack.encode(held))
        except OSError as error:
            self._fail(order.coded.version, f"its record cannot be written: {error}")
            return
        self._put_up(whole, held)
        self.counters.sealed += 1
        self._outside.made(
            ParityMade(
                version=order.coded.version,
                fetched_bytes=filling.fetched_bytes,
                buffer_bytes=size_bytes,
                seconds=time.monotonic() - filling.begun,
                ended=time.time(),
                damaged=self.counters.damaged
                + sum(client.counters.damaged for member in self._clients.values() for client in member.clients),
            )
        )
        self._handle(ParitySealed(version=order.coded.version))

    def _put_up(self, whole: WholeParity, held: HeldParity) -> None:
        self._whole[whole.number] = (whole, held)
        self._show_parities()

    def _drop(self, buffer: int) -> None:
        self._whole.pop(buffer, None)
        self._show_parities()
        if self._filling is not None and self._filling.order.buffer == buffer:
            self._filling = None
        self._store.clear(buffer)

    def _show_parities(self) -> None:
        """What inventories name and what others may read."""
        self.held = tuple(held for _, (_, held) in sorted(self._whole.items()))
        self._shelf.parities = {
            (whole.version, parity.stripe, parity.number): ParityExtent(
                self._store.path(number), parity.offset, parity.size_bytes, whole.checksums, whole.size_bytes
            )
            for number, (whole, held) in self._whole.items()
            for parity in held.coded.parities(held.holder)
        }

    # --- connections

    def _close_member(self, node_rank: int) -> None:
        member = self._clients.pop(node_rank)
        for client in member.clients:
            self.counters.damaged += client.counters.damaged
            self._poller.unregister(client.socket)
            client.close()

    def _drop_clients(self) -> None:
        for node_rank in list(self._clients):
            self._close_member(node_rank)


@dataclass
class _Filling:
    """The buffer that is being filled."""

    order: ReserveParity
    view: memoryview
    parities: tuple[Parity, ...]
    code: ReedSolomon
    fetched_bytes: int = 0
    begun: float = field(default_factory=time.monotonic)


@dataclass
class _Member:
    """Connections to one member of the group."""

    endpoint: str
    clients: list[BulkClient]
    asked: dict[tuple[BulkClient, int], tuple[Version, Chunk]] = field(default_factory=dict)
    heard: float = field(default_factory=time.monotonic)
    """When it answered last, or was first asked since; `time.monotonic()`."""
    turn: int = 0

    def ask(self, fetch: Fetch) -> None:
        """Ask for a chunk, over the next connection."""
        if not self.asked:
            self.heard = time.monotonic()
        self.turn = (self.turn + 1) % len(self.clients)
        client = self.clients[self.turn]
        wanted = StreamRange(version=fetch.version, node_rank=fetch.node_rank, offset=fetch.offset, length=fetch.length)
        self.asked[client, client.ask(wanted, patient=True)] = (fetch.version, fetch.chunk)


def _coded_image(version: Version, one: OwnImage, how: Protecting) -> CodedImage:
    """What of an image is coded, by its header.

    Raises:
        CorruptError: the slot does not hold the version, or the header is damaged.
    """
    with mapped_image(one.path, version) as (image, digest):
        meta = read_header(lambda offset, length: image[offset : offset + length], expected_digest=digest)
        extents = [
            Extent(start, start + piece.size_bytes, piece.nodes)
            for piece, start in zip(meta.pieces, meta.piece_offsets, strict=True)
        ]
        ranges, copies = coded_ranges(
            extents,
            data_start=meta.data_start,
            objects_offset=meta.objects_offset,
            size_bytes=meta.size_bytes,
            block_bytes=meta.block_bytes,
            num_parity=how.num_parity,
            domains=how.domains,
        )
    return CodedImage(
        global_rank=one.global_rank, size_bytes=meta.size_bytes, header_digest=digest, ranges=ranges, copies=copies
    )
