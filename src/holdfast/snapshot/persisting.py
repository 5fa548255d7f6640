"""The leader's part in persisting: it orders the parts, waits for them, and has index and root written.

When, what and how often is the ledger's to say (`holdfast.snapshot.persists`). Here are the attempts that run: their
orders are repeated, for a connection may have lost them, and given up after `persister.LIMIT_S`; a later attempt of a
version that the job waits for begins after a pause. Event loop only; storage is touched in the lanes ``storage`` and
``commit``.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from holdfast.checkpoint.places import place
from holdfast.checkpoint.version import Version
from holdfast.errors import HoldfastError
from holdfast.snapshot import chain, leader
from holdfast.snapshot.lanes import Lanes
from holdfast.snapshot.messages import PersistEnded, PersistOrder, PersistPart
from holdfast.snapshot.persister import LIMIT_S, Commit, clear_way, commit, step_directory
from holdfast.snapshot.persists import ATTEMPTS_OF_MANDATORY, pause_s

if TYPE_CHECKING:
    from holdfast.snapshot.leading import Leading

_log = logging.getLogger(__name__)
_ORDER_AGAIN_S: Final = 5.0
_SAY_EVERY: Final = 5
"""Of the attempts that come after a pause, every so many are told of."""
_SLOW_S: Final = 60.0
"""An attempt that takes longer is told of, unless it may well be as the last ones were."""
_USUAL: Final = 4.0
"""So many times as long as the slowest of the last ones is no news."""


@dataclass
class _Attempt:
    """One attempt to persist a version."""

    version: Version
    number: int
    waiting: set[int]
    begins: float
    """`time.monotonic()`."""
    order: leader.OrderPersist | None = None
    """Until it begins."""
    orders: dict[int, PersistOrder] = field(default_factory=dict)
    """By node rank; empty until they may be sent."""
    ordered: float = 0.0
    records: dict[int, tuple[bytes, ...]] = field(default_factory=dict)
    told: bool = False
    """Whether people know that it takes long."""


class Persisting:
    """Of one leader.

    Args:
        leading: whose generation, configuration and inventories count.
        lanes: of the daemon.
    """

    def __init__(self, leading: Leading, lanes: Lanes) -> None:
        self.ended: deque[PersistEnded] = deque(maxlen=4)
        """The last ones."""
        self.finishing = False
        """The job ends: what runs goes on, nothing is tried again."""
        self._leading, self._lanes = leading, lanes
        self._attempts: dict[Version, _Attempt] = {}
        self._begun = time.monotonic()

    def tick(self, now: float) -> None:
        """Go on where nothing but time is needed. `now`: `time.monotonic()`."""
        config = self._leading.config
        every_s = config.persist_every_s if config and config.checkpoint_dir else None
        if every_s is not None and now - self._begun > every_s:
            self._begun = now
            self._leading.feed(leader.PersistDue())
        for attempt in list(self._attempts.values()):
            if attempt.order is not None and now >= attempt.begins and not self.finishing:
                self._begin(attempt, attempt.order)
            if attempt.orders and now - attempt.ordered > _ORDER_AGAIN_S:
                attempt.ordered = now  # order or answer may have been lost with a connection
                for node_rank in attempt.waiting:
                    self._leading.send(node_rank, attempt.orders[node_rank])
            if attempt.waiting and now - attempt.begins > LIMIT_S:
                for node_rank in sorted(attempt.waiting):
                    self._part_ended(attempt, node_rank, f"nothing was heard of it for {LIMIT_S:.0f} s")
            if attempt.order is None and not attempt.told:
                self._say_slow(attempt, now)

    def order(self, order: leader.OrderPersist) -> None:
        """Begin an attempt, or give its order to nodes again."""
        config = self._leading.config
        if config is None or config.checkpoint_dir is None:
            for node_rank in order.nodes:
                self._leading.feed(
                    leader.PartEnded(
                        version=order.version, attempt=order.attempt, node_rank=node_rank, error="no checkpoint_dir"
                    )
                )
            return
        now = time.monotonic()
        known = self._attempts.get(order.version)
        if known is None or known.number != order.attempt:
            known = _Attempt(order.version, order.attempt, set(), now + pause_s(order.tries), order)
            self._attempts[order.version] = known
            self._say_again(order)
        known.waiting |= set(order.nodes)
        if now >= known.begins:
            self._begin(known, order)

    def _say_slow(self, attempt: _Attempt, now: float) -> None:
        """Storage may hang for ever: it is given up, but late, for it may be slow as well."""
        usual_s = max((one.seconds for one in self.ended if one.path is not None), default=0.0)
        waited_s = now - attempt.begins
        if waited_s <= max(_SLOW_S, _USUAL * usual_s):
            return
        attempt.told = True
        nodes = ", ".join(map(str, sorted(attempt.waiting)))
        what = f"the part of node {nodes}" if nodes else "the index"
        self._leading.say(
            "warning",
            f"step {attempt.version.step} is not in storage yet: {what} is being written for {waited_s:.0f} s, and is "
            f"given up after {LIMIT_S:.0f} s; newer checkpoints wait, snapshots in memory go on",
        )

    def _say_again(self, order: leader.OrderPersist) -> None:
        after = order.tries - ATTEMPTS_OF_MANDATORY - 1
        if after >= 0 and after % _SAY_EVERY == 0:
            self._leading.say(
                "warning",
                f"step {order.version.step} is not in storage yet, and kept in memory: {order.problem}; it is tried "
                f"again until it is, for some minutes",
            )

    def _begin(self, attempt: _Attempt, order: leader.OrderPersist) -> None:
        config = self._leading.config
        assert config is not None
        assert config.checkpoint_dir is not None
        attempt.order = None
        directory = str(step_directory(config.checkpoint_dir, order.version.step))
        messages = self._orders(order, directory)

        def wanted() -> bool:
            return not self._leading.closed and self._attempts.get(order.version) is attempt

        def clear() -> None:
            clear_way(place(directory), order.version, wanted=wanted)

        def cleared(result: object) -> None:
            if not wanted():
                return
            attempt.orders, attempt.ordered = messages, time.monotonic()
            for node_rank in order.nodes:
                if isinstance(result, Exception):
                    self._part_ended(attempt, node_rank, str(result))
                else:
                    self._leading.send(node_rank, messages[node_rank])

        self._lanes.submit("storage", clear, cleared, limit_s=LIMIT_S)

    def _orders(self, order: leader.OrderPersist, directory: str) -> dict[int, PersistOrder]:
        """What each node is told. Images of nodes that are gone are dealt out to all, the same at each attempt."""
        leading, members = self._leading, self._leading.members
        message = PersistOrder(
            version=order.version, directory=directory, attempt=order.attempt, tag=order.tag, metrics=order.metrics
        )
        messages = dict.fromkeys(members, message)
        own = order.version.generation == leading.start.generation
        lost = () if own else chain.lost_images(order.version, leading.inventories)
        if lost:
            ranks = ", ".join(str(one.global_rank) for one in lost)
            leading.say("info", f"{order.version}: the share of rank {ranks} is decoded, and written for it")
            located = leading.locations(order.version, lost)
            there, decoded = located[: -len(lost)], located[-len(lost) :]
            for number, node_rank in enumerate(members[: len(lost)]):
                mine = decoded[number :: len(members)]
                messages[node_rank] = msgspec.structs.replace(message, lost=mine, images=there, bulk=leading.bulk)
        return messages

    def take_part(self, message: PersistPart) -> None:
        """A node has written its part, or could not."""
        attempt = self._attempts.get(message.version)
        if attempt is None or attempt.number != message.attempt or message.node_rank not in attempt.waiting:
            return
        attempt.records[message.node_rank] = message.records
        self._part_ended(attempt, message.node_rank, message.error)

    def _part_ended(self, attempt: _Attempt, node_rank: int, error: str | None) -> None:
        attempt.waiting.discard(node_rank)
        self._leading.feed(
            leader.PartEnded(version=attempt.version, attempt=attempt.number, node_rank=node_rank, error=error)
        )

    def commit(self, order: leader.CommitPersist) -> None:
        """All parts are there: index and root."""
        config = self._leading.config
        assert config is not None
        assert config.checkpoint_dir is not None
        attempt = self._attempts[order.version]
        job = Commit(
            version=order.version,
            directory=step_directory(config.checkpoint_dir, order.version.step),
            records=tuple(record for node_rank in sorted(attempt.records) for record in attempt.records[node_rank]),
            world_size=self._leading.worlds.get(order.version, len(config.ranks)),
            metrics=order.metrics,
            tag=order.tag,
            history=self._leading.history,
            keep=config.keep,
        )

        def done(result: object) -> None:
            if self._leading.closed:
                return
            error = str(result) if isinstance(result, Exception) else None
            if isinstance(result, Exception) and not isinstance(result, HoldfastError):
                _log.error("committing %s failed", order.version, exc_info=result)
            self._leading.feed(leader.CommitEnded(version=order.version, attempt=order.attempt, error=error))

        self._lanes.submit("commit", lambda: commit(job), done, limit_s=LIMIT_S)

    def settled(self, settled: leader.PersistSettled) -> None:
        """Nothing more is done for the version: tell all nodes."""
        attempt = self._attempts.pop(settled.version, None)
        if settled.outcome == "dropped":
            _log.info("%s was not persisted: %s", settled.version, settled.reason)
            return
        config = self._leading.config
        assert config is not None
        persisted = settled.outcome == "persisted"
        path: Path | None = None
        if persisted and config.checkpoint_dir is not None:
            path = step_directory(config.checkpoint_dir, settled.version.step)
        ended = PersistEnded(
            version=settled.version,
            path=str(path) if path else None,
            error=None if persisted else settled.reason or "it could not be written",
            seconds=time.monotonic() - attempt.begins if attempt else 0.0,
            tag=settled.tag,
            final=settled.final,
        )
        self.ended.append(ended)
        for node_rank in self._leading.members:
            self._leading.send(node_rank, ended)
