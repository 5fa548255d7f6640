"""Which rank slows the others down, persistently. Pure.

In a synchronous job all ranks' steps take the same time, because all wait for the slowest. So two things are compared,
per window of `window_s`: the whole step (jobs that do not wait for each other) and its *lead*, the part until the first
forward pass has ended: input and compute that no collective call of the backward pass evens out.

A rank is slow in a window where its median step, or its median lead, is above that of the median of the other ranks by
`share` of their median step. It is named when it was the slowest, and slow, in `windows` windows in a row, and again
when it has recovered. On GPUs the lead is the host's: a slow input pipeline shows, a slow kernel does not.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from dataclasses import dataclass

from holdfast.launcher.wire import Pulse


@dataclass(frozen=True, kw_only=True)
class StragglerLimits:
    """Numbers of the rule; times in seconds."""

    window_s: float = 10.0
    windows: int = 3
    share: float = 0.2
    least_s: float = 0.005
    """Differences below this are never told."""
    least_steps: int = 3
    """Steps of each rank that a window needs; with fewer it goes on."""


@dataclass(frozen=True)
class Straggler:
    """A rank is persistently slow, or (`slow` False) no longer."""

    global_rank: int
    slow: bool
    text: str


class StragglerWatch:
    """See the module's head. One per leader's agent, used by one thread."""

    def __init__(self, limits: StragglerLimits | None = None) -> None:
        self._limits = limits or StragglerLimits()
        self._num_ranks = 0
        self._seen: dict[int, int] = {}
        self._samples: dict[int, list[tuple[float, float]]] = defaultdict(list)
        self._until: float | None = None
        self._suspect: int | None = None
        self._windows = 0
        self._named: int | None = None

    def began(self, num_ranks: int) -> None:
        """A generation of so many ranks begins."""
        self._num_ranks = num_ranks
        self._seen.clear()
        self._samples.clear()
        self._until = self._suspect = self._named = None
        self._windows = 0

    def observed(self, pulses: tuple[Pulse, ...]) -> None:
        """What one node's agent has seen; the first two steps of a generation do not count."""
        for pulse in pulses:
            if pulse.steps_done > 2 and self._seen.get(pulse.global_rank) != pulse.step and not pulse.exempt:
                self._seen[pulse.global_rank] = pulse.step
                self._samples[pulse.global_rank].append((pulse.step_s, pulse.lead_s))

    def ticked(self, now: float) -> list[Straggler]:
        """Time has passed."""
        if self._until is None:
            self._until = now + self._limits.window_s
        if now < self._until or self._num_ranks < 2 or not self._whole:
            return []
        self._until = now + self._limits.window_s
        medians = {
            rank: (statistics.median(s for s, _ in samples), statistics.median(lead for _, lead in samples))
            for rank, samples in self._samples.items()
        }
        self._samples.clear()
        return self._judge(medians)

    @property
    def _whole(self) -> bool:
        return sum(len(s) >= self._limits.least_steps for s in self._samples.values()) == self._num_ranks

    def _judge(self, medians: dict[int, tuple[float, float]]) -> list[Straggler]:
        found = max((self._lag(rank, medians), rank) for rank in medians)
        (lag, usual), slowest = found
        limit = max(self._limits.share * usual, self._limits.least_s)
        slow = slowest if lag > limit else None
        self._windows = self._windows + 1 if slow is not None and slow == self._suspect else int(slow is not None)
        self._suspect = slow
        out = []
        if self._named is not None and slow != self._named:
            out.append(Straggler(self._named, False, f"rank {self._named} keeps up with the others again"))
            self._named = None
        if slow is not None and self._named is None and self._windows >= self._limits.windows:
            self._named = slow
            text = (
                f"rank {slow} is slower than the others: {1000 * lag:.0f} ms of each step "
                f"(of {1000 * usual:.0f} ms), for {self._windows * self._limits.window_s:.0f} s"
            )
            out.append(Straggler(slow, True, text))
        return out

    def _lag(self, rank: int, medians: dict[int, tuple[float, float]]) -> tuple[float, float]:
        """By how much the rank is behind the others, and their median step; seconds."""
        others = [values for other, values in medians.items() if other != rank]
        step = statistics.median(value for value, _ in others)
        lead = statistics.median(value for _, value in others)
        return max(medians[rank][0] - step, medians[rank][1] - lead), step
