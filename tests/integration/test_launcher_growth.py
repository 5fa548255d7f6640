"""A node joins a job that trains: the world becomes larger at an agreed step, and no step is done twice."""

from __future__ import annotations

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
    with job_in(tmp_path) as found:
        yield found


def agent(job: Job, number: int, *flags: str) -> subprocess.Popen[bytes]:
    port = 20000 + int(job.name[1:], 16) % 9000
    command = ["--nnodes", "2:3", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", job.name]
    command += ["--rdzv-endpoint", f"localhost:{port},localhost:{port + 1}", "--rdzv-conf", "last_call_timeout=1"]
    command += ["--hold-requeue-code", "75", *flags, str(SCRIPT), "--steps", "100000", "--batch", str(BATCH)]
    command += ["--samples", str(SAMPLES), "--step-seconds", "0.05", "--out", str(job.root / "out")]
    command += ["--checkpoints", str(job.checkpoints), "--progress", str(job.root / "progress")]
    return job.start(job.holdfast(*command), log=f"agent-{number}.txt")


def trains_on(job: Job, world: int) -> None:
    """Until some steps of a world of that size are done."""

    def done() -> bool:
        sizes = [line["world_size"] for line in History.read(job.root / "out").lines if line["event"] == "step"]
        return sizes[-3:].count(world) == 3

    logs = "".join(path.read_text() for path in job.root.glob("agent-*.txt"))
    job.wait_for(done, f"a world of {world}\n{logs}", within_s=120)


def test_a_node_joins_at_an_agreed_step(job: Job) -> None:
    agents = [agent(job, number) for number in range(2)]
    trains_on(job, 2)
    agents.append(agent(job, 2))
    trains_on(job, 3)
    agents[1].terminate()
    assert [process.wait(60) for process in agents] == [75, 75, 75], [job.output(f"agent-{n}.txt") for n in range(3)]

    (growth,) = [event for event in job.events() if event["kind"] == "recovery"]
    assert (growth["cause"], growth["steps_lost"]) == ("the nodes change", 0)
    history = History.read(job.root / "out")
    (restored,) = history.restored
    assert restored["step"] == growth["step"]
    assert {restored["digest"]} == history.digests(restored["step"])
    assert restored["samples"] == restored["step"] * BATCH
    generations = [line["generation"] for line in history.lines if line["event"] == "step" and line["rank"] == 0]
    assert len(set(generations)) == 2
    assert len(generations) == max(history.surviving())  # no step was done twice
    alone = ElasticSampler(SAMPLES, global_batch_size=BATCH, seed=5)
    assert history.samples() == [
        sample for step in history.surviving() for sample in alone.share_at((step - 1) * BATCH)
    ]
    assert_exactly_once(history.samples(), SAMPLES)
    assert leftovers(job) == []
