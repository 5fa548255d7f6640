"""The warm spawner of a node: a process, run by path, that has imported what a script needs, and forks workers.

``spawner.py FD`` answers requests of the agent (`holdfast.launcher.standby`) on the socket FD: one JSON object each.

- ``{"import": FILE, …}``: import the modules that are named in FILE, from the standard library, site-packages and
  holdfast alone, never the user's own. Answered by ``{"ready": number of modules}`` or ``{"failed": reason}``.
- ``{"fork": 1}`` with two descriptors (the guard and a channel): fork a worker. Answered by ``{"pid": PID}``. It then
  waits on the channel for ``{"argv": […], "env": {…}, "parent": PID}`` with its standard output and standard error, and
  ends where the channel is closed instead. So a fork, which takes long in a large process, is over before it is
  needed.

It stays single-threaded and touches no GPU: a module whose import starts a thread, opens a GPU or asks for what differs
between workers (RANK and the like) is left to the workers, and the spawner begins again without it. So what a worker
inherits beyond a fresh interpreter is imported modules, and nothing else.

A worker is forked twice, so that the agent (a subreaper) becomes its parent, as it is of the workers that it spawns
itself: a spawner that dies takes no worker along.
"""

# ruff: noqa: E402  # imports follow what has to be seen and done before them
from __future__ import annotations

import os
import sys

_BARE = frozenset(sys.modules)
"""What is loaded before anything of the script's could have been found."""
if __name__ == "__main__" and not getattr(sys.flags, "safe_path", False):
    del sys.path[0]  # this file's own directory, whose modules must not stand in for anybody's

import array
import contextlib
import ctypes
import gc
import importlib.machinery
import importlib.util
import json
import signal
import site
import socket
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

_PR_SET_PDEATHSIG = 1
_MAX_MESSAGE = 1 << 20
_MAX_BEGINNINGS = 8
_AGAIN = "_HOLDFAST_SPAWNER_REQUEST"
_SHARED = ("torch", "holdfast")
"""Packages of which single modules are left out; others are left out whole."""


class _WatchedEnvironment(os._Environ):  # type: ignore[type-arg]  # it takes arguments in stubs only
    """`os.environ` while modules are imported: notes whether one asks for what differs between workers."""

    varying: frozenset[str] = frozenset()
    asked = False

    def __getitem__(self, key: str) -> str:
        if key in _WatchedEnvironment.varying:
            _WatchedEnvironment.asked = True
        value: str = super().__getitem__(key)
        return value


class Spawner:
    """See the module's head. Ends when the agent closes the socket."""

    def __init__(self, descriptor: int) -> None:
        self._socket = socket.socket(fileno=descriptor)
        self._policy = os.sched_getscheduler(0)
        self._path, self._finders = list(sys.path), list(sys.meta_path)

    def serve(self) -> list[str] | None:
        """Answer requests; in a forked worker, the arguments of its script. None: the agent has gone."""
        _schedule(os.SCHED_BATCH)
        if _AGAIN in os.environ:
            self._answer(self._warm_up(json.loads(os.environ.pop(_AGAIN))))
        while True:
            data, descriptors = _receive(self._socket)
            if not data:
                return None
            request = json.loads(data)
            if "import" in request:
                self._answer(self._warm_up(request))
                continue
            arguments = self._fork(descriptors)
            if arguments is not None:
                return arguments

    def _answer(self, answer: dict[str, object]) -> None:
        self._socket.sendall(json.dumps(answer).encode())

    # --- imports

    def _warm_up(self, request: dict[str, Any]) -> dict[str, object]:  # Any: JSON
        left_out: list[str] = request.get("left_out", [])
        with open(request["import"]) as file:
            names = [name for name in file.read().split() if not _is_among(name, left_out)]
        flagged = self._import(names, request)
        if flagged and len(left_out) + len(flagged) <= _MAX_BEGINNINGS and "torch" not in flagged:
            self._begin_again({**request, "left_out": sorted({*left_out, *flagged})})
        reason = f"no worker can share imports of {', '.join(sorted(flagged))}" if flagged else self._objection(request)
        if reason is not None:
            return {"failed": reason}
        gc.collect()
        gc.freeze()  # a worker that collects garbage then leaves these pages shared
        return {"ready": len(sys.modules) - len(_BARE), "left_out": left_out}

    def _import(self, names: list[str], request: dict[str, Any]) -> set[str]:
        """Import in order; what no worker may inherit is returned."""
        flagged: set[str] = set()
        standard = ("BuiltinImporter", "FrozenImporter", "PathFinder")
        sys.path[:] = [path for path in self._path if _is_installed(path)]
        sys.meta_path[:] = [finder for finder in self._finders if getattr(finder, "__name__", "") in standard]
        num_finders = len(sys.meta_path)
        plain_class = os.environ.__class__
        _WatchedEnvironment.varying = frozenset(request["varying"])
        os.environ.__class__ = _WatchedEnvironment
        try:
            if any(_is_among(name, ["holdfast"]) for name in names):
                sys.path.append(request["ours"])  # wherever it is installed; its submodules are found through it
                importlib.import_module("holdfast")
                sys.path.remove(request["ours"])
            for name in names:
                if name not in sys.modules and not _try(name):
                    top = name.partition(".")[0]
                    flagged.add(name if top in _SHARED or top in sys.stdlib_module_names else top)
                    if _touched():
                        break  # whatever comes now would be blamed for it
        finally:
            os.environ.__class__ = plain_class
            sys.meta_path[:] = self._finders + sys.meta_path[num_finders:]
            sys.path[:] = self._path
        return flagged

    def _objection(self, request: dict[str, Any]) -> str | None:
        """Why no worker may be forked although every module is harmless: in a worker, its name means another one."""
        places = [*request["user_paths"], *(path for path in self._path if not _is_installed(path))]
        tops = {name.partition(".")[0] for name in sys.modules} - {name.partition(".")[0] for name in _BARE}
        for top in tops - {"holdfast"}:
            for place in places:
                found = importlib.machinery.PathFinder.find_spec(top, [place])
                if found is not None and found.loader is not None:
                    return f"the module {found.origin} has the name of an installed one"
        return None

    def _begin_again(self, request: dict[str, Any]) -> NoReturn:
        """Become a fresh process that has the request already."""
        _schedule(self._policy)
        os.environ[_AGAIN] = json.dumps(request)
        descriptor = self._socket.detach()
        os.set_inheritable(descriptor, True)
        os.execv(sys.executable, [sys.executable, "-u", __file__, str(descriptor)])

    # --- workers

    def _fork(self, descriptors: list[int]) -> list[str] | None:
        guard, channel = descriptors
        told, tell = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        middle = os.fork()
        if middle == 0:
            if os.fork() != 0:
                os._exit(0)
            os.setsid()
            for descriptor, line in ((guard, f"+{os.getpid()}\n"), (tell, str(os.getpid()))):
                with contextlib.suppress(OSError):
                    os.write(descriptor, line.encode())
            for descriptor in (told, tell, guard, self._socket.detach()):
                os.close(descriptor)
            return self._become(channel)
        for descriptor in (tell, *descriptors):
            os.close(descriptor)
        os.waitpid(middle, 0)  # from here on the worker is the agent's child
        pid = os.read(told, 32)
        os.close(told)
        self._answer({"pid": int(pid or 0)})
        return None

    def _become(self, channel: int) -> list[str]:
        """A worker before its script: waits for its turn, and is then as a fresh interpreter that the agent spawned."""
        with socket.socket(fileno=channel) as turn:
            data, descriptors = _receive(turn)
        if not data:
            os._exit(1)
        request = json.loads(data)
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, *[ctypes.c_ulong(value) for value in (signal.SIGKILL, 0, 0, 0)])
        if os.getppid() != request["parent"]:  # the agent died before the line above took effect
            os._exit(1)
        stdout, stderr = descriptors
        os.dup2(stdout, 1)
        os.dup2(stderr, 2)
        for descriptor in descriptors:
            os.close(descriptor)
        _schedule(self._policy)
        environment: dict[str, str] = request["env"]
        for name in set(os.environ) - set(environment):
            del os.environ[name]
        for name, value in environment.items():
            if os.environ.get(name) != value:
                os.environ[name] = value
        importlib.invalidate_caches()
        _draw_entropy()
        return list(request["argv"])


