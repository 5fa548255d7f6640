"""How strongly the teacher pulls: lambda(s), a pure function of the step, so that nothing of it has to be saved."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from holdfast.errors import UsageError

Kind = Literal["linear", "constant"] | Callable[[int], float]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """lambda(s) = weight * max(0, (stop_step - s) / stop_step), the form of LET (arXiv 2602.05393); others by `kind`.

    Raises:
        UsageError: a weight or a step that cannot be, or an unknown kind.
    """

    weight: float
    """lambda(0); 0 means no guidance at all."""
    stop_step: int
    """The first step without guidance, counted from 0."""
    kind: Kind = "linear"
    """As above; "constant" up to `stop_step` (RKD, SALT); or the factor as a function of the step."""

    def __post_init__(self) -> None:
        if isinstance(self.stop_step, bool) or not isinstance(self.stop_step, int) or self.stop_step < 1:
            raise UsageError(
                f"stop_step={self.stop_step!r}: guidance ends at this step, so it must be 1 or more (weight=0 for none)"
            )
        if not (math.isfinite(self.weight) and self.weight >= 0):
            raise UsageError(f"weight={self.weight!r} must be 0 or a positive number")
        if not callable(self.kind) and self.kind not in ("linear", "constant"):
            raise UsageError(f"schedule={self.kind!r} is unknown: use 'linear', 'constant' or a function of the step")

    def over(self, step: int) -> bool:
        """Whether nothing is guided at `step` and after it."""
        return self.weight == 0 or step >= self.stop_step

    def at(self, step: int) -> float:
        """lambda at a step, 0.0 from `stop_step` on.

        Raises:
            UsageError: a negative step.
        """
        if step < 0:
            raise UsageError(f"step={step}: steps are counted from 0")
        if self.over(step):
            return 0.0
        if self.kind == "linear":
            return self.weight * ((self.stop_step - step) / self.stop_step)
        if self.kind == "constant":
            return self.weight
        assert callable(self.kind)
        return self.weight * float(self.kind(step))
