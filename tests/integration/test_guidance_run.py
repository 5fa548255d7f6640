"""Guidance under `holdfast run`: a kill in mid-guidance changes no bit of what training ends with."""

from __future__ import annotations

from pathlib import Path

from support.jobs import BIN, job_in, leftovers

SCRIPT = Path(__file__).with_name("guidance_script.py")
TESTS = str(Path(__file__).resolve().parents[1])


def test_a_kill_in_mid_guidance_changes_no_bit(tmp_path: Path) -> None:
    with job_in(tmp_path, PYTHONPATH=TESTS) as job:
        killed, plain = tmp_path / "killed.txt", tmp_path / "plain.txt"
        flags = ["--standalone", "--nproc-per-node", "1", "--hold-faults", "kill:rank=0,step=25,when=backward"]
        assert job.run(job.holdfast(*flags, SCRIPT, killed, "0.03")) == 0, job.output()
        (recovery,) = [event for event in job.events() if event["kind"] == "recovery"]
        assert recovery["tier"] == "memory", job.output()
        assert len(job.fired()) == 1
        assert leftovers(job) == []
        assert job.run([str(BIN / "python"), str(SCRIPT), str(plain), "0"], log="plain.log") == 0, job.output(
            "plain.log"
        )
        assert killed.read_text() == plain.read_text()
