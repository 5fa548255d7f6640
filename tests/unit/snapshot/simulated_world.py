"""The world of the simulation: processes, files and pages as they are (see `ledger_simulation`)."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from holdfast.checkpoint.version import GenerationId, Version
from holdfast.snapshot import agreement, chain, leader, ledger
from holdfast.snapshot.coding import CodedVersion
from holdfast.snapshot.exchange import Exchange
from holdfast.snapshot.exchange_events import ExchangeInstruction
from holdfast.snapshot.messages import Inventory
from holdfast.snapshot.records import Parentage
from holdfast.snapshot.reports import Agreed, Pin, Request, SlotRef

ROUNDS = 150
"""Rounds (each possible action once) within which a job must end after the last fault; sound runs need about 60."""
PATIENCE = 40
"""Looks (two a round) after which a worker waits no longer for the grant of the restored step, once faults have ended:
the wait has a limit on the clock, and what ends by chance alone may outlast any number of rounds."""


class Violation(AssertionError):
    """An invariant does not hold."""


@dataclass(frozen=True, kw_only=True)
class Machines:
    """The machines under test; mutants replace some."""

    node: type[ledger.NodeLedger] = ledger.NodeLedger
    leader: type[leader.LeaderLedger] = leader.LeaderLedger
    at_boundary: Callable[[int, Agreed | None, int], agreement.Decision] = agreement.at_boundary
    choose: Callable[[chain.ChainQuestion], chain.Choice] = chain.choose
    exchange: type[Exchange] = Exchange


@dataclass
class File:
    """A slot file: its header, and who writes it."""

    version: Version
    rank: int
    clean: bool
    writer: Worker


@dataclass
class Buffer:
    """A parity buffer of a node: it outlives the daemon."""

    coded: CodedVersion
    rank: int
    """Of the node, in the generation of the version."""
    data: bytearray
    whole: bool = False


@dataclass(eq=False)
class Worker:
    """A worker process."""

    generation: GenerationId
    rank: int
    local: int
    node: Node
    step: int
    alive: bool = True
    stage: str = "start"
    """start, secure (may take the restored step), body, agreed (must look), grant (must look), final, stop, done"""
    intent: tuple[SlotRef, Version] | None = None
    """It has read a grant and not begun to write."""
    copying: tuple[SlotRef, Version] | None = None
    taken: set[int] = field(default_factory=set)
    bells: deque[object] = field(default_factory=deque)
    connected_to: int = 0
    performed: int | None = None
    looks: int = 0
    """At the grant of the restored step, since faults have ended."""


@dataclass(eq=False)
class Node:
    """A node: what outlives its daemon, and the daemon (`ledger`, None while it is dead)."""

    rank: int
    epoch: int = 0
    files: dict[tuple[int, SlotRef], File] = field(default_factory=dict)
    # control page
    grants: dict[SlotRef, int] = field(default_factory=dict)
    agreed: Agreed | None = None
    settled: int | None = None
    acks: dict[int, int] = field(default_factory=dict)
    # node.state
    generation: GenerationId | None = None
    local_ranks: tuple[int, ...] = ()
    decided: bool = False
    parent: Version | None = None
    start_step: int = 0
    exposed: bool = False
    parents: dict[GenerationId, Parentage] = field(default_factory=dict)
    requests: tuple[Request, ...] = ()
    pinned: tuple[Pin, ...] = ()
    protected: Version | None = None
    decided_protected: Version | None = None
    pool: tuple[int, int] | None = None
    newest_before: int = 0
    # the daemon
    ledger: ledger.NodeLedger | None = None
    leading: Leading | None = None
    connected: bool = False
    up: deque[tuple[object, ...]] = field(default_factory=deque)
    down: deque[tuple[object, ...]] = field(default_factory=deque)
    complete: int | None = None
    persisting: list[tuple[Version, int]] = field(default_factory=list)
    polled: dict[int, tuple[int, int]] = field(default_factory=dict)
    workers: list[Worker] = field(default_factory=list)
    zombies: list[Worker] = field(default_factory=list)
    # parity
    ranks_then: dict[GenerationId, int] = field(default_factory=dict)
    """The rank that the node had in each generation."""
    lost: bool = False
    """Powered off; the agents have not noticed yet."""
    buffers: dict[int, Buffer] = field(default_factory=dict)
    garbage: dict[int, bytes] = field(default_factory=dict)
    """What a buffer holds when it is used anew."""
    exchange: Exchange | None = None
    jobs: deque[tuple[ExchangeInstruction, bytes]] = field(default_factory=deque)
    """What the exchange ordered and is not done yet."""
    room_known: bool = False


@dataclass(eq=False)
class Leading:
    """The leading part of a daemon."""

    generation: GenerationId
    inventories: dict[int, Inventory] = field(default_factory=dict)
    choice: chain.Choice | None = None
    ledger: leader.LeaderLedger | None = None
    commits: list[leader.CommitPersist] = field(default_factory=list)
    parts: dict[tuple[Version, int], set[int]] = field(default_factory=dict)
    lost: dict[Version, set[int]] = field(default_factory=dict)
    """Ranks whose images are decoded while a carried version is written."""


@dataclass(frozen=True)
class Plan:
    """The shape of a run."""

    num_nodes: int
    ranks_per_node: int
    num_slots: int
    snapshot_every: int
    persist_every: int | None
    steps: int
    until_known: bool
    coupled: bool
    skip: float
    faults: int
    requests: int
    actions: int
    redundancy: str = "none"
    sizes: tuple[int, ...] = ()
    """Bytes of the image of a rank."""
    shared: bool = False
    """A part of each image is on every node, and is not coded where that is enough."""
    lossy: float = 0.0
    power: int = 0
    """Nodes that may lose power."""
    no_room: bool = False
    """Some node has no room for parity."""

    @property
    def coded(self) -> bool:
        """Whether there is redundancy."""
        return self.redundancy != "none"

    @classmethod
    def draw_coded(cls, rng: random.Random) -> Plan:
        """A job with redundancy."""
        plan = cls.draw(rng)
        return replace(
            plan,
            num_nodes=rng.choice((2, 2, 3, 3, 4, 5)),
            ranks_per_node=rng.choice((1, 1, 1, 2)),
            num_slots=rng.choice((2, 3, 4, 6, 6)),
            redundancy=rng.choice(("auto", "mirror", "2+1", "2+2", "3+1", "1+2")),
            sizes=tuple(rng.choice((0, 1, 63, 64, 65, 100, 200, 333)) for _ in range(7)),
            shared=rng.random() < 0.3,
            lossy=rng.choice((0.0, 0.0, 0.05, 0.2)),
            power=rng.choice((0, 1, 1, 2, 2, 3)),
            no_room=rng.random() < 0.04,
            actions=rng.randint(300, 2000),
            steps=rng.randint(5, 16),
        )

    @classmethod
    def draw(cls, rng: random.Random) -> Plan:
        return cls(
            num_nodes=rng.choice((1, 1, 2, 2, 3)),
            ranks_per_node=rng.choice((1, 1, 2)),
            num_slots=rng.choice((2, 2, 3, 3, 4, 6)),
            snapshot_every=rng.choice((1, 1, 1, 2, 3)),
            persist_every=rng.choice((None, 2, 3, 5)),
            steps=rng.randint(4, 10),
            until_known=rng.random() < 0.5,
            coupled=rng.random() < 0.7,
            skip=rng.choice((0.0, 0.0, 0.1, 0.3)),
            faults=rng.choice((0, 1, 1, 2, 2, 3, 4)),
            requests=rng.choice((0, 0, 1, 2)),
            actions=rng.randint(60, 360),
        )
