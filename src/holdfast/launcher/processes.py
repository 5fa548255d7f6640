"""Child processes that cannot be orphaned: spawned, watched by pidfd, ended with everything they started.

A child is in its own session, as torchrun's are, so a signal to its group reaches what it started. Its exit is seen
through a pidfd and left unreaped (a zombie keeps its pid, and so the group's id, from being used again) until the group
has been ended.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_PR_GET_CHILD_SUBREAPER = 37
_TREE_TRIES = 5
"""After so many changes within one look the whole process table is read."""


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

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self._process is not None, "the guard was not started"
        return self._process.pid

    def ended(self, group: int) -> None:
        """The group has ended and its leader was reaped."""
        self.tell(b"-%d\n" % group)

    def tell(self, line: bytes) -> None:
        """Write one line; a guard that was killed is no reason to fail (PDEATHSIG still holds)."""
        with contextlib.suppress(BrokenPipeError):
            os.write(self.descriptor, line)


class Child:
    """One child process and its group. Used by the thread that spawned it, which must be the main thread.

    PR_SET_PDEATHSIG fires when the *thread* that forked ends, hence the main thread.
    """

    def __init__(self, pid: int, guard: Guard, process: subprocess.Popen[bytes] | None = None) -> None:
        """Watch the child `pid`, which leads a session and has named itself to the guard.

        Raises:
            OSError: there is no such process.
        """
        self.pid = pid
        self.pidfd = os.pidfd_open(pid)
        self._guard = guard
        self._process = process
        self._exit_code: int | None = None

    @classmethod
    def spawn(
        cls,
        command: Sequence[str],
        *,
        environment: Mapping[str, str],
        guard: Guard,
        stdout: IO[str] | None = None,
        stderr: IO[str] | None = None,
        passed: Sequence[int] = (),
    ) -> Child:
        """Start `command`; it inherits the descriptors in `passed` beside its standard ones.

        Raises:
            OSError: it cannot be executed.
        """
        process = subprocess.Popen(
            list(command),
            env=dict(environment),
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
            pass_fds=passed,
            preexec_fn=_bind_to_parent(guard.descriptor),
        )
        return cls(process.pid, guard, process)

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

    def end(self, timeout_s: float) -> None:
        """Wait for the process, kill it after `timeout_s`, and forget it."""
        poller = select.poll()
        poller.register(self.pidfd, select.POLLIN)
        if not poller.poll(timeout_s * 1000):
            self.signal_group(signal.SIGKILL)
            poller.poll(timeout_s * 1000)
        if self.exit_code() is not None:
            self.reap()

    def reap(self) -> None:
        """Forget the process, which has ended: what is left of its group is killed first, while the id is ours."""
        assert self.exit_code() is not None, f"process {self.pid} has not ended"
        self.signal_group(signal.SIGKILL)
        if self._process is not None:
            self._process.wait()
        else:
            os.waitpid(self.pid, 0)
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


def become_subreaper() -> None:
    """Make this process the parent of every orphan below it, rather than init."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, *[ctypes.c_ulong(n) for n in (1, 0, 0, 0)]):
        raise OSError(ctypes.get_errno(), "this process cannot be made a subreaper")


def reap_orphans(own: frozenset[int]) -> None:
    """Reap the zombies that fell to this process as a subreaper: all but its `own` children."""
    for pid, (state, parent, _) in _process_table().items():
        if state == "Z" and parent == os.getpid() and pid not in own:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)


def groups_in_use(groups: frozenset[int]) -> frozenset[int]:
    """Those of the process groups that have a member which is not a zombie."""
    table = _process_table().values()
    return frozenset(group for state, _, group in table if state not in "ZX" and group in groups)


def _process_table() -> dict[int, tuple[str, int, int]]:
    """State, parent and group by process id: of all processes below this one where it is a subreaper, else of all.

    Nothing that a child has started leaves a subreaper's tree, and to read the whole of /proc takes long.
    """
    below = _tree() if _is_subreaper() else None
    pids = (int(name) for name in os.listdir("/proc") if name.isdigit()) if below is None else below
    found = {pid: _stat(pid) for pid in pids}
    return {pid: stat for pid, stat in found.items() if stat is not None}


def _is_subreaper() -> bool:
    answer = ctypes.c_int(0)
    ctypes.CDLL(None).prctl(_PR_GET_CHILD_SUBREAPER, ctypes.byref(answer), *[ctypes.c_ulong(0)] * 3)
    return bool(answer.value)


def _tree() -> set[int] | None:
    """The ids of all processes below this one, None where the kernel does not tell children."""
    for _ in range(_TREE_TRIES):
        mine = _children(os.getpid())
        if mine is None:
            return None
        found = descendants(os.getpid())
        if _children(os.getpid()) == mine:  # else one has died meanwhile, and left its children to us
            return found
    return None


def descendants(pid: int) -> set[int]:
    """The ids of all processes below `pid`, as far as the kernel tells."""
    found: set[int] = set()
    ahead = [pid]
    while ahead:
        below = (_children(ahead.pop()) or set()) - found
        found |= below
        ahead += below
    return found


def _children(pid: int) -> set[int] | None:
    """Children of a process, None where it is gone (or the kernel does not tell)."""
    try:
        tasks = os.listdir(f"/proc/{pid}/task")
        texts = [Path("/proc", str(pid), "task", task, "children").read_text() for task in tasks]
    except OSError:
        return None
    return {int(child) for text in texts for child in text.split()}


def _stat(pid: int) -> tuple[str, int, int] | None:
    try:
        stat = Path("/proc", str(pid), "stat").read_text(errors="replace")  # the name of a process is any bytes
    except OSError:
        return None
    state, parent, group = stat[stat.rindex(")") + 2 :].split()[:3]
    return state, int(parent), int(group)
