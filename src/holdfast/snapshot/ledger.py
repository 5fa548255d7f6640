"""The ledger of one node: which slot holds which version, who may write it, and when it may be reused (pure).

Rules
-----
1. A slot is granted to one version at a time, and only while it is free (`holdfast.snapshot.slots` says when).
2. Slots of the newest complete version, of the parent and of pinned versions are kept. Only orders of the leader free
   them: a newer complete version, all ranks of the generation having completed one, the end of the persist. A node
   never decides by itself that a version is superseded.
3. What the leader no longer lists is abandoned; its slot is quarantined until each writer has let go or is dead.
4. Events of an older generation change nothing but what they say about a writer that let go. Orders of an older
   generation or of an older leader epoch are refused.
5. The slot headers are the truth about what is clean: when a generation starts, and when a daemon is restarted, they
   are read again. The control page is the truth about what is granted: a grant counts from the moment at which it
   stands there, in this daemon's memory or not.

States of a generation on a node
--------------------------------
    fenced      GenerationStarted: old images are kept as they are, nothing is granted
    restoring   RestoreDecided: the parent is known; the others are still kept, for the parent may fail its checks
    running     orders say that all ranks have entered: everything but the parent and the pinned versions goes
    advanced    orders name a complete version of this generation: the parent goes too

Theory of operation
-------------------
Reports and orders are whole states (`holdfast.snapshot.reports`). After each event the ledger compares what it would
report with what it last did, and sends it where they differ; the leader answers in the same way. Hence a lost message,
a restarted daemon and a restarted leader need no code of their own but the first exchange. A leader that has been
restarted has a new epoch and asks for reports (``resync``); a node that has answered it refuses what the old one may
still have in flight, so the new one builds on reports that nothing can overtake.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from holdfast.checkpoint.version import GenerationId, Version
from holdfast.snapshot.reports import Agreed, Final, Held, NodeState, Orders, Pin, RankState, Request, SlotRef
from holdfast.snapshot.slots import Header, Image, SlotTable

__all__ = ["Header", "Image", "NodeEvent", "NodeInstruction", "NodeLedger"]

# --- events: what the shell of the daemon feeds ---------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class GenerationStarted:
    """Feed at StartGeneration, after reading all slot headers again (the header is the truth: doorbells may be lost).

    Fences everything older. Yields `ClearGrants` and `SendInventory`. No slots until the next `PoolReady`.
    """

    generation: GenerationId
    node_rank: int
    local_ranks: tuple[int, ...]
    """Global ranks of this node in the new generation."""
    headers: tuple[Header, ...]


@dataclass(frozen=True, kw_only=True)
class Published:
    """A grant that stands on the control page of the current generation: the newest one of its slot."""

    slot: SlotRef
    step: int


@dataclass(frozen=True, kw_only=True)
class Adopted:
    """Feed once, first, in a restarted daemon whose arena has a generation (node.state), before anything else.

    Feed afterwards `PoolReady`, then from the control page `RankEntered`, `RankStepped`, `RankAcknowledged` and
    `RankRead` of each rank, and `WriterDied` for those that are gone.
    """

    generation: GenerationId
    node_rank: int
    local_ranks: tuple[int, ...]
    parent: Version | None
    """As recorded when `RestoreDecided` was fed; None where nothing was decided or memory was not the source."""
    headers: tuple[Header, ...]
    published: tuple[Published, ...]
    agreed: Agreed | None
    """What stands on the control page."""
    requests: tuple[Request, ...] = ()
    """Open requests as recorded in node.state (`StoreRequests`)."""


@dataclass(frozen=True, kw_only=True)
class RestoreDecided:
    """Feed when the leader's choice arrives (LeaderRestore) and its Parentage is recorded, before workers hear of it.
    Again when the leader chooses anew (RestoreFailed). Yields `StopPersist` for what lies above the restored step."""

    generation: GenerationId
    parent: Version | None
    """The version in memory that the generation starts from; None where the tier is storage or none."""
    step: int
    """The restored step, 0 where the tier is none."""


@dataclass(frozen=True, kw_only=True)
class PoolReady:
    """Feed when slot files 0..num_slots-1 of `pool` are there for all local ranks, just before SlotsReady goes out.

    Slots of other pools are never granted again; each is dropped (`DropSlot`) once nothing in it is needed. Feed it
    again in each new generation, with the same pool where the old one still fits.
    """

    pool: int
    num_slots: int


@dataclass(frozen=True)
class PoolPaused:
    """Feed when some rank needs larger slots: no grants until the next `PoolReady`."""


@dataclass(frozen=True, kw_only=True)
class RankEntered:
    """Feed when a rank reported the phase ``restored`` (its Session is entered)."""

    generation: GenerationId
    global_rank: int
    step: int
    until: int | None = None


@dataclass(frozen=True, kw_only=True)
class RankStepped:
    """Feed when a rank's newest finished step on the control page has changed (polled, or with a doorbell), unless the
    rank is in `NodeLedger.watched` (then `RankRead`)."""

    generation: GenerationId
    global_rank: int
    step: int


@dataclass(frozen=True, kw_only=True)
class RankUntil:
    """Feed when a rank says (NeedSlots) what the last step of its loop will be."""

    generation: GenerationId
    global_rank: int
    until: int


@dataclass(frozen=True, kw_only=True)
class RankCommitted:
    """Feed at `Committed`. Idempotent; a worker repeats its newest ones when it reconnects to a restarted daemon."""

    version: Version
    global_rank: int
    wait_s: float = 0.0
    step_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class RankMissed:
    """Feed at `Missed`: the worker saw, at a boundary after `version.step`, a grant of it that it had not taken."""

    version: Version
    global_rank: int


@dataclass(frozen=True, kw_only=True)
class RankRead:
    """A worker's published step, read first, then its headers. Feed it when a worker reconnects (its doorbells may be
    lost), at `ReadRanks`, and instead of `RankStepped` for ranks in `NodeLedger.watched`.

    A grant of an older step without a matching header was missed; a withdrawn grant of a later step will never be
    taken. Needs that a worker publishes a step before it looks for its grant, and writes FILLING before it leaves that
    boundary.
    """

    generation: GenerationId
    global_rank: int
    step: int
    headers: tuple[Header, ...]


@dataclass(frozen=True, kw_only=True)
class RankAcknowledged:
    """Feed when a rank's acknowledged number on the control page has changed."""

    generation: GenerationId
    global_rank: int
    number: int


