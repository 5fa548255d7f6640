"""Networks that fall apart, with real agents on nodes in namespaces; every schedule of it is in the simulation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from support.node_jobs import NodeJob, node_job
from support.nodes import Node

pytestmark = [pytest.mark.campaign, pytest.mark.timeout(900)]
WORKER = """
echo "$GROUP_WORLD_SIZE" > "world-$(hostname)"
while [ ! -e go ]; do sleep 0.1; done
"""
WITHIN_S = 120.0


@contextmanager
def running(root: Path, nnodes: str, *flags: str) -> Iterator[NodeJob]:
    """A job on as many nodes as there may be, all of them in the world."""
    (root / "worker.sh").write_text(WORKER)
    script = ["--no-python", "bash", str(root / "worker.sh")]
    flags = ("--hold-snapshot-memory", "0", "--hold-grow", "1s", "--hold-requeue-code", "75", *flags)
    largest = int(nnodes.partition(":")[2])
    with node_job(largest, root, script, nnodes=nnodes, flags=flags) as job:
        job.start(*job.cluster.nodes)
        is_on(job, largest, *job.cluster.nodes)
        yield job


def world_on(job: NodeJob, node: Node) -> int:
    """Size of the world of which a worker runs on the node, 0 where none runs."""
    if not any("worker.sh" in command and " run " not in command for command in node.processes().values()):
        return 0
    told = job.job.root / f"world-{node.name}"
    return int(told.read_text() or 0) if told.exists() else 0


def is_on(job: NodeJob, world: int, *nodes: Node) -> None:
    """Until workers of a world of that size run on the nodes (0: until none runs)."""
    job.wait(lambda: all(world_on(job, node) == world for node in nodes), f"a world of {world}", within_s=WITHIN_S)


def ends(job: NodeJob, *nodes: Node) -> None:
    """The scripts end, and so does the job."""
    (job.job.root / "go").touch()
    assert [job.agents[node].wait(60) for node in nodes] == [0] * len(nodes), job.told()
    assert job.leftovers() == []


@pytest.mark.parametrize("alone", [0, 2])
def test_three_and_one_part_and_meet_again(tmp_path: Path, alone: int) -> None:
    with running(tmp_path, "2:4") as job:
        nodes = job.cluster.nodes
        others = [node for node in nodes if node is not nodes[alone]]
        job.cluster.cut(nodes[alone])
        is_on(job, 3, *others)
        is_on(job, 0, nodes[alone])
        job.cluster.heal(nodes[alone])
        is_on(job, 4, *nodes)
        ends(job, *nodes)


def test_two_nodes_whose_cable_was_cut_both_go_on_and_meet_again(tmp_path: Path) -> None:
    with running(tmp_path, "1:2") as job:
        nodes = job.cluster.nodes
        job.cluster.cut(nodes[1])
        is_on(job, 1, *nodes)
        job.cluster.heal(nodes[1])
        is_on(job, 2, *nodes)
        ends(job, *nodes)


def test_two_nodes_minus_the_first(tmp_path: Path) -> None:
    with running(tmp_path, "1:2") as job:
        first, second = job.cluster.nodes
        job.power_off(first)
        is_on(job, 1, second)
        ends(job, second)


def test_one_of_four_goes_on_with_a_claim_store(tmp_path: Path) -> None:
    with running(tmp_path, "1:4", "--hold-claim-store", str(tmp_path / "claims")) as job:
        *lost, last = job.cluster.nodes
        job.power_off(*lost)
        is_on(job, 1, last)
        ends(job, last)


def test_one_of_four_waits_without_a_claim_store_and_ends_with_the_requeue_code(tmp_path: Path) -> None:
    flags = ["--rdzv-conf", "last_call_timeout=1,join_timeout=15"]
    with running(tmp_path, "1:4", *flags) as job:
        *lost, last = job.cluster.nodes
        job.power_off(*lost)
        is_on(job, 0, last)
        assert job.agents[last].wait(60) == 75, job.told()
        assert job.leftovers() == []
