"""The parity exchange of one node: which chunks to ask for, what to add where, when the parity is whole (pure).

Rules
-----
1. A node has two parity buffers. One holds the parity of the protected version, the other that of the version being
   protected. Only `KeepParity`, which comes from the leader's orders, lets the former go; unfinished parity, and a
   finished one that nobody names, may go at any time (no RAID write hole). After a restart the exchange has heard no
   name yet: what this generation has finished stays until it is told which version is being protected.
2. Requests go out by node rank, so they end with the generation (`ExchangeFenced`).
3. Parity is counted in memory only: which chunks it has taken in is known to the machine that took them in. So
   unfinished parity is dropped at a restart and at a new generation, and nothing can be counted twice or left out.
4. Of each chunk one copy is taken in. What was not asked for, or has come already, is dropped.
5. A chunk is known by its version and its place. A version never changes, so an answer to an older request is as good
   as one to the last.
6. The first chunk of a range replaces what the buffer holds there, and zeros what longer sources reach: a buffer is
   never cleared as a whole.
7. Done is said when everything that was asked for has been added (`ChunkAbsorbed`) and the buffer is sealed.

States of the running version
-----------------------------
    streams     ProtectWanted: it waits for the streams of all members of the group
    reserving   all streams are known, so all layouts are; the buffer is marked as filling
    filling     ParityReserved: chunks are asked for, a window at a time, and added as they come
    sealing     every chunk was added
    done        ParitySealed: kept with those that are finished

Source: the layout is that of SCR's Reed-Solomon scheme; REFT (arXiv 2310.12670) encodes snapshots the same way, by
sub-groups. Fetching by the holder of the parity is ours.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from holdfast.checkpoint.version import GenerationId, Version
from holdfast.erasure.groups import Group
from holdfast.snapshot.coding import Chunk, CodedVersion, Parity, Stream
from holdfast.snapshot.exchange_events import (
    Absorb,
    AskStream,
    ChunkAbsorbed,
    ChunkArrived,
    ChunkRefused,
    DeclareDone,
    DropParity,
    ExchangeEvent,
    ExchangeFenced,
    ExchangeInstruction,
    ExchangeStarted,
    Fetch,
    KeepParity,
    Nudged,
    ParityReserved,
    ParitySealed,
    ProtectWanted,
    ReserveParity,
    SealParity,
    SendStream,
    SourceReset,
    StreamAsked,
    StreamReceived,
    VersionFailed,
)

WINDOW: Final = 4
"""Chunks asked for that have not come yet, over all sources; but at least one of each. More of them only fill memory
and caches: the next answer is under way while one is added."""
_EARLY: Final = 4
"""Versions of which streams are kept that come before our own order."""


@dataclass
class ExchangeCounters:
    """For reports and tests."""

    absorbed: int = 0
    dropped: int = 0
    """Chunks that came twice, or that nobody waited for."""
    refused: int = 0
    asked_again: int = 0


@dataclass
class _Source:
    """What one member has still to give."""

    waiting: deque[Chunk] = field(default_factory=deque)
    asked: dict[Chunk, None] = field(default_factory=dict)
    """In the order of the requests."""
    refused: list[Chunk] = field(default_factory=list)


@dataclass
class _Running:
    """The version whose parity is being made."""

    version: Version
    streams: dict[int, Stream]
    coded: CodedVersion | None = None
    buffer: int = -1
    sources: dict[int, _Source] = field(default_factory=dict)
    parities: dict[int, tuple[int, Parity]] = field(default_factory=dict)
    """By stripe: place in the buffer."""
    cuts: dict[tuple[int, int], range] = field(default_factory=dict)
    """By stripe and shard: `CodedVersion.shard_range`."""
    begun: set[tuple[int, int]] = field(default_factory=set)
    """(stripe, chunk index) of which some source was taken in."""
    absorbing: set[Chunk] = field(default_factory=set)
    left: int = 0
    """Chunks that are not added yet."""

    def cut(self, chunk: Chunk, chunk_bytes: int) -> range:
        """The chunk as a range of its shard."""
        start = chunk.index * chunk_bytes
        return range(start, min(start + chunk_bytes, len(self.cuts[chunk.stripe, chunk.shard])))


class Exchange:
    """One per daemon; used by one thread. `handle` costs microseconds, a few per chunk.

    Args:
        chunk_bytes: how shards are cut; the same on every node of the job.
        window: chunks asked for at a time, over all sources.
    """

    def __init__(self, *, chunk_bytes: int, window: int = WINDOW) -> None:
        self.counters = ExchangeCounters()
        self.finished: dict[int, CodedVersion] = {}
        """Whole parity, by buffer."""
        self._chunk_bytes, self._window = chunk_bytes, window
        self._generation: GenerationId | None = None
        self._node_rank = 0
        self._world_size = 0
        self._group = Group((0,), 1, 0)
        self._kept: Version | None = None
        self._wanted: Version | None = None
        self._own: Stream | None = None
        """Ours of the version that is wanted."""
        self._early: dict[Version, dict[int, Stream]] = {}
        self._running: _Running | None = None

    @property
    def running(self) -> Version | None:
        """The version whose parity is being made: `Nudged` is to be fed from time to time."""
        return self._running.version if self._running else None

    def handle(self, event: ExchangeEvent) -> list[ExchangeInstruction]:
        """Take one event; instructions are to be carried out in order, before the next event is fed. What speaks about
        another version than the running one changes nothing."""
        out: list[ExchangeInstruction] = []
        match event:
            case ExchangeFenced():
                self._drop_running(out)
                self._generation = self._wanted = self._own = None
            case ExchangeStarted():
                self._start(event, out)
            case ProtectWanted():
                self._protect(event, out)
            case StreamReceived():
                self._take_stream(event.version, event.stream, out)
            case StreamAsked():
                if event.version == self._wanted:
                    self._send_stream((event.node_rank,), out)
            case KeepParity():
                self._kept = event.version
                self._drop_finished(out)
            case VersionFailed():
                if event.version == self.running:
                    self._drop_running(out)
            case Nudged():
                self._nudge(out)
            case _:
                running = self._running
                if running is not None and running.coded is not None:
                    self._take_running(running, event, out)
        return out

    def _take_running(self, running: _Running, event: ExchangeEvent, out: list[ExchangeInstruction]) -> None:
        match event:
            case SourceReset(node_rank=node_rank):
                self._ask_again(running, node_rank, out)
            case ChunkArrived(version=version, chunk=chunk):
                if version == running.version:
                    self._take_chunk(running, chunk, out)
                else:
                    self.counters.dropped += 1
            case ChunkAbsorbed(version=version, chunk=chunk) if version == running.version:
                if chunk in running.absorbing:
                    running.absorbing.discard(chunk)
                    running.left -= 1
                    self._seal_if_whole(running, out)
            case ChunkRefused(version=version, chunk=chunk) if version == running.version:
                self._take_refusal(running, chunk, out)
            case ParityReserved(version=version) if version == running.version:
                self._begin(running, out)
            case ParitySealed(version=version) if version == running.version:
                assert running.coded is not None
                self.finished[running.buffer] = running.coded
                self._running = None
                out.append(DeclareDone(version=version))

    # --- generations and orders

    def _start(self, event: ExchangeStarted, out: list[ExchangeInstruction]) -> None:
        if all(one.coded.version != self.running for one in event.finished):  # else it was sealed a moment ago
            self._drop_running(out)
        self._running = None
        self._generation, self._node_rank = event.generation, event.node_rank
        self._group, self._world_size = event.group, event.world_size
        self.finished = {one.buffer: one.coded for one in event.finished}
        self._kept = self._wanted = self._own = None
        self._early = {}

    def _protect(self, event: ProtectWanted, out: list[ExchangeInstruction]) -> None:
        if event.version.generation != self._generation or event.version == self.running:
            return
        self._drop_running(out)
        self._wanted, self._own = event.version, event.stream
        self._drop_finished(out)
        self._send_stream(self._others(), out)
        whole = any(coded.version == event.version for coded in self.finished.values())
        if whole or self._group.num_parity == 0:
            out.append(DeclareDone(version=event.version))
            return
        early = self._early.get(event.version, {})
        self._early = {version: one for version, one in self._early.items() if version.step > event.version.step}
        self._running = _Running(event.version, {**early, self._node_rank: event.stream})
        self._reserve_if_known(self._running, out)
        self._ask_streams(self._running, out)

    def _drop_running(self, out: list[ExchangeInstruction]) -> None:
        running, self._running = self._running, None
        if running is not None and running.coded is not None:
            out.append(DropParity(buffer=running.buffer, version=running.version))

    def _drop_finished(self, out: list[ExchangeInstruction]) -> None:
        """Finished parity stays where its version is the protected one, or the one that is being protected.

        Before the first order to protect, after a restart, that may be what this generation finished: the leader counts
        on it since the report before, and orders that are older than that name nothing.
        """
        for buffer, coded in list(self.finished.items()):
            may_count = self._wanted is None and coded.version.generation == self._generation
            if not may_count and coded.version not in (self._kept, self._wanted):
                del self.finished[buffer]
                out.append(DropParity(buffer=buffer, version=coded.version))

    # --- streams

    def _others(self) -> list[int]:
        return [node for node in self._group.members if node != self._node_rank]

    def _send_stream(self, nodes: Iterable[int], out: list[ExchangeInstruction]) -> None:
        if self._wanted is not None and self._own is not None:
            out += [SendStream(node_rank=node, version=self._wanted, stream=self._own) for node in nodes]

    def _ask_streams(self, running: _Running, out: list[ExchangeInstruction]) -> None:
        unknown = [node for node in self._others() if node not in running.streams]
        out += [AskStream(node_rank=node, version=running.version) for node in unknown]

    def _take_stream(self, version: Version, stream: Stream, out: list[ExchangeInstruction]) -> None:
        if version.generation != self._generation or stream.node_rank not in self._group.members:
            return
        running = self._running
        if running is not None and running.version == version:
            running.streams.setdefault(stream.node_rank, stream)  # ours is there already
            self._reserve_if_known(running, out)
        elif self._wanted is None or version.step > self._wanted.step:
            self._early.setdefault(version, {})[stream.node_rank] = stream
            for old in sorted(self._early)[:-_EARLY]:
                del self._early[old]

    def _reserve_if_known(self, running: _Running, out: list[ExchangeInstruction]) -> None:
        if running.coded is not None or not running.streams.keys() >= set(self._group.members):
            return
        running.coded = CodedVersion(
            version=running.version,
            world_size=self._world_size,
            group=self._group,
            streams=tuple(running.streams[node] for node in self._group.members),
            chunk_bytes=self._chunk_bytes,
        )
        running.buffer = 1 if 0 in self.finished else 0
        assert running.buffer not in self.finished, "both buffers hold parity that counts"
        out.append(ReserveParity(buffer=running.buffer, coded=running.coded, node_rank=self._node_rank))

    # --- chunks

    def _begin(self, running: _Running, out: list[ExchangeInstruction]) -> None:
        """Line up all chunks, in the order of their place in the parities: what goes to one place comes together."""
        coded = running.coded
        assert coded is not None
        if running.sources or running.parities:
            return  # said twice
        wanted: list[Chunk] = []
        for place, parity in enumerate(coded.parities(self._node_rank)):
            running.parities[parity.stripe] = (place, parity)
            for shard in range(coded.group.num_data):
                running.cuts[parity.stripe, shard] = coded.shard_range(parity.stripe, shard)
                wanted += [Chunk(parity.stripe, index, shard) for index in range(coded.chunks(parity.stripe, shard))]
        running.left = len(wanted)
        for chunk in sorted(wanted, key=lambda chunk: (chunk.index, chunk.stripe, chunk.shard)):
            node = coded.shard_node(chunk.stripe, chunk.shard)
            running.sources.setdefault(node, _Source()).waiting.append(chunk)
        for node in running.sources:
            self._fetch(running, node, out)
        self._seal_if_whole(running, out)

    def _fetch(self, running: _Running, node: int, out: list[ExchangeInstruction]) -> None:
        source = running.sources[node]
        while source.waiting and len(source.asked) < max(1, self._window // len(running.sources)):
            chunk = source.waiting.popleft()
            source.asked[chunk] = None
            cut = running.cut(chunk, self._chunk_bytes)
            out.append(
                Fetch(
                    node_rank=node,
                    version=running.version,
                    chunk=chunk,
                    offset=running.cuts[chunk.stripe, chunk.shard].start + cut.start,
                    length=len(cut),
                )
            )

    def _take_chunk(self, running: _Running, chunk: Chunk, out: list[ExchangeInstruction]) -> None:
        node = self._source_of(running, chunk)
        if node is None or chunk not in running.sources[node].asked:
            self.counters.dropped += 1
            return
        del running.sources[node].asked[chunk]
        cut = running.cut(chunk, self._chunk_bytes)
        place, parity = running.parities[chunk.stripe]
        first = (chunk.stripe, chunk.index) not in running.begun
        reach = min(cut.start + self._chunk_bytes, parity.size_bytes)
        running.begun.add((chunk.stripe, chunk.index))
        running.absorbing.add(chunk)
        self.counters.absorbed += 1
        out.append(
            Absorb(
                buffer=running.buffer,
                version=running.version,
                chunk=chunk,
                parity=place,
                offset=cut.start,
                length=len(cut),
                first=first,
                clear=reach - cut.stop if first else 0,
            )
        )
        self._fetch(running, node, out)

    def _source_of(self, running: _Running, chunk: Chunk) -> int | None:
        assert running.coded is not None
        if (chunk.stripe, chunk.shard) not in running.cuts:
            return None
        node = running.coded.shard_node(chunk.stripe, chunk.shard)
        return node if node in running.sources else None

    def _take_refusal(self, running: _Running, chunk: Chunk, out: list[ExchangeInstruction]) -> None:
        node = self._source_of(running, chunk)
        if node is not None and chunk in running.sources[node].asked:
            self.counters.refused += 1
            del running.sources[node].asked[chunk]
            running.sources[node].refused.append(chunk)

    def _ask_again(self, running: _Running, node: int, out: list[ExchangeInstruction]) -> None:
        source = running.sources.get(node)
        if source is not None:
            again = [*source.asked, *source.refused]
            self.counters.asked_again += len(again)
            source.waiting.extendleft(reversed(again))
            source.asked, source.refused = {}, []
            self._fetch(running, node, out)

    def _nudge(self, out: list[ExchangeInstruction]) -> None:
        running = self._running
        if running is None:
            return
        self._ask_streams(running, out)
        for node, source in running.sources.items():
            source.waiting.extendleft(reversed(source.refused))
            source.refused = []
            self._fetch(running, node, out)

    def _seal_if_whole(self, running: _Running, out: list[ExchangeInstruction]) -> None:
        if running.left == 0:
            assert running.coded is not None
            out.append(SealParity(buffer=running.buffer, coded=running.coded, node_rank=self._node_rank))
