"""Which checkpoints to keep. The choice is pure; `Retention.apply` carries it out."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from math import isnan
from pathlib import Path
from typing import NamedTuple

import msgspec

from holdfast.checkpoint.belongings import foreign_names, missing_part
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
            if value is not None and not value > 0:  # NaN is not
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
        except (msgspec.MsgspecError, UnicodeError) as error:
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
            kept = kept + [info for info in steps if info.is_tagged]
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
        found = self.find(checkpoint_dir, storage=storage)
        found.carry_out(storage, self)
        return found.steps

    def find(self, checkpoint_dir: str | Path, *, storage: Storage | None = None) -> Deletions:
        """What `apply` would delete.

        Raises:
            StorageError: the directory cannot be listed.
        """
        checkpoint_dir = place(checkpoint_dir)
        storage = storage or storage_of(checkpoint_dir)
        steps = list_steps(checkpoint_dir, storage=storage)
        keep, delete = self.choose(steps)
        delete = _without_the_only_whole_one(storage, keep, delete)
        abandoned = _abandoned(storage, checkpoint_dir, keep) if self.deletes else []
        return Deletions(delete, _left_over(storage, steps, keep), abandoned)

    @property
    def deletes(self) -> bool:
        """Whether it deletes anything at all."""
        return bool(self.last is not None or self.every_steps is not None or self.every_s is not None or self.best)


class Deletions(NamedTuple):
    """What a policy deletes in a directory."""

    steps: list[StepInfo]
    """Complete ones that it does not keep."""
    left_over: list[Path]
    """Of interrupted saves."""
    abandoned: list[Path]
    """Folders of what was set aside."""

    def carry_out(self, storage: Storage, policy: Retention) -> None:
        """Delete, checkpoints oldest first.

        Raises:
            StorageError: one cannot be removed.
        """
        for info in self.steps:
            storage.remove(info.path)
            logger.info("%s removed: not kept by %s", info.path, policy.encode())
        for path in self.left_over:
            storage.remove(path)
            logger.info("%s removed: an interrupted save left it", path)
        for path in self.abandoned:
            storage.remove(path)
            logger.info("%s removed: the run that goes on has passed it", path)


def _without_the_only_whole_one(
    storage: Storage, keep: Sequence[StepInfo], delete: Sequence[StepInfo]
) -> list[StepInfo]:
    """What may go: where files of all that is kept are missing, the newest one with all its files stays too."""
    if not delete or any(not missing_part(storage, info) for info in reversed(keep)):
        return list(delete)
    stays = next((info for info in reversed(delete) if not missing_part(storage, info)), None)
    logger.warning(
        "%s: %s; %s",
        keep[-1].path,
        missing_part(storage, keep[-1]),
        "nothing older is deleted" if stays is None else f"{stays.path} is kept too: it is the newest that is whole",
    )
    return [] if stays is None else [info for info in delete if info is not stays]


def _left_over(storage: Storage, steps: Sequence[StepInfo], keep: Sequence[StepInfo]) -> list[Path]:
    """What interrupted saves left: without a root (a damaged one may still be repaired), of a step before the newest
    checkpoint, long untouched when that was made, and without a file that is not ours."""
    if not keep:
        return []
    return [
        info.path
        for info in steps
        if not info.complete
        and info.step < keep[-1].step
        and info.time < keep[-1].time - LEFT_OVER_S
        and not _may_be_wanted(storage, info.path)
    ]


def _may_be_wanted(storage: Storage, folder: Path) -> bool:
    """Whether there is a root, which may be repaired, or what is not ours."""
    return any(entry.name == ROOT_NAME for entry in storage.list(folder)) or bool(foreign_names(storage, folder))


def _abandoned(storage: Storage, checkpoint_dir: Path, keep: Sequence[StepInfo]) -> list[Path]:
    """Folders of checkpoints that were set aside when a run went on from an earlier one, once it has come further than
    they had and made its newest checkpoint long after them. With a tag in one of them, or with something that is not
    ours, the folder stays."""
    found: list[Path] = []
    for entry in storage.list(checkpoint_dir) if keep else ():
        if not entry.is_folder or not _ABANDONED.fullmatch(entry.name):
            continue
        folder = checkpoint_dir / entry.name
        steps = list_steps(folder, storage=storage)
        newest = max((info.time for info in steps), default=0.0)
        passed = all(info.step < keep[-1].step and not info.is_tagged for info in steps)
        ours = len(storage.list(folder)) == len(steps) and not any(
            foreign_names(storage, info.path) for info in steps if not info.complete
        )
        if passed and ours and newest < keep[-1].time - LEFT_OVER_S:
            found.append(folder)
    return found


def _spaced(steps: list[StepInfo], seconds: float) -> list[StepInfo]:
    kept: list[StepInfo] = []
    for info in steps:
        if not kept or info.time - kept[-1].time >= seconds:
            kept.append(info)
    return kept
