"""The persist queue: which complete version is written to storage now, which one waits (pure).

Rules
-----
1. One persist at a time. A version in the queue is pinned: its slots are kept until it is settled.
2. Of those that wait only the newest is kept; older ones are dropped and counted. *Mandatory* ones (an agreed save, the
   final step) are never dropped, they wait in order.
3. A version that waits gives up its slots where fewer than two would be left for new versions (unless mandatory):
   memory snapshots go on while storage is slow.
4. A persist is an attempt: every node writes its part, then index and root are written. An attempt fails as a whole. A
   mandatory one is tried three times, others once. The *final* step, for which the job waits at its end, is tried for
   some minutes more, after pauses: when the job has ended nothing else holds what it made.
5. A tag counts whenever it comes. A version that was persisted without it, or whose root was under way then, is
   attempted again: what lies in storage is not written again, and gets the tag.

States of the running attempt
-----------------------------
    writing --all parts--> committing --root--> persisted
    writing, committing --error--> failed, or writing again (next attempt)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from holdfast.checkpoint.version import Version
from holdfast.snapshot.reports import Pin

ATTEMPTS_OF_MANDATORY = 3
ATTEMPTS_OF_FINAL = 26
"""About ten minutes, with the pauses of `pause_s`."""
_LONGEST_PAUSE_S = 30.0


@dataclass(frozen=True, kw_only=True)
class OrderPersist:
    """Send PersistOrder to these nodes. May come again for a node that has reconnected: one that is writing this
    attempt goes on, one that has written it answers again."""

    version: Version
    attempt: int
    nodes: tuple[int, ...]
    tag: str | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    tries: int = 1
    """Which attempt it is for this version; it begins after `pause_s`."""
    problem: str = ""
    """Why the one before has failed."""


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
    """persisted, failed or dropped (a newer one took its place; counted, no error)."""
    reason: str = ""
    tag: str | None = None
    final: bool = False
    """It was tried as the final step."""


PersistInstruction = OrderPersist | CommitPersist | PersistSettled


@dataclass
class _Running:
    pin: Pin
    attempt: int
    missing: set[int]
    tries: int = 1
    problem: str = ""
    given: str | None = None
    """The tag that the order to commit has."""


class PersistQueue:
    """Owned by the leader's ledger.

    Args:
        nodes: node ranks, each of which writes a part.
        attempt: the first attempt's number, larger than any that a former leader may have used.
    """

    def __init__(self, nodes: Iterable[int], *, attempt: int) -> None:
        self._nodes = tuple(nodes)
        self._attempt = attempt
        self._running: _Running | None = None
        self._tries = 0
        self._waiting: list[Pin] = []
        self._persisted: dict[Version, str | None] = {}  # with the tags that they have
        self.dropped = 0
        self.failed = 0

    @property
    def pins(self) -> tuple[Pin, ...]:
        """Everything that must be kept, the running one first."""
        return (*((self._running.pin,) if self._running else ()), *self._waiting)

    def offer(self, pin: Pin) -> list[PersistInstruction]:
        """A complete version is to be persisted; offered again where it has become mandatory, or got a tag."""
        if pin.version in self._persisted and pin.tag in (None, self._persisted[pin.version]):
            return []
        if any(known.version == pin.version for known in self.pins):
            self._replace(pin)
            return []
        out = self._drop([known for known in self._waiting if not known.mandatory]) if not pin.mandatory else []
        self._waiting.append(pin)
        return out + self._begin_next()

    def squeeze(self, num_slots: int, newest: Version) -> list[PersistInstruction]:
        """A newer version is complete: give up what waits where it leaves fewer than two slots for new versions."""
        out: list[PersistInstruction] = []
        for pin in list(self._waiting):
            others = sum(known.version != newest for known in self.pins)
            if num_slots - others < 2 and not pin.mandatory and pin.version != newest:
                out += self._drop([pin])
        return out

    def part_ended(self, version: Version, attempt: int, node_rank: int, error: str | None) -> list[PersistInstruction]:
        """A node wrote its part, or could not."""
        running = self._current(version, attempt)
        if running is None:
            return []
        if error is not None:
            return self._fail(running, f"node {node_rank}: {error}")
        if node_rank not in running.missing:
            return []
        running.missing.discard(node_rank)
        if running.missing:
            return []
        return [self._commit(running)]

    def commit_ended(self, version: Version, attempt: int, error: str | None) -> list[PersistInstruction]:
        """Index and root are written, or not."""
        running = self._current(version, attempt)
        if running is None or running.missing:
            return []
        if error is not None:
            return self._fail(running, error)
        self._persisted[version] = running.given
        if running.pin.tag not in (None, running.given):
            return [self._begin(running.pin)]  # it came while the root was written
        settled = PersistSettled(version=version, outcome="persisted", tag=running.pin.tag)
        return [settled, *self._end_running()]

    def node_reconnected(self, node_rank: int) -> list[PersistInstruction]:
        """A node's daemon or its connection is new: the order, or the answer to it, may be lost."""
        running = self._running
        if running is None or node_rank not in running.missing:
            return []
        return [self._order(running, (node_rank,))]

    def _replace(self, pin: Pin) -> None:
        """A known version is offered again: it may have become mandatory, or have got a tag."""
        if self._running is not None and self._running.pin.version == pin.version:
            self._running.pin = pin
        self._waiting = [pin if known.version == pin.version else known for known in self._waiting]

    def _current(self, version: Version, attempt: int) -> _Running | None:
        running = self._running
        return running if running and (running.pin.version, running.attempt) == (version, attempt) else None

    def _begin_next(self) -> list[PersistInstruction]:
        if self._running is not None or not self._waiting:
            return []
        self._tries = 0
        return [self._begin(self._waiting.pop(0))]

    def _begin(self, pin: Pin, *, problem: str = "") -> PersistInstruction:
        self._attempt += 1
        self._tries += 1
        self._running = _Running(pin, self._attempt, set(self._nodes), self._tries, problem)
        return self._order(self._running, self._nodes)

    def _fail(self, running: _Running, reason: str) -> list[PersistInstruction]:
        attempts = ATTEMPTS_OF_FINAL if running.pin.final else ATTEMPTS_OF_MANDATORY if running.pin.mandatory else 1
        if self._tries < attempts:
            return [self._begin(running.pin, problem=reason)]
        self.failed += 1
        pin = running.pin
        settled = PersistSettled(version=pin.version, outcome="failed", reason=reason, tag=pin.tag, final=pin.final)
        return [settled, *self._end_running()]

    def _end_running(self) -> list[PersistInstruction]:
        self._running = None
        return self._begin_next()

    def _drop(self, pins: list[Pin]) -> list[PersistInstruction]:
        self._waiting = [pin for pin in self._waiting if pin not in pins]
        self.dropped += len(pins)
        return [PersistSettled(version=pin.version, outcome="dropped", tag=pin.tag) for pin in pins]

    @staticmethod
    def _order(running: _Running, nodes: tuple[int, ...]) -> OrderPersist:
        pin = running.pin
        return OrderPersist(
            version=pin.version,
            attempt=running.attempt,
            nodes=nodes,
            tag=pin.tag,
            metrics=dict(pin.metrics),
            tries=running.tries,
            problem=running.problem,
        )

    @staticmethod
    def _commit(running: _Running) -> CommitPersist:
        pin = running.pin
        running.given = pin.tag
        return CommitPersist(version=pin.version, attempt=running.attempt, tag=pin.tag, metrics=dict(pin.metrics))


def pause_s(tries: int) -> float:
    """Seconds before attempt number `tries` of a version: none before those that every mandatory one has."""
    return min(_LONGEST_PAUSE_S, 2.0 ** (tries - ATTEMPTS_OF_MANDATORY - 1)) if tries > ATTEMPTS_OF_MANDATORY else 0.0
