"""The ledger of the leader: grants, completeness, persists, the snapshot interval (pure).

One per generation, in the daemon of the leading node.

Rules
-----
1. Nothing is granted before all ranks have entered, nor while a node has no slots (none yet, or they grow), nor beyond
   what every node has free.
2. A version is complete when every node reports it clean. The newest complete one is named in the orders; only then do
   nodes let go of the one before. Everything older that is still outstanding is superseded.
3. A version that any rank missed is abandoned at once: it leaves the orders.
4. A grant is at least `lead` (G) steps ahead of the newest published step; G doubles after a miss, up to the number of
   slots, and shrinks by one after `_CALM` versions without one. Steps that workers wait for at the boundary itself (the
   last step, an agreed one) are granted even when a worker has reached them; where no slot is free for one, later
   grants are taken back.
5. *Must* steps (multiples of ``persist_every``, the last step, a confirmed agreed step) are always granted: when one
   is near, the last free slot is kept for it.
6. A complete must step that is to be persisted goes to the persist queue before the orders that name it complete, so
   its slots are pinned before anyone may free them.
7. The first version of a generation that goes on from memory comes at once, whatever the interval: until it is there,
   what other nodes keep for the lost ones is all that there is. Where the loss of a further node could take that
   (`exposed`), the restored step itself is granted: workers wait a moment for it before they train. One that gives up
   costs no more than this grant; G stays as it is.
8. With redundancy, complete versions are protected one after the other (`holdfast.snapshot.protection`).
9. The step of a confirmed regroup is settled when its version is complete. Where a node leaves, what it holds goes with
   it: then the version must be protected besides, or persisted where nothing protects it, and be done with its persist.

States
------
    gathering   a new leader: orders ask for reports, nothing else, until every node has answered this epoch
    waiting     not all ranks have entered
    running     grants

Theory of operation
-------------------
See `holdfast.snapshot.ledger`: reports and orders are whole states. The leader keeps the newest report of each node and
derives everything anew from these after each one. A slot is in use at a node from the moment at which the leader grants
it: free there = reported free, less the outstanding steps that the report does not list. A restarted leader finds the
outstanding steps, the newest complete one, the pins and the agreed step in the reports; what its predecessor had
decided and told nobody was never true.
"""

from __future__ import annotations

from dataclasses import dataclass

from holdfast.checkpoint.version import GenerationId, Version
from holdfast.snapshot.agreement import Agreement, Situation
from holdfast.snapshot.interval import AutoInterval
from holdfast.snapshot.persists import CommitPersist, OrderPersist, PersistInstruction, PersistQueue, PersistSettled
from holdfast.snapshot.protection import ParityLowered, Protection, VersionProtected
from holdfast.snapshot.reports import Held, NodeState, Orders, Pin, RankState, Request

__all__ = [
    "CommitEnded",
    "CommitPersist",
    "IntervalChosen",
    "LeaderConfig",
    "LeaderCounters",
    "LeaderEvent",
    "LeaderInstruction",
    "LeaderLedger",
    "OrderPersist",
    "ParityLowered",
    "PartEnded",
    "PersistDue",
    "PersistSettled",
    "ReportReceived",
    "SendOrders",
    "VersionCompleted",
    "VersionProtected",
]

_CALM = 32
"""Complete versions without a miss after which G shrinks by one."""
_WINDOW = 2
"""Grants reach from G to G + _WINDOW steps ahead, so that one round trip does not cost a step."""
_ATTEMPTS_PER_EPOCH = 1 << 20
"""Attempt numbers of different leaders of one generation never meet."""


@dataclass(frozen=True, kw_only=True)
class LeaderConfig:
    """What a generation's leader must know. Made once the restore is chosen."""

    generation: GenerationId
    epoch: int
    """Grows with every start of the leader's daemon (its daemon epoch); 1 or more."""
    nodes: tuple[int, ...]
    """Node ranks."""
    num_ranks: int
    """Ranks of the Session in all."""
    start_step: int
    """The restored step."""
    snapshot_every: int = 0
    """0: auto."""
    persist_every_steps: int | None = None
    carried: tuple[Pin, ...] = ()
    """Unfinished persists of older generations that go on (`chain.carried_persists`)."""
    decoded: tuple[Version, ...] = ()
    """Those of them of which images are lost: they are decoded while they are written."""
    coded: bool = False
    """Some group of the generation has parity."""
    parent: Version | None = None
    """What the generation started from, where that was in memory."""
    protected: Version | None = None
    """`chain.Choice.protected`."""
    lowered: int = 0
    """`Protection.lowered`, of a former leader of the generation."""
    exposed: bool = False
    """`messages.Restore.exposed`."""


