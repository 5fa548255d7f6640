"""Jobs whose nodes lose power while their storage cannot be used: the memory of the others gives back every bit.

Each job writes checkpoints until nodes are lost. At that moment its checkpoint directory goes away, so whatever comes
back comes from memory; it is there again after the recovery, for the end of the job.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from holdfast.checkpoint.version import Version
from support.jobs import BIN, TRAIN, fingerprints, job_in
from support.node_jobs import NodeJob, node_job
from support.node_memory import exchanging, protected, protected_versions

pytestmark = pytest.mark.timeout(1200)
STEPS = 40
Stock = Callable[[int, str], list[dict[str, str]]]


def script(root: Path, parallel: str, *more: str) -> list[str]:
    """The training of every test here; `root` is where it leaves what it ends with."""
    own = [str(TRAIN), "--parallel", parallel, "--steps", str(STEPS), "--out", str(root / "out")]
    return [*own, "--progress", str(root / "progress"), *more]


def held(root: Path, parallel: str) -> list[str]:
    """The same with a checkpoint directory that all nodes share."""
    storage = ["--checkpoints", str(root / "checkpoints"), "--persist-every", "5", "--step-seconds", "0.08"]
    return script(root, parallel, *storage)


def flags(root: Path, redundancy: str) -> list[str]:
    """Of `holdfast run`: the claim store is no part of the storage that goes away."""
    (root / "claims").mkdir()
    return ["--hold-redundancy", redundancy, "--hold-claim-store", str(root / "claims")]


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


def recoveries(job: NodeJob) -> list[dict[str, Any]]:
    """Those that came to their end; one that a further loss overtook has no tier."""
    return [event for event in job.events("recovery") if event["tier"]]


def lose(job: NodeJob, numbers: tuple[int, ...], when: Callable[[], bool] = lambda: True) -> int:
    """Power off nodes and take the storage away, at the next moment that is right; the newest step protected then."""
    nodes = [job.cluster.nodes[number] for number in numbers]
    job.wait(when, "the moment at which power is lost")
    step = protected(job.cluster.nodes)
    job.power_off(*nodes)
    job.lose_storage()
    return step


def replace(job: NodeJob, numbers: tuple[int, ...]) -> None:
    """New machines in the places of lost ones, with an agent on each."""
    for number in numbers:
        job.replace(job.cluster.nodes[number])


def assert_from_peers(job: NodeJob, least: int, count: int = 1) -> dict[str, Any]:
    """Wait for the recovery; it came from the memory of other nodes, and lost nothing that had been protected. The
    storage is there again: the job may end."""
    job.wait(lambda: len(recoveries(job)) >= count, f"recovery {count} from peers")
    job.return_storage()
    event = recoveries(job)[count - 1]
    assert event["tier"] == "peers", f"{event}\n{job.told()}"
    assert event["step"] >= least, event
    return event


def undisturbed(tmp_path: Path, *few: str) -> list[dict[str, str]]:
    """How two ranks of torchrun end that take other steps than `stock`."""
    folder = tmp_path / "undisturbed"
    folder.mkdir()
    with job_in(folder) as plain:
        assert plain.plain(TRAIN, *script(folder, "fsdp2", "--plain")[1:], *few, ranks=2) == 0, plain.output()
    return fingerprints(folder / "out", 2)


def assert_undisturbed(job: NodeJob, expected: list[dict[str, str]]) -> None:
    """Every agent ended well, with the bits of the run that nothing disturbed, and left nothing."""
    assert set(job.finish().values()) == {0}, job.told()
    assert fingerprints(job.job.root / "out", len(expected)) == expected
    assert job.leftovers() == []


@pytest.mark.campaign
def test_two_nodes_lose_a_worker_then_all_of_one_and_end_with_the_bits_of_torchrun(
    tmp_path: Path, stock: Stock
) -> None:
    expected = stock(2, "ddp")
    with node_job(2, tmp_path, held(tmp_path, "ddp"), flags=flags(tmp_path, "auto")) as job:
        first, second = job.cluster.nodes
        job.start(first, second)
        job.wait_protected(5)
        first.kill(str(TRAIN))
        job.wait(lambda: len(recoveries(job)) == 1, "the recovery of a worker")
        assert recoveries(job)[0]["tier"] == "memory"
        job.wait_protected(recoveries(job)[0]["step"])
        least = lose(job, (1,))
        replace(job, (1,))
        assert_from_peers(job, least, 2)
        assert_undisturbed(job, expected)


@pytest.mark.campaign
@pytest.mark.parametrize(("number", "redundancy"), [(0, "auto"), (1, "2+2"), (2, "3+1"), (3, "2+2")])
def test_any_one_of_four_nodes_loses_power_at_any_instant_and_is_replaced(
    tmp_path: Path, stock: Stock, number: int, redundancy: str
) -> None:
    chance = random.Random(number)
    expected = stock(4, "fsdp2")
    with node_job(4, tmp_path, held(tmp_path, "fsdp2"), flags=flags(tmp_path, redundancy)) as job:
        job.start(*job.cluster.nodes)
        job.wait_protected(5 + chance.randrange(25))
        least = lose(job, (number,))
        replace(job, (number,))
        assert_from_peers(job, least)
        assert_undisturbed(job, expected)


@pytest.mark.campaign
@pytest.mark.parametrize("numbers", list(itertools.combinations(range(4), 2)))
@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_any_two_of_four_nodes_lose_power_at_once_and_are_replaced(
    tmp_path: Path, stock: Stock, numbers: tuple[int, int], parallel: str
) -> None:
    slow = ["--hold-bandwidth", "100k"]  # so that an exchange takes as long as some steps
    expected = stock(4, parallel)
    with node_job(4, tmp_path, held(tmp_path, parallel), flags=[*flags(tmp_path, "2+2"), *slow]) as job:
        job.start(*job.cluster.nodes)
        job.wait_protected(5)
        least = lose(job, numbers, lambda: exchanging(job.cluster.nodes))
        replace(job, numbers)
        assert_from_peers(job, least)
        assert_undisturbed(job, expected)


@pytest.mark.campaign
def test_two_nodes_lose_power_twice_in_a_row(tmp_path: Path, stock: Stock) -> None:
    expected = stock(4, "fsdp2")
    with node_job(4, tmp_path, held(tmp_path, "fsdp2"), flags=flags(tmp_path, "2+2")) as job:
        job.start(*job.cluster.nodes)
        job.wait_protected(5)
        least = lose(job, (0, 1))
        replace(job, (0, 1))
        step = assert_from_peers(job, least, 1)["step"]
        job.wait_protected(step)
        least = lose(job, (2, 3))
        replace(job, (2, 3))
        assert_from_peers(job, least, 2)
        assert_undisturbed(job, expected)


@pytest.mark.campaign
def test_what_was_restored_survives_the_next_loss_though_no_step_was_done_since(tmp_path: Path) -> None:
    """Two nodes with one parity: what the first loss has left is gone with the second one. A step takes seconds."""
    few = ["--steps", "7", "--step-seconds", "3"]
    with node_job(2, tmp_path, [*held(tmp_path, "fsdp2"), *few], flags=flags(tmp_path, "auto")) as job:
        job.start(*job.cluster.nodes)
        job.wait_protected(1)
        least = lose(job, (1,))
        replace(job, (1,))
        job.wait(lambda: _restored_again(job, 2), "the restored state is a version, and protected")
        [restored] = _restored_again(job, 2)
        assert restored.step >= least
        job.power_off(job.cluster.nodes[0])
        assert {one.step for one in protected_versions(job.cluster.nodes) if one.generation == restored.generation} == {
            restored.step
        }
        replace(job, (0,))
        job.wait(lambda: [one for one in recoveries(job) if one["generation"].endswith("-g0003")], "a recovery")
        job.return_storage()
        event = recoveries(job)[-1]
        assert (event["tier"], event["step"]) == ("peers", restored.step), f"{event}\n{job.told()}"
        assert set(job.finish().values()) == {0}, job.told()
        found = fingerprints(tmp_path / "out", 2)
        assert job.leftovers() == []
    assert found == undisturbed(tmp_path, *few[:2])


def _restored_again(job: NodeJob, generation: int) -> set[Version]:
    """What a generation has made and protected."""
    return {one for one in protected_versions(job.cluster.nodes) if one.generation.generation == generation}


@pytest.mark.campaign
@pytest.mark.parametrize("second", [0, 2])
def test_a_second_node_loses_power_while_the_first_one_is_recovered(tmp_path: Path, stock: Stock, second: int) -> None:
    expected = stock(4, "fsdp2")
    with node_job(4, tmp_path, held(tmp_path, "fsdp2"), flags=flags(tmp_path, "2+2")) as job:
        job.start(*job.cluster.nodes)
        job.wait_protected(5)
        least = lose(job, (3,))
        replace(job, (3,))
        job.wait(lambda: _started(job, 2) == 4, "the second generation")
        job.power_off(job.cluster.nodes[second])
        replace(job, (second,))
        assert_from_peers(job, least)
        assert_undisturbed(job, expected)


@pytest.mark.campaign
def test_one_node_more_than_the_parities_takes_the_job_back_to_storage_and_it_says_why(
    tmp_path: Path, stock: Stock
) -> None:
    expected = stock(4, "fsdp2")
    with node_job(4, tmp_path, held(tmp_path, "fsdp2"), flags=flags(tmp_path, "2+2")) as job:
        job.start(*job.cluster.nodes)
        job.wait_protected(5)
        job.wait(lambda: list(job.job.checkpoints.glob("step-*/root")), "a checkpoint")
        job.power_off(*job.cluster.nodes[1:])
        replace(job, (1, 2, 3))
        job.wait(lambda: recoveries(job), "the recovery")
        [event] = recoveries(job)
        assert event["tier"] == "storage", event
        assert "too many nodes" in event["reason"], event
        assert event["reason"] in (job.job.root / "agent-n0.txt").read_text()
        assert_undisturbed(job, expected)


def _started(job: NodeJob, generation: int) -> int:
    """How many nodes have started the workers of a generation."""
    found = [event["generation"] for event in job.events("generation_started")]
    return sum(one.endswith(f"-g{generation:04d}") for one in found)


def test_a_node_of_two_loses_power_and_comes_back_from_the_memory_of_the_other(tmp_path: Path) -> None:
    """The one of these that every test run has; the parity of one node gives back the image of the other."""
    few, gate = ["--steps", "16"], tmp_path / "gate"
    waits = ["--paced", "--gate", str(gate), "--gate-at", "12"]  # for memory, then for the loss, however long they take
    with node_job(2, tmp_path, [*held(tmp_path, "fsdp2"), *few, *waits], flags=flags(tmp_path, "auto")) as job:
        job.start(*job.cluster.nodes)
        job.wait_protected(2)
        least = lose(job, (1,))
        gate.touch()
        replace(job, (1,))
        assert_from_peers(job, least)
        assert set(job.finish().values()) == {0}, job.told()
        found = fingerprints(tmp_path / "out", 2)
        assert job.leftovers() == []
    assert found == undisturbed(tmp_path, *few)
