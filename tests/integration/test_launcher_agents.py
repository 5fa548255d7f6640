"""Several agents of one job on loopback: one generation, one restart count, whoever fails."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.jobs import Job, job_in, leftovers, marked

WAIT_S = 400.0

WORKER = """
echo "$GROUP_RANK $RANK $WORLD_SIZE $TORCHELASTIC_RESTART_COUNT $MASTER_PORT $$" >> ranks
if [ "$1" = fail ] && [ "$RANK $TORCHELASTIC_RESTART_COUNT" = "3 0" ]; then
  while [ "$(wc -l < ranks)" -lt 4 ]; do sleep 0.05; done; kill -9 $$
fi
[ "$1" = fail ] && [ "$TORCHELASTIC_RESTART_COUNT" = 0 ] && sleep 600
[ "$1" = wait ] && while [ ! -e go ]; do sleep 0.05; done
exit 0
"""


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    with job_in(tmp_path) as found:
        (tmp_path / "worker.sh").write_text(WORKER)
        yield found


BUSY = ("--hold-dead-after", "20s")
"""Where no node is lost: none is to be counted as lost because the machine is busy."""
LOST = ("--hold-dead-after", "5s")
"""Where one is, and no other."""


def agent(job: Job, number: int, mode: str, *flags: str) -> subprocess.Popen[bytes]:
    """Start one agent with two workers; its output goes to agent-NUMBER.txt."""
    command = job.holdfast("--nproc-per-node", "2", *flags, "--no-python", "bash", str(job.root / "worker.sh"), mode)
    return job.start(command, log=f"agent-{number}.txt")


def c10d(job: Job, nnodes: str = "2") -> list[str]:
    flags = ["--nnodes", nnodes, "--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{job.port}"]
    flags += ["--rdzv-id", job.name, "--rdzv-conf", "last_call_timeout=1,join_timeout=100"]
    return [*flags, "--hold-grow", "1"]


def rows(job: Job) -> list[list[str]]:
    """node, rank, world, restart count, store port and pid of every worker that ever started."""
    path = job.root / "ranks"
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def wait_for(condition: Callable[[], object], what: str, job: Job) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        logs = "\n".join(path.read_text() for path in job.root.glob("agent-*.txt"))
        assert time.monotonic() < deadline, f"{what} did not happen within {WAIT_S} s\n{logs}"
        time.sleep(0.05)


def finish(*agents: subprocess.Popen[bytes]) -> list[int]:
    return [process.wait(WAIT_S) for process in agents]


# PET_* are defaults of the same flags (test_launcher_arguments).
@pytest.mark.parametrize("backend", ["c10d", "static", pytest.param("PET", marks=pytest.mark.campaign)])
def test_a_failure_on_one_node_restarts_both(job: Job, backend: str) -> None:
    agents = []
    for number in (1, 0):
        flags = ["--max-restarts", "2", *BUSY]
        if backend == "c10d":
            flags += c10d(job)
        elif backend == "static":
            flags += ["--nnodes", "2", "--node-rank", str(number), "--master-addr", "127.0.0.1"]
            flags += ["--master-port", str(job.port)]
        else:
            job.environment = {
                "PET_NNODES": "2",
                "PET_NODE_RANK": str(number),
                "PET_MASTER_ADDR": "127.0.0.1",
                "PET_MASTER_PORT": str(job.port),
            }
        agents.append(agent(job, number, "fail", *flags))
    assert finish(*agents) == [0, 0], job.output("agent-0.txt") + job.output("agent-1.txt")
    first, second = rows(job)[:4], rows(job)[4:]
    for generation, count in ((first, "0"), (second, "1")):
        assert sorted(row[1] for row in generation) == ["0", "1", "2", "3"]
        assert {row[3] for row in generation} == {count}
        assert {row[2] for row in generation} == {"4"}
        assert len({row[4] for row in generation}) == 1
    assert first[0][4] != second[0][4]
    generations = {e["generation"] for e in job.events() if e["kind"] == "generation_started"}
    assert len(generations) == 2
    assert len([e for e in job.events() if e["kind"] == "recovery"]) == 1
    assert leftovers(job) == []


@pytest.mark.parametrize("victim", ["leader", "member"])
def test_a_killed_agent_takes_its_workers_along_and_its_return_resumes_the_job(job: Job, victim: str) -> None:
    leader = agent(job, 0, "wait", *c10d(job), *LOST)
    wait_for(lambda: "node_joined" in str([e.get("change") for e in _events(job)]), "the leader", job)
    member = agent(job, 1, "wait", *c10d(job), *LOST)
    wait_for(lambda: len(rows(job)) == 4, "the first generation", job)
    lost, other = (leader, member) if victim == "leader" else (member, leader)
    lost.kill()
    lost.wait(60)
    node = {"leader": "0", "member": "1"}[victim]
    pids = [int(row[5]) for row in rows(job) if row[0] == node]
    wait_for(lambda: not any(pid in marked(job.name) for pid in pids), "the end of its workers", job)
    again = agent(job, 2, "wait", *c10d(job), *LOST)
    wait_for(lambda: len(rows(job)) == 8, "the next generation", job)
    (job.root / "go").touch()
    assert finish(other, again) == [0, 0]
    assert len({row[4] for row in rows(job)[4:]}) == 1
    assert leftovers(job) == []


def test_a_silent_node_is_missed_and_the_others_go_on(job: Job) -> None:
    stays = agent(job, 0, "wait", *c10d(job, "1:2"), *LOST)
    wait_for(lambda: "node_joined" in str([e.get("change") for e in _events(job)]), "the leader", job)
    hangs = agent(job, 1, "wait", *c10d(job, "1:2"), *LOST)
    wait_for(lambda: len([row for row in rows(job) if row[2] == "4"]) == 4, "a world of four", job)
    os.kill(hangs.pid, signal.SIGSTOP)
    wait_for(lambda: rows(job)[-1][2] == "2" and rows(job)[-2][2] == "2", "a world of two", job)
    assert "lost node" in job.output("agent-0.txt")
    os.kill(hangs.pid, signal.SIGCONT)
    wait_for(lambda: [row[2] for row in rows(job)[-4:]] == ["4"] * 4, "the larger world", job)
    (job.root / "go").touch()
    assert finish(stays, hangs) == [0, 0]
    assert leftovers(job) == []


def test_a_signal_to_one_agent_ends_the_job_on_both(job: Job) -> None:
    agents = [agent(job, number, "wait", *c10d(job), *BUSY) for number in range(2)]
    wait_for(lambda: len(rows(job)) == 4, "the first generation", job)
    agents[1].terminate()
    assert finish(*agents) == [1, 1]
    assert leftovers(job) == []


def test_exhausted_restarts_end_both_agents_with_code_1(job: Job) -> None:
    agents = [agent(job, number, "fail", *c10d(job), *BUSY) for number in range(2)]
    assert finish(*agents) == [1, 1]
    both = job.output("agent-0.txt") + job.output("agent-1.txt")
    assert both.count("rank 3 was killed (SIGKILL)") == 2
    assert both.count("Root Cause (first observed failure):") >= 1
    assert leftovers(job) == []


def test_an_agent_of_another_job_is_turned_away(job: Job) -> None:
    first = agent(job, 0, "wait", *c10d(job))
    wait_for(lambda: "node_joined" in str([e.get("change") for e in _events(job)]), "the leader", job)
    flags = c10d(job)
    flags[flags.index("--rdzv-id") + 1] = "another"
    stranger = agent(job, 1, "wait", "--hold-job", f"{job.name}x", *flags)
    assert stranger.wait(WAIT_S) == 1
    assert "serves job" in job.output("agent-1.txt")
    first.terminate()
    first.wait(WAIT_S)


def _events(job: Job) -> list[dict[str, object]]:
    return job.events() if job.run_dir.exists() else []
