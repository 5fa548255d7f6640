"""What a user puts in `extra`: objects with ``state_dict``/``load_state_dict``, replicated or per rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

State = Any  # whatever the object's own state_dict() returns; only the codec looks inside


@runtime_checkable
class Stateful(Protocol):
    """The whole surface that `extra` asks of an object."""

    def state_dict(self) -> State:
        """Called at every session boundary that makes a version; must not communicate or draw random numbers."""

    def load_state_dict(self, state_dict: State, /) -> object:
        """Called once when a state is restored."""


@dataclass(frozen=True)
class PerRank:
    """An `extra` object whose state differs between ranks, for example a data loader.

    Args:
        obj: a `Stateful`, a ``torch.Generator``, a ``numpy.random.Generator`` or a ``random.Random``.
        on_resize: called when the restored state was saved by another number of ranks, with the states of all old
            ranks in order, the new global rank and the new world size; returns the state to load. Without it a
            resize is an error before training starts.
    """

    obj: object
    on_resize: Callable[[Sequence[State], int, int], State] | None = None
