"""Jobs whose nodes lose power: what comes back is the run that nothing disturbed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.jobs import BIN, TRAIN, fingerprints, job_in
from support.node_jobs import NodeJob, node_job

STEPS = 60
STEP_S = "0.08"


def script(root: Path, *more: str) -> list[str]:
    """The training of every test here; `root` is where it leaves what it ends with."""
    own = [str(TRAIN), "--parallel", "ddp", "--steps", str(STEPS), "--out", str(root / "out")]
    return [*own, "--progress", str(root / "progress"), *more]


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[dict[str, str]]]:
    """What two ranks end with under torchrun, without holdfast."""
    root = tmp_path_factory.mktemp("stock")
    with job_in(root) as job:
        command = [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "2", *script(root, "--plain")]
        assert job.run(command) == 0, job.output()
        yield fingerprints(root / "out", 2)


@pytest.fixture
def two_nodes(tmp_path: Path) -> Iterator[NodeJob]:
    storage = ["--checkpoints", str(tmp_path / "checkpoints"), "--persist-every", "10", "--step-seconds", STEP_S]
    with node_job(2, tmp_path, script(tmp_path, *storage)) as job:
        yield job


def test_two_nodes_lose_a_worker_then_all_of_one_and_end_with_the_bits_of_torchrun(
    two_nodes: NodeJob, stock: list[dict[str, str]]
) -> None:
    job = two_nodes
    first, second = job.cluster.nodes
    job.start(first, second)
    job.wait_step(5)
    first.kill(str(TRAIN))
    job.wait(lambda: len(job.events("recovery")) == 1, "the recovery of a worker")
    job.wait_step(25)
    job.power_off(second)
    job.replace(second)
    assert set(job.finish().values()) == {0}, job.told()
    worker, node = job.events("recovery")
    assert worker["tier"] == "memory"
    assert node["tier"] in {"storage", "peers"}
    assert fingerprints(job.job.root / "out", 2) == stock
    assert job.leftovers() == []
