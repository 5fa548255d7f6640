"""Stock torchrun's stale store beside holdfast: gloo, two workers, one SIGKILL. Run it to see both.

    python tests/integration/launcher_stale_store.py

torchrun gives every attempt the same TCPStore, so a restarted worker can read the addresses that the dead attempt left
there, and burns its restarts (pytorch issue 135712). `holdfast run` makes a new store for every generation.
"""
# ruff: noqa: T201  # a script for people: it prints

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

RESTARTS = 3


def worker() -> None:
    """All-reduce until the end; rank 1 kills itself once, in the first attempt."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    attempt, rank = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), int(os.environ["RANK"])
    print(f"attempt {attempt} rank {rank} store {os.environ['MASTER_PORT']}", flush=True)
    dist.init_process_group("gloo")
    for step in range(20):
        value = torch.ones(1)
        dist.all_reduce(value)
        if step == 5 and rank == 1 and attempt == 0:
            os.kill(os.getpid(), signal.SIGKILL)
    print(f"attempt {attempt} rank {rank} finished", flush=True)
    dist.destroy_process_group()


def measure(launcher: list[str]) -> tuple[int, int, float]:
    """Exit code, attempts used and seconds of one run under `launcher`."""
    flags = ["--nproc-per-node", "2", "--max-restarts", str(RESTARTS), __file__, "worker"]
    begin = time.monotonic()
    done = subprocess.run([*launcher, *flags], capture_output=True, text=True, check=False, timeout=600)
    attempts = {line.split()[1] for line in done.stdout.splitlines() if line.startswith("attempt ")}
    return done.returncode, len(attempts), time.monotonic() - begin


def main() -> None:
    """Both launchers, side by side."""
    folder = Path(sys.executable).parent
    launchers = {
        "torchrun": [str(folder / "torchrun"), "--standalone"],
        "holdfast run": [str(folder / "holdfast"), "run", "--standalone", "--hold-snapshot-memory", "0"],
    }
    for name, command in launchers.items():
        code, attempts, seconds = measure(command)
        print(f"{name:14} exit code {code}, {attempts} of {RESTARTS + 1} attempts used, {seconds:.1f} s")


if __name__ == "__main__":
    worker() if sys.argv[1:] == ["worker"] else main()
