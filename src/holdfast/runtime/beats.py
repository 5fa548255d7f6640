"""Signs of life of a worker, and its stacks on demand: what the launcher needs to tell a hang from a long step.

Beats come from the session boundary, from every ``step()`` of any optimizer, from forward passes of the Session's
models and from DataLoaders. Each one is two stores into the control page. Nothing here runs inside compiled code: for
the compiler the hooks are constants, which leave nothing in the graph.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Final, Protocol

import torch
from torch import nn
from torch.utils.data import dataloader

_WRAPPED: Final = ("module", "_fsdp_wrapped_module")

_RESERVED: Final = 8
"""Real-time signals next to SIGRTMIN that are left to others."""


class Watched(Protocol):
    """The worker's seat in the control page, as far as signs of life go; all are called on the training thread."""

    def beat(self) -> None:
        """A sign of life."""

    def timed(self, step_s: float, lead_s: float) -> None:
        """The step that has just ended took `step_s`; `lead_s` until its first forward pass had ended."""


class _Life:
    """The one Session of this process that is watched. Hooks are plain functions and find it here, so that a model that
    is copied or pickled within a Session takes nothing of the Session along."""

    def __init__(self) -> None:
        self.beat: Callable[[], None] | None = None
        self.pid = 0
        self.lead_ns = 0

    def sign(self) -> None:
        if self.beat is not None and self.pid == os.getpid():  # a forked child has the mapping too
            self.beat()


_life = _Life()


class Beats:
    """Installs the hooks; one per Session, used by the training thread."""

    def __init__(self, watched: Watched, models: Iterable[nn.Module]) -> None:
        """Install. `close` takes everything back."""
        self._watched = watched
        self._begun_ns = time.monotonic_ns()
        self._cleanup = contextlib.ExitStack()
        _life.beat, _life.pid, _life.lead_ns = watched.beat, os.getpid(), 0
        for model in models:
            for module in _and_wrapped(model):
                self._cleanup.callback(module.register_forward_pre_hook(_before_forward).remove)
                self._cleanup.callback(module.register_forward_hook(_after_forward).remove)
        self._cleanup.enter_context(_watched_loaders())

    def step_ended(self) -> None:
        """A boundary: say how long the step took."""
        now = time.monotonic_ns()
        step_ns, lead_ns = now - self._begun_ns, _life.lead_ns - self._begun_ns
        self._watched.timed(step_ns / 1e9, max(0, lead_ns) / 1e9)
        self._begun_ns, _life.lead_ns = now, 0

    def close(self) -> None:
        """Take the hooks away."""
        _life.beat = None
        self._cleanup.close()


def _and_wrapped(model: nn.Module) -> Iterator[nn.Module]:
    """`model`, and what DDP or FSDP1 wraps in it: scripts evaluate that one, on one rank, without the wrapper."""
    yield model
    for name, inner in model.named_children():
        if name in _WRAPPED and len(model._modules) == 1:
            yield from _and_wrapped(inner)


def _before_forward(module: nn.Module, inputs: Any) -> None:  # Any: torch's hook signature
    if not torch.compiler.is_compiling():
        _life.sign()


def _after_forward(module: nn.Module, inputs: Any, output: Any) -> None:  # Any: torch's hook signature
    if not torch.compiler.is_compiling():
        _life.sign()
        if _life.lead_ns == 0:
            _life.lead_ns = time.monotonic_ns()


@contextlib.contextmanager
def _watched_loaders() -> Iterator[None]:
    """Every batch that a DataLoader hands to this process is a sign of life."""
    iterator: Any = dataloader._BaseDataLoaderIter  # Any: a method of it is replaced
    plain = iterator.__next__

    def watched(self: Any) -> Any:  # Any: whatever the loader yields
        batch = plain(self)
        _life.sign()
        return batch

    iterator.__next__ = watched
    try:
        yield
    finally:
        if iterator.__next__ is watched:
            iterator.__next__ = plain


class StackWriter:
    """Has the interpreter write the stacks of all threads to a file whenever a certain signal arrives.

    faulthandler does it from C, whatever the threads are at, unless the process is stopped. The signal is one that
    nobody has a handler for, so that no handler of the user's is replaced.
    """

    def __init__(self, path: Path) -> None:
        """`path` is made; the launcher reads and empties it."""
        self.signal = 0
        """The number of the signal; 0 where none is free."""
        number = free_signal()
        if number:
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115  # it stays open until `close`
            faulthandler.register(number, file=self._file, all_threads=True, chain=False)
            self.signal = number

    def close(self) -> None:
        """Ignore the signal from now on: one that is under way must not end the process."""
        if self.signal:
            faulthandler.unregister(self.signal)
            signal.signal(self.signal, signal.SIG_IGN)
            self._file.close()


def free_signal(status: Path = Path("/proc/self/status")) -> int:
    """A real-time signal that this process neither catches, ignores nor blocks; 0 where there is none."""
    taken = 0
    with contextlib.suppress(OSError):
        for line in status.read_text().splitlines():
            name, _, mask = line.partition(":")
            if name in ("SigCgt", "SigIgn", "SigBlk"):
                taken |= int(mask, 16)
    numbers = range(signal.SIGRTMAX - 1, signal.SIGRTMIN + _RESERVED, -1)
    return next((number for number in numbers if not taken >> (number - 1) & 1), 0)