@dataclass(frozen=True, kw_only=True)
class RankFinished:
    """Feed at `FinalStep`: the loop of the rank ended by itself."""

    generation: GenerationId
    global_rank: int
    step: int
    persist: bool


@dataclass(frozen=True, kw_only=True)
class WriterDied:
    """Feed when a worker process is gone (pidfd), with the generation it belonged to."""

    generation: GenerationId
    global_rank: int


@dataclass(frozen=True, kw_only=True)
class Requested:
    """Feed at RequestSave, RequestEnd and RequestStop. Survives generations."""

    request: Request


@dataclass(frozen=True)
class LeaderConnected:
    """Feed when the connection to the leader's daemon is (re)made: yields a `SendReport`."""


@dataclass(frozen=True, kw_only=True)
class OrdersReceived:
    """Feed when orders of the leader arrive (in order of arrival)."""

    orders: Orders


NodeEvent = (
    GenerationStarted
    | Adopted
    | RestoreDecided
    | PoolReady
    | PoolPaused
    | RankEntered
    | RankStepped
    | RankUntil
    | RankCommitted
    | RankMissed
    | RankRead
    | RankAcknowledged
    | RankFinished
    | WriterDied
    | Requested
    | LeaderConnected
    | OrdersReceived
)

# --- instructions: what the shell must do, in this order ------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ClearGrants:
    """Erase the page's grants and agreed step and write the generation: workers of older ones see nothing."""

    generation: GenerationId


@dataclass(frozen=True)
class SendInventory:
    """Send the leader an Inventory: images from `NodeLedger.clean()`, pins from `NodeLedger.pinned`."""


@dataclass(frozen=True, kw_only=True)
class PublishGrant:
    """Write the grant of `version.step` in `slot` on the page, visible to the workers at once."""

    slot: SlotRef
    version: Version


@dataclass(frozen=True, kw_only=True)
class WithdrawGrant:
    """Erase the grant from the page: nobody needs the version any more. Who has not seen it yet never will."""

    slot: SlotRef
    version: Version


