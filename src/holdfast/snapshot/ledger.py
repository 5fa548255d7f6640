"""The ledger of one node: which slot holds which version, who may write it, and when it may be reused (pure).

Rules
-----
1. A slot is granted to one version at a time, and only while it is free (`holdfast.snapshot.slots` says when).
2. Slots of the newest complete version, of the parent, of the protected version, of the one being protected and of
   pinned versions are kept. Only orders of the leader free them: a newer complete version, all ranks of the generation
   having completed one, a newer protected version, the end of the persist. A node never decides by itself that a
   version is superseded.
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
    running     orders say that all ranks have entered: everything but the parent, the protected and the pinned versions
                goes
    advanced    orders name a complete version of this generation: the parent goes too, unless it is the protected one
    protected   orders name a protected version of this generation: the older protected one goes with its parity

Theory of operation
-------------------
Reports and orders are whole states (`holdfast.snapshot.reports`). After each event the ledger compares what it would
report with what it last did, and sends it where they differ; the leader answers in the same way. Hence a lost message,
a restarted daemon and a restarted leader need no code of their own but the first exchange. A leader that has been
restarted has a new epoch and asks for reports (``resync``); a node that has answered it refuses what the old one may
still have in flight, so the new one builds on reports that nothing can overtake.
"""

from __future__ import annotations

import msgspec

from holdfast.checkpoint.version import GenerationId, Version
from holdfast.snapshot.ledger_events import (
    Adopted,
    ClearGrants,
    Completed,
    DropSlot,
    GenerationStarted,
    LeaderConnected,
    NodeEvent,
    NodeInstruction,
    OrdersReceived,
    ParityAvailable,
    ParityDone,
    ParityFailed,
    PoolPaused,
    PoolReady,
    Protect,
    Protected,
    PublishAgreed,
    Published,
    PublishGrant,
    RankAcknowledged,
    RankCommitted,
    RankEntered,
    RankFinished,
    RankMissed,
    RankRead,
    RankStepped,
    RankUntil,
    ReadRanks,
    Requested,
    RestoreDecided,
    SendInventory,
    SendReport,
    Settled,
    StopPersist,
    StorePins,
    StoreRequests,
    WithdrawGrant,
    WriterDied,
)
from holdfast.snapshot.reports import Agreed, Final, Held, NodeState, Orders, Pin, RankState, Request, SlotRef
from holdfast.snapshot.slots import Header, Image, SlotTable

