"""Jobs that hang are named, dumped and restarted; jobs that only take long are left alone."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest

from support.jobs import TRAIN, Job, job_in, leftovers

pytestmark = pytest.mark.timeout(900)
"""Long is what these jobs are about; each has a limit of its own."""

SCRIPT = Path(__file__).with_name("hang_script.py")


def run(job: Job, how: str, *flags: str, timeout_s: float = 120) -> list[dict[str, object]]:
    """Run the script to its end; the `hang` events."""
    command = job.holdfast("--standalone", "--nproc-per-node", "2", *flags, SCRIPT, job.root, how)
    assert job.run(command, timeout_s=timeout_s) == 0, job.output()
    assert leftovers(job) == []
    return [event for event in job.events() if event["kind"] == "hang"]


def restarts(job: Job) -> list[str]:
    return [(job.root / f"done-{rank}").read_text() for rank in (0, 1)]


@pytest.mark.campaign
def test_an_endless_loop_is_named_with_stacks_of_all_ranks_and_ended(tmp_path: Path) -> None:
    with job_in(tmp_path) as job:
        hangs = run(job, "loop", "--hold-hang-timeout", "4s")
        assert [event["change"] for event in hangs] == ["dump", "suspected", "hung"]
        assert all(event["global_rank"] == 1 and event["step"] == 8 for event in hangs[1:]), hangs
        assert "in misbehave" in hangs[1]["text"]
        stacks = {path.name[-8:]: path.read_text() for path in (job.run_dir / "stacks").iterdir()}
        assert "misbehave" in stacks["0001.txt"]
        assert "all_reduce" in stacks["0000.txt"] or "backward" in stacks["0000.txt"]
        assert restarts(job) == ["1", "1"]
        (recovery,) = [event for event in job.events() if event["kind"] == "recovery"]
        assert recovery["cause"].startswith("rank 1 hangs (no sign of life")
        assert recovery.get("steps_lost", 0) <= 1


@pytest.mark.campaign
def test_a_stopped_worker_is_restarted_without_a_limit(tmp_path: Path) -> None:
    with job_in(tmp_path) as job:
        script = [str(TRAIN), "--parallel", "ddp", "--steps", "14", "--step-seconds", "0.1", "--out", str(job.root)]
        command = job.holdfast(
            "--standalone", "--nproc-per-node", "2", "--hold-faults", "hang:rank=1,step=8,when=backward", *script
        )
        assert job.run(command) == 0, job.output()
        hung = [event for event in job.events() if event["kind"] == "hang" and event["change"] == "hung"]
        assert [(event["global_rank"], event["text"][:10]) for event in hung] == [(1, "in state T")]
        assert leftovers(job) == []


@pytest.mark.campaign
def test_a_worker_that_is_stopped_before_its_session_is_restarted(tmp_path: Path) -> None:
    """In the first generation the other rank has entered; in the third both are known to be about to."""
    with job_in(tmp_path) as job:
        hangs = run(job, "stopped outside", "--max-restarts", "3")
        assert "rank 1 stops before its Session" in job.output()
        assert "rank 1 stops before the process group" in job.output()
        assert [event["change"] for event in hangs] == ["dump", "suspected", "hung"] * 2
        assert [(event["global_rank"], event["text"][:10]) for event in hangs[2::3]] == [(1, "in state T")] * 2
        assert "left alone" not in job.output()
        assert restarts(job) == ["3", "3"]


def test_a_stopped_worker_of_a_script_without_a_session_is_told_of_and_left_alone(tmp_path: Path) -> None:
    with job_in(tmp_path) as job:
        script = job.root / "worker.sh"
        script.write_text(
            f'cd "{job.root}"\nif [ "$RANK" = 1 ]; then kill -STOP $$; touch went-on; fi\n'
            "while [ ! -e went-on ]; do sleep 0.1; done\n"
        )
        process = job.start(job.holdfast("--nproc-per-node", "2", "--no-python", "bash", script))
        told = re.compile(r"warning: rank 1 \(.*, pid (\d+)\) has been in state T for \d+ s; it is left alone")
        job.wait_for(lambda: told.search(job.output()), "a warning")
        found = told.search(job.output())
        assert found is not None
        os.kill(int(found[1]), signal.SIGCONT)
        assert process.wait(400) == 0, job.output()
        changes = [event["change"] for event in job.events() if event["kind"] == "hang"]
        assert changes[:2] == ["dump", "suspected"]
        assert "hung" not in changes
        assert (job.run_dir / "stacks").exists()
        assert leftovers(job) == []


@pytest.mark.campaign
def test_a_collective_that_one_rank_never_joins_is_ended_without_a_flag(tmp_path: Path) -> None:
    with job_in(tmp_path) as job:
        hangs = run(job, "absent", timeout_s=240)
        assert [event["change"] for event in hangs] == ["dump", "suspected", "dump", "hung"]
        assert hangs[-1]["global_rank"] == 1
        assert "all ranks idle" in hangs[-1]["text"]
        assert restarts(job) == ["1", "1"]


@pytest.mark.campaign
@pytest.mark.parametrize("how", ["section", "loader"])
def test_a_section_and_a_data_loader_are_signs_of_life(tmp_path: Path, how: str) -> None:
    with job_in(tmp_path) as job:
        assert run(job, how, "--hold-hang-timeout", "4s") == []
        assert restarts(job) == ["0", "0"]


@pytest.mark.campaign
def test_a_rank_that_saves_for_minutes_while_others_wait_is_not_restarted(tmp_path: Path) -> None:
    with job_in(tmp_path) as job:
        hangs = run(job, "writes", timeout_s=400)
        assert "hung" not in [event["change"] for event in hangs], hangs
        assert restarts(job) == ["0", "0"]


@pytest.mark.campaign
@pytest.mark.parametrize(
    "how", ["slow steps", "compile", "compile in a child", "evaluation", "scoring", "stream", "long section"]
)
def test_a_long_healthy_run_is_not_restarted(tmp_path: Path, how: str) -> None:
    with job_in(tmp_path) as job:
        hangs = run(job, how, timeout_s=500)
        assert "hung" not in [event["change"] for event in hangs], hangs
        assert restarts(job) == ["0", "0"]
