"""The ledger of the leader: grants, completeness, persists, the snapshot interval (pure).

SIGNATURES FIRST, bodies follow.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from holdfast.checkpoint.version import GenerationId, Version
from holdfast.snapshot.reports import NodeState, Orders


@dataclass(frozen=True, kw_only=True)
class LeaderConfig:
    """What a generation's leader must know. Made once the restore is chosen."""

    generation: GenerationId
    epoch: int
    """Grows with every start of the leader's daemon (its daemon epoch)."""
    nodes: tuple[int, ...]
    """Node ranks."""
    num_ranks: int
    """Ranks of the Session in all."""
    start_step: int
    """The restored step."""
    snapshot_every: int = 0
    """0: auto."""
    persist_every_steps: int | None = None
    carried: tuple[Version, ...] = ()
    """Unfinished persists of older generations that go on (`chain.carried_persists`)."""


# --- events ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ReportReceived:
    """Feed at every NodeReport, in order of arrival."""

    state: NodeState


@dataclass(frozen=True)
class PersistDue:
    """Feed when `persist_every_s` has elapsed since the last persist began: the next version is persisted."""


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

# --- instructions ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SendOrders:
    """Send to a node. A newer one for the same node replaces one that is not sent yet."""

    node_rank: int
    orders: Orders


@dataclass(frozen=True, kw_only=True)
class OrderPersist:
    """Send PersistOrder to these nodes. May come again for one node (its daemon was restarted)."""

    version: Version
    attempt: int
    nodes: tuple[int, ...]
    tag: str | None = None
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class CommitPersist:
    """All parts are written: write index and root, then feed `CommitEnded`."""

    version: Version
    attempt: int
    tag: str | None = None
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class PersistSettled:
    """Nothing more will be done for this version: tell all (PersistEnded, PersistedMessage or PersistFailedMessage)."""

    version: Version
    outcome: str
    """persisted, failed or dropped (a newer one took its place in the queue; counted, no error)."""
    reason: str = ""
    tag: str | None = None


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


LeaderInstruction = SendOrders | OrderPersist | CommitPersist | PersistSettled | VersionCompleted | IntervalChosen


@dataclass
class LeaderCounters:
    """For reports and tests."""

    complete: int = 0
    missed: int = 0
    """Grants that some rank missed."""
    skipped: int = 0
    """Steps of the interval that were not granted for want of slots."""
    persists_dropped: int = 0
    persists_failed: int = 0


class LeaderLedger:
    """One per generation, in the leader's daemon; also made anew when that daemon is restarted (it rebuilds from reports).

    The shell makes it once LeaderRestore is sent, calls `start()` and then feeds events.
    """

    def __init__(self, config: LeaderConfig) -> None:
        self.config = config
        self.counters = LeaderCounters()

    def start(self) -> list[LeaderInstruction]:
        """The first instructions: orders that ask every node for its report."""
        raise NotImplementedError

    def handle(self, event: LeaderEvent) -> list[LeaderInstruction]:
        """Take one event; instructions are to be carried out at once and in order."""
        raise NotImplementedError

    @property
    def complete(self) -> Version | None:
        """Newest complete version of this generation."""
        raise NotImplementedError
