"""The timeline of one recovery, pure: what the leader's agent hears, as seconds since the failure was detected."""

from __future__ import annotations

import signal
from collections.abc import Iterable

from holdfast.checkpoint.version import GenerationId
from holdfast.launcher.events import Recovery
from holdfast.launcher.wire import Failure, Plan, Report, SessionState


def describe_failure(failure: Failure) -> str:
    """What happened to the worker, to be followed by more: "rank 1 was killed (SIGKILL)"."""
    if failure.hangs:
        return f"rank {failure.global_rank} hangs ({failure.message})"
    if failure.exit_code < 0:
        return f"rank {failure.global_rank} was killed ({signal_name(-failure.exit_code)})"
    text = f"rank {failure.global_rank} ended with exit code {failure.exit_code}"
    return f"{text} ({failure.message})" if failure.message else text


def signal_name(number: int) -> str:
    """SIGKILL for 9; the number where it has no name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return str(number)


class Timeline:
    """From a failure to the first step that all ranks have finished again. Times are time.time()."""

    def __init__(self, cause: str, detected_s: float, *, had_session: bool, first: bool = False) -> None:
        """`first`: this is the start of a run, a recovery only where its Sessions find something to resume."""
        self.cause = cause
        self._first = first
        self._detected_s = detected_s
        self._had_session = had_session
        self._phases: dict[str, float] = {}
        self._plan: Plan | None = None
        self._reports: dict[str, Report] = {}
        self._announced = False
        self._session = SessionState()

    def stopped(self, time_s: float) -> None:
        """No worker of the old generation is left anywhere."""
        self._mark("stopped", time_s)

    def agreed(self, plan: Plan, time_s: float) -> None:
        """The new generation is named."""
        self._plan = plan
        self._mark("agreed", time_s)

    def observe(self, report: Report) -> None:
        """A node reported."""
        if self._plan is None or report.generation != self._plan.generation:
            return
        self._reports[report.node.node_id] = report
        reports = [self._reports[p.node_id] for p in self._plan.places if p.node_id in self._reports]
        if len(reports) < len(self._plan.places):
            return
        if all(r.started_s for r in reports):
            self._mark("started", max(r.started_s for r in reports))
        for phase in ("opened", "restored", "first_step"):
            if all(getattr(r.session, phase) >= r.node.num_workers for r in reports):
                self._mark(phase, max(getattr(r.session, f"{phase}_s") for r in reports))
        self._session = _worst(r.session for r in reports)

    @property
    def generation(self) -> GenerationId | None:
        """The generation that recovers, None until it is named."""
        return self._plan.generation if self._plan is not None else None

    @property
    def complete(self) -> bool:
        """All ranks have finished a step again."""
        return "first_step" in self._phases

    @property
    def is_recovery(self) -> bool:
        """Whether anything was recovered, or had to be."""
        return not self._first or self._session.tier not in ("", "none")

    def line(self) -> str | None:
        """The one line for people, once it can be said; None before and after."""
        if not self.is_recovery or self._announced or self._plan is None or self._plan.generation is None:
            return None
        number, session = self._plan.generation.generation, self._session
        if self.complete:
            self._announced = True
            since = f"{self._phases['first_step']:.1f} s since {self.cause}"
            if session.tier in ("", "none"):
                return f"generation {number} started from the beginning: {session.steps_lost} steps lost, {since}"
            lost = f"{session.steps_lost} step{'' if session.steps_lost == 1 else 's'} lost"
            why = f" ({session.reason})" if session.tier == "storage" and session.reason else ""
            return f"generation {number} resumed from {session.tier} at step {session.step}: {lost}, {since}{why}"
        if not self._had_session and "started" in self._phases:
            self._announced = True
            count = self._plan.restart_count
            return f"generation {number} started (restart {count}), {self._phases['started']:.1f} s since {self.cause}"
        return None

    def event(self) -> Recovery:
        """The line of the event log."""
        return Recovery(
            cause=self.cause,
            generation=str(self.generation or ""),
            restart_count=self._plan.restart_count if self._plan is not None else 0,
            tier=self._session.tier,
            step=self._session.step,
            steps_lost=self._session.steps_lost,
            phases={name: round(seconds, 4) for name, seconds in self._phases.items()},
            reason=self._session.reason,
        )

    def _mark(self, phase: str, time_s: float) -> None:
        self._phases.setdefault(phase, max(0.0, time_s - self._detected_s))


_TIERS = ("", "none", "memory", "peers", "storage")


def _worst(states: Iterable[SessionState]) -> SessionState:
    """The state that stands for the job: peers before memory where nodes differ."""
    return max(states, key=lambda state: _TIERS.index(state.tier) if state.tier in _TIERS else 0)
