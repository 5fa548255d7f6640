"""Signals of the agent as bytes in a pipe: handlers only set a flag, the agent's loop does the work."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Sequence
from types import FrameType, TracebackType
from typing import Any

from holdfast.errors import UsageError

FORWARDED = (signal.SIGUSR1, signal.SIGUSR2)
"""Beside the signals of --signals-to-handle: they must not end the agent."""


def parse_signals(text: str) -> tuple[signal.Signals, ...]:
    """The signals of ``--signals-to-handle``.

    Raises:
        UsageError: a name is unknown, or that of a signal that nobody can catch.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    try:
        found = tuple(signal.Signals[name] for name in names)
    except KeyError as error:
        raise UsageError(f"--signals-to-handle: {error.args[0]!r} is no signal of this system") from error
    for number in found:
        if number in (signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD):
            raise UsageError(f"--signals-to-handle: {number.name} cannot be handled")
    return found


class SignalPipe:
    """Catches signals while its context is open; main thread only.

    SIGHUP stays ignored where ``nohup`` has it ignored: who says so wants the job to outlive the terminal. SIGCHLD does
    not: the system would reap children, and nobody learn how they ended.
    """

    def __init__(self, handled: Sequence[signal.Signals]) -> None:
        wanted = dict.fromkeys((*handled, *FORWARDED))
        if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
            wanted.pop(signal.SIGHUP, None)
        self._handled = tuple(wanted)
        self._before: dict[int, Any] = {}  # a handler: what signal.getsignal returns
        self._before_wakeup = -1
        self.descriptor = -1
        self._write = -1

    def __enter__(self) -> SignalPipe:
        self.descriptor, self._write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._before_wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        for number in self._handled:
            self._before[number] = signal.signal(number, _do_nothing)
        self._before[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        signal.set_wakeup_fd(self._before_wakeup)
        os.close(self.descriptor)
        os.close(self._write)

    def drain(self) -> list[int]:
        """The signals that arrived since the last call."""
        with contextlib.suppress(BlockingIOError):
            return [number for number in os.read(self.descriptor, 4096) if number in self._handled]
        return []


def _do_nothing(number: int, frame: FrameType | None) -> None:
    """The wake-up descriptor has the signal already."""
