"""Jobs whose nodes lose power: what comes back is the run that nothing disturbed."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from support.jobs import BIN, TRAIN, fingerprints, job_in
from support.node_jobs import NodeJob, node_job

STEPS = 60
Stock = Callable[[int, str], list[dict[str, str]]]


def script(root: Path, parallel: str, *more: str) -> list[str]:
    """The training of every test here; `root` is where it leaves what it ends with."""
    own = [str(TRAIN), "--parallel", parallel, "--steps", str(STEPS), "--out", str(root / "out")]
    return [*own, "--progress", str(root / "progress"), *more]


def held(root: Path, parallel: str) -> list[str]:
    """The same with a checkpoint directory that all nodes share."""
    storage = ["--checkpoints", str(root / "checkpoints"), "--persist-every", "10", "--step-seconds", "0.08"]
    return script(root, parallel, *storage)


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Stock:
    """What so many ranks end with under torchrun, without holdfast."""
    known: dict[tuple[int, str], list[dict[str, str]]] = {}

    def run(ranks: int, parallel: str) -> list[dict[str, str]]:
        if (ranks, parallel) not in known:
            root = tmp_path_factory.mktemp("stock")
            with job_in(root) as job:
                command = [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", str(ranks)]
                assert job.run([*command, *script(root, parallel, "--plain")]) == 0, job.output()
            known[ranks, parallel] = fingerprints(root / "out", ranks)
        return known[ranks, parallel]

    return run


def lose_and_replace(job: NodeJob, *numbers: int) -> None:
    """Power off some nodes at once, put new machines in their places, and wait for the recovery."""
    before = len(job.events("recovery"))
    lost = [job.cluster.nodes[number] for number in numbers]
    job.power_off(*lost)
    for node in lost:
        job.replace(node)
    job.wait(lambda: len(job.events("recovery")) > before, f"the recovery from the loss of {numbers}")


def assert_undisturbed(job: NodeJob, expected: list[dict[str, str]]) -> None:
    """Every agent ended well, with the bits of the run that nothing disturbed, and left nothing."""
    assert set(job.finish().values()) == {0}, job.told()
    assert fingerprints(job.job.root / "out", len(expected)) == expected
    assert job.leftovers() == []


@pytest.mark.campaign
def test_two_nodes_lose_a_worker_then_all_of_one_and_end_with_the_bits_of_torchrun(
    tmp_path: Path, stock: Stock
) -> None:
    with node_job(2, tmp_path, held(tmp_path, "ddp")) as job:
        first, second = job.cluster.nodes
        job.start(first, second)
        job.wait_step(5)
        first.kill(str(TRAIN))
        job.wait(lambda: len(job.events("recovery")) == 1, "the recovery of a worker")
        job.wait_step(25)
        lose_and_replace(job, 1)
        assert_undisturbed(job, stock(2, "ddp"))
        worker, node = job.events("recovery")
        assert worker["tier"] == "memory"
        assert node["tier"] in {"storage", "peers"}


@pytest.mark.campaign
@pytest.mark.parametrize("number", range(4))
def test_any_one_of_four_nodes_loses_power_at_any_instant_and_is_replaced(
    tmp_path: Path, stock: Stock, number: int
) -> None:
    chance = random.Random(number)
    with node_job(4, tmp_path, held(tmp_path, "fsdp2")) as job:
        job.start(*job.cluster.nodes)
        job.wait_step(11 + chance.randrange(30))
        lose_and_replace(job, number)
        assert_undisturbed(job, stock(4, "fsdp2"))
        [recovery] = job.events("recovery")
        assert recovery["tier"] in {"storage", "peers"}
