"""Another parallel layout straight from memory: the launcher is killed, and its successor trains otherwise."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.history import History, assert_exactly_once
from support.jobs import Job, job_in, leftovers

SCRIPT = Path(__file__).parent.parent / "support" / "elastic.py"
BATCH, SAMPLES = 12, 50


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    with job_in(tmp_path) as found:
        yield found


def command(job: Job, ranks: int, parallel: str, steps: int) -> list[str]:
    script = [SCRIPT, "--parallel", parallel, "--steps", str(steps), "--batch", str(BATCH), "--samples", str(SAMPLES)]
    script += ["--step-seconds", "0.1", "--progress", job.root / "progress", "--out", job.root / "out"]
    return job.holdfast("--standalone", "--nproc-per-node", str(ranks), *script)


def train_until_killed(job: Job, ranks: int, parallel: str, step: int) -> None:
    """Kill the launcher without warning once a step is done; its daemon keeps what it holds."""
    agent = job.start(command(job, ranks, parallel, 10_000))
    job.wait_for(lambda: job.progress() >= step, f"step {step}")
    agent.kill()
    agent.wait(20)


@pytest.mark.campaign
def test_fsdp2_on_4_then_fsdp2_with_tp_on_2x2_then_ddp_on_2_without_any_storage(job: Job) -> None:
    train_until_killed(job, 4, "fsdp2", 8)
    train_until_killed(job, 4, "tp", 16)
    assert job.run(command(job, 2, "ddp", 24)) == 0, job.output()
    history = History.read(job.root / "out")
    assert [(line["tier"], line["world_size"]) for line in history.restored] == [("memory", 4), ("memory", 2)]
    for line in history.restored:
        assert {line["digest"]} == history.digests(line["step"])
        assert line["samples"] == line["step"] * BATCH
    assert history.restored[0]["step"] >= 5
    assert_exactly_once(history.samples(), SAMPLES)
    losses = list(history.losses().values())
    assert sum(losses[-4:]) < sum(losses[:4])
    assert leftovers(job) == []
