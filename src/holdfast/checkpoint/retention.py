"""Which checkpoints to keep. The choice is pure; `Retention.apply` carries it out."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from math import isnan
from pathlib import Path

import msgspec

from holdfast.checkpoint.places import place
from holdfast.checkpoint.root import ROOT_NAME
from holdfast.checkpoint.steps import StepInfo, list_steps
from holdfast.checkpoint.storage import Storage, storage_of
from holdfast.errors import UsageError

logger = logging.getLogger(__name__)

_ABANDONED = re.compile(r"abandoned-\d{8}T\d{6}Z-[0-9a-f]{4}", re.ASCII)
LEFT_OVER_S = 600.0
"""Seconds without a change after which an incomplete step directory counts as left over."""


class Retention(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """A checkpoint is kept when any of these keeps it. The newest complete one is always kept."""

    last: int | None = None
    """The newest n. None, with no other rule: all."""
    every_steps: int | None = None
    """Those whose step is a multiple of this."""
    every_s: float | None = None
    """One per so many seconds of wall time, counted from the oldest."""
    best: int = 0
    """The n best by the metric `best_by`; those without it, or with NaN, do not count."""
    best_by: str | None = None
    lower_is_better: bool = True
    tagged: bool = True
    """Those with a tag."""

    def __post_init__(self) -> None:
        for name in ("last", "every_steps", "every_s"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UsageError(f"Retention({name}={value}): give a positive number")
        if self.best < 0 or (self.best > 0) != (self.best_by is not None):
            raise UsageError(
                f"Retention(best={self.best}, best_by={self.best_by!r}): give how many, and the metric's name"
            )

    @classmethod
    def of(cls, keep: int | Retention) -> Retention:
        """The policy of a Session's ``keep``.

        Raises:
            UsageError: it is neither a positive number nor a Retention.
        """
        if isinstance(keep, Retention):
            return keep
        if not isinstance(keep, int) or isinstance(keep, bool):
            raise UsageError(f"keep={keep!r}: give a number of checkpoints, or a Retention")
        return cls(last=keep)

    def encode(self) -> str:
        """One line of JSON, for `SessionConfig.keep`."""
        return msgspec.json.encode(self).decode()

    @classmethod
    def decode(cls, text: str) -> Retention:
        """Read back what `encode` gave.

        Raises:
            UsageError: `text` is no policy.
        """
        try:
            return msgspec.json.decode(text, type=cls)
        except msgspec.MsgspecError as error:
            raise UsageError(f"{text!r} is no retention policy: {error}") from error

    def choose(self, steps: Sequence[StepInfo]) -> tuple[list[StepInfo], list[StepInfo]]:
        """(keep, delete), each by step. Incomplete ones are in neither: whoever writes one may still be at it."""
        complete = sorted((info for info in steps if info.complete), key=lambda info: info.step)
        kept = {info.step for info in self._kept(complete)}
        return [i for i in complete if i.step in kept], [i for i in complete if i.step not in kept]

    def _kept(self, steps: list[StepInfo]) -> list[StepInfo]:
        if not self.deletes:
            return steps
        kept = steps[-(self.last or 1) :]
        if self.every_steps is not None:
            kept = kept + [info for info in steps if info.step % self.every_steps == 0]
        if self.every_s is not None:
            kept = kept + _spaced(steps, self.every_s)
        if self.best_by is not None:
            kept = kept + self._best(steps, self.best_by)
        if self.tagged:
            kept = kept + [info for info in steps if info.tag is not None]
        return kept

    def _best(self, steps: list[StepInfo], metric: str) -> list[StepInfo]:
        known = [info for info in steps if metric in info.metrics and not isnan(info.metrics[metric])]
        sign = 1 if self.lower_is_better else -1
        # Of equal ones the newer.
        return sorted(known, key=lambda info: (sign * info.metrics[metric], -info.step))[: self.best]

    def apply(self, checkpoint_dir: str | Path, *, storage: Storage | None = None) -> list[StepInfo]:
        """Delete what is not kept, oldest first, and what interrupted saves left long ago.

        Called by one process, after a commit.

        Returns:
            The deleted checkpoints.

        Raises:
            StorageError: the directory cannot be listed, or one cannot be removed.
        """
        checkpoint_dir = place(checkpoint_dir)
        storage = storage or storage_of(checkpoint_dir)
        steps = list_steps(checkpoint_dir, storage=storage)
        keep, delete = self.choose(steps)
        for info in delete:
            storage.remove(info.path)
            logger.info("%s removed: not kept by %s", info.path, self.encode())
        for info in _left_over(storage, steps, keep):
            storage.remove(info.path)
            logger.info("%s removed: an interrupted save left it", info.path)
        if self.deletes:
            for folder in _abandoned(storage, checkpoint_dir, keep):
                storage.remove(folder)
                logger.info("%s removed: the run that goes on has passed it", folder)
        return delete

    @property
    def deletes(self) -> bool:
        """Whether it deletes anything at all."""
        return bool(self.last is not None or self.every_steps is not None or self.every_s is not None or self.best)


def _left_over(storage: Storage, steps: Sequence[StepInfo], keep: Sequence[StepInfo]) -> list[StepInfo]:
    """What interrupted saves left: without a root (a damaged one may still be repaired), of a step before the newest
    checkpoint, and long untouched when that was made."""
    if not keep:
        return []
    return [
        info
        for info in steps
        if not info.complete
        and info.step < keep[-1].step
        and info.time < keep[-1].time - LEFT_OVER_S
        and all(entry.name != ROOT_NAME for entry in storage.list(info.path))
    ]


def _abandoned(storage: Storage, checkpoint_dir: Path, keep: Sequence[StepInfo]) -> list[Path]:
    """Folders of checkpoints that were set aside when a run went on from an earlier one, once it has come further than
    they had and made its newest checkpoint long after them. With a tag in one of them the folder stays."""
    found: list[Path] = []
    for entry in storage.list(checkpoint_dir) if keep else ():
        if not entry.is_folder or not _ABANDONED.fullmatch(entry.name):
            continue
        steps = list_steps(checkpoint_dir / entry.name, storage=storage)
        newest = max((info.time for info in steps), default=0.0)
        passed = all(info.step < keep[-1].step and info.tag is None for info in steps)
        if passed and newest < keep[-1].time - LEFT_OVER_S:
            found.append(checkpoint_dir / entry.name)
    return found


def _spaced(steps: list[StepInfo], seconds: float) -> list[StepInfo]:
    kept: list[StepInfo] = []
    for info in steps:
        if not kept or info.time - kept[-1].time >= seconds:
            kept.append(info)
    return kept
