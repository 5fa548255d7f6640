"""What a Session tells: where it was restored from, what was persisted, and the handle of a requested save."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True, kw_only=True)
class Restored:
    """Where the state of a Session came from."""

    step: int
    """Completed steps of the restored state."""
    tier: str
    """memory, peers, storage or init_from."""
    generation: int
    """Number of the generation that now runs; 0 without ``holdfast run``."""
    path: Path | None = None
    """The step directory, where the tier is storage."""
    steps_lost: int = 0
    """Finished steps that have to be done again."""


@dataclass(frozen=True, kw_only=True)
class Persisted:
    """A version that is in storage."""

    step: int
    path: Path
    tag: str | None = None
    seconds: float = 0.0
    """From the order to the root record."""


class PendingSave(Protocol):
    """What a mode returns for a requested save. This is the whole surface; called by `SaveHandle` from any thread."""

    def done(self) -> bool:
        """Whether `result` would return or raise at once."""
        ...

    def result(self, timeout: timedelta) -> Persisted:
        """Wait. Raises StorageError where it could not be written, PeerTimeout after `timeout`."""
        ...

    def step(self) -> int | None:
        """The step that is (or will be) saved, None until it is agreed."""
        ...


class SaveHandle:
    """A requested save. Any thread may use it."""

    def __init__(self, pending: PendingSave) -> None:
        self._pending = pending

    @property
    def step(self) -> int | None:
        """Completed steps of the version that is saved; None until the ranks have agreed on it."""
        return self._pending.step()

    def done(self) -> bool:
        """Whether the save has ended, well or not."""
        return self._pending.done()

    def result(self, timeout: timedelta = timedelta(minutes=10)) -> Persisted:
        """Wait for the save. Not to be called by the training thread before the agreed step has been reached.

        Raises:
            StorageError: it could not be written; older checkpoints are as they were.
            PeerTimeout: it has not ended within `timeout`.
        """
        return self._pending.result(timeout)


class ListOfCallbacks:
    """Callbacks for persisted versions; called by the training thread at boundaries and at the end."""

    def __init__(self) -> None:
        self._callbacks: list[Callable[[Persisted], None]] = []

    def add(self, callback: Callable[[Persisted], None]) -> None:
        """Append; called in the order of registration."""
        self._callbacks.append(callback)

    def call(self, persisted: Persisted) -> None:
        """Call all; what a callback raises is the user's and goes up unchanged."""
        for callback in self._callbacks:
            callback(persisted)
