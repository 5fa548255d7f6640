"""Guidance under `holdfast run`: a kill in mid-guidance changes no bit of what training ends with."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.guidance_script import main as train
from support.jobs import job_in, leftovers

SCRIPT = Path(__file__).resolve().parents[1] / "support" / "guidance_script.py"
TESTS = str(Path(__file__).resolve().parents[1])


@pytest.mark.campaign  # in-process resumes, bit for bit as well, are in unit/runtime/test_guidance_resume.py
def test_a_kill_in_mid_guidance_changes_no_bit(tmp_path: Path) -> None:
    with job_in(tmp_path, PYTHONPATH=TESTS) as job:
        killed, plain = tmp_path / "killed.txt", tmp_path / "plain.txt"
        flags = ["--standalone", "--nproc-per-node", "1", "--hold-faults", "kill:rank=0,step=25,when=backward"]
        assert job.run(job.holdfast(*flags, SCRIPT, killed, "0.03")) == 0, job.output()
        (recovery,) = [event for event in job.events() if event["kind"] == "recovery"]
        assert recovery["tier"] == "memory", job.output()
        assert len(job.fired()) == 1
        assert leftovers(job) == []
    train(plain, 0)
    assert killed.read_text() == plain.read_text()
