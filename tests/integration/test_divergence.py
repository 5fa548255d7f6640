"""Replicas on several nodes that come to differ: named, counted, outvoted or refused; drift stays each node's own."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.jobs import Job, job_in, leftovers

pytestmark = [pytest.mark.campaign, pytest.mark.timeout(600)]
SCRIPT = Path(__file__).with_name("divergence_script.py")


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    with job_in(tmp_path) as found:
        paths = [str(SCRIPT.parent.parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        found.environment = {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
        yield found


def run(job: Job, kind: str, nodes: int) -> list[dict[str, Any]]:
    """To its end on so many nodes with a rank each; what the ranks say."""
    out = job.root / "out"
    out.mkdir()
    flags = ["--nnodes", str(nodes), "--nproc-per-node", "1", "--max-restarts", "3", "--rdzv-backend", "c10d"]
    flags += ["--rdzv-endpoint", f"localhost:{job.port}", "--rdzv-id", job.name]
    agents = [
        job.start(
            job.holdfast(*flags, "--hold-domain", f"domain-{node}", SCRIPT, out, job.checkpoints, kind),
            log=f"agent-{node}.txt",
        )
        for node in range(nodes)
    ]
    codes = [process.wait(400) for process in agents]
    assert codes == [0] * nodes, "\n".join(job.output(f"agent-{node}.txt") for node in range(nodes))
    assert (out / "killed").exists()
    assert leftovers(job) == []
    return [json.loads((out / f"rank-{rank}.json").read_text()) for rank in range(nodes)]


def told(job: Job) -> list[dict[str, Any]]:
    return [event for event in job.events() if event["kind"] == "notice" and event.get("about") == "divergence"]


def at(job: Job, step: int, rank: int) -> dict[str, str]:
    found: dict[str, str] = json.loads((job.root / "out" / f"step-{step}-rank-{rank}.json").read_text())
    return found


def test_a_planted_divergence_of_two_replicas_is_named_and_counted_and_no_copy_is_used(job: Job) -> None:
    ranks = run(job, "bit", 2)
    found = told(job)
    assert found[0]["severity"] == "error"
    assert "copies of model.body.weight" in found[0]["text"]
    assert "silent corruption" in found[0]["text"]
    assert "rank 0 on node 0 against rank 1 on node 1; no copy has a majority" in found[0]["text"]
    assert [event["count"] for event in found] == list(range(1, len(found) + 1))
    assert {rank["tier"] for rank in ranks} == {"storage"}
    assert ranks[0]["restored"] == ranks[1]["restored"]
    assert ranks[0]["end"] == ranks[1]["end"]


def test_two_replicas_outvote_the_third_that_has_diverged(job: Job) -> None:
    ranks = run(job, "bit", 3)
    assert at(job, 10, 0) == at(job, 10, 2) != at(job, 10, 1)
    assert all("the majority's copy is used" in event["text"] for event in told(job))
    assert any("copies of model.body.weight" in event["text"] for event in told(job))
    for rank in ranks:
        assert rank["tier"] in ("memory", "peers")
        assert rank["restored"] == at(job, rank["step"], 0)
        assert rank["end"] == ranks[0]["end"]


def test_norms_that_nobody_keeps_equal_go_on_as_each_rank_had_them(job: Job) -> None:
    ranks = run(job, "drift", 2)
    found = told(job)
    assert {event["severity"] for event in found} == {"warning"}
    assert any("copies of model.norm.weight" in event["text"] for event in found)
    assert not any("model.body" in event["text"] for event in found)
    for rank, said in enumerate(ranks):
        assert said["tier"] in ("memory", "peers")
        assert said["restored"] == at(job, said["step"], rank)
    assert ranks[0]["restored"]["norm.weight"] != ranks[1]["restored"]["norm.weight"]
