"""A worker that the standby forks is one that a fresh interpreter would be: compared with plain ``python -u``."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import holdfast
from holdfast.launcher import standby as standbys
from holdfast.launcher.processes import Child, Guard
from holdfast.launcher.standby import Standby, StandbyChanged, can_stand_by, user_path

WAIT_S = 200.0
_PR_SET_CHILD_SUBREAPER = 36

PROBE = """
import json, multiprocessing, os, signal, sys, threading
import helper
main = sys.modules["__main__"]
kept = ("SigIgn", "SigBlk", "Cap", "Umask", "NoNew", "Threads")
status = [line for line in open("/proc/self/status") if line.startswith(kept)]
seen = dict(
    name=__name__, file=__file__, spec=str(__spec__).replace(str(__loader__), ""), package=str(__package__),
    loader=type(__loader__).__name__,
    dunders=sorted(key for key in vars(main) if key.startswith("__")), builtins=type(__builtins__).__name__,
    is_main=main.__dict__ is globals(), argv=sys.argv, path=sys.path, original=sys.orig_argv[1:], flags=str(sys.flags),
    executable=sys.executable, helper=helper.__file__, descriptors=len(os.listdir("/proc/self/fd")),
    policy=os.sched_getscheduler(0), leads_session=os.getsid(0) == os.getpid(), group=os.getpgrp() == os.getpid(),
    parent=os.getppid(), cwd=os.getcwd(), status=status, environment=dict(os.environ),
    signals={s.name: str(signal.getsignal(s)) for s in signal.Signals},
    in_main_thread=threading.current_thread() is threading.main_thread(), hook=sys.excepthook.__name__,
    process=multiprocessing.current_process().name, its_parent=str(multiprocessing.parent_process()),
    stdout=[sys.stdout.encoding, sys.stdout.line_buffering, sys.stdout.write_through, sys.stdout.isatty()],
    stderr=[sys.stderr.encoding, sys.stderr.line_buffering], stdin=os.readlink("/proc/self/fd/0"),
    c_environment=os.popen("echo $RANK").read(),
)
print(json.dumps(seen, indent=1))
"""

POOLS = """
import multiprocessing
class Answer:
    def __init__(self, value): self.value = value
def ask(question): return Answer(question.value * 6)
if __name__ == "__main__":
    for method in ("fork", "spawn", "forkserver"):
        with multiprocessing.get_context(method).Pool(1) as pool:
            print(method, pool.map(ask, [Answer(7)])[0].value, Answer.__module__)
