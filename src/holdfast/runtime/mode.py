"""What differs between a Session under ``holdfast run`` and one under plain ``python`` or ``torchrun``."""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

from holdfast.faults import Injector
from holdfast.runtime.capture import TrainingState
from holdfast.runtime.options import Options
from holdfast.runtime.results import ListOfCallbacks, Restored, SaveHandle


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a mode works with; made by the Session when it is entered."""

    state: TrainingState
    options: Options
    ranks: tuple[int, ...]
    """Global ranks of the Session, ascending."""
    global_rank: int
    process_group: object
    """None: the default one, or none at all."""
    injector: Injector
    callbacks: ListOfCallbacks

    @property
    def session_rank(self) -> int:
        """Position of this rank in the Session; 0 speaks for all."""
        return self.ranks.index(self.global_rank)

    @property
    def alone(self) -> bool:
        """Whether no other rank has to agree."""
        return len(self.ranks) == 1


class Mode(abc.ABC):
    """The tiers that a Session uses. Called by the training thread only."""

    @abc.abstractmethod
    def open(self) -> Restored | None:
        """Restore the state in place, or initialise it; None where training starts from nothing."""

    @abc.abstractmethod
    def expect(self, until: int) -> None:
        """The loop will end at step `until`."""

    @abc.abstractmethod
    def secure(self) -> None:
        """Nothing has been done since the restore: make the restored state a version where it needs that."""

    @abc.abstractmethod
    def boundary(self, step: int, metrics: Mapping[str, float]) -> bool:
        """`step` steps are finished. True: training ends here, on all ranks."""

    @abc.abstractmethod
    def save(self, tag: str | None, metrics: Mapping[str, float]) -> SaveHandle:
        """Persist a version at an agreed step."""

    @abc.abstractmethod
    def stop(self, *, persist: bool) -> None:
        """End at an agreed step."""

    @abc.abstractmethod
    def close(self, step: int, *, failed: bool) -> None:
        """The end, at `step`. Not `failed`: that step is made a version and, where there is storage, persisted."""

    @abc.abstractmethod
    def before_update(self) -> None:
        """The state is about to be changed in place: return when nothing reads it any more."""

    def section(self, limit: timedelta | None) -> contextlib.AbstractContextManager[None]:
        """A declared stretch without steps, exempt from hang detection for `limit`; without a launcher, nothing."""
        return contextlib.nullcontext()
