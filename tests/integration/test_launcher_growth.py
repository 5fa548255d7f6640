"""Nodes join a job that trains, and leave it: the world changes at agreed steps, and no step is done twice."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from holdfast import ElasticSampler
from support.history import History, assert_exactly_once
from support.jobs import Job, job_in, leftovers

SCRIPT = Path(__file__).parent.parent / "support" / "elastic.py"
BATCH, SAMPLES = 12, 50


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    with job_in(tmp_path, HOLDFAST_TOKEN="what agents and daemons share") as found:
        yield found


def agent(job: Job, number: int, *flags: str) -> subprocess.Popen[bytes]:
    command = ["--nnodes", "2:3", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", job.name]
    endpoints = f"localhost:{job.port},localhost:{job.port + 1}"
    command += ["--rdzv-endpoint", endpoints, "--rdzv-conf", "last_call_timeout=1"]
    command += [
        "--hold-requeue-code",
        "75",
        "--hold-grace",
        "60s",
        *flags,
        str(SCRIPT),
        "--steps",
        "100000",
        "--batch",
        str(BATCH),
    ]
    command += ["--samples", str(SAMPLES), "--step-seconds", "0.05", "--out", str(job.root / "out")]
    command += ["--checkpoints", str(job.checkpoints), "--progress", str(job.root / "progress")]
    return job.start(job.holdfast(*command), log=f"agent-{number}.txt")


def logs(job: Job) -> str:
    return "\n".join(path.read_text() for path in sorted(job.root.glob("agent-*.txt")))


def trains_on(job: Job, world: int) -> None:
    """Until some steps of a world of that size are done."""

    def done() -> bool:
        lines = History.read(job.root / "out").lines
        sizes = [line["world_size"] for line in lines if line["event"] == "step" and line["rank"] == 0]
        return sizes[-3:].count(world) == 3

    job.wait_for(done, f"a world of {world}", within_s=120)


@pytest.mark.campaign
@pytest.mark.timeout(900)
def test_a_node_joins_and_the_leaders_host_is_taken_away_and_no_step_is_done_twice(job: Job) -> None:
    agents = [agent(job, number) for number in range(2)]
    trains_on(job, 2)
    agents.append(agent(job, 2))
    trains_on(job, 3)
    leads = next(e["agent"] for e in job.events() if e["kind"] == "membership" and e["change"] == "forming")
    gone = next(process for process in agents if process.pid == leads)
    gone.send_signal(signal.SIGUSR1)
    assert gone.wait(120) == 75, logs(job)
    trains_on(job, 2)
    agents.remove(gone)
    agents[0].terminate()
    assert [process.wait(60) for process in agents] == [75, 75], logs(job)

    growth, drain = [event for event in job.events() if event["kind"] == "recovery"]
    assert (growth["cause"], growth["steps_lost"]) == ("the nodes change", 0)
    assert (drain["cause"], drain["steps_lost"]) == ("the leader's node leaves the job", 0)
    history = History.read(job.root / "out")
    for restored, event in zip(history.restored, (growth, drain), strict=True):
        assert restored["step"] == event["step"]
        assert {restored["digest"]} == history.digests(restored["step"])
        assert restored["samples"] == restored["step"] * BATCH
    done = [line["step"] for line in history.lines if line["event"] == "step" and line["rank"] == 0]
    assert len(done) == max(done)  # no step was done twice
    alone = ElasticSampler(SAMPLES, global_batch_size=BATCH, seed=5)
    assert history.samples() == [sample for step in range(max(done)) for sample in alone.share_at(step * BATCH)]
    assert_exactly_once(history.samples(), SAMPLES)
    assert leftovers(job) == []
