"""Saves that somebody asked for while training: what was asked, and who answers."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from holdfast.checkpoint.places import place
from holdfast.checkpoint.steps import read_step_info, step_dir_name, tag_step
from holdfast.errors import CheckpointError, FenceError, PeerTimeout, StorageError
from holdfast.runtime.huddle import Huddle
from holdfast.runtime.results import Persisted

if TYPE_CHECKING:  # a Session without daemons imports none of it
    from holdfast.snapshot.client import PendingSave
    from holdfast.snapshot.messages import PersistedMessage

_LOOK_S = 0.2
"""How long a wait for the daemons lasts before it looks whether the ranks have taken the request over."""


class Wanted(msgspec.Struct, frozen=True):
    """What a save is to be."""

    tag: str | None = None
    metrics: dict[str, float] = {}


def first_wanted(huddle: Huddle, mine: Sequence[Wanted]) -> Wanted | None:
    """The first open request of all ranks, one with a tag before those without; None where there is none.

    Args:
        huddle: all its ranks make this call.
        mine: the open requests of this rank.

    Raises:
        PeerTimeout: a rank did not come; named.
    """
    said = huddle.gather(msgspec.json.encode(mine).decode())
    asked = [wanted for text in said for wanted in msgspec.json.decode(text, type=list[Wanted])]
    return min(asked, key=lambda wanted: wanted.tag is None, default=None)


def name_stored(directory: Path, step: int, tag: str | None) -> Persisted | StorageError:
    """What becomes of a save of a step that is in storage already: its tag names that. Any rank, for itself.

    Args:
        directory: of the step directories.
        step: that is there.
        tag: that it is to have; None: whichever it has.
    """
    path = directory / step_dir_name(step)
    try:
        info = read_step_info(path, step) if tag is None else tag_step(path, tag)
    except CheckpointError as error:
        return error if isinstance(error, StorageError) else StorageError(str(error))
    return Persisted(step=step, path=path, tag=info.tag)


class LiveSave:
    """A save under ``holdfast run``: made by the daemons, or by the ranks where there turns out to be no memory tier.

    Any thread may ask; the training thread answers.
    """

    def __init__(self, pending: PendingSave | None, wanted: Wanted) -> None:
        """
        Args:
            pending: what the daemons were asked for; None: the ranks make it.
            wanted: what was asked for.
        """
        self.wanted = wanted
        self._changed = threading.Condition()
        # Guarded by _changed.
        self._pending = pending
        self._outcome: Persisted | StorageError | FenceError | None = None

    def withdraw(self) -> None:
        """The daemons will not make it: the ranks do."""
        with self._changed:
            if self._pending is not None and not self._pending.done():
                self._pending = None
            self._changed.notify_all()

    def answer(self, outcome: Persisted | StorageError | FenceError) -> None:
        """It was made, or it failed."""
        with self._changed:
            self._outcome = self._outcome or outcome
            self._changed.notify_all()

    def give_up(self, reason: str) -> None:
        """Nobody will make it: an answer for who waits, where there is none yet."""
        if not self.done():
            self.answer(FenceError(f"the save was not made: {reason}"))

    def done(self) -> bool:
        """Whether it is in storage, or failed."""
        with self._changed:
            return self._outcome is not None or (self._pending is not None and self._pending.done())

    def step(self) -> int | None:
        """The step that is saved, None while that is open."""
        with self._changed:
            if isinstance(self._outcome, Persisted):
                return self._outcome.step
            return None if self._pending is None else self._pending.step

    def result(self, timeout: timedelta) -> Persisted:
        """Wait for it.

        Raises:
            StorageError: it could not be written.
            FenceError: the Session ended before it was made.
            PeerTimeout: not within `timeout`.
        """
        deadline = time.monotonic() + timeout.total_seconds()
        while True:
            left = max(0.0, deadline - time.monotonic())
            with self._changed:
                pending, outcome = self._pending, self._outcome
                if outcome is None and pending is None:
                    self._changed.wait(min(left, _LOOK_S))
            if isinstance(outcome, Persisted):
                return outcome
            if pending is not None and (outcome is None or pending.done()):
                try:
                    return persisted_of(pending.result(timedelta(seconds=min(left, _LOOK_S))))
                except PeerTimeout:
                    pass  # said below, where the time is over
            elif outcome is not None:
                raise outcome
            if left == 0.0:
                raise PeerTimeout(f"the save was not made within {timeout}")


def persisted_of(message: PersistedMessage) -> Persisted:
    """What the Session tells of a daemon's message."""
    return Persisted(step=message.version.step, path=place(message.path), tag=message.tag, seconds=message.seconds)
