"""Which checkpoints to keep (stub: bodies follow)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from holdfast.checkpoint.commit import StepInfo


class Retention(msgspec.Struct, frozen=True, kw_only=True):
    """A checkpoint is kept when any of these keeps it; the newest complete one always is."""

    last: int | None = None
    every_steps: int | None = None
    every_s: float | None = None
    best: int = 0
    best_by: str | None = None
    lower_is_better: bool = True
    tagged: bool = True

    def encode(self) -> str:
        raise NotImplementedError

    @classmethod
    def decode(cls, text: str) -> Retention:
        raise NotImplementedError

    def choose(self, steps: Sequence[StepInfo]) -> tuple[list[StepInfo], list[StepInfo]]:
        raise NotImplementedError

    def apply(self, checkpoint_dir: str | Path) -> list[StepInfo]:
        """Delete what is not kept; the deleted ones."""
        raise NotImplementedError
