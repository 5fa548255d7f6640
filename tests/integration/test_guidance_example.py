"""examples/let, at the smallest scale: three trainings, one kill, one table, one plot."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from support.jobs import BIN, job_in

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "let"


@pytest.mark.campaign
def test_the_experiment_runs_to_its_table_through_a_kill(tmp_path: Path) -> None:
    with job_in(tmp_path) as job:
        options = [
            "--steps",
            "30",
            "--eval-every",
            "10",
            "--eval-batches",
            "1",
            "--batch",
            "2",
            "--data-bytes",
            "100000",
            "--teacher-steps",
            "30",
        ]
        out = tmp_path / "let"
        command = [str(BIN / "python"), str(EXAMPLE / "experiment.py"), "--out", str(out), "--kill-at", "13", *options]
        assert job.run(command, timeout_s=280) == 0, job.output()
        table = job.output()[job.output().index(" step   plain") :]
    lines = [json.loads(line) for line in (out / "guided" / "curve.jsonl").read_text().splitlines()]
    assert {line["step"] for line in lines} == {10, 20, 30}
    assert ["cosine" in line for line in lines if line["step"] in (10, 30)] == [True, False]
    assert len([line for line in table.splitlines() if line[:5].strip().isdigit()]) == 3
    assert "was killed and went on from memory" in table
    lines_drawn = [
        node.get("points", "").split() for node in ElementTree.parse(out / "plot.svg").iter() if node.get("points")
    ]
    assert [len(points) for points in lines_drawn] == [3, 3]