__all__ = [
    "Adopted",
    "ClearGrants",
    "Completed",
    "DropSlot",
    "GenerationStarted",
    "Header",
    "Image",
    "LeaderConnected",
    "NodeEvent",
    "NodeInstruction",
    "NodeLedger",
    "OrdersReceived",
    "ParityAvailable",
    "ParityDone",
    "ParityFailed",
    "PoolPaused",
    "PoolReady",
    "Protect",
    "Protected",
    "PublishAgreed",
    "PublishGrant",
    "Published",
    "RankAcknowledged",
    "RankCommitted",
    "RankEntered",
    "RankFinished",
    "RankMissed",
    "RankRead",
    "RankStepped",
    "RankUntil",
    "ReadRanks",
    "Requested",
    "RestoreDecided",
    "SendInventory",
    "SendReport",
    "Settled",
    "StopPersist",
    "StorePins",
    "StoreRequests",
    "WithdrawGrant",
    "WriterDied",
]


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
        self._local_ranks: tuple[int, ...] = ()
        """Global ranks of this node; their place is their local rank."""
        self._ranks: dict[int, RankState] = {}
        """Those of them that the Session has."""
        self._num_slots = 0
        self._leader_epoch = 0
        self._complete: int | None = None
        self._protect: int | None = None
        self._protected: Version | None = None
        self._told_protected = False
        """`Protected` was said in this generation."""
        self._coded: Version | None = None
        self._uncodable: Version | None = None
        self._parity: bool | None = None
        self._most_parity = self._lowered = 0
        self._grants: tuple[int, ...] = ()
        self._pins: dict[Version, Pin] = {}
        self._stored_pins: dict[Version, Pin] = {}
        self._requests: dict[str, Request] = {}
        self._agreed: Agreed | None = None
        self._settled: int | None = None
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

    def handle(self, *events: NodeEvent) -> list[NodeInstruction]:
        """Take what was seen at one moment: one event, or several that workers brought about, in their order. The
        instructions are to be carried out at once and in order, before the next event is fed (`ReadRanks`, which asks
        for events, is the last one). Events of older generations are refused (ignored but for what they say about a
        writer that let go)."""
        out: list[NodeInstruction] = []
        asks = [self._take(event, out) for event in events]
        if self._pins != self._stored_pins:
            self._stored_pins = dict(self._pins)
            out.append(StorePins(pinned=self.pinned))
        self._settle(out)
        self._report(out, anyway=any(asks))
        if any(isinstance(instruction, WithdrawGrant) for instruction in out) and self.watched:
            out.append(ReadRanks())
        return out

    def _take(self, event: NodeEvent, out: list[NodeInstruction]) -> bool:
        """Note the event; the answer says whether a report is due although nothing has changed."""
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
                if event.metrics:
                    self.table.note_metrics(event.version, event.global_rank, event.metrics)
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
            case ParityAvailable():
                if event.generation == self.generation:
                    self._parity = event.available
                    self._most_parity, self._lowered = event.most, event.lowered
            case ParityDone():
                if event.version.generation == self.generation:
                    self._coded = event.version
            case ParityFailed():
                if event.version.generation == self.generation:
                    self._uncodable = event.version
            case LeaderConnected():
                return True
            case OrdersReceived():
                return self._take_orders(event.orders, out)
        return False

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
        self.table.fence(self._local_ranks, event.headers)
        self._enter(event.generation, event.node_rank, event.local_ranks)
        if any(request.kind == "regroup" for request in self._requests.values()):
            self._requests = {name: one for name, one in self._requests.items() if one.kind != "regroup"}
            out.append(StoreRequests(requests=tuple(self._requests.values())))
        held = {image.version for image in self.table.images()}
        self._pins = {version: pin for version, pin in self._pins.items() if version in held}
        out += [ClearGrants(generation=event.generation), SendInventory()]

    def _adopt(self, event: Adopted) -> None:
        self._enter(event.generation, event.node_rank, event.local_ranks)
        self._restrict(event.session_ranks)
        self.parent = event.parent
        self._requests = {request.id: request for request in event.requests}
        self._pins = {pin.version: pin for pin in event.pinned}
        self._stored_pins = dict(self._pins)
        self._agreed = event.agreed
        self._protected = event.protected
        granted = {published.slot: event.generation.at(published.step) for published in event.published}
        for header in event.headers:
            if header.slot not in granted or (
                header.version != granted[header.slot] and not header.clean and header.writer_alive
            ):
                self.table.adopt_image(header)
        for slot, version in granted.items():
            headers = [header for header in event.headers if header.slot == slot]
            self.table.adopt_grant(slot, version, tuple(self._ranks), headers)

    def _enter(self, generation: GenerationId, node_rank: int, local_ranks: tuple[int, ...]) -> None:
        self.generation, self._node_rank = generation, node_rank
        self._local_ranks = local_ranks
        self._ranks = {global_rank: RankState(global_rank=global_rank) for global_rank in local_ranks}
        self.table.places = {global_rank: local for local, global_rank in enumerate(local_ranks)}
        self.parent, self._complete, self._agreed, self._settled = None, None, None, None
        self._protect, self._coded, self._uncodable, self._parity = None, None, None, None
        self._most_parity = self._lowered = 0
        self._told_protected = False
        self._grants, self._num_slots, self._leader_epoch = (), 0, 0
        self._reported = None

    def _decide_restore(self, event: RestoreDecided, out: list[NodeInstruction]) -> None:
        if event.generation != self.generation:
            return
        self.parent, self._protected = event.parent, event.protected
        self._restrict(event.session_ranks)
        newer = [pin for pin in self._pins if pin.generation != self.generation and pin.step > event.step]
        for version in newer:
            del self._pins[version]
            out.append(StopPersist(version=version))

    def _restrict(self, session_ranks: tuple[int, ...] | None) -> None:
        """Only ranks of the Session write images."""
        if session_ranks is not None:
            self._ranks = {rank: state for rank, state in self._ranks.items() if rank in session_ranks}

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
        if orders.settled is not None and orders.settled != self._settled:
            self._settled = orders.settled
            out.append(Settled(step=orders.settled))
        if orders.running or orders.protect is not None:
            self._take_protection(orders, out)
            self._let_go_of_the_past()
        self._abandon_unlisted(out)
        return False

    def _take_pins(self, pins: tuple[Pin, ...], out: list[NodeInstruction]) -> None:
        now = {pin.version: pin for pin in pins}
        out.extend(StopPersist(version=version) for version in self._pins if version not in now)
        self._pins = now

    def _take_protection(self, orders: Orders, out: list[NodeInstruction]) -> None:
        """The version to protect comes last: the exchange then knows which parity to keep."""
        assert self.generation is not None
        if orders.protected != self._protected or not self._told_protected:
            self._protected, self._told_protected = orders.protected, True
            out.append(Protected(version=orders.protected))
        if orders.protect is not None and orders.protect != self._protect:
            out.append(Protect(version=self.generation.at(orders.protect)))
        self._protect = orders.protect

    def _answer_requests(self, out: list[NodeInstruction]) -> None:
        agreed = self._agreed
        if agreed is None or not agreed.confirmed:
            return
        memory = self._num_slots >= 2
        reached = all(rank.step >= agreed.step for rank in self._ranks.values())
        complete = self._complete is not None and self._complete >= agreed.step
        open_ = {identity for identity, request in self._requests.items() if request.kind != "regroup"}
        answered = [identity for identity in agreed.requests if identity in open_]
        if answered and (complete or (reached and not memory)):
            for identity in answered:
                del self._requests[identity]
            out.append(StoreRequests(requests=tuple(self._requests.values())))

    def _let_go_of_the_past(self) -> None:
        parent = self.parent if self._complete is None else None
        self.table.forget_images(lambda version: version in (parent, self._protected) or version in self._pins)

    def _abandon_unlisted(self, out: list[NodeInstruction]) -> None:
        kept = {*self._grants, self._complete, self._protect}
        if self._protected is not None and self._protected.generation == self.generation:
            kept.add(self._protected.step)
        for row in self.table.granted():
            assert row.version is not None
            if row.version.step not in kept and row.version not in self._pins:
                row.abandoned = True
                out.append(WithdrawGrant(slot=row.ref, version=row.version))

    # --- after each event

    def _settle(self, out: list[NodeInstruction]) -> None:
        """Free what may be freed, then give slots to the grants that wait for one."""
        self.table.settle()
        self._revive(out)
        out.extend(DropSlot(slot=slot) for slot in self.table.drop_former())
        if self.generation is None or self._num_slots == 0:
            return
        waiting = self._waiting()
        for step, row in zip(waiting, self.table.free() if waiting else (), strict=False):
            version = self.generation.at(step)
            row.grant(version, self._ranks)
            out.append(PublishGrant(slot=row.ref, version=version))

    def _revive(self, out: list[NodeInstruction]) -> None:
        """A step that was taken back is granted again while its slot waits for writers that may have taken it: in the
        same slot, for a rank that stands at that step already can never show that it has not."""
        for row in self.table if self._num_slots else ():
            version = row.version if row.abandoned and row.ref.pool == self.table.pool else None
            if version is not None and version.generation == self.generation and version.step in self._grants:
                row.revive()
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
            Held(step=row.version.step, state=row.state, wait_s=row.wait_s, step_s=row.step_s, metrics=row.metrics)
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
            coded=self._coded,
            protected=self._protected,
            uncodable=self._uncodable,
            parity=self._parity,
            most_parity=self._most_parity,
            lowered=self._lowered,
        )


def _newer(new: GenerationId, old: GenerationId) -> bool:
    return (new.incarnation, new.generation) > (old.incarnation, old.generation)


def _with(rank: RankState, **changes: object) -> RankState:
    return msgspec.structs.replace(rank, **changes)
