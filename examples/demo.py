"""The demonstration behind `make demo`: train two workers, kill one in mid-step, resume, compare with stock torchrun.

    python examples/demo.py [--parallel ddp|fsdp2] [--steps N] [--kill 'kill:rank=1,step=50,when=backward']

Exits with 0 where the run that was killed ended with the same bits as the run without holdfast, with 1 where not.
"""

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from holdfast.launcher.events import read_events

TRAIN = Path(__file__).parent / "gpt" / "train.py"
BIN = Path(sys.executable).parent
WORKERS = 2
RESTARTS_BY_HAND = 5


class Screen:
    """Prints lines of two kinds: what the training says (indented), and what the demonstration says."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._bold, self._plain = ("\033[1m", "\033[0m") if sys.stdout.isatty() else ("", "")

    def says(self, line: str) -> None:
        seconds = time.monotonic() - self._began
        print(f"{self._bold}[{seconds:5.1f} s] {line}{self._plain}", flush=True)

    def passes_on(self, line: str) -> None:
        print(f"    {line}", flush=True)


class Watcher(threading.Thread):
    """Reads the run's event log while it grows and tells what a person wants to know."""

    def __init__(self, run_dir: Path, screen: Screen) -> None:
        super().__init__(name="demo-watcher", daemon=True)
        self._run_dir, self._screen = run_dir, screen
        self._told = 0
        self._failed_at: float | None = None
        self.recoveries: list[dict] = []
        self.ended = threading.Event()

    def run(self) -> None:
        while not self.ended.wait(0.1):
            self.read()

    def read(self) -> None:
        """Tell of the events that are new."""
        events = read_events(self._run_dir)
        for event in events[self._told :]:
            self._tell(event)
        self._told = len(events)

    def _tell(self, event: dict) -> None:
        if event["kind"] == "generation_started":
            workers = ", ".join(f"rank {rank} is pid {pid}" for rank, pid in enumerate(event["pids"]))
            self._screen.says(f"generation {number_of(event)}: {workers}; the launcher is pid {event['agent']}")
            if not event.get("restart_count"):
                self._screen.says("a worker will be killed soon, or kill anything yourself now")
        elif event["kind"] == "daemon":
            pid = f" (pid {event['pid']})" if event.get("pid") else ""
            self._screen.says(f"snapshot daemon {event['change']}{pid}")
        elif event["kind"] == "worker_failed":
            self._failed_at = event["time"] if self._failed_at is None else self._failed_at
            how = event.get("signal") or f"exit code {event['exit_code']}"
            self._screen.says(f"rank {event['global_rank']} (pid {event['pid']}) died of {how}")
        elif event["kind"] == "recovery":
            self.recoveries.append(event)
            self._screen.says(resume_line(event))
            self._failed_at = None


def number_of(event: dict) -> int:
    """4, of the generation i01-7f3a9c02-g0004."""
    return int(event["generation"].rpartition("-g")[2])


def resume_line(event: dict) -> str:
    """One line about a recovery: generation, tier, step, seconds since the kill, steps lost."""
    phases = event.get("phases", {})
    seconds = max(phases.values(), default=0.0)
    course = " > ".join(f"{name} {at:.2f}" for name, at in sorted(phases.items(), key=lambda phase: phase[1]))
    tier = event.get("tier") or "nothing"
    return (
        f"RESUMED: generation {number_of(event)}, from {tier}, at step {event.get('step', 0)}, first new step "
        f"{seconds:.2f} s after the kill, steps lost: {event.get('steps_lost', 0)}   ({course})"
    )


def stream(command: list[str], screen: Screen, environment: dict[str, str]) -> int:
    """Run a command, pass its output on line by line, give its exit code."""
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, text=True, errors="replace"
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            screen.passes_on(line.rstrip())
        return process.wait()


def with_holdfast(args: argparse.Namespace, folder: Path, screen: Screen) -> str | None:
    """Train under `holdfast run` with a rehearsed failure; the digest, or None where it failed."""
    run_dir, digest = folder / "run", folder / "holdfast.digest"
    launcher = ["run", "--standalone", "--nproc-per-node", str(WORKERS)]
    launcher += ["--hold-job", f"demo-{os.getpid()}", "--hold-run-dir", str(run_dir), "--hold-faults", args.kill]
    script = [*training(args, digest), "--checkpoint-dir", str(folder / "checkpoints")]
    screen.says(f"$ holdfast {shlex.join(launcher[:4])} --hold-faults '{args.kill}' {shown(script)}")
    watcher = Watcher(run_dir, screen)
    watcher.start()
    try:
        for _ in range(RESTARTS_BY_HAND):
            code = stream([str(BIN / "holdfast"), *launcher, *script], screen, environment())
            if code >= 0:
                break
            screen.says("the launcher itself was killed: starting it again, its snapshots are still there")
    finally:
        watcher.ended.set()
        watcher.join(5)
        watcher.read()
    if code != 0:
        screen.says(f"holdfast run ended with exit code {code}")
        return None
    if not watcher.recoveries:
        screen.says("nothing was killed: this run has shown nothing")
        return None
    return digest.read_text().strip()


def without_holdfast(args: argparse.Namespace, folder: Path, screen: Screen) -> str | None:
    """The same loop, which does not import holdfast, under stock torchrun."""
    digest = folder / "torchrun.digest"
    launcher = ["--standalone", "--nproc-per-node", str(WORKERS)]
    script = [*training(args, digest), "--plain"]
    screen.says(f"now the same loop without holdfast: $ torchrun {shlex.join(launcher)} {shown(script)}")
    code = stream([str(BIN / "torchrun"), *launcher, *script], screen, environment())
    if code != 0 and not digest.exists():  # torch may abort after a worker's last line (pytorch issue 190489)
        screen.says(f"torchrun ended with exit code {code}")
        return None
    return digest.read_text().strip()


def training(args: argparse.Namespace, digest: Path) -> list[str]:
    return [str(TRAIN), "--parallel", args.parallel, "--steps", str(args.steps), "--digest-out", str(digest)]


def shown(script: list[str]) -> str:
    """The script's command line, short enough for a screen."""
    kept = script[: script.index("--digest-out")] + [word for word in script if word == "--plain"]
    return shlex.join(["examples/gpt/train.py", *kept[1:]])


def environment() -> dict[str, str]:
    """One thread per rank in both runs: with more, sums may be taken in another order."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parallel", choices=("ddp", "fsdp2"), default="ddp")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--kill", default="kill:rank=1,step=50,when=backward", help="what breaks: see docs/faults.md")
    args = parser.parse_args()
    screen = Screen()
    screen.says(f"{WORKERS} workers train a small GPT on the source of Python's standard library ({args.parallel})")
    with tempfile.TemporaryDirectory(prefix="holdfast-demo-") as folder:
        held = with_holdfast(args, Path(folder), screen)
        if held is None:
            return 1
        plain = without_holdfast(args, Path(folder), screen)
        if plain is None:
            return 1
    same = held == plain
    screen.says(f"with a kill under holdfast   {held}")
    screen.says(f"undisturbed under torchrun   {plain}")
    screen.says(
        "IDENTICAL: final weights and optimizer state are the same bit for bit" if same else "DIFFERENT weights"
    )
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
