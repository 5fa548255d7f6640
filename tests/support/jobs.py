"""Run jobs as a user would, wait for them, and look for what they left behind.

Every process that a job starts inherits a marker in its environment, by which `leftovers` finds each one that lives on.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support.zygote import run_plain

TRAIN = Path(__file__).with_name("train.py")
MARKER = "HOLDFAST_TEST_MARKER"
BIN = Path(sys.executable).parent


@dataclass
class Job:
    """One job's own folder, name and marker; any number of launches share them."""

    root: Path
    name: str = field(default_factory=lambda: f"t{secrets.token_hex(4)}")
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def run_dir(self) -> Path:
        return self.root / "run"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def port(self) -> int:
        """A port for the agents, the one after it too: below the ephemeral range, and of no other job that runs now.

        Processes of pytest that share the work have ranges of their own; within one the test's random name decides.
        """
        worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]) % 12
        return 20000 + 1000 * worker + int(self.name[1:], 16) % 999

    def variables(self) -> dict[str, str]:
        kept = {
            key: value for key, value in os.environ.items() if not key.startswith(("HOLDFAST_", "PET_", "TORCHELASTIC"))
        }
        temporary = self.root / "tmp"
        temporary.mkdir(exist_ok=True)
        own = {"OMP_NUM_THREADS": "1", "TMPDIR": str(temporary), MARKER: self.name}
        # Failures come here within a second of the start, before any standby is ready: it would only take time.
        own["PET_HOLD_STANDBY"] = "0"
        # torch's compiler keeps a cache in TMPDIR wherever an optimizer steps; it is torch's, and no leftover of ours.
        return kept | own | {"TORCHINDUCTOR_CACHE_DIR": str(self.root / "inductor"), **self.environment}

    def holdfast(self, *arguments: str | os.PathLike[str]) -> list[str]:
        """The command line of `holdfast run` for this job."""
        flags = ["--hold-job", self.name, "--hold-run-dir", str(self.run_dir)]
        return [str(BIN / "holdfast"), "run", *flags, *map(str, arguments)]

    def start(self, command: Sequence[str], *, log: str = "log.txt") -> subprocess.Popen[bytes]:
        """Start a command of this job; its output goes to a file in the job's folder."""
        with (self.root / log).open("ab") as output:
            return subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=self.variables(),
                cwd=self.root,
            )

    def run(self, command: Sequence[str], *, timeout_s: float = 400, log: str = "log.txt") -> int:
        """Run a command to its end and give its exit code; a command that outlasts the limit is killed and fails."""
        process = self.start(command, log=log)
        try:
            return process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            kill_marked(self.name)
            raise AssertionError(
                f"still running after {timeout_s} s: {' '.join(command)}\n{self.output(log)}"
            ) from None

    def plain(self, script: Path, *arguments: str | os.PathLike[str], ranks: int = 1, log: str = "log.txt") -> int:
        """Run a script without holdfast and give its exit code, as `zygote.run_plain` does."""
        given = [str(argument) for argument in arguments]
        return run_plain(
            script, given, world_size=ranks, folder=self.root, variables=self.variables(), log=self.root / log
        )

    def progress(self) -> int:
        """The newest step that any rank has told of in the folder ``progress`` (``--progress`` of the scripts)."""
        return max((int(path.read_text() or 0) for path in self.root.glob("progress/[0-9]*")), default=0)

    def wait_for(self, condition: Callable[[], object], what: str, *, within_s: float = 400) -> None:
        """Until something is so; what it did not come to be is told with all output."""
        deadline = time.monotonic() + within_s
        while not condition():
            assert time.monotonic() < deadline, f"{what} did not happen within {within_s} s\n{self.output()}"
            time.sleep(0.02)

    def output(self, log: str = "log.txt") -> str:
        path = self.root / log
        return path.read_text(errors="replace") if path.exists() else ""

    def events(self) -> list[dict[str, Any]]:
        """All events of the run directory, in order of time; a line that is just being written is left out."""
        texts = [path.read_text() for path in sorted(self.run_dir.glob("events*.jsonl"))]
        lines = [line for text in texts for line in text.splitlines(keepends=True) if line.endswith("\n")]
        return sorted((json.loads(line) for line in lines), key=lambda event: event["time"])

    def fired(self) -> list[dict[str, Any]]:
        """Faults that fired."""
        path = self.run_dir / "faults.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def fingerprints(folder: Path, world_size: int) -> list[dict[str, str]]:
    """What each rank ended with (see train.py)."""
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(world_size)]


def marked(name: str) -> dict[int, str]:
    """Living processes of a job: pid and command line."""
    needle = f"{MARKER}={name}".encode()
    found: dict[int, str] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            if needle in (entry / "environ").read_bytes().split(b"\0"):
                found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return found


def kill_marked(name: str) -> None:
    """SIGKILL whatever lives of a job."""
    for pid in marked(name):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def traces(job: Job) -> list[str]:
    """Processes, shared memory, sockets and temporary files of the job."""
    found = [f"process {pid}: {command}" for pid, command in marked(job.name).items()]
    found += [f"shared memory {path}" for path in Path("/dev/shm").glob("holdfast-*") if job.name in path.name]
    found += [f"file {path}" for path in below(Path(f"/tmp/holdfast-{os.getuid()}")) if job.name in path]
    return found + [f"file {path}" for path in below(job.root / "tmp")]


def below(folder: Path) -> list[str]:
    """All files and folders in it. Those of other tests come and go meanwhile, at which `Path.rglob` fails."""
    return [os.path.join(at, name) for at, folders, files in os.walk(folder) for name in (*folders, *files)]


def leftovers(job: Job, *, within_s: float = 60, besides: str = "") -> list[str]:
    """What is still there of the job after its end; a daemon that is just leaving gets a moment.

    Args:
        within_s: the moment.
        besides: traces with this in them are of others, and stay.
    """
    deadline = time.monotonic() + within_s
    while True:
        found = [trace for trace in traces(job) if not besides or besides not in trace]
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.05)


@contextlib.contextmanager
def job_in(root: Path, **environment: str) -> Iterator[Job]:
    """A job that is cleared away however the test ends."""
    job = Job(root, environment=environment)
    try:
        yield job
    finally:
        kill_marked(job.name)
        for path in Path("/dev/shm").glob("holdfast-*"):
            if job.name in path.name:
                subprocess.run(["rm", "-rf", str(path)], check=False)
        for path in Path(f"/tmp/holdfast-{os.getuid()}").glob(f"{job.name}-*"):  # of whom was killed while it left
            subprocess.run(["rm", "-rf", str(path)], check=False)
