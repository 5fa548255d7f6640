"""The standby of one node, seen from its agent: a warm spawner (`holdfast.launcher.spawner`) that forks workers.

The first generation is spawned as ever; its local rank 0 runs under `holdfast.launcher.interpreter`, which writes down
what the script imports. When the first step has been finished, the spawner is started with that list, and the workers
of later generations are forked from it: beforehand (`hold`), because a fork of so large a process takes a tenth of a
second on some machines. Whatever goes wrong with it costs time, never the job: `fork` then answers None, and workers
are spawned as ever.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from holdfast import environment
from holdfast.launcher.processes import Child, Guard, become_subreaper

ANSWER_S = 3.0
"""How long a fork may take before the spawner is given up."""
END_S = 2.0
"""How long the spawner may take to end."""
_MAX_MESSAGE = 1 << 16
_HERE = Path(__file__).parent

VARYING = (
    "RANK",
    "LOCAL_RANK",
    "GROUP_RANK",
    "ROLE_RANK",
    "WORLD_SIZE",
    "GROUP_WORLD_SIZE",
    "ROLE_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "CUDA_VISIBLE_DEVICES",
    "TORCHELASTIC_RESTART_COUNT",
    "TORCHELASTIC_ERROR_FILE",
    environment.GENERATION,
)
"""Variables that are not the same in all workers of all generations."""
SPARE_MODULES = ("torch", "torch.distributed", "torch.nn.parallel", "torch._dynamo", "holdfast.runtime.live")
"""What the standby of a spare node imports: every script with a Session needs it."""


@dataclass(frozen=True)
class StandbyChanged:
    """The spawner is ready to fork, or cannot be used any more."""

    ready: bool
    pid: int
    num_modules: int = 0
    text: str = ""


@dataclass(frozen=True)
class _Held:
    """A forked worker that waits for its turn."""

    child: Child
    channel: socket.socket


class Standby:
    """See the module's head. Used by the agent's main thread only."""

    def __init__(self, command: str, *, guard: Guard, names: Path, log: Path, user_path: str) -> None:
        """Nothing is started here.

        Args:
            command: the interpreter of the workers.
            guard: ends the spawner when the agent was killed.
            names: file for the names of the modules that the script imports.
            log: file for what the spawner prints.
            user_path: directory in which the script finds its own modules.
        """
        self._command = command
        self._guard = guard
        self._names = names
        self._log = log
        self._user_path = user_path
        self._child: Child | None = None
        self._socket: socket.socket | None = None
        self._used = False
        self._held: deque[_Held] = deque()
        self._asked: deque[socket.socket] = deque()
        """Channels of workers that the spawner is still to fork, in the order of its answers."""
        self.ready = False
        self._lost = ""

    @property
    def pid(self) -> int:
        """Process id of the spawner, 0 where there is none."""
        return self._child.pid if self._child is not None else 0

    @property
    def pids(self) -> frozenset[int]:
        """The spawner and the workers that wait: children of the agent whose end is waited for here."""
        spawner = {self.pid} if self._child is not None else set()
        return frozenset(spawner | {held.child.pid for held in self._held})

    @property
    def descriptor(self) -> int | None:
        """Readable when `changed` has something to tell."""
        return self._socket.fileno() if self._socket is not None else None

    def recorded(self, arguments: Sequence[str]) -> tuple[str, ...]:
        """The arguments of a worker of which the imports are written down, once."""
        if self._used:
            return tuple(arguments)
        script = arguments[1:] if arguments[0] == "-u" else arguments
        return ("-u", str(_HERE / "interpreter.py"), str(self._names), *script)

    def warm_up(self, variables: Mapping[str, str], modules: Sequence[str] = ()) -> None:
        """Start the spawner, once.

        Args:
            variables: the environment of the workers.
            modules: what it imports where no script has run here; none: what a worker's was seen to import.
        """
        if self._used:
            return
        self._used = True
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with theirs, open(self._log, "w") as log:
                if modules:
                    self._names.write_text("\n".join(modules))
                become_subreaper()
                self._child = Child.spawn(
                    (self._command, "-u", str(_HERE / "spawner.py"), str(theirs.fileno())),
                    environment={name: value for name, value in variables.items() if name not in VARYING},
                    guard=self._guard,
                    stdout=log,
                    stderr=log,
                    passed=(theirs.fileno(),),
                )
        except OSError as error:
            ours.close()
            self._lost = f"its process cannot be started: {error}"
            return
        self._socket = ours
        request = {
            "import": str(self._names),
            "varying": VARYING,
            "ours": str(_HERE.parents[1]),
            "user_paths": [self._user_path],
        }
        with contextlib.suppress(OSError):  # it has died already, which the socket tells
            ours.send(json.dumps(request).encode())
        ours.setblocking(False)

    def changed(self) -> StandbyChanged | None:
        """What has happened since the last call."""
        lost, self._lost = self._lost, ""
        if lost:
            return StandbyChanged(ready=False, pid=self.pid, text=lost)
        pid = self.pid
        while (answer := self._heard()) is not None:
            if "ready" in answer:
                self.ready = True
                left_out = answer["left_out"]
                text = f"without {', '.join(left_out)}, whose import concerns one worker alone" if left_out else ""
                return StandbyChanged(ready=True, pid=pid, num_modules=answer["ready"], text=text)
            failed = answer.get("failed", "it answered out of turn")
            if "pid" in answer and self._asked:
                failed = self._take(answer["pid"])
            if failed:
                self.close()
                return StandbyChanged(ready=False, pid=pid, text=failed)
        return None

    def _heard(self) -> dict[str, Any] | None:  # Any: JSON
        """The spawner's next answer, None where there is none yet."""
        if self._socket is None:
            return None
        try:
            data = self._socket.recv(_MAX_MESSAGE)
        except BlockingIOError:
            return None
        except OSError:
            data = b""
        answer: dict[str, Any] = json.loads(data) if data else {"failed": f"it ended ({self._last_words()})"}
        return answer

    def hold(self, num_workers: int) -> None:
        """Have so many workers wait. Returns at once; `changed` takes the spawner's answers."""
        if not self.ready:
            return
        try:
            while len(self._held) + len(self._asked) < num_workers:
                self._ask()
        except OSError as error:
            self._give_up(error)

    def fork(
        self,
        arguments: Sequence[str],
        variables: Mapping[str, str],
        *,
        stdout: IO[str] | None,
        stderr: IO[str] | None,
    ) -> Child | None:
        """A worker that runs the script; None where the spawner did not give one (`changed` tells why)."""
        assert self._socket is not None, "the spawner is not ready"
        descriptors = [stdout.fileno() if stdout else 1, stderr.fileno() if stderr else 2]
        script = arguments[1:] if arguments[0] == "-u" else arguments
        request = {"argv": list(script), "env": dict(variables), "parent": os.getpid()}
        try:
            held = self._next()
            with held.channel:
                socket.send_fds(held.channel, [json.dumps(request).encode()], descriptors)
        except (OSError, ValueError, KeyError) as error:
            self._give_up(error)
            return None
        return held.child

    def _next(self) -> _Held:
        """A worker that waits, forked now where none does."""
        while self._held:
            held = self._held.popleft()
            if held.child.exit_code() is None:
                return held
            held.channel.close()
            held.child.reap()
        assert self._socket is not None, "the spawner is not ready"
        if not self._asked:
            self._ask()
        self._socket.settimeout(ANSWER_S)
        failed = self._take(json.loads(self._socket.recv(_MAX_MESSAGE))["pid"])
        self._socket.setblocking(False)
        if failed:
            raise OSError(failed)
        return self._held.popleft()

    def _ask(self) -> None:
        assert self._socket is not None, "the spawner is not ready"
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._asked.append(ours)
        with theirs:
            socket.send_fds(self._socket, [b'{"fork": 1}'], [self._guard.descriptor, theirs.fileno()])

    def _take(self, pid: int) -> str:
        """The spawner has forked what it was asked for first; "", or why that cannot be used."""
        channel = self._asked.popleft()
        try:
            self._held.append(_Held(Child(pid, self._guard), channel))
        except OSError as error:
            channel.close()
            return f"it gave no worker: {error}"
        return ""

    def _give_up(self, error: Exception) -> None:
        self._lost = f"it gave no worker: {error or type(error).__name__} ({self._last_words()})"
        self.close()

    def close(self) -> None:
        """End the spawner and the workers that wait; those that run a script stay."""
        self.ready = False
        while self._asked:
            self._asked.popleft().close()
        while self._held:
            held = self._held.popleft()
            held.channel.close()
            held.child.signal_group(signal.SIGKILL)
            held.child.end(END_S)
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._child is not None:
            self._child.signal_group(signal.SIGKILL)  # it keeps nothing, and may be in the middle of an import
            self._child.end(END_S)
            self._child = None

    def _last_words(self) -> str:
        try:
            lines = self._log.read_text(errors="replace").strip().splitlines()
        except OSError:
            lines = []
        return lines[-1] if lines else "it said nothing"


def can_stand_by(arguments: Sequence[str]) -> bool:
    """Whether the workers run a Python script or module in a way that a standby can continue."""
    if not arguments or arguments[0] != "-u" or len(arguments) < 2:
        return False
    if arguments[1] == "-m":
        return len(arguments) > 2
    return arguments[1].endswith(".py") and os.path.isfile(arguments[1])


def user_path(arguments: Sequence[str]) -> str:
    """The directory that the interpreter puts first on `sys.path` for these arguments."""
    return os.getcwd() if arguments[1] == "-m" else os.path.dirname(os.path.realpath(arguments[1]))