@dataclass(frozen=True)
class ReadRanks:
    """Now that grants are withdrawn, feed `RankRead` of every living local rank: who has not reached an abandoned step
    cannot take it any more. Ranks in `NodeLedger.watched` need `RankRead` instead of `RankStepped` from now on."""


@dataclass(frozen=True, kw_only=True)
class PublishAgreed:
    """Write the agreed step on the page; workers that wait in ``agreed()`` look again. Where it is confirmed and of
    kind save, send SaveAgreed to the workers."""

    agreed: Agreed


@dataclass(frozen=True, kw_only=True)
class SendReport:
    """Send the state to the leader. A newer one replaces one that is not sent yet, but `ask` of either must stay set
    (send at most one per few ms)."""

    state: NodeState


@dataclass(frozen=True, kw_only=True)
class StoreRequests:
    """Record the open requests in node.state."""

    requests: tuple[Request, ...]


@dataclass(frozen=True, kw_only=True)
class DropSlot:
    """Unlink the files of a slot of a former pool: nothing in it is needed and nobody writes it."""

    slot: SlotRef


@dataclass(frozen=True, kw_only=True)
class StopPersist:
    """Stop reading this version for a persist: its pin is gone, the slot may be written again."""

    version: Version


@dataclass(frozen=True, kw_only=True)
class Completed:
    """For people, agents (Progress) and workers: the version is complete on all ranks of the job."""

    version: Version


NodeInstruction = (
    ClearGrants
    | SendInventory
    | PublishGrant
    | WithdrawGrant
    | ReadRanks
    | PublishAgreed
    | SendReport
    | StoreRequests
    | DropSlot
    | StopPersist
    | Completed
)


