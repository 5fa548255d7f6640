"""Agreed steps: all workers save, stop, or wait for another membership, at the end of the same step (pure).

Rules
-----
1. The leader proposes a step T ahead of the newest published one. A later pick for the same requests is a proposal with
   a larger number; only the proposal with the largest number counts.
2. A worker acknowledges at a boundary before T. From then on it will not pass T before it has seen T confirmed, or a
   later proposal.
3. The leader confirms when every worker has acknowledged. Nothing changes a confirmed step.
4. A worker that reaches T unconfirmed waits there. One that has reached T without having acknowledged may have passed
   it already (it publishes a step before it looks at the page): the leader then picks a later T, further ahead each
   time. Those that wait at the former T see the later one and go on.
5. A confirmed regroup is the last agreed step of its generation: workers save at T and wait there for their end. They
   say that they wait once the version is *settled*: complete, and where a node leaves protected besides (persisted,
   where there is no parity), for what that node holds goes with it. Nobody is ended before all wait.
6. Of open requests a stop goes first, then a regroup, then saves; what goes first answers the others too.

States of the leader's half
---------------------------
    idle --request--> proposed --all acknowledged--> confirmed --all there, version complete--> idle
                       proposed --one was there unacknowledged--> proposed (later, larger number)

Why all workers stop at the same step: a worker passes T only if it has not seen a proposal of T, or has seen a larger
number. In the first case it has not acknowledged T, so T is never confirmed. In the second case the leader has given T
up before, so T is never confirmed either.

When every loop has ended by itself, at the same step, all workers are waiting there: that step answers all requests.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from holdfast.snapshot.reports import Agreed, RankState, Request

_ORDER = {"stop": 0, "regroup": 1, "save": 2}
_LEAST_LEAD = 2
"""The newest worker may be inside the step after the one that it has published: only the boundary after that one is
sure to see the proposal, and must come before T or be T itself."""


class Decision(enum.Enum):
    """What a worker does at a boundary."""

    GO_ON = "go on"
    """Nothing stands against the next step."""
    ACKNOWLEDGE = "acknowledge"
    """Write the number on the page (before leaving the boundary), then go on."""
    WAIT = "wait"
    """Stay, read the page again until the answer is another one."""
    PERFORM = "perform"
    """This is the agreed step: save, stop, or wait for the end here."""


@dataclass(frozen=True)
class AgreedAt:
    """The step that has just ended is an agreed one."""

    kind: str
    """save, stop or regroup."""
    step: int
    tag: str | None = None
    persist: bool = True
    """Whether the version is written to storage."""


def at_boundary(step: int, agreed: Agreed | None, acknowledged: int) -> Decision:
    """The worker's half: it has published `step` and then read the page.

    Args:
        step: completed steps of this worker.
        agreed: what stands on the page.
        acknowledged: newest number that this worker acknowledged.
    """
    if agreed is None or step > agreed.step:
        return Decision.GO_ON
    if step == agreed.step:
        return Decision.PERFORM if agreed.confirmed else Decision.WAIT
    return Decision.ACKNOWLEDGE if acknowledged < agreed.number else Decision.GO_ON


@dataclass(frozen=True, kw_only=True)
class Situation:
    """What the leader's half looks at."""

    ranks: Sequence[RankState]
    """All ranks of the Session; all have entered."""
    requests: Mapping[str, Request]
    """Open ones."""
    complete: int | None
    """Newest complete step."""
    lead: int
    """How far ahead to propose, in steps: as far as grants are."""
    memory: bool
    """There is a memory tier, so the agreed step becomes a version."""
    room_to_save: bool
    """The persist queue can take a save; otherwise saves wait (stops do not)."""


