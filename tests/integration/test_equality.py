"""A run with a Session equals the same script that never imports holdfast, bit for bit, from step 0."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from support.jobs import Job, fingerprints, job_in, leftovers

SCRIPT = Path(__file__).with_name("equality_script.py")
CASES = ("adamw", "adamw-foreach", "adamw-fused", "sgd", "muon", "lbfgs", "expert", "scaler")
WORLD = {"none": 1, "ddp": 2, "fsdp2": 2}

Expected = Callable[[str, str], list[dict[str, str]]]


@pytest.fixture(scope="module")
def without_holdfast(tmp_path_factory: pytest.TempPathFactory) -> Expected:
    """What each rank ends with, for a case and a layout; one plain run per layout computes all cases."""
    known: dict[str, Path] = {}

    def expected(case: str, parallel: str) -> list[dict[str, str]]:
        if parallel not in known:
            job = Job(tmp_path_factory.mktemp(f"plain-{parallel}"))
            arguments = [",".join(CASES), parallel, job.root / "out", "--plain"]
            assert job.plain(SCRIPT, *arguments, ranks=WORLD[parallel]) == 0, job.output()
            known[parallel] = job.root / "out"
        return fingerprints(known[parallel] / case, WORLD[parallel])

    return expected


def with_holdfast(job: Job, case: str, parallel: str, faults: str = "") -> list[dict[str, str]]:
    flags = ["--standalone", "--nproc-per-node", str(WORLD[parallel]), *(["--hold-faults", faults] if faults else [])]
    assert job.run(job.holdfast(*flags, str(SCRIPT), case, parallel, str(job.root / "out"))) == 0, job.output()
    return fingerprints(job.root / "out" / case, WORLD[parallel])


campaign = pytest.mark.campaign
UNDISTURBED = [
    ("adamw-fused", "fsdp2"),
    pytest.param("scaler", "ddp", marks=campaign),
    pytest.param("muon", "none", marks=campaign),
    pytest.param("adamw", "ddp", marks=campaign),
    pytest.param("adamw-foreach", "none", marks=campaign),
    pytest.param("sgd", "ddp", marks=campaign),
    pytest.param("lbfgs", "fsdp2", marks=campaign),
]
RESUMED = [
    ("expert", "ddp"),
    pytest.param("muon", "fsdp2", marks=campaign),
    ("lbfgs", "none"),
    pytest.param("scaler", "ddp", marks=campaign),
]
SLOW = "slow:rank=0,step=0,seconds=0.05,steps=20"
"""Steps of a few milliseconds; the launcher has to hear of a version before the kill."""


@pytest.mark.parametrize(("case", "parallel"), UNDISTURBED)
def test_a_run_with_a_session_equals_the_same_script_without(
    tmp_path: Path, without_holdfast: Expected, case: str, parallel: str
) -> None:
    with job_in(tmp_path) as job:
        assert with_holdfast(job, case, parallel) == without_holdfast(case, parallel)
        assert leftovers(job) == []


@pytest.mark.parametrize(("case", "parallel"), RESUMED)
def test_a_run_that_was_killed_and_resumed_equals_the_same_script_without(
    tmp_path: Path, without_holdfast: Expected, case: str, parallel: str
) -> None:
    with job_in(tmp_path) as job:
        # The expert is routed for the first time after the resume: its optimizer state does not exist before.
        kill = f"kill:rank={WORLD[parallel] - 1},step=10,when=backward"
        found = with_holdfast(job, case, parallel, f"{SLOW};{kill}")
        tiers = [event["tier"] for event in job.events() if event["kind"] == "recovery"]
        assert tiers == ["memory"], job.output()
        assert found == without_holdfast(case, parallel)
        assert leftovers(job) == []


@pytest.mark.campaign
@pytest.mark.parametrize("parallel", sorted(WORLD))
@pytest.mark.parametrize("case", CASES)
def test_every_case_in_every_layout(tmp_path: Path, without_holdfast: Expected, case: str, parallel: str) -> None:
    with job_in(tmp_path) as job:
        kill = f"kill:rank=0,step=10,when=optimizer;kill:rank={WORLD[parallel] - 1},step=15,when=copy"
        assert with_holdfast(job, case, parallel, f"{SLOW};{kill}") == without_holdfast(case, parallel)
        assert leftovers(job) == []