"""

ENDS = {
    "an exception": "def inner():\n    raise ValueError('seven')\ndef outer():\n    inner()\nouter()\n",
    "a chain": "try:\n    1 / 0\nexcept ZeroDivisionError as error:\n    raise KeyError('k') from error\n",
    "a syntax error": "x = (\n",
    "a group": "raise ExceptionGroup('two', [ValueError(1), TypeError(2)])\n",
    "an interrupt": "raise KeyboardInterrupt\n",
    "an exit code": "import sys\nsys.exit(7)\n",
    "an exit message": "import sys\nsys.exit('gone')\n",
    "a hook": "import sys\nsys.excepthook = lambda kind, error, trace: print('hook', error)\nraise ValueError(1)\n",
    "a handler at exit": "import atexit\natexit.register(print, 'bye')\nraise ValueError(1)\n",
    "a last thread": "import threading, time\ndef late():\n    time.sleep(.05)\n    print('late')\n"
    "threading.Thread(target=late).start()\n",
    "a signal": "import os, signal\nos.kill(os.getpid(), signal.SIGTERM)\n",
    "an abort": "import os\nos.abort()\n",
    "a relative import": "from . import x\n",
}


@dataclass
class Warm:
    """A standby, and the interpreter that it has to equal."""

    root: Path
    guard: Guard
    standby: Standby
    variables: dict[str, str]

    def ready(self, *names: str, **variables: str) -> StandbyChanged:
        """Start the spawner with these modules and wait for its answer."""
        (self.root / "names").write_text("".join(f"{name}\n" for name in names))
        self.standby.warm_up(self.variables | variables)
        return self.change()

    def change(self) -> StandbyChanged:
        descriptor = self.standby.descriptor
        if descriptor is not None:
            assert select.select([descriptor], [], [], WAIT_S)[0], "the spawner says nothing"
        change = self.standby.changed()
        assert change is not None
        return change

    def fork(self, *arguments: str, **variables: str) -> Child | None:
        """A worker of the standby; its output goes to `out` and `err`."""
        with open(self.root / "out", "w") as out, open(self.root / "err", "w") as err:
            return self.standby.fork(("-u", *arguments), self.variables | variables, stdout=out, stderr=err)

    def run(self, *arguments: str, **variables: str) -> tuple[int | None, str, str]:
        """Exit code, output and errors of a forked worker."""
        child = self.fork(*arguments, **variables)
        assert child is not None
        return self.finish(child)

    def finish(self, child: Child) -> tuple[int | None, str, str]:
        assert select.select([child.pidfd], [], [], WAIT_S)[0], "the worker goes on"
        code = child.exit_code()
        child.reap()
        return code, (self.root / "out").read_text(), (self.root / "err").read_text()

    def plain(self, *arguments: str, **variables: str) -> tuple[int | None, str, str]:
        """The same of a fresh interpreter, started as the agent starts one."""
        with open(self.root / "out", "w") as out, open(self.root / "err", "w") as err:
            child = Child.spawn(
                (sys.executable, "-u", *arguments),
                environment=self.variables | variables,
                guard=self.guard,
                stdout=out,
                stderr=err,
            )
        return self.finish(child)


@pytest.fixture
def warm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Warm]:
    monkeypatch.setattr(standbys, "ANSWER_S", WAIT_S)  # whoever is given up has to be slower than any machine
    scripts = tmp_path / "scripts"
    scripts.mkdir()
    (scripts / "helper.py").write_text("")
    monkeypatch.chdir(tmp_path)
    variables = {key: value for key, value in os.environ.items() if key not in standbys.VARYING}
    with Guard() as guard:
        standby = Standby(
            sys.executable,
            guard=guard,
            names=tmp_path / "names",
            log=tmp_path / "log",
            user_path=str(scripts),
        )
        try:
            yield Warm(tmp_path, guard, standby, variables)
        finally:
            standby.close()
            ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, *[ctypes.c_ulong(0)] * 4)


def script(warm: Warm, text: str, name: str = "script.py") -> str:
    path = warm.root / "scripts" / name
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("how", ["absolute", "relative", "dotted", "module"])
def test_a_forked_worker_sees_what_a_fresh_interpreter_shows(warm: Warm, how: str) -> None:
    path = script(warm, PROBE)
    script(warm, PROBE, "__main__.py")
    arguments = {
        "absolute": [path],
        "relative": ["scripts/script.py"],
        "dotted": ["./scripts/../scripts/script.py"],
        "module": ["-m", "scripts.script"],
    }[how]
    more = {"PYTHONPATH": str(warm.root / "scripts")} if how == "module" else {}
    assert warm.ready("json", "numpy", "multiprocessing", **more).ready
    of_worker = {"RANK": "3", "EXTRA": "x y", **more}
    forked, fresh = (
        warm.run(*arguments, "--flag", "a b", **of_worker),
        warm.plain(*arguments, "--flag", "a b", **of_worker),
    )
    assert (forked[0], forked[2]) == (fresh[0], fresh[2]) == (0, "")
    assert json.loads(forked[1]) == json.loads(fresh[1])


def test_a_recorded_worker_sees_what_a_fresh_interpreter_shows(warm: Warm) -> None:
    path = script(warm, PROBE)
    arguments = warm.standby.recorded(("-u", path, "--flag"))
    recorded, fresh = warm.plain(*arguments[1:], RANK="1"), warm.plain(path, "--flag", RANK="1")
    assert recorded[0] == fresh[0] == 0, recorded
    seen, expected = json.loads(recorded[1]), json.loads(fresh[1])
    assert seen.pop("descriptors") == expected.pop("descriptors") + 1  # of the file below
    assert seen == expected
    assert {"json", "multiprocessing", "helper", "json.decoder"} <= set((warm.root / "names").read_text().split())


@pytest.mark.parametrize("what", ENDS)
def test_scripts_end_as_in_a_fresh_interpreter(warm: Warm, what: str) -> None:
    path = script(warm, ENDS[what])
    expected = warm.plain(path)
    assert warm.plain(*warm.standby.recorded(("-u", path))[1:]) == expected
    assert warm.ready("json").ready
    assert warm.run(path) == expected


def test_pools_of_every_kind_find_the_classes_of_the_script(warm: Warm) -> None:
    assert warm.ready("multiprocessing", "multiprocessing.pool").ready
    code, out, errors = warm.run(script(warm, POOLS))
    assert (code, errors) == (0, "")
    assert out == "fork 42 __main__\nspawn 42 __main__\nforkserver 42 __main__\n"


def test_forked_workers_draw_their_own_entropy(warm: Warm) -> None:
    text = "import multiprocessing, numpy, random, tempfile, uuid\n"
    text += "print(numpy.random.rand(), random.random(), next(tempfile._get_candidate_names()), uuid.uuid4(),\n"
    text += "      bytes(multiprocessing.current_process().authkey).hex())\n"
    assert warm.ready("numpy", "random", "tempfile", "uuid", "multiprocessing").ready
    drawn = [warm.run(script(warm, text))[1].split() for _ in range(2)]
    assert all(one != other for one, other in zip(*drawn, strict=True))


def test_the_users_own_modules_are_never_imported_beforehand(warm: Warm) -> None:
    text = f"open({str(warm.root / 'imported')!r}, 'a').write('once ')\n"
    script(warm, text, "mine.py")
    elsewhere = warm.root / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "theirs.py").write_text(text)
    assert warm.ready("mine", "theirs", "json", PYTHONPATH=str(elsewhere)).ready
    assert not (warm.root / "imported").exists()
    assert warm.run(script(warm, "import mine, theirs"), PYTHONPATH=str(elsewhere))[0] == 0
    assert (warm.root / "imported").read_text() == "once once "


def test_a_module_with_the_name_of_an_installed_one_keeps_the_standby_away(warm: Warm) -> None:
    script(warm, "mine = True\n", "wave.py")
    change = warm.ready("wave")
    assert not change.ready
    assert str(warm.root / "scripts" / "wave.py") in change.text


@pytest.mark.parametrize(
    "text",
    [
        "import threading, time\nthreading.Thread(target=time.sleep, args=(600,), daemon=True).start()\n",
        "import os\nrank = os.environ.get('LOCAL_RANK')\n",
        "import os\nrank = os.getenv('RANK', 0)\n",
    ],
)
def test_what_workers_cannot_share_is_left_to_them(warm: Warm, text: str) -> None:
    base = warm.root / "base"
    python = f"python{sys.version_info.major}.{sys.version_info.minor}"
    installed = base / "lib" / python / "site-packages"
    (installed / "touchy").mkdir(parents=True)
    (installed / "touchy" / "__init__.py").write_text(text)
    (installed / "calm.py").write_text("")
    (installed / "above.py").write_text("import touchy\n")
    where = {"PYTHONUSERBASE": str(base), "PYTHONPATH": str(installed)}
    change = warm.ready("calm", "touchy", "above", "touchy.part", **where)
    assert change.ready, change.text
    assert "above, touchy" in change.text
    loaded = "import sys\nprint({'calm', 'touchy', 'above'} & set(sys.modules))\n"
    loaded += "import touchy\nprint(vars(touchy).get('rank'))\n"
    code, out, _ = warm.run(script(warm, loaded), LOCAL_RANK="5", RANK="5", **where)
    assert code == 0
    assert out.splitlines() == ["{'calm'}", "5" if "rank" in text else "None"]


def test_a_spawner_that_dies_takes_no_worker_along_and_says_so_once(warm: Warm) -> None:
    assert warm.ready("json").ready
    child = warm.fork(
        script(warm, "import sys\nprint('up')\nsys.stdin.read() or __import__('time').sleep(1)\nprint('on')\n")
    )
    assert child is not None
    os.kill(warm.standby.pid, signal.SIGKILL)
    change = warm.change()
    assert not change.ready
    assert warm.standby.changed() is None
    assert warm.finish(child)[:2] == (0, "up\non\n")


def test_a_silent_spawner_is_given_up_and_its_late_worker_runs_nothing(
    warm: Warm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(standbys, "ANSWER_S", 0.2)
    assert warm.ready("json").ready
    pid = warm.standby.pid
    os.kill(pid, signal.SIGSTOP)
    assert warm.fork(script(warm, f"open({str(warm.root / 'ran')!r}, 'w')\n")) is None
    change = warm.change()
    assert not change.ready
    assert "it gave no worker" in change.text
    assert not Path("/proc", str(pid)).exists()
    assert not (warm.root / "ran").exists()


def hold(warm: Warm, count: int) -> frozenset[int]:
    """Have workers wait; their pids."""
    warm.standby.hold(count)
    deadline = time.monotonic() + WAIT_S
    while len(warm.standby.pids) < count + 1:
        assert warm.standby.changed() is None
        assert time.monotonic() < deadline, "the spawner forks nothing"
        time.sleep(0.01)
    return warm.standby.pids - {warm.standby.pid}


def test_workers_that_wait_take_their_turns_and_the_rest_end_with_the_standby(warm: Warm) -> None:
    assert warm.ready("json").ready
    waiting = hold(warm, 2)
    path = script(warm, "import os, sys\nprint(os.getpid(), os.environ['RANK'], sys.argv[1:])\n")
    child = warm.fork(path, "--flag", RANK="5")
    assert child is not None
    assert child.pid in waiting
    assert warm.finish(child) == (0, f"{child.pid} 5 ['--flag']\n", "")
    [left] = waiting - {child.pid}
    assert _lives(str(left))
    warm.standby.close()
    assert not Path("/proc", str(left)).exists()


def test_a_spare_node_imports_what_every_script_needs(warm: Warm) -> None:
    warm.standby.warm_up(warm.variables, ("json", "wave"))
    assert warm.change().ready
    code, out, _ = warm.run(script(warm, "import sys\nprint('wave' in sys.modules)\n"))
    assert (code, out) == (0, "True\n")
    assert warm.standby.recorded(("-u", "script.py")) == ("-u", "script.py")


def test_a_waiting_worker_that_died_is_passed_over(warm: Warm) -> None:
    assert warm.ready("json").ready
    [waiting] = hold(warm, 1)
    os.kill(waiting, signal.SIGKILL)
    pidfd = os.pidfd_open(waiting)
    assert select.select([pidfd], [], [], WAIT_S)[0]
    os.close(pidfd)
    assert warm.run(script(warm, "print('on')\n"))[:2] == (0, "on\n")
    assert warm.standby.changed() is None


ORPHANS = """
import os, subprocess, sys, time
from holdfast.launcher import processes
processes.become_subreaper()
processes._stat = lambda pid, plain=processes._stat: plain(pid) if pid != 1 else sys.exit("it reads everything")
leader = subprocess.Popen(["sh", "-c", "sleep 600 & setsid sh -c 'sleep 600 & wait' & wait"], start_new_session=True)
while len(found := processes._process_table()) < 4: time.sleep(0.01)
before = processes.groups_in_use(frozenset({leader.pid}))
leader.kill()
os.waitid(os.P_PID, leader.pid, os.WEXITED | os.WNOWAIT)
after = processes.groups_in_use(frozenset({leader.pid}))
os.killpg(leader.pid, 9)
while processes.groups_in_use(frozenset({leader.pid})): time.sleep(0.01)
print(len(before), len(after))
for group in {group for _, _, group in found.values()} - {os.getpgrp()}:
    os.killpg(group, 9)
