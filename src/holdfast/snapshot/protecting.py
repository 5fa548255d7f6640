"""The event loop's half of protecting versions: it stands between the ledger and the thread that makes parity.

What the leader chose for the generation (groups, failure domains, endpoints of the bulk servers) comes with
`LeaderRestore`; the thread is started where some group has parity, or where a predecessor left some. A job of one node
has neither, and pays nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import zmq

from holdfast.checkpoint.version import GenerationId, Version
from holdfast.erasure.groups import Group
from holdfast.snapshot import ledger
from holdfast.snapshot.arena import Arena
from holdfast.snapshot.coding import HeldParity
from holdfast.snapshot.exchange_events import (
    AskStream,
    ExchangeStarted,
    KeepParity,
    ReserveParity,
    SendStream,
    StreamAsked,
    StreamReceived,
)
from holdfast.snapshot.headers import OwnImage
from holdfast.snapshot.keys import JobKeys
from holdfast.snapshot.lanes import Lanes
from holdfast.snapshot.limits import least_limit
from holdfast.snapshot.messages import (
    AnyMessage,
    LeaderRestore,
    Notice,
    ParityMade,
    StartGeneration,
    StreamTold,
    StreamWanted,
)
from holdfast.snapshot.parity import NUM_BUFFERS, ParityStore
from holdfast.snapshot.shelf import Shelf

if TYPE_CHECKING:  # it needs numpy
    from holdfast.snapshot.exchanging import ExchangeThread

_log = logging.getLogger(__name__)
_LANE = "parity"


class Protector:
    """Of one daemon. Event loop only.

    Args:
        arena: where the parity is kept.
        context: of the daemon's sockets.
        keys: of the job.
        shelf: where streams and parities are put up for others.
        lanes: whose ``parity`` lane reserves memory.
        send: sends to the daemon of a node rank.
        feed: tells the ledger.
        images: of a version on this node.
        say: a line for people.
        found: what was damaged, and how much (`DamageLog.found`).
        to_agent: sends to our agent, if there is one.
    """

    def __init__(
        self,
        arena: Arena,
        context: zmq.Context[zmq.Socket[bytes]],
        keys: JobKeys,
        shelf: Shelf,
        lanes: Lanes,
        *,
        send: Callable[[int, AnyMessage], None],
        feed: Callable[[ledger.NodeEvent], None],
        images: Callable[[Version], Sequence[OwnImage]],
        say: Callable[[Notice], None],
        found: Callable[[str, int], None],
        to_agent: Callable[[AnyMessage], None],
    ) -> None:
        self._arena, self._context, self._keys, self._shelf, self._lanes = arena, context, keys, shelf, lanes
        self._send, self._feed, self._images, self._say, self._to_agent = send, feed, images, say, to_agent
        self._found, self._damaged = found, 0
        self._store = ParityStore(arena)
        self._thread: ExchangeThread | None = None
        self._start: StartGeneration | None = None
        self._group: Group | None = None
        self._domains: dict[int, str] = {}
        self._lowered = 0  # `LeaderRestore.lowered`

    @property
    def held(self) -> tuple[HeldParity, ...]:
        """Whole parity, for the inventory."""
        return self._thread.held if self._thread is not None else ()

    @property
    def shares(self) -> tuple[tuple[int, float], ...]:
        """How many parities, m, the group of this node may have, most first; and the bytes of one generation of parity
        for each byte of its state: m / k."""
        group = self._group
        if group is None:
            return ()
        width = group.num_data + group.num_parity
        return tuple((number, number / (width - number)) for number in range(group.num_parity, 0, -1))

    @property
    def coded(self) -> bool:
        """Whether some group of the generation has parity."""
        return self._group is not None

    # --- generations

    def adopt(self) -> None:
        """First of all: what a predecessor left."""
        if any(self._store.path(number).exists() for number in range(NUM_BUFFERS)):
            self._ready()

    def begin(self, start: StartGeneration) -> None:
        """A generation starts: unfinished parity is dropped; groups come with `decided`."""
        self._start, self._group = start, None
        if self._thread is not None:
            self._thread.fence(self._started(start, Group((start.node_rank,), 1, 0)))

    def decided(self, message: LeaderRestore) -> None:
        """The leader has chosen, and formed groups."""
        start, grouping, self._lowered = self._start, message.grouping, message.lowered
        if start is None or grouping is None or all(group.num_parity == 0 for group in grouping.groups):
            return
        self._group, self._domains = grouping.group_of(start.node_rank), message.domains
        thread = self._ready()
        thread.endpoints = dict(message.restore.bulk)
        thread.begin(self._started(start, self._group))

    def _started(self, start: StartGeneration, group: Group) -> ExchangeStarted:
        return ExchangeStarted(
            generation=start.generation,
            node_rank=start.node_rank,
            group=group,
            world_size=sum(member.num_ranks for member in start.members),
            finished=(),
        )

    def moved(self, node_rank: int, bulk: str) -> None:
        """The bulk server of another node listens elsewhere now."""
        if self._thread is not None and bulk:
            self._thread.endpoints = {**self._thread.endpoints, node_rank: bulk}

    def _ready(self) -> ExchangeThread:
        if self._thread is None:
            from holdfast.snapshot.exchanging import ExchangeThread, Outside  # late: it needs numpy

            outside = Outside(
                send=lambda order: self._lanes.post(lambda: self._tell(order)),
                reserve=lambda order: self._lanes.post(lambda: self._reserve(order)),
                done=lambda version: self._lanes.post(lambda: self._feed(ledger.ParityDone(version=version))),
                made=lambda message: self._lanes.post(lambda: self._made(message)),
                failed=lambda version, reason: self._lanes.post(lambda: self._failed(version, reason)),
            )
            self._thread = ExchangeThread(self._context, self._keys, self._store, self._shelf, outside)
            self._thread.adopt(self._images)
            self._thread.start()
        return self._thread

    def close(self) -> None:
        """End the thread."""
        if self._thread is not None:
            self._thread.close()
            self._thread = None

    # --- the ledger's instructions

    def protect(self, version: Version) -> None:
        """Make parity of a version."""
        if self._thread is None or self._group is None or self._start is None:
            _log.error("%s is to be protected, and no group has parity", version)
            return
        from holdfast.snapshot.exchanging import Protecting

        how = Protecting(
            node_rank=self._start.node_rank, num_parity=self._group.num_parity, domains=dict(self._domains)
        )
        self._thread.protect(version, self._images(version), how)

    def keep(self, version: Version | None) -> None:
        """This version is the protected one."""
        if self._thread is not None:
            self._thread.feed(KeepParity(version=version))

    # --- other daemons

    def receive(self, message: StreamTold | StreamWanted) -> None:
        """A member of the group says what its stream is, or asks for ours."""
        if self._thread is None:
            return
        match message:
            case StreamTold(version=version, stream=stream):
                self._thread.feed(StreamReceived(version=version, stream=stream))
            case StreamWanted(version=version, node_rank=node_rank):
                self._thread.feed(StreamAsked(version=version, node_rank=node_rank))

    def _tell(self, order: AskStream | SendStream) -> None:
        assert self._start is not None
        match order:
            case SendStream(node_rank=to, version=version, stream=stream):
                self._send(to, StreamTold(version=version, stream=stream))
            case AskStream(node_rank=to, version=version):
                self._send(to, StreamWanted(version=version, node_rank=self._start.node_rank))

    # --- memory

    def _reserve(self, order: ReserveParity) -> None:
        size_bytes = order.coded.buffer_bytes(order.node_rank)

        def reserve() -> str | None:
            return self._store.reserve(order.buffer, size_bytes, self._room)

        def reserved(problem: str | Exception | None) -> None:
            if problem is not None:
                self.unavailable(order.coded.version.generation, str(problem))
            elif self._thread is not None:
                self._thread.reserved(order)

        self._lanes.submit(_LANE, reserve, reserved)

    def _room(self) -> int:
        allowed = self._arena.state.memory_limit_bytes
        return least_limit(self._arena.directory, used_bytes=self._arena.used_bytes(), allowed_bytes=allowed).room_bytes

    def unavailable(self, generation: GenerationId, reason: str) -> None:
        """There is no room for parity in this generation."""
        self._say(Notice(severity="warning", text=f"snapshots are not protected against the loss of a node: {reason}"))
        self._feed(ledger.ParityAvailable(generation=generation, available=False, lowered=self._lowered))

    def _made(self, message: ParityMade) -> None:
        """A buffer was sealed. What came damaged on the way was asked for again."""
        self._to_agent(message)
        number, self._damaged = message.damaged - self._damaged, message.damaged
        if number > 0:
            text = f"{number} of the messages with chunks of {message.version} were damaged on their way and sent again"
            self._found(text, number)

    def _failed(self, version: Version, reason: str) -> None:
        self._say(Notice(severity="warning", text=f"{version} cannot be protected: {reason}"))
        self._feed(ledger.ParityFailed(version=version))
