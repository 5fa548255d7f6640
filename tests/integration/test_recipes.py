"""Every recipe in examples/recipes survives a kill: it ends with the line that an undisturbed run ends with."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from support.jobs import BIN, Job, job_in, leftovers

RECIPES = Path(__file__).resolve().parents[2] / "examples" / "recipes"
PACED = Path(__file__).resolve().parents[1] / "support" / "paced_script.py"


@dataclass(frozen=True)
class Case:
    """How a recipe is run and killed."""

    name: str
    ranks: int = 1
    kill: str = "step=30,when=backward"
    slow_at: str = "begin"
    recoveries: int = 1
    in_short: bool = False
    """Whether `make test` runs it; the campaign runs all. FSDP2 is in the kill matrix too, with compiled blocks in
    `test_capture_distributed`."""


CASES = [
    Case("gradient_accumulation", kill="step=30,when=optimizer", in_short=True),
    Case("gan"),
    Case("ema_and_teacher", kill="step=30,when=copy", in_short=True),
    Case("fine_tune", kill="step=30,when=updated"),
    Case("save_best", kill="step=45,when=forward"),
    Case("early_stop", kill="step=30,when=begin"),
    Case("exception", ranks=2, kill="step=45,when=backward", recoveries=2),
    Case("fsdp2_compile", ranks=2, kill="step=30,when=updated"),
    Case("existing_loop", kill="step=30,when=boundary", slow_at="boundary"),
    Case("dataloader", kill="step=30,when=commit", in_short=True),
]


def final_line(output: str) -> str:
    """The one line that says what the recipe ended with; launchers may put a rank in front."""
    found = {line[line.index("final ") :] for line in output.splitlines() if "final " in line}
    assert len(found) == 1, output
    return found.pop()


def undisturbed(root: Path, case: Case) -> str:
    """The final line without a kill, and without a launcher of ours."""
    root.mkdir()
    with job_in(root, COMPILE_BACKEND="aot_eager") as job:
        folder = job.root / "out"
        folder.mkdir()
        (folder / "mended").touch()  # the reader of exception.py does not fail in this run
        code = job.plain(RECIPES / f"{case.name}.py", folder, ranks=case.ranks)
        # Rarely a thread of gloo drops the last reference to a tensor while the interpreter ends, and the process
        # aborts after its last line (pytorch issue 190489). This run only says what the numbers are.
        ended = code == 0 or "terminate called without an active exception" in job.output()
        assert ended, job.output()
        return final_line(job.output())


def killed(job: Job, case: Case) -> str:
    """The final line of a run under `holdfast run` that was killed. Its steps wait for the memory of the node."""
    folder = job.root / "out"
    folder.mkdir()
    slow = f"slow:rank=0,step=1,seconds=0.12,steps=30,when={case.slow_at}"  # `end_step` is not paced
    faults = f"{slow};kill:rank={case.ranks - 1},{case.kill}"
    flags = ["--standalone", "--nproc-per-node", str(case.ranks), "--hold-faults", faults]
    assert job.run(job.holdfast(*flags, PACED, RECIPES / f"{case.name}.py", folder)) == 0, job.output()
    return final_line(job.output())


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A folder with a short name: a DataLoader makes Unix sockets in $TMPDIR, whose paths must stay below 108 bytes."""
    with tempfile.TemporaryDirectory(prefix="hf-", dir="/tmp") as folder:
        yield Path(folder)


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=case.name, marks=() if case.in_short else pytest.mark.campaign) for case in CASES],
)
def test_a_recipe_survives_a_kill(short_path: Path, case: Case) -> None:
    with job_in(short_path, COMPILE_BACKEND="aot_eager") as job:
        final = killed(job, case)
        recoveries = [event for event in job.events() if event["kind"] == "recovery"]
        assert [event["tier"] for event in recoveries] == ["memory"] * case.recoveries, job.output()
        assert all(event.get("steps_lost", 0) <= 2 for event in recoveries)
        assert len(job.fired()) == 2
        # What Python's multiprocessing keeps for a process that SIGKILL ends (workers of a DataLoader) is not ours.
        assert leftovers(job, besides="/pymp-") == []
    assert final == undisturbed(short_path / "undisturbed", case)


def test_every_recipe_is_tested() -> None:
    assert {case.name for case in CASES} == {path.stem for path in RECIPES.glob("*.py")}


def test_the_best_checkpoints_are_kept(tmp_path: Path) -> None:
    with job_in(tmp_path) as job:
        folder = job.root / "out"
        assert job.run([str(BIN / "python"), str(RECIPES / "save_best.py"), str(folder)]) == 0, job.output()
        kept = {path.name for path in folder.iterdir() if path.name.startswith("step-")}
        assert "step-00000080" in kept
        assert len(kept) in (2, 3), kept
