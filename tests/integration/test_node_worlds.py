"""Worlds that shrink with the nodes they lose and grow with those that come, from memory alone: without storage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from support.history import History, assert_exactly_once
from support.node_jobs import NodeJob, node_job

pytestmark = pytest.mark.timeout(1200)
SCRIPT = Path(__file__).parent.parent / "support" / "elastic.py"
BATCH, SAMPLES = 12, 50


def script(root: Path, parallel: str) -> list[str]:
    own = [str(SCRIPT), "--parallel", parallel, "--steps", "100000", "--end-file", str(root / "end")]
    own += ["--batch", str(BATCH), "--samples", str(SAMPLES), "--step-seconds", "0.1"]
    return [*own, "--progress", str(root / "progress"), "--out", str(root / "out")]


def wait_world(job: NodeJob, num_ranks: int) -> dict[str, Any]:
    """Until the newest recovery has come to its end in a world of that size; its event."""

    def recovered() -> dict[str, Any] | None:
        worlds = {one["generation"]: one["world_size"] for one in job.events("generation_started")}
        found = [one for one in job.events("recovery") if one["tier"]]
        return found[-1] if found and worlds.get(found[-1]["generation"]) == num_ranks else None

    job.wait(recovered, f"a recovery in a world of {num_ranks}")
    event = recovered()
    assert event is not None
    assert event["tier"] == "peers", event
    return event


@pytest.mark.campaign
@pytest.mark.parametrize("parallel", ["fsdp2", "ddp"])
def test_four_nodes_then_three_then_two_then_four_without_any_storage(tmp_path: Path, parallel: str) -> None:
    (tmp_path / "claims").mkdir()
    flags = ["--hold-claim-store", str(tmp_path / "claims"), "--hold-grow", "1s"]
    with node_job(4, tmp_path, script(tmp_path, parallel), nnodes="2:4", flags=flags) as job:
        job.start(*job.cluster.nodes)
        step = job.wait_protected(5)
        for number, num_ranks in ((3, 3), (1, 2)):
            job.power_off(job.cluster.nodes[number])
            event = wait_world(job, num_ranks)
            assert event["step"] >= step
            step = job.wait_protected(event["step"] + 3)
        for number in (1, 3):
            job.replace(job.cluster.nodes[number])
        step = job.wait_protected(wait_world(job, 4)["step"] + 3)
        (tmp_path / "end").touch()
        assert set(job.finish().values()) == {0}, job.told()
        assert job.leftovers() == []
    history = History.read(tmp_path / "out")
    worlds = [line["world_size"] for line in history.restored]
    assert worlds in ([3, 2, 4], [3, 2, 3, 4])  # the two newcomers come together, or one after the other
    for line in history.restored:
        assert line["tier"] == "peers"
        assert {line["digest"]} == history.digests(line["step"])  # model and optimizer, bit for bit
        assert line["samples"] == line["step"] * BATCH
    assert list(history.surviving()) == list(range(1, max(history.surviving()) + 1))
    assert max(history.surviving()) >= step
    assert_exactly_once(history.samples(), SAMPLES)
    losses = list(history.losses().values())
    assert sum(losses[-4:]) < sum(losses[:4])
