"""How often to snapshot under ``snapshot_every="auto"`` (pure).

Source: CheckFreq (FAST'21), section 4.1, bounds the overhead of checkpoints by their interval. Here: over each ten
complete versions, take the largest time that any rank's training thread waited for one of them, and choose the smallest
interval that keeps it under one percent of the time of the steps between two versions.
"""

from __future__ import annotations

import math

WINDOW = 10
"""Versions per decision."""
SHARE = 0.01
"""Allowed share of the wait in the step time."""


class AutoInterval:
    """Starts at 1. `every` is the interval in steps.

    Args:
        fixed: the interval that the user chose, 0 for auto.
    """

    def __init__(self, fixed: int) -> None:
        self.every = fixed or 1
        self._auto = fixed == 0
        self._waits_s: list[float] = []
        self._steps_s: list[float] = []

    def completed(self, wait_s: float, step_s: float) -> tuple[float, float] | None:
        """A version is complete: the largest wait and step duration of any rank at it, in seconds.

        Returns:
            (wait, step time) that made `every` change, None where it did not.
        """
        if not self._auto or step_s <= 0:
            return None
        self._waits_s.append(wait_s)
        self._steps_s.append(step_s)
        if len(self._waits_s) < WINDOW:
            return None
        worst_s, mean_s = max(self._waits_s), sum(self._steps_s) / len(self._steps_s)
        self._waits_s, self._steps_s = [], []
        every = math.floor(worst_s / (SHARE * mean_s)) + 1
        if every == self.every:
            return None
        self.every = every
        return worst_s, mean_s
