"""Kill anything at any time, from outside, by no schedule that the job knows of."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from pathlib import Path

import pytest

from support.jobs import TRAIN, Job, fingerprints, job_in, leftovers

STEPS = 60
KILLS = 5


def targets(job: Job) -> dict[str, list[int]]:
    """Living workers and the daemon, by the newest events."""
    found: dict[str, list[int]] = {"worker": [], "daemon": []}
    if not (job.run_dir / "events.jsonl").exists():
        return found
    for event in job.events():
        if event["kind"] == "generation_started":
            found["worker"] = event["pids"]
        if event["kind"] == "daemon" and event.get("pid"):
            found["daemon"] = [event["pid"]]
    return found


def kill(job: Job, pids: list[int]) -> bool:
    """SIGKILL processes of this job; False where one is gone already."""
    for pid in pids:
        try:
            if job.name.encode() not in Path(f"/proc/{pid}/environ").read_bytes():
                return False
            os.kill(pid, signal.SIGKILL)
        except (OSError, ProcessLookupError):
            return False
    return True


@pytest.mark.campaign
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(1, 9))
def test_whatever_is_killed_whenever_the_run_ends_as_if_nothing_had_happened(tmp_path: Path, seed: int) -> None:
    choice = random.Random(seed)
    parallel = choice.choice(["ddp", "fsdp2"])
    options = ["--parallel", parallel, "--steps", str(STEPS)]
    plain = Job(tmp_path / "plain")
    plain.root.mkdir()
    code = plain.plain(TRAIN, "--plain", *options, "--out", plain.root / "out", ranks=2)
    assert code == 0, plain.output()

    (tmp_path / "held").mkdir()
    with job_in(tmp_path / "held") as job:
        out = ["--out", str(job.root / "out"), "--step-seconds", "0.1", "--checkpoints", str(job.checkpoints)]
        arguments = [
            "--standalone",
            "--nproc-per-node",
            "2",
            "--max-restarts",
            "50",
            "--hold-standby",
            "1",
            str(TRAIN),
            *options,
            *out,
        ]
        process = job.start(job.holdfast(*arguments))
        kills = 0
        deadline = time.monotonic() + 600
        while process.poll() is None and time.monotonic() < deadline:
            # The pause is the experiment: kills come at instants that nothing in the job decides.
            with contextlib.suppress(Exception):
                process.wait(choice.uniform(0.5, 8.0))
            known = targets(job)
            if kills == KILLS or not known["worker"]:
                continue
            victim = choice.choice(["worker", "worker", "worker", "daemon", "both"])
            pids = [choice.choice(known["worker"])] if victim != "daemon" else []
            pids += known["daemon"] if victim != "worker" else []
            kills += kill(job, pids)
        assert process.poll() == 0, f"seed {seed}\n{job.output()}"
        assert kills > 0, "nothing was killed: the run was too short"
        tiers = [event["tier"] for event in job.events() if event["kind"] == "recovery"]
        # "" is a generation that was killed before its Session had opened, "none" one before the first version.
        assert set(tiers) <= {"memory", "none", ""}, f"{tiers}\n{(job.run_dir / 'events.jsonl').read_text()}"
        assert fingerprints(job.root / "out", 2) == fingerprints(plain.root / "out", 2), f"seed {seed}"
        assert leftovers(job) == []