def _receive(source: socket.socket) -> tuple[bytes, list[int]]:
    """One message and the descriptors that came with it; no bytes where the other end is closed."""
    received = array.array("i")
    try:
        data, ancillary, _, _ = source.recvmsg(_MAX_MESSAGE, socket.CMSG_LEN(4 * received.itemsize))
    except ConnectionResetError:
        return b"", []
    for level, kind, payload in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            received.frombytes(payload[: len(payload) - len(payload) % received.itemsize])
    return data, list(received)


def _schedule(policy: int) -> None:
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, policy, os.sched_param(0))


def _is_among(name: str, prefixes: Iterable[str]) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def _is_installed(path: str) -> bool:
    """Whether modules found in `path` are Python's or installed ones, rather than the user's own."""
    roots = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    roots |= {site.getusersitepackages(), *site.getsitepackages()}
    zipped = f"python{sys.version_info.major}{sys.version_info.minor}.zip"
    return any(path == root or path.startswith(f"{root}/") for root in roots) or os.path.basename(path) == zipped


def _try(name: str) -> bool:
    """Import a module; False where no worker may inherit what that did. One that fails is left to the worker."""
    _WatchedEnvironment.asked = False
    before = len(sys.modules)
    with contextlib.suppress(BaseException):
        importlib.import_module(name)
    return len(sys.modules) == before or not (_WatchedEnvironment.asked or _touched())


def _touched() -> bool:
    """Whether this process has what a fork cannot inherit: a second thread, an open GPU.

    OpenBLAS ends its threads before a fork and starts them again when they are needed, hence the trial.
    """
    if len(os.listdir("/proc/self/task")) > 1:
        child = os.fork()
        if child == 0:
            os._exit(0)
        os.waitpid(child, 0)
        if len(os.listdir("/proc/self/task")) > 1:
            return True
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{descriptor}").startswith(("/dev/nvidia", "/dev/kfd")):
                return True
    return False


def _draw_entropy() -> None:
    """What a fresh interpreter would have drawn for itself; `random` and `tempfile` do so after a fork."""
    numpy_random = sys.modules.get("numpy.random")
    if numpy_random is not None:
        numpy_random.seed()
    process = sys.modules.get("multiprocessing.process")
    if process is not None:
        process.current_process().authkey = os.urandom(32)


def _interpreter() -> Any:  # a module that no worker shall find among its own
    spec = importlib.util.spec_from_file_location("interpreter", Path(__file__).with_name("interpreter.py"))
    assert spec is not None, "it lies beside this file"
    assert spec.loader is not None, "it lies beside this file"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    _run = _interpreter()
    _arguments = Spawner(int(sys.argv[1])).serve()
    if _arguments is not None:
        _run.run_as_main(_arguments)
