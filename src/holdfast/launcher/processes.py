"""Child processes that cannot be orphaned: spawned, watched by pidfd, ended with everything they started.

A child is in its own session, as torchrun's are, so a signal to its group reaches what it started. Its exit is seen
through a pidfd and left unreaped (a zombie keeps its pid, and so the group's id, from being used again) until the group
has been ended.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

_PR_SET_PDEATHSIG = 1


class Guard:
    """Owner of the process described in `holdfast.launcher.guard`. Used by the agent's main thread, as a context."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Guard:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(Path(__file__).with_name("guard.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            bufsize=0,
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process is not None, "the guard was not started"
        if kind is None:
            self.tell(b".\n")
        assert self._process.stdin is not None, "stdin is a pipe"
        self._process.stdin.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    @property
    def descriptor(self) -> int:
        """File descriptor to which a child writes its group before it runs anything."""
        assert self._process is not None, "the guard was not started"
        assert self._process.stdin is not None, "stdin is a pipe"
        return self._process.stdin.fileno()

    def ended(self, group: int) -> None:
        """The group has ended and its leader was reaped."""
        self.tell(b"-%d\n" % group)

    def tell(self, line: bytes) -> None:
        """Write one line; a guard that was killed is no reason to fail (PDEATHSIG still holds)."""
        with contextlib.suppress(BrokenPipeError):
            os.write(self.descriptor, line)


class Child:
    """One spawned process and its group. Used by the thread that spawned it, which must be the main thread.

    PR_SET_PDEATHSIG fires when the *thread* that forked ends, hence the main thread.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        environment: Mapping[str, str],
        guard: Guard,
        stdout: IO[str] | None = None,
        stderr: IO[str] | None = None,
    ) -> None:
        """Start `command`.

        Raises:
            OSError: it cannot be executed.
        """
        self._guard = guard
        self._exit_code: int | None = None
        self._process = subprocess.Popen(
            list(command),
            env=dict(environment),
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
            preexec_fn=_bind_to_parent(guard.descriptor),
        )
        self.pid = self._process.pid
        self.pidfd = os.pidfd_open(self.pid)

    def exit_code(self) -> int | None:
        """Exit code (negative: the signal that ended it), None while it runs. Does not reap."""
        if self._exit_code is None:
            found = os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if found is not None:
                self._exit_code = found.si_status if found.si_code == os.CLD_EXITED else -found.si_status
        return self._exit_code

    def signal_group(self, number: int) -> None:
        """Signal the process and everything in its group."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)

    def reap(self) -> None:
        """Forget the process, which has ended: what is left of its group is killed first, while the id is ours."""
        assert self.exit_code() is not None, f"process {self.pid} has not ended"
        self.signal_group(signal.SIGKILL)
        self._process.wait()
        os.close(self.pidfd)
        self._guard.ended(self.pid)


def _bind_to_parent(guard: int) -> Callable[[], None]:
    """What the child does between fork and exec: die with the parent, name its group to the guard."""
    parent = os.getpid()
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    arguments = [ctypes.c_ulong(value) for value in (signal.SIGKILL, 0, 0, 0)]

    def bind() -> None:
        prctl(_PR_SET_PDEATHSIG, *arguments)
        if os.getppid() != parent:  # it died before the line above took effect
            os._exit(1)
        with contextlib.suppress(OSError):
            os.write(guard, b"+%d\n" % os.getpid())

    return bind


def groups_in_use(groups: frozenset[int]) -> frozenset[int]:
    """Those of the process groups that have a member which is not a zombie."""
    found = set()
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            stat = Path("/proc", name, "stat").read_text()
        except OSError:
            continue
        state, _, group = stat[stat.rindex(")") + 2 :].split()[:3]
        if state not in "ZX" and int(group) in groups:
            found.add(int(group))
    return frozenset(found)
