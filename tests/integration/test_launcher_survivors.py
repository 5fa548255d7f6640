"""No agent is indispensable: the leader's is killed, a spare steps in, the next loss makes the world smaller."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.jobs import Job, job_in, leftovers

WAIT_S = 400.0

WORKER = """
echo "$GROUP_RANK $RANK $WORLD_SIZE $TORCHELASTIC_RESTART_COUNT $MASTER_PORT $$" >> ranks
while [ ! -e go ]; do sleep 0.05; done
"""


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    with job_in(tmp_path) as found:
        (tmp_path / "worker.sh").write_text(WORKER)
        yield found


def agent(job: Job, number: int, *flags: str) -> subprocess.Popen[bytes]:
    command = ["--nnodes", "1:2", "--rdzv-backend", "c10d", "--rdzv-id", job.name, "--max-restarts", "0"]
    command += ["--rdzv-endpoint", f"localhost:{job.port},localhost:{job.port + 1}", "--hold-grow", "1"]
    command += ["--rdzv-conf", "last_call_timeout=2,join_timeout=100", "--hold-linger", "1s"]
    command += ["--hold-dead-after", "5s"]  # nobody but who is killed, however busy the machine is
    command += [*flags, "--no-python", "bash", str(job.root / "worker.sh")]
    return job.start(job.holdfast(*command), log=f"agent-{number}.txt")


def rows(job: Job) -> list[list[str]]:
    """node, rank, world, restart count and store port of every worker that ever started."""
    path = job.root / "ranks"
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def wait_for(condition: Callable[[], object], what: str, job: Job) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        logs = "\n".join(f"{path.name}: {path.read_text()}" for path in sorted(job.root.glob("agent-*.txt")))
        assert time.monotonic() < deadline, f"{what} did not happen within {WAIT_S} s\n{rows(job)}\n{logs}"
        time.sleep(0.05)


def changes(job: Job) -> list[object]:
    return [event.get("change") for event in job.events()] if job.run_dir.exists() else []


def test_the_job_outlives_its_leaders_and_ends_with_the_last_node(job: Job) -> None:
    agents = [agent(job, 0)]
    wait_for(lambda: "node_joined" in changes(job), "the leader", job)
    agents.append(agent(job, 1))
    wait_for(lambda: [row[2] for row in rows(job)[-2:]] == ["2"] * 2, "the first world of two", job)
    agents.append(agent(job, 2))  # beyond the largest world: a spare
    wait_for(lambda: changes(job).count("node_joined") >= 3, "the spare", job)
    for world in ("2", "1"):
        started = len(rows(job))
        agents[0].kill()  # always the one that leads
        agents.pop(0).wait(60)
        wait_for(lambda n=started, w=world: len(rows(job)) == n + int(w), f"a world of {world}", job)
        assert {row[2] for row in rows(job)[started:]} == {world}
        assert len({row[4] for row in rows(job)[started:]}) == 1  # one store, on a node that lives
        assert len({row[3] for row in rows(job)[started:]}) == 1  # one restart count
    (job.root / "go").touch()
    assert agents[0].wait(WAIT_S) == 0
    assert "leader_lost" in changes(job)
    assert leftovers(job) == []
