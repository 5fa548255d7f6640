"""What goes into the ledger of a node and what comes out of it: frozen events and instructions (pure).

The machine between them is `holdfast.snapshot.ledger`. Structs, because a daemon starts the sooner the less code its
classes generate.
"""

from __future__ import annotations

import msgspec

from holdfast.checkpoint.version import GenerationId, Version
from holdfast.snapshot.reports import Agreed, NodeState, Orders, Pin, Request, SlotRef
from holdfast.snapshot.slots import Header

# --- events: what the shell of the daemon feeds ---------------------------------------------------------------------


class GenerationStarted(msgspec.Struct, frozen=True, kw_only=True):
    """Feed at StartGeneration, after reading all slot headers again (the header is the truth: doorbells may be lost).

    Fences everything older. Yields `ClearGrants` and `SendInventory`. No slots until the next `PoolReady`.
    """

    generation: GenerationId
    node_rank: int
    local_ranks: tuple[int, ...]
    """Global ranks of this node in the new generation."""
    headers: tuple[Header, ...]


class Published(msgspec.Struct, frozen=True, kw_only=True):
    """A grant that stands on the control page of the current generation: the newest one of its slot."""

    slot: SlotRef
    step: int


class Adopted(msgspec.Struct, frozen=True, kw_only=True):
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
    session_ranks: tuple[int, ...] | None = None
    """As in `RestoreDecided`; None where nothing was decided."""
    requests: tuple[Request, ...] = ()
    """Open requests as recorded in node.state (`StoreRequests`)."""
    pinned: tuple[Pin, ...] = ()
    """Versions kept for a persist as recorded there (`StorePins`)."""
    protected: Version | None = None
    """As recorded there (`Protected`)."""


class RestoreDecided(msgspec.Struct, frozen=True, kw_only=True):
    """Feed when the leader's choice arrives (LeaderRestore) and its Parentage is recorded, before workers hear of it.
    Again when the leader chooses anew (RestoreFailed). Yields `StopPersist` for what lies above the restored step."""

    generation: GenerationId
    parent: Version | None
    """The version in memory that the generation starts from; None where the tier is storage or none."""
    step: int
    """The restored step, 0 where the tier is none."""
    session_ranks: tuple[int, ...] | None = None
    """Global ranks of the Session, of all nodes: only these write images. None: every rank does."""
    protected: Version | None = None
    """The version of an older generation whose slots and parity are kept until one of this generation is protected
    (`chain.Choice.protected`)."""


class PoolReady(msgspec.Struct, frozen=True, kw_only=True):
    """Feed when slot files 0..num_slots-1 of `pool` are there for all local ranks, just before SlotsReady goes out.

    Slots of other pools are never granted again; each is dropped (`DropSlot`) once nothing in it is needed. Feed it
    again in each new generation, with the same pool where the old one still fits.
    """

    pool: int
    num_slots: int


class PoolPaused(msgspec.Struct, frozen=True):
    """Feed when some rank needs larger slots: no grants until the next `PoolReady`."""


class RankEntered(msgspec.Struct, frozen=True, kw_only=True):
    """Feed when a rank reported the phase ``restored`` (its Session is entered)."""

    generation: GenerationId
    global_rank: int
    step: int
    until: int | None = None


class RankStepped(msgspec.Struct, frozen=True, kw_only=True):
    """Feed when a rank's newest finished step on the control page has changed (polled, or with a doorbell), unless the
    rank is in `NodeLedger.watched` (then `RankRead`)."""

    generation: GenerationId
    global_rank: int
    step: int


class RankUntil(msgspec.Struct, frozen=True, kw_only=True):
    """Feed when a rank says (NeedSlots) what the last step of its loop will be."""

    generation: GenerationId
    global_rank: int
    until: int


class RankCommitted(msgspec.Struct, frozen=True, kw_only=True):
    """Feed at `Committed`. Idempotent; a worker repeats its newest ones when it reconnects to a restarted daemon."""

    version: Version
    global_rank: int
    wait_s: float = 0.0
    step_s: float = 0.0
    metrics: dict[str, float] = {}


class RankMissed(msgspec.Struct, frozen=True, kw_only=True):
    """Feed at `Missed`: the worker saw, at a boundary after `version.step`, a grant of it that it had not taken."""

    version: Version
    global_rank: int


class RankRead(msgspec.Struct, frozen=True, kw_only=True):
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


class RankAcknowledged(msgspec.Struct, frozen=True, kw_only=True):
    """Feed when a rank's acknowledged number on the control page has changed."""

    generation: GenerationId
    global_rank: int
    number: int


class RankFinished(msgspec.Struct, frozen=True, kw_only=True):
    """Feed at `FinalStep`: the loop of the rank ended by itself."""

    generation: GenerationId
    global_rank: int
    step: int
    persist: bool


class WriterDied(msgspec.Struct, frozen=True, kw_only=True):
    """Feed when a worker process is gone (pidfd), with the generation it belonged to."""

    generation: GenerationId
    global_rank: int