"""


def test_what_a_dead_worker_left_in_its_group_is_seen_without_reading_all_processes() -> None:
    found = subprocess.run([sys.executable, "-c", ORPHANS], capture_output=True, text=True, timeout=WAIT_S, check=False)
    assert found.stdout.split() == ["1", "1"], found.stderr


AGENT = """
import os, signal, sys, time
from pathlib import Path
from holdfast.launcher.processes import Guard
from holdfast.launcher import standby as standbys
from holdfast.launcher.standby import Standby
standbys.ANSWER_S = 200.0
root, script, ending = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
(root / "names").write_text("json")
with Guard() as guard:
    standby = Standby(sys.executable, guard=guard, names=root / "names", log=root / "log", user_path=str(root))
    standby.warm_up(os.environ)
    while standby.changed() is None: time.sleep(0.01)
    child = standby.fork(("-u", script), os.environ, stdout=None, stderr=None)
    os.write(1, f"{standby.pid} {child.pid}\\n".encode())  # at once: the worker writes there too, and runs already
    if ending == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    child.end(60)
    print("code", child.exit_code())
    standby.close()
"""


def test_a_worker_dies_with_its_agent(warm: Warm) -> None:
    command = [sys.executable, "-c", AGENT, str(warm.root), script(warm, "import time; time.sleep(600)"), "killed"]
    agent = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=False)
    deadline = time.monotonic() + WAIT_S
    pids = agent.stdout.split()
    assert len(pids) == 2, agent.stderr
    while any(_lives(pid) for pid in pids):
        assert time.monotonic() < deadline, "a process outlives its agent"
        time.sleep(0.01)


def test_a_user_without_privileges_has_a_standby_too() -> None:
    if os.getuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("needs root and setpriv to become another user")
    as_nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    places = [str(Path(holdfast.__file__).parents[1]), *sys.path]
    variables = {"PYTHONPATH": os.pathsep.join(place for place in places if place), "PYTHONDONTWRITEBYTECODE": "1"}
    with tempfile.TemporaryDirectory(prefix="nobody-", dir="/tmp") as folder:
        path = Path(folder, "script.py")
        told = "f'user {os.getuid()} policy {os.sched_getscheduler(0)}\\n'"
        path.write_text(f"import os\nos.write(1, {told}.encode())\n")  # at once, for the agent writes there too
        os.chown(folder, 65534, 65534)
        for python in (sys.executable, f"/usr/bin/python3.{sys.version_info.minor}"):
            commands = ["-c", "import holdfast.launcher.standby"], ["-c", AGENT, folder, str(path), "awaited"]
            possible, found = (
                subprocess.run(
                    [*as_nobody, "sh", "-c", shlex.join([python, *command])],  # by a shell: it has no powers of root
                    env=os.environ | variables | {"HOME": folder},
                    capture_output=True,
                    text=True,
                    timeout=WAIT_S,
                    check=False,
                )
                for command in commands
            )
            if possible.returncode == 0:
                assert found.returncode == 0, found.stderr
                assert f"user 65534 policy {os.SCHED_OTHER}" in found.stdout
                assert "code 0" in found.stdout
                return
    pytest.skip("another user cannot run this environment")


def _lives(pid: str) -> bool:
    with contextlib.suppress(OSError):
        return Path("/proc", pid, "stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    return False


@pytest.mark.parametrize(
    ("arguments", "possible"),
    [
        (("-u", "here.py", "x"), True),
        (("-u", "-m", "package.module"), True),
        (("-u", "folder"), False),
        (("-u", "missing.py"), False),
        (("script.sh",), False),
        ((), False),
    ],
)
def test_only_scripts_and_modules_have_a_standby(
    arguments: tuple[str, ...], possible: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here.py").touch()
    (tmp_path / "folder").mkdir()
    assert can_stand_by(arguments) is possible
    if possible:
        assert user_path(arguments) == str(tmp_path)
