"""The life of one node's snapshot tier, with real processes: daemon, workers, agent (played by the test)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from holdfast.checkpoint.boxes import Box
from holdfast.checkpoint.commit import list_steps, open_checkpoint
from holdfast.snapshot.messages import Bye, Shutdown
from support.snapshot_worker import Plan
from support.snapshots import Job, Node


@pytest.fixture
def node(request: pytest.FixtureRequest) -> Iterator[Node]:
    made = Node("a")
    made.start_daemon()
    made.hello()
    yield made
    made.close()


def test_a_run_snapshots_every_step_persists_and_leaves_nothing(node: Node, tmp_path: Path) -> None:
    job = Job([node], 2)
    plan = Plan(until=30, ranks=(0, 1), checkpoint_dir=str(tmp_path / "c"), persist_every_steps=10, step_s=0.03)
    job.start(plan)
    for worker in job.finish():
        assert worker.event("restored")["tier"] == "none"
        assert worker.event("persisted")["step"] == 30
        assert len(worker.event("done")["committed"]) >= 20
    assert [info.step for info in list_steps(tmp_path / "c") if info.complete] == [10, 20, 30]
    with open_checkpoint(tmp_path / "c" / "step-00000030") as catalog:
        out = bytearray(65536)
        catalog.read("w", Box((1, 0), (1, 65536)), out)
        assert set(out) == {(30 * 7 + 1) % 251}
    node.ask(Shutdown(persist=False), Bye)
    node.assert_gone()


def test_grants_follow_commits(node: Node) -> None:
    job = Job([node], 1)
    [worker] = job.start(Plan(until=300, ranks=(0,), step_s=0.003))
    job.finish()
    assert len(worker.event("done")["committed"]) > 200