class NodeLedger:
    """Slots and versions of one node. Owned by the daemon's main thread; lives as long as the daemon.

    Args:
        epoch: grows with every start of this node's daemon on the same arena.
    """

    def __init__(self, *, epoch: int) -> None:
        self.epoch = epoch
        self.table = SlotTable()
        self.generation: GenerationId | None = None
        self.parent: Version | None = None
        self._node_rank = 0
        self._ranks: dict[int, RankState] = {}
        self._num_slots = 0
        self._leader_epoch = 0
        self._complete: int | None = None
        self._grants: tuple[int, ...] = ()
        self._pins: dict[Version, Pin] = {}
        self._requests: dict[str, Request] = {}
        self._agreed: Agreed | None = None
        self._reported: NodeState | None = None

    # --- what the shell may ask

    @property
    def pinned(self) -> tuple[Pin, ...]:
        """Versions kept for a persist."""
        return tuple(pin for _, pin in sorted(self._pins.items()))

    @property
    def watched(self) -> frozenset[int]:
        """Global ranks that have passed a granted step, or may still write an abandoned slot, and have not said what
        they did: their steps are to be fed as `RankRead`, which is repeated every second or so (doorbells may be lost,
        and a grant may have come to the page just after its step)."""
        return self.table.watched({global_rank: rank.step for global_rank, rank in self._ranks.items()})

    def clean(self) -> tuple[Image, ...]:
        """Clean images that may be read (for the inventory)."""
        return tuple(self.table.images())

    def readable(self, slot: SlotRef, version: Version) -> bool:
        """Whether a range read of `version` from `slot` may be served now."""
        return any(image.slot == slot and image.version == version for image in self.table.images())

    def slots_of(self, version: Version) -> tuple[Image, ...]:
        """The clean images of `version` on this node (for the persister)."""
        return tuple(image for image in self.table.images() if image.version == version)

    # --- events

    def handle(self, event: NodeEvent) -> list[NodeInstruction]:
        """Take one event; the instructions are to be carried out at once and in order, before the next event is fed
        (`ReadRanks`, which asks for events, is the last one). Events of older generations are refused (ignored but for
        what they say about a writer that let go)."""
        out: list[NodeInstruction] = []
        report_anyway = False
        match event:
            case GenerationStarted():
                self._start_generation(event, out)
            case Adopted():
                self._adopt(event)
            case RestoreDecided():
                self._decide_restore(event, out)
            case PoolReady():
                self.table.use_pool(event.pool, event.num_slots)
                self._num_slots = event.num_slots
            case PoolPaused():
                self._num_slots = 0
            case RankCommitted():
                self.table.committed(event.version, event.global_rank, event.wait_s, event.step_s)
            case RankMissed():
                self.table.missed(event.version, event.global_rank)
            case WriterDied():
                self.table.let_go(event.generation, event.global_rank)
                self.table.strangers_gone(event.generation, event.global_rank)
            case RankEntered() | RankStepped() | RankUntil() | RankRead() | RankAcknowledged() | RankFinished():
                self._take_rank_event(event)
            case Requested():
                self._requests[event.request.id] = event.request
                out.append(StoreRequests(requests=tuple(self._requests.values())))
            case LeaderConnected():
                report_anyway = True
            case OrdersReceived():
                report_anyway = self._take_orders(event.orders, out)
        self._settle(out)
        self._report(out, anyway=report_anyway)
        if any(isinstance(instruction, WithdrawGrant) for instruction in out) and self.watched:
            out.append(ReadRanks())
        return out

    def _take_rank_event(
        self, event: RankEntered | RankStepped | RankUntil | RankRead | RankAcknowledged | RankFinished
    ) -> None:
        rank = self._ranks.get(event.global_rank)
        if rank is None or event.generation != self.generation:
            return
        match event:
            case RankEntered():
                until = rank.until if event.until is None else event.until
                rank = _with(rank, entered=True, step=max(rank.step, event.step), until=until)
            case RankStepped():
                rank = _with(rank, step=max(rank.step, event.step))
            case RankUntil():
                rank = _with(rank, until=event.until)
            case RankRead():
                rank = _with(rank, step=max(rank.step, event.step))
                self.table.read(event.generation, event.global_rank, event.step, event.headers)
            case RankAcknowledged():
                rank = _with(rank, acknowledged=max(rank.acknowledged, event.number))
            case RankFinished():
                final = Final(step=event.step, persist=event.persist)
                rank = _with(rank, step=max(rank.step, event.step), final=final)
        self._ranks[event.global_rank] = rank

    # --- generations

    def _start_generation(self, event: GenerationStarted, out: list[NodeInstruction]) -> None:
        if self.generation is not None and not _newer(event.generation, self.generation):
            return
        self.table.fence(tuple(self._ranks), event.headers)
        self._enter(event.generation, event.node_rank, event.local_ranks)
        held = {image.version for image in self.table.images()}
        self._pins = {version: pin for version, pin in self._pins.items() if version in held}
        out += [ClearGrants(generation=event.generation), SendInventory()]

    def _adopt(self, event: Adopted) -> None:
        self._enter(event.generation, event.node_rank, event.local_ranks)
        self.parent = event.parent
        self._requests = {request.id: request for request in event.requests}
        self._agreed = event.agreed
        granted = {published.slot: event.generation.at(published.step) for published in event.published}
        for header in event.headers:
            if header.slot not in granted or (
                header.version != granted[header.slot] and not header.clean and header.writer_alive
            ):
                self.table.adopt_image(header)
        for slot, version in granted.items():
            headers = [header for header in event.headers if header.slot == slot]
            self.table.adopt_grant(slot, version, event.local_ranks, headers)

    def _enter(self, generation: GenerationId, node_rank: int, local_ranks: tuple[int, ...]) -> None:
        self.generation, self._node_rank = generation, node_rank
        self._ranks = {global_rank: RankState(global_rank=global_rank) for global_rank in local_ranks}
        self.parent, self._complete, self._agreed = None, None, None
        self._grants, self._num_slots, self._leader_epoch = (), 0, 0
        self._reported = None

    def _decide_restore(self, event: RestoreDecided, out: list[NodeInstruction]) -> None:
        if event.generation != self.generation:
            return
        self.parent = event.parent
        for version in [version for version in self._pins if version.step > event.step]:
            del self._pins[version]
            out.append(StopPersist(version=version))

    # --- orders

    def _take_orders(self, orders: Orders, out: list[NodeInstruction]) -> bool:
        """Obey; the answer says whether a report is due although nothing has changed."""
        if orders.generation != self.generation or orders.leader_epoch < self._leader_epoch:
            return False
        self._leader_epoch = orders.leader_epoch
        if orders.resync:
            return True
        self._grants = orders.grants
        self._take_pins(orders.pinned, out)
        if orders.complete is not None and (self._complete is None or orders.complete > self._complete):
            self._complete = orders.complete
            out.append(Completed(version=self.generation.at(orders.complete)))
        if orders.agreed is not None and orders.agreed != self._agreed:
            self._agreed = orders.agreed
            out.append(PublishAgreed(agreed=orders.agreed))
        self._answer_requests(out)
        if orders.running:
            self._let_go_of_the_past()
        self._abandon_unlisted(out)
        return False

    def _take_pins(self, pins: tuple[Pin, ...], out: list[NodeInstruction]) -> None:
        now = {pin.version: pin for pin in pins}
        out.extend(StopPersist(version=version) for version in self._pins if version not in now)
        self._pins = now

    def _answer_requests(self, out: list[NodeInstruction]) -> None:
        agreed = self._agreed
        if agreed is None or not agreed.confirmed:
            return
        memory = self._num_slots >= 2
        reached = all(rank.step >= agreed.step for rank in self._ranks.values())
        complete = self._complete is not None and self._complete >= agreed.step
        answered = [identity for identity in agreed.requests if identity in self._requests]
        if answered and (complete or (reached and not memory)):
            for identity in answered:
                del self._requests[identity]
            out.append(StoreRequests(requests=tuple(self._requests.values())))

    def _let_go_of_the_past(self) -> None:
        parent = self.parent if self._complete is None else None
        self.table.forget_images(lambda version: version == parent or version in self._pins)

    def _abandon_unlisted(self, out: list[NodeInstruction]) -> None:
        kept = {*self._grants, self._complete}
        for row in self.table.granted():
            assert row.version is not None
            if row.version.step not in kept and row.version not in self._pins:
                row.abandoned = True
                out.append(WithdrawGrant(slot=row.ref, version=row.version))

    # --- after each event

    def _settle(self, out: list[NodeInstruction]) -> None:
        """Free what may be freed, then give slots to the grants that wait for one."""
        self.table.settle()
        out.extend(DropSlot(slot=slot) for slot in self.table.drop_former())
        if self.generation is None or self._num_slots == 0:
            return
        for step, row in zip(self._waiting(), self.table.free(), strict=False):
            version = self.generation.at(step)
            row.grant(version, self._ranks)
            out.append(PublishGrant(slot=row.ref, version=version))

    def _waiting(self) -> list[int]:
        """Granted steps without a slot, oldest first, less those that a local rank has passed already."""
        return [step for step, state in self._without_slot() if state == "granted"]

    def _without_slot(self) -> list[tuple[int, str]]:
        assert self.generation is not None
        held = {row.version.step for row in self.table if row.version is not None}
        newest = max((rank.step for rank in self._ranks.values()), default=0)
        return [(step, "missed" if step < newest else "granted") for step in sorted(self._grants) if step not in held]

    def _report(self, out: list[NodeInstruction], *, anyway: bool) -> None:
        if self.generation is None:
            return
        state = self._state(self.generation)
        if anyway or state != self._reported:
            self._reported = state
            out.append(SendReport(state=msgspec.structs.replace(state, ask=True) if anyway else state))

    def _state(self, generation: GenerationId) -> NodeState:
        held = [
            Held(step=row.version.step, state=row.state, wait_s=row.wait_s, step_s=row.step_s)
            for row in self.table.granted()
            if row.version is not None
        ]
        without = [Held(step=step, state=state) for step, state in self._without_slot()]
        waiting = sum(one.state == "granted" for one in without)
        free = len(self.table.free()) - waiting if self._num_slots else 0
        return NodeState(
            generation=generation,
            node_rank=self._node_rank,
            epoch=self.epoch,
            leader_epoch=self._leader_epoch,
            num_slots=self._num_slots,
            free=free,
            held=tuple(held + without),
            complete=self._complete,
            pinned=self.pinned,
            ranks=tuple(self._ranks.values()),
            requests=tuple(self._requests.values()),
            agreed=self._agreed,
        )


def _newer(new: GenerationId, old: GenerationId) -> bool:
    return (new.incarnation, new.generation) > (old.incarnation, old.generation)


def _with(rank: RankState, **changes: object) -> RankState:
    return msgspec.structs.replace(rank, **changes)