# --- events: what the shell of the leading daemon feeds -------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ReportReceived:
    """Feed at every NodeReport, in order of arrival (the leader's own node too)."""

    state: NodeState


@dataclass(frozen=True)
class PersistDue:
    """Feed when ``persist_every_s`` has elapsed since the last persist began: the newest complete version is
    persisted, where that has been done already the next one."""


@dataclass(frozen=True, kw_only=True)
class PartEnded:
    """Feed at PersistPart: a node wrote its images, or could not (`error`; a time limit of the shell counts too)."""

    version: Version
    attempt: int
    node_rank: int
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class CommitEnded:
    """Feed when index and root were written after `CommitPersist`, or not (`error`). "Exists already, the same version"
    is success."""

    version: Version
    attempt: int
    error: str | None = None


LeaderEvent = ReportReceived | PersistDue | PartEnded | CommitEnded

# --- instructions: what the shell must do, in this order ------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SendOrders:
    """Send to a node. A newer one for the same node replaces one that is not sent yet."""

    node_rank: int
    orders: Orders


@dataclass(frozen=True, kw_only=True)
class VersionCompleted:
    """Complete on all ranks. Every node says so too (`ledger.Completed`); for the leader's own log."""

    version: Version


@dataclass(frozen=True, kw_only=True)
class IntervalChosen:
    """snapshot_every="auto" chose another interval: one line for people."""

    every: int
    wait_s: float
    step_s: float


LeaderInstruction = (
    SendOrders | PersistInstruction | VersionCompleted | VersionProtected | ParityLowered | IntervalChosen
)


@dataclass
class LeaderCounters:
    """For reports and tests."""

    complete: int = 0
    missed: int = 0
    """Grants that some rank missed."""
    superseded: int = 0
    """Grants that a newer complete version made useless."""
    protected: int = 0
    skipped: int = 0
    """Steps of the interval that passed ungranted once grants had begun."""


