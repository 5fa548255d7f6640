"""The ledger of one node: which slot holds which version, who may write it, and when it may be reused (pure).

SIGNATURES FIRST, bodies follow.
"""

from __future__ import annotations

from dataclasses import dataclass

from holdfast.checkpoint.version import GenerationId, Version
from holdfast.snapshot.reports import Agreed, Grant, NodeState, Orders, Request, SlotRef

# --- events: what the shell of the daemon feeds ---------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Header:
    """The slot header of one local rank as read from the arena. FREE headers are not passed."""

    slot: SlotRef
    version: Version
    global_rank: int
    """In the generation that wrote it."""
    world_size: int
    clean: bool
    """CLEAN; otherwise FILLING."""
    writer_alive: bool
    """The process that wrote it (pid and start time of the header) lives."""


@dataclass(frozen=True, kw_only=True)
class GenerationStarted:
    """Feed at StartGeneration, after reading all slot headers again (the header is the truth: doorbells may be lost).

    Fences everything older. Yields `ClearGrants` and `SendInventory`.
    """

    generation: GenerationId
    node_rank: int
    local_ranks: tuple[int, ...]
    """Global ranks of this node in the new generation."""
    headers: tuple[Header, ...]


@dataclass(frozen=True, kw_only=True)
class Published:
    """One entry of the control page's grant table, which has exactly one entry per slot of the pool in use."""

    slot: SlotRef
    grant: Grant


@dataclass(frozen=True, kw_only=True)
class Adopted:
    """Feed once, first, in a restarted daemon whose arena has a generation (node.state), before anything else.

    Feed afterwards, from the control page, `RankStepped`, `RankAcknowledged` and `RankEntered` of each rank.
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
    """Feed when the leader's choice arrives (LeaderRestore) and its Parentage is recorded, before workers hear of it."""

    generation: GenerationId
    parent: Version | None
    """The version in memory that the generation starts from; None where the tier is storage or none."""


@dataclass(frozen=True, kw_only=True)
class PoolReady:
    """Feed when slot files 0..num_slots-1 of `pool` are there for all local ranks, just before SlotsReady goes out.

    Slots of other pools are never granted again; each is dropped (`DropSlot`) once nothing in it is needed. Feed it again
    in a new generation, with the same pool where the old one still fits.
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
    """Feed when a rank's newest finished step on the control page has changed (polled, or with a doorbell)."""

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
    """Feed when a worker reconnects (its doorbells may be lost): its published step, read first, then its headers.

    A grant of an older step without a matching header was missed. Needs that a worker publishes a step before it looks
    for its grant, and writes FILLING before it leaves that boundary.
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
    """Erase the page's grant table and agreed step and write the generation: workers of older ones see nothing."""

    generation: GenerationId


@dataclass(frozen=True)
class SendInventory:
    """Send the leader an Inventory: images from `NodeLedger.clean()`, pins from `NodeLedger.pinned`."""


@dataclass(frozen=True, kw_only=True)
class PublishGrant:
    """Write the grant table's entry of `slot` (replacing what stood there), visible to the workers at once."""

    slot: SlotRef
    grant: Grant
    version: Version


@dataclass(frozen=True, kw_only=True)
class PublishAgreed:
    """Write the agreed step on the page; workers that wait in ``agreed()`` look again. Where it is confirmed and of kind
    save, send SaveAgreed to the workers."""

    agreed: Agreed


@dataclass(frozen=True, kw_only=True)
class SendReport:
    """Send the state to the leader. A newer one replaces one that is not sent yet (send at most one per few ms)."""

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

    def handle(self, event: NodeEvent) -> list[NodeInstruction]:
        """Take one event; the instructions are to be carried out at once and in order. Events of older generations are
        refused (ignored but for what they say about a writer that let go)."""
        raise NotImplementedError

    @property
    def pinned(self) -> tuple[Version, ...]:
        """Versions kept for a persist."""
        raise NotImplementedError

    def clean(self) -> tuple[Header, ...]:
        """Clean images that may be read (inventory): headers with `clean` whose slot nobody may write."""
        raise NotImplementedError

    def readable(self, slot: SlotRef, version: Version) -> bool:
        """Whether a range read of `version` from `slot` may be served now."""
        raise NotImplementedError

    def slot_of(self, version: Version) -> SlotRef | None:
        """The slot that holds `version` clean on all ranks of this node (for the persister)."""
        raise NotImplementedError
