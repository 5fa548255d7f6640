"""The standby of one node, seen from its agent: a warm spawner (`holdfast.launcher.spawner`) that forks workers.

The first generation is spawned as ever; its local rank 0 runs under `holdfast.launcher.interpreter`, which writes down
what the script imports. When the first step has been finished, the spawner is started with that list, and the workers
of later generations are forked from it. Whatever goes wrong with it costs time, never the job: `fork` then answers
None, and workers are spawned as ever.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
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


@dataclass(frozen=True)
class StandbyChanged:
    """The spawner is ready to fork, or cannot be used any more."""

    ready: bool
    pid: int
    num_modules: int = 0
    text: str = ""


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
        self.ready = False
        self._lost = ""

    @property
    def pid(self) -> int:
        """Process id of the spawner, 0 where there is none."""
        return self._child.pid if self._child is not None else 0

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

    def warm_up(self, variables: Mapping[str, str]) -> None:
        """Start the spawner, once. `variables`: the environment of the workers."""
        if self._used:
            return
        self._used = True
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs, open(self._log, "w") as log:
            try:
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
        if self._socket is None:
            return None
        try:
            data = self._socket.recv(_MAX_MESSAGE)
        except BlockingIOError:
            return None
        except OSError:
            data = b""
        pid = self.pid
        answer: dict[str, Any] = json.loads(data) if data else {"failed": f"it ended ({self._last_words()})"}
        if "ready" not in answer:
            self.close()
            return StandbyChanged(ready=False, pid=pid, text=answer.get("failed", "it answered out of turn"))
        self.ready = True
        left_out = answer["left_out"]
        text = f"without {', '.join(left_out)}, whose import concerns one worker alone" if left_out else ""
        return StandbyChanged(ready=True, pid=pid, num_modules=answer["ready"], text=text)

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
        go, let_go = os.pipe2(os.O_CLOEXEC)
        descriptors = [stdout.fileno() if stdout else 1, stderr.fileno() if stderr else 2, self._guard.descriptor, go]
        script = arguments[1:] if arguments[0] == "-u" else arguments
        request = {"argv": list(script), "env": dict(variables), "parent": os.getpid()}
        try:
            self._socket.settimeout(ANSWER_S)
            socket.send_fds(self._socket, [json.dumps(request).encode()], descriptors)
            data = self._socket.recv(_MAX_MESSAGE)
            child = Child(int(json.loads(data)["pid"]), self._guard)
            self._socket.setblocking(False)
            os.write(let_go, b"g")  # without it the worker ends by itself, so none is ever lost sight of
        except (OSError, ValueError, KeyError) as error:
            self._lost = f"it gave no worker: {error or type(error).__name__} ({self._last_words()})"
            self.close()
            return None
        finally:
            os.close(go)
            os.close(let_go)
        return child

    def close(self) -> None:
        """End the spawner; workers that it has forked stay."""
        self.ready = False
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
