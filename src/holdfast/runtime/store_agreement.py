"""Agreed saves and stops without daemons: any rank asks, all ranks act at the end of the same step.

The protocol is that of `holdfast.snapshot.agreement`; the store of the process group takes the place of the control
pages. Each rank has one thread that looks into the store, a few times a second while nobody has asked for anything, so
that a boundary costs the training thread no communication. The thread of the Session's first rank leads.

Keys, below the Session's name::

    count            how many requests were made (a counter)
    request/<n>      the n-th request
    rank/<r>         what rank r has published: step and acknowledgement, always of one instant
    agreed           the proposed or confirmed step

A rank that passes a proposed step without having seen it says so from its thread, even while its training thread waits
in a collective call for the ranks that stand at that step: the leader then picks a later one, and they go on.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import msgspec

from holdfast.checkpoint.saving import Ranks
from holdfast.errors import DECODE_ERRORS, PeerError, PeerTimeout
from holdfast.snapshot.agreement import Agreement, Decision, Situation, at_boundary
from holdfast.snapshot.reports import Agreed, RankState, Request

log = logging.getLogger(__name__)

_IDLE_S = 0.25
"""Between two looks while nobody has asked: how late a request is noticed."""
_BUSY_S = 0.005
"""Between two looks while something is being agreed."""
_LEAD = 2
"""How far ahead of the newest step one is proposed; the agreement looks further ahead after each miss."""
_JOIN_S = 5.0


class StoreAgreement:
    """One rank's part. The training thread calls `boundary` and `expect`, any thread `request`; `close` ends it."""

    def __init__(
        self, ranks: Ranks, name: str, *, first_step: int = 0, timeout: timedelta = timedelta(minutes=10)
    ) -> None:
        """Start looking.

        Args:
            ranks: of the Session; more than one.
            name: the same on all ranks, different for each Session of the process.
            first_step: completed steps of the restored state.
            timeout: how long a boundary waits for the other ranks.
        """
        self._ranks = ranks
        self._name = name
        self._timeout = timeout
        # A store's own wait keeps its connection from all threads of the process: ours is another one.
        self._store: Any = ranks.store.clone() if hasattr(ranks.store, "clone") else ranks.store
        self._agreement = Agreement()
        self._requests: dict[str, Request] = {}
        self._answered: set[str] = set()
        self._published: bytes = b""
        self._changed = threading.Condition()
        # Guarded by _changed.
        self._step = first_step
        self._until: int | None = None
        self._acknowledged = 0
        self._agreed: Agreed | None = None
        self._closed = False
        self._problem: str | None = None
        self._thread = threading.Thread(target=self._run, name="holdfast-agreement", daemon=True)
        self._thread.start()

    # --- the training thread

    def expect(self, until: int) -> None:
        """The loop ends after `until` steps at the latest."""
        with self._changed:
            self._until = until

    def boundary(self, step: int) -> Agreed | None:
        """`step` steps are finished: what all ranks do here, None where that is nothing.

        Raises:
            PeerTimeout: `step` was proposed, and within the timeout neither confirmed nor given up.
            PeerError: the store does not answer any more, and the other ranks may wait for this one.
        """
        deadline = time.monotonic() + self._timeout.total_seconds()
        with self._changed:
            self._step = step
            while True:
                match at_boundary(step, self._agreed, self._acknowledged):
                    case Decision.GO_ON:
                        return None
                    case Decision.PERFORM:
                        return self._agreed
                    case Decision.ACKNOWLEDGE:
                        assert self._agreed is not None
                        self._acknowledged = self._agreed.number
                        return None
                    case Decision.WAIT:
                        self._wait(step, deadline)

    def request(self, kind: str, *, persist: bool, tag: str | None = None, metrics: Mapping[str, float]) -> str:
        """Ask for an agreed step.

        Args:
            kind: save or stop.
            persist: whether that step is to be in storage.
            tag: of the checkpoint.
            metrics: of the checkpoint.

        Returns:
            The identity of the request, found again in `Agreed.requests`.

        Raises:
            PeerError: the store does not answer.
        """
        try:
            number = int(self._store.add(f"{self._name}/count", 1))
            request = Request(id=str(number), kind=kind, persist=persist, tag=tag, metrics=dict(metrics))
            self._store.set(f"{self._name}/request/{number}", msgspec.json.encode(request))
        except RuntimeError as error:  # torch's DistStoreError is one
            raise PeerError(f"the store of the process group does not answer: {error}") from error
        return request.id

    def close(self) -> None:
        """Stop looking. What is not agreed by now is for the end of the Session to answer."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(_JOIN_S)
        if self._thread.is_alive():
            log.warning("the thread that looks for requests of other ranks does not end: the store does not answer")

    def _wait(self, step: int, deadline: float) -> None:
        """Until the page changes."""
        if self._problem is not None:
            raise PeerError(self._problem)
        left = deadline - time.monotonic()
        if left <= 0:
            raise PeerTimeout(f"step {step} was proposed and neither confirmed nor given up within {self._timeout}")
        self._changed.wait(left)

    # --- the thread

    def _run(self) -> None:
        try:
            while not self._is_closed(_BUSY_S if self._look() else _IDLE_S):
                pass
        except RuntimeError as error:  # torch's DistStoreError is one
            self._give_up(f"the store of the process group does not answer: {error}")
        except (PeerError, *DECODE_ERRORS) as error:
            self._give_up(str(error))

    def _is_closed(self, pause_s: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: self._closed, pause_s)

    def _give_up(self, problem: str) -> None:
        with self._changed:
            closed, self._problem = self._closed, problem
            self._changed.notify_all()
        if not closed:
            log.warning("this rank learns of no further saves and stops that others ask for: %s", problem)

    def _look(self) -> bool:
        """One round; whether something is being agreed."""
        count = int(self._store.add(f"{self._name}/count", 0))
        busy = len(self._answered) < count
        if busy:
            self._publish()
            agreed = self._lead(count) if self._ranks.rank == 0 else self._read()
            with self._changed:
                self._agreed = agreed
                if agreed is not None and agreed.confirmed and self._step >= agreed.step:
                    self._answered.update(agreed.requests)
                self._changed.notify_all()
            self._publish()
        return busy

    def _publish(self) -> None:
        with self._changed:
            state = RankState(
                global_rank=self._ranks.rank,
                step=self._step,
                entered=True,
                acknowledged=self._acknowledged,
                until=self._until,
            )
        encoded = msgspec.json.encode(state)
        if encoded != self._published:
            self._store.set(f"{self._name}/rank/{self._ranks.rank}", encoded)
            self._published = encoded

    def _read(self) -> Agreed | None:
        key = f"{self._name}/agreed"
        return msgspec.json.decode(self._store.get(key), type=Agreed) if self._store.check([key]) else None

    def _lead(self, count: int) -> Agreed | None:
        """The leader's half: what stands in the store after this round."""
        for number in range(len(self._requests) + 1, count + 1):
            key = f"{self._name}/request/{number}"
            if not self._store.check([key]):
                break
            self._requests[str(number)] = msgspec.json.decode(self._store.get(key), type=Request)
        keys = [f"{self._name}/rank/{rank}" for rank in range(self._ranks.world_size)]
        before = self._agreement.current
        if not self._store.check(keys):  # true only where all are there
            return before
        states = [msgspec.json.decode(self._store.get(key), type=RankState) for key in keys]
        open_ones = {key: one for key, one in self._requests.items() if key not in self._answered}
        self._agreement.advance(
            Situation(ranks=states, requests=open_ones, complete=None, lead=_LEAD, memory=False, room_to_save=True)
        )
        current = self._agreement.current
        if current is not None and current != before:
            self._store.set(f"{self._name}/agreed", msgspec.json.encode(current))
        return current
