"""The recoveries of a job, told as they happen: a line for people and an event each. Used by the leader's agent."""

from __future__ import annotations

import time
from collections.abc import Callable

from holdfast.launcher.console import say
from holdfast.launcher.events import AnyEvent
from holdfast.launcher.timeline import Timeline
from holdfast.launcher.wire import Plan, Report


class RecoveryBook:
    """At most one recovery is open; the next failure closes it unfinished. One thread."""

    def __init__(self, write: Callable[[AnyEvent], None]) -> None:
        """`write` takes the event of each recovery."""
        self._write = write
        self._timeline: Timeline | None = None
        self._had_session = False
        self._began = False

    def begin(self, cause: str, detected_s: float, *, had_session: bool = False) -> None:
        """A generation ends for this `cause`, noticed at `detected_s` (time.time()).

        Args:
            had_session: it had a Session, which an agent that leads only from now on has not observed.
        """
        self.close()
        self._had_session = self._had_session or had_session
        self._began = True
        self._timeline = Timeline(cause, detected_s, had_session=self._had_session)

    def stopped(self) -> None:
        """No worker of the old generation is left."""
        if self._timeline is not None:
            self._timeline.stopped(time.time())

    def agreed(self, plan: Plan) -> None:
        """A plan goes to all members; the first one with a new generation counts.

        The first generation of a run is told of too where its Sessions resume what an earlier run left.
        """
        if plan.generation is None or plan.phase != "run":
            return
        if not self._began:
            self._began = True
            self._timeline = Timeline("the job was started again", time.time(), had_session=True, first=True)
        if self._timeline is None:
            return
        if self._timeline.generation is None:
            self._timeline.agreed(plan, time.time())

    def observe(self, report: Report) -> None:
        """Follow the recovery through what all nodes report."""
        self._had_session = self._had_session or report.session.opened > 0
        if self._timeline is None:
            return
        self._timeline.observe(report)
        line = self._timeline.line()
        if line is not None:
            say(line)
        if self._timeline.complete:
            self.close()

    def close(self) -> None:
        """Close the recovery that is under way: it is complete, or the next failure came first."""
        timeline = self._timeline
        if timeline is not None and timeline.generation is not None and timeline.is_recovery:
            self._write(timeline.event())
        self._timeline = None
