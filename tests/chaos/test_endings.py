"""How jobs end and begin again: restarts used up, storage removed, two jobs side by side."""

from __future__ import annotations

import shutil
from pathlib import Path

from holdfast.checkpoint import list_steps
from support.jobs import TRAIN, Job, fingerprints, job_in, leftovers


def command(job: Job, *, steps: int = 14, flags: tuple[str, ...] = ()) -> list[str]:
    """`holdfast run` of the matrix's script on one rank, with storage."""
    script = [str(TRAIN), "--steps", str(steps), "--step-seconds", "0.1", "--paced"]
    script += ["--checkpoints", str(job.checkpoints), "--out", str(job.root / "out")]
    return job.holdfast("--standalone", "--nproc-per-node", "1", *flags, *script)


def complete_steps(job: Job) -> list[int]:
    return [step.step for step in list_steps(job.checkpoints) if step.complete]


def test_used_up_restarts_leave_the_newest_version_in_storage_and_the_next_run_goes_on_from_it(tmp_path: Path) -> None:
    with job_in(tmp_path) as job:
        faults = "kill:rank=0,step=5,when=backward;kill:rank=0,step=8,when=forward"
        first = command(job, flags=("--max-restarts", "1", "--hold-faults", faults))
        assert job.run(first) == 1, job.output()
        assert "Root Cause (first observed failure)" in job.output()
        assert "SIGKILL" in job.output()
        assert len(job.fired()) == 2
        stored = complete_steps(job)
        assert stored
        assert 6 <= max(stored) <= 8, stored
        assert leftovers(job) == []

        assert job.run(command(job), log="second.txt") == 0, job.output("second.txt")
        assert f"RESTORED tier=storage step={max(stored)}" in job.output("second.txt")
        assert leftovers(job) == []
        resumed = fingerprints(job.root / "out", 1)
        shutil.rmtree(job.checkpoints)
        assert job.run(command(job), log="third.txt") == 0, job.output("third.txt")
        assert "RESTORED" not in job.output("third.txt"), "after rm -rf of the checkpoints a run starts from nothing"
        assert fingerprints(job.root / "out", 1) == resumed


def test_memory_of_a_killed_launcher_is_not_used_once_its_checkpoints_were_removed(tmp_path: Path) -> None:
    with job_in(tmp_path) as job:
        flags = ("--hold-faults", "kill-agent:node=0,step=6")
        assert job.run(command(job, flags=flags)) == -9, job.output()
        assert job.checkpoints.exists()
        shutil.rmtree(job.checkpoints)
        assert job.run(command(job), log="second.txt") == 0, job.output("second.txt")
        assert "RESTORED" not in job.output("second.txt")
        assert leftovers(job) == []


def test_two_jobs_on_one_host_never_meet(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        folder.mkdir()
    with job_in(folders[0]) as one, job_in(folders[1]) as two:
        faults = ("--hold-faults", "kill:rank=0,step=6,when=backward")
        running = [(job, job.start(command(job, flags=faults))) for job in (one, two)]
        for job, process in running:
            assert process.wait(400) == 0, job.output()
            assert len(job.fired()) == 1
            assert [event["tier"] for event in job.events() if event["kind"] == "recovery"] == ["memory"]
            assert leftovers(job) == []
        assert fingerprints(one.root / "out", 1) == fingerprints(two.root / "out", 1)
