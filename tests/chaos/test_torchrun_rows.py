"""Where torchrun fails its users (measured, torch 2.13), one test per row; and the endings that it does not have.

Rows that other tests cover: restart after a kill (`test_kill_matrix`); a worker that traps SIGTERM, a shutdown
timeout that was given, workers of a killed agent, SIGUSR1, SIGTERM never ends in success (`test_launcher_run`); one
restart count for all nodes, static rendezvous restarts together, a silent node is missed (`test_launcher_agents`);
stale addresses of a shared store (`test_launcher_store`); a worker that not even SIGKILL ends
(`test_launcher_membership`); hangs (`test_hangs`).
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from holdfast.checkpoint import list_steps
from support.jobs import TRAIN, Job, job_in, leftovers

pytestmark = pytest.mark.campaign
WAIT_S = 90


def command(job: Job, *flags: str, steps: int = 400) -> list[str]:
    """A job of two ranks with storage that takes long."""
    script = [str(TRAIN), "--parallel", "ddp", "--steps", str(steps), "--step-seconds", "0.1"]
    script += ["--checkpoints", str(job.checkpoints), "--out", str(job.root / "out")]
    return job.holdfast("--standalone", "--nproc-per-node", "2", "--hold-requeue-code", "75", *flags, *script)


def begun(job: Job, command: list[str], *, log: str = "log.txt") -> subprocess.Popen[bytes]:
    """Start it and wait until it has versions in memory."""
    process = job.start(command, log=log)
    deadline = time.monotonic() + WAIT_S
    while "memory tier" not in job.output(log) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1.0)
    assert process.poll() is None, job.output(log)
    return process


def stored(job: Job) -> list[int]:
    return [step.step for step in list_steps(job.checkpoints) if step.complete]


def test_the_exit_code_of_a_worker_becomes_1(tmp_path: Path) -> None:
    with job_in(tmp_path) as job:
        assert job.run(job.holdfast("--nproc-per-node", "1", "--no-python", "bash", "-c", "exit 7")) == 1
        assert "exitcode  : 7" in job.output()
        assert leftovers(job) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_each_stop_signal_ends_at_an_agreed_step_with_the_requeue_code(tmp_path: Path, number: signal.Signals) -> None:
    with job_in(tmp_path) as job:
        process = begun(job, command(job))
        process.send_signal(number)
        assert process.wait(WAIT_S) == 75, job.output()
        assert len(stored(job)) == 1
        assert leftovers(job) == []


def test_a_notice_file_is_a_signal(tmp_path: Path) -> None:
    with job_in(tmp_path) as job:
        process = begun(job, command(job, "--hold-notice-file", str(tmp_path / "notice")))
        (tmp_path / "notice").touch()
        assert process.wait(WAIT_S) == 75, job.output()
        assert len(stored(job)) == 1
        assert leftovers(job) == []


def test_a_second_interrupt_ends_at_once(tmp_path: Path) -> None:
    with job_in(tmp_path) as job:
        process = begun(job, command(job, "--hold-faults", "pyhang:rank=1,step=3"))
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        assert process.wait(15) != 0, job.output()
        assert leftovers(job) == []


def test_the_run_id_of_the_first_start_stays(tmp_path: Path) -> None:
    with job_in(tmp_path) as job:
        assert job.run(command(job, "--hold-faults", "kill-agent:node=0,step=6", steps=12)) == -9, job.output()
        assert job.run(command(job, "--hold-faults", "kill:rank=0,step=9", steps=14), log="again.txt") == 0
        runs = {event["run_id"] for event in job.events() if event["kind"] == "run_started"}
        assert len(runs) == 1
        assert leftovers(job) == []


def test_the_tools_tell_of_a_run_while_it_lasts_and_after(tmp_path: Path) -> None:
    with job_in(tmp_path) as job:
        process = begun(job, command(job, "--hold-faults", "kill:rank=1,step=6"))
        holdfast = str(Path(sys.executable).parent / "holdfast")
        listed = subprocess.run([holdfast, "status", job.name], capture_output=True, text=True, timeout=60, check=False)
        assert (listed.returncode, job.name in listed.stdout) == (0, True), listed
        process.send_signal(signal.SIGTERM)
        assert process.wait(WAIT_S) == 75
        told = subprocess.run(
            [holdfast, "report", job.run_dir], capture_output=True, text=True, timeout=60, check=False
        )
        assert told.returncode == 0
        assert "rank 1 was killed" in told.stdout