class LeaderLedger:
    """One per generation; also made anew when the leading daemon is restarted (it rebuilds from reports).

    The shell makes it once LeaderRestore is sent, calls `start()` and then feeds events.
    """

    def __init__(self, config: LeaderConfig) -> None:
        self.config = config
        self.counters = LeaderCounters()
        self.lead = 1
        self.outstanding: set[int] = set()
        self.persists = PersistQueue(config.nodes, attempt=config.epoch * _ATTEMPTS_PER_EPOCH)
        self.agreement = Agreement()
        self.protection = Protection(coded=config.coded, parent=config.parent, protected=config.protected)
        self.protection.lowered = config.lowered
        self.interval = AutoInterval(config.snapshot_every)
        self._reports: dict[int, NodeState] = {}
        self._ranks: list[RankState] = []
        """As in the reports; those of the Session."""
        self._writing: list[NodeState] = []
        """Reports of the nodes that have ranks of the Session: the others hold no part of a version."""
        self._gathered = False
        self._complete: int | None = None
        self._restored = config.start_step if config.exposed else None
        """The restored step, while it may become a version."""
        self._granted_through = config.start_step
        self._granted_from: int | None = None
        self._newest = config.start_step
        self._calm = 0
        self._persist_due = False
        self._offered: dict[int, Pin] = {}
        """By step: what went to the persist queue."""
        self._metrics: dict[str, float] = {}
        """Of the newest complete version."""
        self._sent: dict[int, Orders] = {}

    @property
    def complete(self) -> Version | None:
        """Newest complete version of this generation."""
        return self.config.generation.at(self._complete) if self._complete is not None else None

    def start(self) -> list[LeaderInstruction]:
        """The first instructions: orders that ask every node for its report."""
        return [self._ask(node_rank) for node_rank in self.config.nodes]

    def handle(self, event: LeaderEvent) -> list[LeaderInstruction]:
        """Take one event; instructions are to be carried out at once and in order."""
        out: list[LeaderInstruction] = []
        match event:
            case ReportReceived():
                self._take_report(event.state, out)
            case PersistDue():
                self._persist_due = True
            case PartEnded():
                out += self.persists.part_ended(event.version, event.attempt, event.node_rank, event.error)
            case CommitEnded():
                out += self.persists.commit_ended(event.version, event.attempt, event.error)
        if self._gathered:
            self._advance(out)
            self._give_orders(out)
        return out

    # --- reports

    def _take_report(self, state: NodeState, out: list[LeaderInstruction]) -> None:
        if state.generation != self.config.generation or state.node_rank not in self.config.nodes:
            return
        if state.leader_epoch != self.config.epoch:
            out.append(self._ask(state.node_rank))
            return
        if state.ask:
            self._sent.pop(state.node_rank, None)
        before = self._reports.get(state.node_rank)
        self._reports[state.node_rank] = state
        self._ranks = [rank for _, one in sorted(self._reports.items()) for rank in one.ranks]
        self._writing = [one for one in self._reports.values() if one.ranks]
        if state.ask and before is not None:
            out += self.persists.node_reconnected(state.node_rank)
        if not self._gathered and len(self._reports) == len(self.config.nodes):
            self._gathered = True
            self._rebuild(out)

    def _ask(self, node_rank: int) -> SendOrders:
        orders = Orders(generation=self.config.generation, leader_epoch=self.config.epoch, resync=True)
        return SendOrders(node_rank=node_rank, orders=orders)

    def _rebuild(self, out: list[LeaderInstruction]) -> None:
        """Take over from a former leader of this generation, if there was one."""
        known = [state.complete for state in self._reports.values() if state.complete is not None]
        self._complete = max(known, default=None)
        held = {one.step for state in self._reports.values() for one in state.held}
        self.outstanding = {step for step in held if self._complete is None or step > self._complete}
        self._granted_through = max((self._granted_through, *held))
        self._metrics = self._metrics_at(self._complete)
        self.protection.restore(self._reports.values(), self.config.generation)
        self.agreement.restore(state.agreed for state in self._reports.values())
        pins = {pin.version: pin for state in self._reports.values() for pin in state.pinned}
        own = [pin for version, pin in sorted(pins.items()) if self._persist_is_open(version)]
        for pin in (*self.config.carried, *own):
            if pin.version.generation == self.config.generation:
                self._offered[pin.version.step] = pin
            out += self.persists.offer(pin)
        if self._complete is not None:
            self._offer_if_wanted(self._complete, out)

    def _persist_is_open(self, version: Version) -> bool:
        """Whether a persist of this generation has not ended: a node that has let go of the version heard that it
        has, others may pin it still."""
        held = [self._held(state, version.step) for state in self._writing]
        whole = all(one is not None and one.state == "clean" for one in held)
        return version.generation == self.config.generation and whole

    # --- one round

    def _advance(self, out: list[LeaderInstruction]) -> None:
        self._judge_outstanding(out)
        ranks = self._ranks
        if not self._all_entered(ranks):
            return
        self._count_skipped(ranks)
        self.protection.held = any(pin.version in self.config.decoded for pin in self.persists.pins)
        out += self.protection.lower(self._reports.values())
        protected = self.protection.advance(self._reports.values(), self.complete, self._num_slots())
        self.counters.protected += len(protected)
        out += protected
        self.agreement.advance(self._situation(ranks))
        if self._complete is not None:
            self._offer_if_wanted(self._complete, out)
        self._grant(ranks)

    def _judge_outstanding(self, out: list[LeaderInstruction]) -> None:
        """Abandon what was missed, complete what is clean everywhere; in the order of steps."""
        for step in sorted(self.outstanding):
            states = [self._held(state, step) for state in self._writing]
            if any(one is not None and one.state == "missed" for one in states):
                self.outstanding.discard(step)
                self._note_miss(step)
            elif all(one is not None and one.state == "clean" for one in states):
                self._note_complete(step, [one for one in states if one is not None], out)

    def _note_miss(self, step: int) -> None:
        self.counters.missed += 1
        if step == self._restored:
            self._restored = None
            return
        self._calm = 0
        self.lead = min(self.lead * 2, max(1, self._num_slots()))

    def _note_complete(self, step: int, held: list[Held], out: list[LeaderInstruction]) -> None:
        self.outstanding.discard(step)
        superseded = {older for older in self.outstanding if older < step}
        self.outstanding -= superseded
        self.counters.superseded += len(superseded)
        self.counters.complete += 1
        self._complete = step
        self._metrics = self._metrics_at(step)
        version = self.config.generation.at(step)
        out.append(VersionCompleted(version=version))
        self._offer_if_wanted(step, out)
        out += self.persists.squeeze(self._num_slots(), version)
        self._calm += 1
        if self._calm >= _CALM:
            self._calm, self.lead = 0, max(1, self.lead - 1)
        changed = self.interval.completed(max(one.wait_s for one in held), max(one.step_s for one in held))
        if changed is not None:
            out.append(IntervalChosen(every=self.interval.every, wait_s=changed[0], step_s=changed[1]))

    # --- persists

    def _offer_if_wanted(self, step: int, out: list[LeaderInstruction]) -> None:
        """Persist the complete step where somebody wants it (known now, or since the last look)."""
        known = self._offered.get(step)
        agreed = self.agreement.current
        agreed_here = (
            agreed is not None
            and agreed.confirmed
            and agreed.step == step
            and (agreed.persist or self._leaves_unprotected(step))
        )
        finals = [rank.final for rank in self._ranks if rank.final is not None]
        final = any(one.step == step and one.persist for one in finals)
        mandatory = agreed_here or final
        tag, metrics = (agreed.tag, agreed.metrics) if agreed is not None and agreed_here else (None, {})
        if known is None:
            wanted = mandatory or self._persist_due or self._is_multiple(step)
        else:
            news = (mandatory and not known.mandatory, final and not known.final, tag is not None and known.tag is None)
            wanted = any(news)
        if not wanted:
            return
        self._persist_due = False
        pin = Pin(
            version=self.config.generation.at(step),
            mandatory=mandatory,
            final=final or (known is not None and known.final),
            tag=known.tag if known is not None and known.tag is not None else tag,
            metrics={**self._metrics, **(known.metrics if known is not None else {}), **metrics},
        )
        self._offered[step] = pin
        out += self.persists.offer(pin)

    def _is_multiple(self, step: int) -> bool:
        every = self.config.persist_every_steps
        return every is not None and step > self.config.start_step and step % every == 0

    # --- grants

    def _grant(self, ranks: list[RankState]) -> None:
        """Grant as far ahead as the window allows and slots are free."""
        if self._num_slots() < 2:
            return
        newest = max(rank.step for rank in ranks)
        if self._granted_from is None:
            self._granted_from = newest
        room = min(self._room(state) for state in self._writing)
        for step in self._awaited(ranks, newest):
            granted = step in self.outstanding
            if room < 0 or (room == 0 and not granted):
                self._recall(step)
                return
            if not granted:
                room = self._give(step, room)
        horizon = self._horizon(newest, ranks)
        while room > 0:
            step = self._next_step(newest, ranks, scarce=room < 2, horizon=horizon)
            if step > horizon:
                return
            room = self._give(step, room)

    def _next_step(self, newest: int, ranks: list[RankState], *, scarce: bool, horizon: int) -> int:
        """The next step of the interval, or the next must step where that comes first or needs the last free slot."""
        regular, must = self._next_regular(newest), self._next_must(newest, ranks)
        if must is not None and (must <= regular or (scarce and must <= horizon + _WINDOW)):
            return must
        return regular

    def _give(self, step: int, room: int) -> int:
        self.outstanding.add(step)
        self._granted_through = max(self._granted_through, step)
        return room - 1

    def _recall(self, awaited: int) -> None:
        """Workers wait at `awaited` for a slot, and steps that they cannot reach before hold some: these are taken
        back. No worker can have taken one of them, for none passes `awaited`. The step may be granted already: where a
        leader died while it took grants back, some nodes hold `awaited`, others still the later steps, and its
        successor finds both, more than there are slots."""
        later = {step for step in self.outstanding if step > awaited}
        if later:
            self.outstanding -= later
            self._granted_through = awaited

    def _horizon(self, newest: int, ranks: list[RankState]) -> int:
        """The furthest step that may be granted now."""
        ends = [rank.until for rank in ranks if rank.until is not None]
        ends += [rank.final.step for rank in ranks if rank.final is not None]
        return min([newest + self.lead + _WINDOW, *ends])

    def _room(self, state: NodeState) -> int:
        listed = {one.step for one in state.held}
        return state.free - sum(step not in listed for step in self.outstanding)

    def _awaited(self, ranks: list[RankState], newest: int) -> list[int]:
        """Steps that no worker passes before they are complete: they wait there for the grant, or for its slot. At the
        restored step they wait for a moment only."""
        steps = {rank.final.step for rank in ranks if rank.final is not None}
        if self.agreement.due is not None:
            steps.add(self.agreement.due)
        if self._restored is not None:
            steps.add(self._restored)
        return sorted(step for step in steps if step >= newest and (self._complete is None or step > self._complete))

    def _next_must(self, newest: int, ranks: list[RankState]) -> int | None:
        """The next must step that no grant has reached yet."""
        after = max(newest, self._granted_through)
        steps = {rank.until for rank in ranks if rank.until is not None and rank.until > after}
        every = self.config.persist_every_steps
        if every is not None:
            steps.add((after // every + 1) * every)
        return min(steps, default=None)

    def _next_regular(self, newest: int) -> int:
        every = self.interval.every
        least = max(self._granted_through + 1, newest + self.lead)
        if self.config.parent is not None and self._complete is None and not self.outstanding:
            return least
        return -(-least // every) * every

    def _count_skipped(self, ranks: list[RankState]) -> None:
        newest = max(rank.step for rank in ranks)
        if self._granted_from is not None and newest > self._newest:
            every = self.interval.every
            passed = range(max(self._newest, self._granted_through) // every * every + every, newest + 1, every)
            self.counters.skipped += len(passed)
        self._newest = max(self._newest, newest)

    # --- orders

    def _give_orders(self, out: list[LeaderInstruction]) -> None:
        orders = Orders(
            generation=self.config.generation,
            leader_epoch=self.config.epoch,
            running=self._all_entered(self._ranks),
            grants=tuple(sorted(self.outstanding)),
            complete=self._complete,
            pinned=self.persists.pins,
            agreed=self.agreement.current,
            protect=self.protection.current.step if self.protection.current is not None else None,
            protected=self.protection.protected,
            settled=self._settled(),
        )
        for node_rank in self.config.nodes:
            if self._sent.get(node_rank) != orders:
                self._sent[node_rank] = orders
                out.append(SendOrders(node_rank=node_rank, orders=orders))

    # --- a regroup

    def _settled(self) -> int | None:
        """The step of a confirmed regroup whose version outlives the generation, whoever leaves."""
        agreed = self.agreement.current
        if agreed is None or not agreed.confirmed or agreed.kind != "regroup" or self._complete != agreed.step:
            return None
        version = self.config.generation.at(agreed.step)
        if self._is_left() and any(pin.version == version for pin in self.persists.pins):
            return None
        unsafe = self._is_left() and self.protection.protected != version and not self._leaves_unprotected(agreed.step)
        return None if unsafe else agreed.step

    def _leaves_unprotected(self, step: int) -> bool:
        """Whether a node leaves after `step`, whose version will never be protected."""
        version = self.config.generation.at(step)
        return self._is_left() and not self.protection.can(version, self._reports.values())

    def _is_left(self) -> bool:
        return any(request.leaves for state in self._reports.values() for request in state.requests)

    # --- views of the reports

    def _all_entered(self, ranks: list[RankState]) -> bool:
        return sum(rank.entered for rank in ranks) == self.config.num_ranks

    def _num_slots(self) -> int:
        return min((state.num_slots for state in self._writing), default=0)

    def _metrics_at(self, step: int | None) -> dict[str, float]:
        """What all ranks reported; the smallest node counts where they differ."""
        merged: dict[str, float] = {}
        for _, state in sorted(self._reports.items(), reverse=True):
            held = self._held(state, step) if step is not None else None
            merged |= held.metrics if held is not None else {}
        return merged

    @staticmethod
    def _held(state: NodeState, step: int) -> Held | None:
        return next((one for one in state.held if one.step == step), None)

    def _situation(self, ranks: list[RankState]) -> Situation:
        requests: dict[str, Request] = {one.id: one for state in self._reports.values() for one in state.requests}
        num_slots = self._num_slots()
        return Situation(
            ranks=ranks,
            requests=requests,
            complete=self._complete,
            lead=self.lead + 1,
            memory=num_slots >= 2,
            room_to_save=num_slots < 2 or num_slots - len(self.persists.pins) >= 2,
        )
