"""The workers of a node, and what they have published on the control page and in slot headers.

Only the daemon's event loop touches anything here.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from holdfast.checkpoint.version import GenerationId
from holdfast.snapshot import ledger
from holdfast.snapshot.arena import Arena
from holdfast.snapshot.headers import SlotHeaders
from holdfast.snapshot.messages import Committed, FinalStep, Missed, StartGeneration
from holdfast.snapshot.records import SessionConfig
from holdfast.snapshot.transport import Peer, Transport

_WATCH_S: Final = 1.0


@dataclass
class Worker:
    """A worker that has opened its Session."""

    generation: GenerationId
    global_rank: int
    local_rank: int
    pid: int
    peer: Peer
    config: SessionConfig
    pidfd: int | None = None
    step: int = -1
    """Newest finished step that the ledger was told."""
    acknowledged: int = 0
    closed: bool = False


@dataclass
class Generation:
    """The generation that this node is in."""

    start: StartGeneration
    word: int
    first_rank: int
    local_ranks: tuple[int, ...]
    """Global ranks of this node; their place is their local rank."""
    workers: dict[int, Worker] = field(default_factory=dict)
    """By global rank."""


class Looks:
    """Looks at the control page and at slot headers for the ledger."""

    def __init__(self, arena: Arena, headers: SlotHeaders, node: ledger.NodeLedger) -> None:
        self._arena, self._page, self._headers, self._ledger = arena, arena.control, headers, node
        self._looked_at = 0.0  # when the headers of watched ranks were last read without another reason

    def page(self, generation: Generation | None) -> list[ledger.NodeEvent]:
        """What workers have published since the last time."""
        events: list[ledger.NodeEvent] = []
        if generation is None or not self._arena.state.running:
            return events
        now = time.monotonic()
        look_again = now - self._looked_at > _WATCH_S
        if look_again:
            self._looked_at = now
        for worker in generation.workers.values():
            part = self._page.rank(worker.local_rank)
            step, acknowledged = part.step, part.acknowledged
            if (step > worker.step or look_again) and part.generation == generation.word:
                events += self._stepped(worker, step)
            if acknowledged > worker.acknowledged and part.generation == generation.word:
                worker.acknowledged = acknowledged
                events.append(
                    ledger.RankAcknowledged(
                        generation=worker.generation, global_rank=worker.global_rank, number=acknowledged
                    )
                )
        return events

    def _stepped(self, worker: Worker, step: int) -> list[ledger.NodeEvent]:
        if worker.global_rank in self._ledger.watched:
            return self.rank(worker)
        if step <= worker.step:
            return []
        worker.step = step
        return [ledger.RankStepped(generation=worker.generation, global_rank=worker.global_rank, step=step)]

    def rank(self, worker: Worker) -> list[ledger.NodeEvent]:
        """What the rank has published and what its headers say, read in this order."""
        worker.step = max(worker.step, self._page.rank(worker.local_rank).step)
        if worker.step < 0:
            return []
        headers = self._headers.of_rank(worker.local_rank)
        return [
            ledger.RankRead(
                generation=worker.generation, global_rank=worker.global_rank, step=worker.step, headers=headers
            )
        ]


class Deaths:
    """Waits for the ends of processes."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def watch(self, pid: int, died: Callable[[], None]) -> int | None:
        """Call `died` when the process has ended; at once, and None, where it has. Else its pidfd, for `forget`, which
        is closed when it has ended."""
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            died()
            return None

        def exited() -> None:
            self.forget(pidfd)
            died()

        self._transport.watch(pidfd, exited)
        return pidfd

    def forget(self, pidfd: int) -> None:
        """Its end is not waited for any more."""
        self._transport.unwatch(pidfd)
        os.close(pidfd)


def heard(message: Committed | Missed | FinalStep) -> ledger.NodeEvent:
    """What a worker has told, for the ledger."""
    match message:
        case Committed():
            return ledger.RankCommitted(
                version=message.version,
                global_rank=message.global_rank,
                wait_s=message.wait_s,
                step_s=message.step_s,
                metrics=message.metrics,
            )
        case Missed():
            return ledger.RankMissed(version=message.version, global_rank=message.global_rank)
        case FinalStep():
            return ledger.RankFinished(
                generation=message.generation,
                global_rank=message.global_rank,
                step=message.step,
                persist=message.persist,
            )
