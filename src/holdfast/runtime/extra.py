"""What a user puts in `extra`: objects with ``state_dict``/``load_state_dict``, replicated or per rank."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from holdfast.errors import StateError
from holdfast.runtime.rng import to_state_tensor

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


@dataclass(frozen=True)
class ExtraPart:
    """One entry of `extra`, whatever kind of object it is."""

    key: str
    read: Callable[[], State]
    write: Callable[[State], object]
    per_rank: bool
    on_resize: Callable[[Sequence[State], int, int], State] | None = None

    @property
    def name(self) -> str:
        """Of the object record, and the prefix of lifted tensors."""
        return f"extra.{self.key}"


def extra_part(key: str, value: object) -> ExtraPart:
    """Find out how to read and write an entry of `extra`.

    Raises:
        StateError: it has no ``state_dict`` and ``load_state_dict``, and is no generator.
    """
    if isinstance(value, PerRank):
        part = extra_part(key, value.obj)
        return ExtraPart(key, part.read, part.write, per_rank=True, on_resize=value.on_resize)
    if isinstance(value, type):
        raise StateError(f"extra[{key!r}] is the class {value.__name__}, not an object of it")
    for kind, methods in _GENERATORS.items():
        if isinstance(value, kind):
            read, write = methods(value)
            return ExtraPart(key, read, write, per_rank=False)
    if not callable(getattr(value, "state_dict", None)) or not callable(getattr(value, "load_state_dict", None)):
        raise StateError(
            f"extra[{key!r}] is a {type(value).__name__}, which has no state_dict() and load_state_dict(); "
            "wrap it in an object that has both"
        )
    assert isinstance(value, Stateful)
    return ExtraPart(key, value.state_dict, value.load_state_dict, per_rank=False)


Methods = tuple[Callable[[], State], Callable[[State], object]]


def _torch_generator(generator: torch.Generator) -> Methods:
    return (
        lambda: generator.get_state().numpy().tobytes(),
        lambda state: generator.set_state(to_state_tensor(state)),
    )


def _numpy_generator(generator: np.random.Generator) -> Methods:
    bits: Any = generator.bit_generator  # Any: numpy's stubs make `state` read-only on some versions

    def write(state: State) -> None:
        bits.state = state

    return lambda: bits.state, write


def _numpy_random_state(generator: np.random.RandomState) -> Methods:
    return lambda: generator.get_state(legacy=False), generator.set_state


def _python_random(generator: random.Random) -> Methods:
    return lambda: generator.getstate(), generator.setstate


_GENERATORS: dict[type, Callable[[Any], Methods]] = {
    torch.Generator: _torch_generator,
    np.random.Generator: _numpy_generator,
    np.random.RandomState: _numpy_random_state,
    random.Random: _python_random,
}