class Agreement:
    """The leader's half. `current` is what must stand on every control page."""

    def __init__(self) -> None:
        self.current: Agreed | None = None
        self._lead_factor = 1

    def restore(self, reported: Iterable[Agreed | None]) -> None:
        """A restarted leader takes over what stands on the pages: the largest number, confirmed if it is anywhere."""
        known = [agreed for agreed in reported if agreed is not None]
        self.current = max(known, key=lambda agreed: (agreed.number, agreed.confirmed), default=None)

    @property
    def due(self) -> int | None:
        """The confirmed step, None where there is none."""
        return self.current.step if self.current is not None and self.current.confirmed else None

    def advance(self, now: Situation) -> None:
        """Look at the situation again; `current` may change."""
        if self._answer_with_final(now) or self._is_last():
            return
        if self.current is not None and not self.current.confirmed:
            self._drive_proposal(self.current, now)
        elif self.current is None or self._finished(self.current, now):
            self._propose(now)

    def _is_last(self) -> bool:
        return self.current is not None and self.current.confirmed and self.current.kind == "regroup"

    def _finished(self, current: Agreed, now: Situation) -> bool:
        there = all(rank.step >= current.step for rank in now.ranks)
        passed = all(rank.step > current.step for rank in now.ranks)
        return there and (passed or not now.memory or (now.complete is not None and now.complete >= current.step))

    def _drive_proposal(self, current: Agreed, now: Situation) -> None:
        behind = [rank for rank in now.ranks if rank.acknowledged < current.number]
        if not behind:
            self._lead_factor = 1
            more = [request for request in now.requests.values() if _ORDER[current.kind] <= _ORDER[request.kind]]
            self.current = msgspec.structs.replace(_merge(current, more), confirmed=True)
        elif any(rank.step >= current.step for rank in behind):
            self._lead_factor *= 2
            step = _newest(now) + max(_LEAST_LEAD, now.lead * self._lead_factor)
            self.current = msgspec.structs.replace(current, number=current.number + 1, step=step)

    def _propose(self, now: Situation) -> None:
        answered = self.current.requests if self.current is not None and self._kept_its_word(self.current, now) else ()
        waiting = [request for identity, request in now.requests.items() if identity not in answered]
        if not waiting:
            return
        kind = _first(waiting)
        if kind == "save" and not now.room_to_save:
            return
        newest = _newest(now)
        step = newest + max(_LEAST_LEAD, now.lead)
        until = min((rank.until for rank in now.ranks if rank.until is not None), default=None)
        if until is not None:
            step = min(step, until)
        if step < newest + _LEAST_LEAD:
            return  # the loop is about to end: its last step answers
        number = self.current.number + 1 if self.current is not None else 1
        proposal = Agreed(number=number, step=step, confirmed=False, kind=kind, persist=False)
        self.current = _merge(proposal, waiting)

    def _kept_its_word(self, current: Agreed, now: Situation) -> bool:
        """Whether the confirmed step became what it was meant to be (nodes withdraw their requests a little later)."""
        return not now.memory or (now.complete is not None and now.complete >= current.step)

    def _answer_with_final(self, now: Situation) -> bool:
        """All loops have ended at one step: it is the answer, there is nothing to acknowledge."""
        finals = {rank.final.step for rank in now.ranks if rank.final is not None}
        if len(finals) != 1 or any(rank.final is None for rank in now.ranks):
            return False
        final = finals.pop()
        if any(rank.step != final for rank in now.ranks):
            return False
        current = self.current
        waiting = [
            request for request in now.requests.values() if current is None or request.id not in current.requests
        ]
        if current is not None and current.step == final and current.confirmed and not waiting:
            return True
        if not now.requests:
            return True
        number = current.number + 1 if current is not None else 1
        kind = _first(now.requests.values())
        answer = Agreed(
            number=number, step=final, confirmed=True, kind="stop" if kind == "stop" else "save", persist=False
        )
        self.current = _merge(answer, now.requests.values())
        return True


def _first(requests: Iterable[Request]) -> str:
    """Kind of the request that goes first."""
    return min((request.kind for request in requests), key=_ORDER.__getitem__)


def _newest(now: Situation) -> int:
    return max(rank.step for rank in now.ranks)


def _merge(agreed: Agreed, requests: Iterable[Request]) -> Agreed:
    """`agreed` answers `requests` too; the first tag given stands, metrics are united, any wish to persist counts."""
    for request in requests:
        if request.id in agreed.requests:
            continue
        agreed = msgspec.structs.replace(
            agreed,
            persist=agreed.persist or request.persist,
            tag=agreed.tag if agreed.tag is not None else request.tag,
            metrics=agreed.metrics | request.metrics,
            requests=(*agreed.requests, request.id),
        )
    return agreed