class Requested(msgspec.Struct, frozen=True, kw_only=True):
    """Feed at RequestSave, RequestEnd, RequestStop and RequestRegroup. All but the last survive generations."""

    request: Request


class ParityAvailable(msgspec.Struct, frozen=True, kw_only=True):
    """Feed in each generation with redundancy, once it is known whether this node can hold two generations of parity;
    again when a buffer could not be made. Not fed where the group of this node has no parity."""

    generation: GenerationId
    available: bool
    most: int = 0
    """Where it is not: so many parities, fewer than now, it could hold; 0 where none."""
    lowered: int = 0
    """`LeaderRestore.lowered` that this is said of."""


class ParityDone(msgspec.Struct, frozen=True, kw_only=True):
    """Feed at the exchange's `DeclareDone`: the parity that this node holds of `version` is whole and sealed."""

    version: Version


class ParityFailed(msgspec.Struct, frozen=True, kw_only=True):
    """Feed when the parity of `version` can never be made here: a source's bytes do not match their checksums, or the
    record cannot be written. Feed the exchange `VersionFailed` too. The leader gives the version up and takes a newer
    one."""

    version: Version


class LeaderConnected(msgspec.Struct, frozen=True):
    """Feed when the connection to the leader's daemon is (re)made: yields a `SendReport`."""


class OrdersReceived(msgspec.Struct, frozen=True, kw_only=True):
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
    | ParityAvailable
    | ParityDone
    | ParityFailed
    | LeaderConnected
    | OrdersReceived
)

# --- instructions: what the shell must do, in this order ------------------------------------------------------------


class ClearGrants(msgspec.Struct, frozen=True, kw_only=True):
    """Erase the page's grants and agreed step and write the generation: workers of older ones see nothing."""

    generation: GenerationId


class SendInventory(msgspec.Struct, frozen=True):
    """Send the leader an Inventory: images from `NodeLedger.clean()`, pins from `NodeLedger.pinned`."""


class PublishGrant(msgspec.Struct, frozen=True, kw_only=True):
    """Write the grant of `version.step` in `slot` on the page, visible to the workers at once."""

    slot: SlotRef
    version: Version


class WithdrawGrant(msgspec.Struct, frozen=True, kw_only=True):
    """Erase the grant from the page: nobody needs the version any more. Who has not seen it yet never will."""

    slot: SlotRef
    version: Version


class ReadRanks(msgspec.Struct, frozen=True):
    """Now that grants are withdrawn, feed `RankRead` of every living local rank: who has not reached an abandoned step
    cannot take it any more. Ranks in `NodeLedger.watched` need `RankRead` instead of `RankStepped` from now on."""


class PublishAgreed(msgspec.Struct, frozen=True, kw_only=True):
    """Write the agreed step on the page; workers that wait in ``agreed()`` look again. Where it is confirmed and of
    kind save or regroup, send SaveAgreed to the workers."""

    agreed: Agreed


class Settled(msgspec.Struct, frozen=True, kw_only=True):
    """The version of a regroup's step outlives the generation: write it on the page, where workers wait for it."""

    step: int


class SendReport(msgspec.Struct, frozen=True, kw_only=True):
    """Send the state to the leader. A newer one replaces one that is not sent yet, but `ask` of either must stay set
    (send at most one per few ms)."""

    state: NodeState


class StoreRequests(msgspec.Struct, frozen=True, kw_only=True):
    """Record the open requests in node.state."""

    requests: tuple[Request, ...]


class StorePins(msgspec.Struct, frozen=True, kw_only=True):
    """Record in node.state which versions are kept for a persist: a successor of the daemon must keep them too."""

    pinned: tuple[Pin, ...]


class DropSlot(msgspec.Struct, frozen=True, kw_only=True):
    """Unlink the files of a slot of a former pool: nothing in it is needed and nobody writes it."""

    slot: SlotRef


class StopPersist(msgspec.Struct, frozen=True, kw_only=True):
    """Stop reading this version for a persist: its pin is gone, the slot may be written again."""

    version: Version


class Completed(msgspec.Struct, frozen=True, kw_only=True):
    """For people, agents (Progress) and workers: the version is complete on all ranks of the job."""

    version: Version


class Protect(msgspec.Struct, frozen=True, kw_only=True):
    """Feed the exchange `ProtectWanted`, with the stream of the images in `NodeLedger.slots_of(version)`."""

    version: Version


class Protected(msgspec.Struct, frozen=True, kw_only=True):
    """The protected version is another one now, or the first orders of a running generation name it (None: nothing is
    protected). Record it in node.state, then feed the exchange `KeepParity`. A version of this generation: protected on
    all nodes of the job, tell people and agents."""

    version: Version | None


NodeInstruction = (
    ClearGrants
    | SendInventory
    | PublishGrant
    | WithdrawGrant
    | ReadRanks
    | PublishAgreed
    | Settled
    | SendReport
    | StoreRequests
    | StorePins
    | DropSlot
    | StopPersist
    | Completed
    | Protect
    | Protected
)
