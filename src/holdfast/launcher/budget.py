"""How often a job may be restarted: a pure policy, asked by the leader after every failure of a worker.

With ``--max-restarts N`` it is torchrun's rule, counted for the whole job: N restarts, then the job fails. Without it:

- before a Session has a complete version there are no restarts, as under torchrun;
- from then on restarts are unlimited while progress is made. Progress is a complete version of a larger step than any
  before. The job stops when the same failure comes back at the same step with no progress in between, and after
  `no_progress` restarts without progress.

Node loss, growth and preemption are no failures and are not counted. A kill from outside (SIGKILL, SIGTERM, SIGINT,
SIGHUP) is never "the same failure": it says nothing about the script. Nor is a hang: a stopped process, or a
storage that does not answer.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass

from holdfast.launcher.wire import Failure

_FROM_OUTSIDE = frozenset(-number for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP))


@dataclass(frozen=True)
class Decision:
    """Whether to restart, and why not."""

    restart: bool
    reason: str = ""
    """One clause that completes "the job stops: …"; empty where it is restarted."""


class RestartBudget:
    """Counts failures against the rules above. One per leader; no clock, no I/O."""

    def __init__(self, *, max_restarts: int | None, no_progress: int) -> None:
        self._max_restarts = max_restarts
        self._no_progress = no_progress
        self._used = 0
        self._best = -1
        self._without_progress = 0
        self._last: tuple[object, ...] | None = None

    @property
    def used(self) -> int:
        """Restarts after failures so far."""
        return self._used

    def carry_over(self, used: int) -> None:
        """A new leader goes on from what members have seen under the one before."""
        self._used = max(self._used, used)

    def progressed(self, step: int) -> None:
        """The version of `step` is complete."""
        if step > self._best:
            self._best = step
            self._without_progress = 0
            self._last = None

    def failed(self, failure: Failure) -> Decision:
        """A worker failed; a restart that is granted is counted."""
        decision = self._decide(failure)
        if decision.restart:
            self._used += 1
            self._without_progress += 1
            self._last = _signature(failure)
        return decision

    def _decide(self, failure: Failure) -> Decision:
        if self._max_restarts is not None:
            if self._used < self._max_restarts:
                return Decision(True)
            return Decision(False, f"all {self._max_restarts} restarts of --max-restarts are used")
        if self._best < 0:
            return Decision(False, "no Session had a complete version to restart from, and --max-restarts is not given")
        if self._last is not None and self._last == _signature(failure):
            return Decision(False, f"the same failure came twice at step {failure.step}")
        if self._without_progress >= self._no_progress:
            return Decision(
                False, f"{self._without_progress} restarts in a row made no progress past step {self._best}"
            )
        return Decision(True)


def _signature(failure: Failure) -> tuple[object, ...] | None:
    """What makes two failures the same one; None for those that never are."""
    if failure.exit_code in _FROM_OUTSIDE or failure.hangs:
        return None
    return failure.exit_code, failure.message, failure.step
