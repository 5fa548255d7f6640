"""Several nodes, each with its daemon, on one machine: versions complete together, images are read across nodes."""

from __future__ import annotations

import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from holdfast.checkpoint.boxes import Box
from holdfast.checkpoint.commit import list_steps, open_checkpoint
from holdfast.snapshot.messages import Bye, Shutdown
from support.snapshot_worker import Plan
from support.snapshots import TIMEOUT_S, Job, Node


@pytest.fixture
def nodes() -> Iterator[list[Node]]:
    made = [Node("a"), Node("b")]
    for node in made:
        node.start_daemon()
    for node in made:
        node.hello()
    yield made
    for node in made:
        node.close()


def test_two_nodes_complete_and_persist_versions_together(nodes: list[Node], tmp_path: Path) -> None:
    job = Job(nodes, 1)
    plan = Plan(until=40, ranks=(0, 1), step_s=0.03, checkpoint_dir=str(tmp_path / "c"), persist_every_steps=20)
    job.start(plan)
    for worker in job.finish():
        assert worker.event("persisted")["step"] == 40
    assert [info.step for info in list_steps(tmp_path / "c") if info.complete] == [20, 40]
    with open_checkpoint(tmp_path / "c" / "step-00000040") as catalog:
        out = bytearray(2 * 65536)
        catalog.read("w", Box((0, 0), (2, 65536)), out)
        assert out == bytes([40 * 7 % 251]) * 65536 + bytes([(40 * 7 + 1) % 251]) * 65536
    for node in nodes:
        node.ask(Shutdown(persist=False), Bye)
        node.assert_gone()


def test_images_of_the_other_node_are_read_by_range(nodes: list[Node]) -> None:
    job = Job(nodes, 1)
    job.start(Plan(until=100000, ranks=(0, 1), step_s=0.02, row_bytes=9 << 20))
    complete = nodes[0].complete(10).version.step
    job.end()
    for worker in job.start(Plan(until=complete + 20, ranks=(0, 1), row_bytes=9 << 20, step_s=0.02)):
        worker.wait()
        assert worker.event("restored")["tier"] == "peers"
        assert worker.event("restored")["step"] >= complete


@pytest.mark.parametrize("which", [0, 1])
def test_a_daemon_of_either_node_may_be_killed_and_replaced(nodes: list[Node], tmp_path: Path, which: int) -> None:
    job = Job(nodes, 1)
    job.start(Plan(until=300, ranks=(0, 1), step_s=0.02, checkpoint_dir=str(tmp_path / "c")))
    nodes[0].complete(30)
    before = nodes[which].endpoint
    nodes[which].kill_daemon()
    nodes[which].start_daemon()
    nodes[which].hello()
    assert nodes[which].endpoint == before
    nodes[0].complete(150)
    for worker in job.finish():
        assert worker.event("persisted")["step"] == 300


def test_a_node_without_a_rank_of_the_session_holds_nobody_up(nodes: list[Node], tmp_path: Path) -> None:
    job = Job(nodes, 1)
    plan = Plan(until=60, ranks=(1,), step_s=0.02, checkpoint_dir=str(tmp_path / "c"), persist_every_steps=20)
    worker = job.start(plan)[1]
    job.finish()
    assert worker.event("persisted")["step"] == 60
    assert len(worker.event("done")["committed"]) >= 20


@pytest.mark.parametrize("which", [0, 1])
def test_a_successor_that_listens_elsewhere_is_found_by_the_other_nodes(
    nodes: list[Node], tmp_path: Path, which: int
) -> None:
    job = Job(nodes, 1)
    job.start(Plan(until=300, ranks=(0, 1), step_s=0.02, checkpoint_dir=str(tmp_path / "c")))
    nodes[0].complete(30)
    before = nodes[which].endpoint
    nodes[which].kill_daemon()
    with socket.socket() as squatter:
        squatter.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        squatter.bind(("127.0.0.1", int(before.rpartition(":")[2])))
        squatter.listen()
        nodes[which].start_daemon()
        nodes[which].hello()
        assert nodes[which].endpoint != before
        for worker in job.finish():
            assert worker.event("persisted")["step"] == 300


def test_nodes_without_agents_persist_their_newest_version_together(nodes: list[Node], tmp_path: Path) -> None:
    agents = [subprocess.Popen(["sleep", "600"]) for _ in nodes]
    for node, agent in zip(nodes, agents, strict=True):
        node.hello(agent_pid=agent.pid, linger_s=1.0)
    job = Job(nodes, 1)
    job.start(Plan(until=100000, ranks=(0, 1), step_s=0.01, checkpoint_dir=str(tmp_path / "c")))
    complete = nodes[0].complete(30).version.step
    for agent in agents:
        agent.kill()
        agent.wait()
    for worker in job.workers:
        worker.kill()
    for node in nodes:
        node.assert_gone()
    [info] = [info for info in list_steps(tmp_path / "c") if info.complete]
    assert info.step >= complete


def test_a_save_is_agreed_across_nodes(nodes: list[Node], tmp_path: Path) -> None:
    job = Job(nodes, 1)
    plan = Plan(until=1000, ranks=(0, 1), step_s=0.01, checkpoint_dir=str(tmp_path / "c"), stop_at=60)
    quiet = Plan(until=1000, ranks=(0, 1), step_s=0.01, checkpoint_dir=str(tmp_path / "c"), save_at=20)
    workers = job.start(plan, quiet)
    job.finish()
    agreed = [[event for event in worker.events if event["event"] == "agreed"] for worker in workers]
    assert agreed[0] == agreed[1]
    assert [event["kind"] for event in agreed[0]] == ["save", "stop"]


def test_a_killed_worker_on_one_node_loses_no_complete_version(nodes: list[Node]) -> None:
    job = Job(nodes, 1)
    plan = Plan(until=100000, ranks=(0, 1), step_s=0.01)
    _, killed = job.start(plan, Plan(until=100000, ranks=(0, 1), step_s=0.01, kill_at=40))
    assert killed.process.wait(TIMEOUT_S) == -signal.SIGKILL
    nodes[0].complete(1)
    complete = nodes[0].newest_complete
    job.end()
    for worker in job.start(Plan(until=60, ranks=(0, 1), step_s=0.002)):
        worker.wait()
        assert complete <= worker.event("restored")["step"] < killed.event("killed")["step"]
