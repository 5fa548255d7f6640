"""Sessions under ``holdfast run``: how they end, what they save, and that no step goes without a version."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from holdfast.checkpoint.commit import list_steps
from holdfast.checkpoint.image import BLOCK_BYTES
from support.jobs import BIN, Job, leftovers
from support.jobs import job_in as any_job_in

SCRIPT = Path(__file__).with_name("session_script.py")


def job_in(root: Path) -> AbstractContextManager[Job]:
    """A job whose optimizers leave torch's own cache directory elsewhere than among what we look for."""
    return any_job_in(root, TORCHINDUCTOR_CACHE_DIR=str(root / "inductor"))


def results(job: Job, world_size: int) -> list[dict[str, Any]]:
    return [json.loads((job.root / "out" / f"rank-{rank}.json").read_text()) for rank in range(world_size)]


def launch(job: Job, *arguments: object, world_size: int = 1, flags: tuple[str, ...] = ()) -> int:
    script = [str(SCRIPT), "--out", str(job.root / "out"), "--checkpoints", str(job.checkpoints)]
    command = job.holdfast("--nproc-per-node", str(world_size), *flags, *script, *map(str, arguments))
    return job.run(command)


def saved(job: Job) -> list[int]:
    return [info.step for info in list_steps(job.checkpoints) if info.complete]


def test_every_step_of_a_tiny_model_becomes_a_version(tmp_path: Path) -> None:
    with job_in(tmp_path) as job:
        assert launch(job, "--steps", 20, "--step-seconds", 0.08, "--paced") == 0, job.output()
        (result,) = results(job, 1)
        first = result["committed"][0]
        assert result["committed"] == list(range(first, 21)), result
        assert [step for step in result["missed"] if step > first] == []
        assert saved(job) == [20]
        assert leftovers(job) == []


def test_stop_of_one_rank_ends_all_at_one_step_which_is_saved(tmp_path: Path) -> None:
    with job_in(tmp_path) as job:
        code = launch(job, "--steps", 4000, "--end", "stop", "--end-at", 5, "--end-rank", 1, "--paced", world_size=2)
        assert code == 0, job.output()
        first, second = results(job, 2)
        assert first["step"] == second["step"]
        assert 6 <= first["step"] < 100
        assert first["digest"] == second["digest"]
        assert saved(job) == [first["step"]]
        assert leftovers(job) == []


def test_stop_of_the_only_rank_ends_at_the_end_of_its_body(tmp_path: Path) -> None:
    with job_in(tmp_path) as job:
        assert launch(job, "--steps", 4000, "--end", "stop", "--end-at", 5) == 0, job.output()
        assert results(job, 1)[0]["step"] == 6
        assert saved(job) == [6]


def test_break_after_an_update_saves_that_step(tmp_path: Path) -> None:
    with job_in(tmp_path) as job:
        assert launch(job, "--steps", 4000, "--end", "break", "--end-at", 5, world_size=2) == 0, job.output()
        assert [result["step"] for result in results(job, 2)] == [6, 6]
        assert saved(job) == [6]
        assert leftovers(job) == []


def test_save_of_one_rank_is_made_at_an_agreed_step_and_kept(tmp_path: Path) -> None:
    with job_in(tmp_path) as job:
        arguments = ("--steps", 40, "--save-at", 8, "--end-rank", 1, "--step-seconds", 0.05, "--paced")
        assert launch(job, *arguments, world_size=2) == 0, job.output()
        first, second = results(job, 2)
        step = second["saved"][0]
        assert 9 <= step < 40
        assert saved(job) == [step, 40]
        tags = {info.step: info.tag for info in list_steps(job.checkpoints)}
        assert tags == {step: "kept", 40: None}
        for result in (first, second):
            assert [told[0] for told in result["told"]] == [step, 40]


def test_exception_of_the_script_is_the_jobs_and_memory_goes_to_storage(tmp_path: Path) -> None:
    with job_in(tmp_path) as job:
        end = ("--end", "raise", "--end-at", 8, "--step-seconds", 0.1, "--paced")
        code = launch(job, *end, flags=("--max-restarts", "0"))
        assert code == 1, job.output()
        assert "ValueError: the script's own" in job.output()
        assert saved(job) == [8]  # body 8 was not finished
        assert leftovers(job) == []


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.campaign), 2])
def test_state_that_does_not_fit_memory_is_saved_and_resumed_through_storage(tmp_path: Path, world_size: int) -> None:
    (tmp_path / "expected").mkdir()
    with job_in(tmp_path / "expected") as plain:
        assert plain.plain(SCRIPT, "--out", plain.root / "out", ranks=world_size) == 0, plain.output()
        expected = [result["digest"] for result in results(plain, world_size)]
    with job_in(tmp_path) as job:
        fault = f"kill:rank={world_size - 1},step=8,when=backward"
        flags = ("--hold-snapshot-memory", "100k", "--max-restarts", "2", "--hold-faults", fault)
        code = launch(job, "--persist-every", 5, world_size=world_size, flags=flags)
        assert code == 0, job.output()
        found = results(job, world_size)
        assert [result["restored"] for result in found] == [["storage", 5]] * world_size
        assert [result["digest"] for result in found] == expected
        assert saved(job) == [5, 10, 12]
        assert job.output().count("do not fit") >= 1
        assert leftovers(job) == []


def test_two_ranks_under_torchrun_save_and_resume_as_one(tmp_path: Path) -> None:
    def script(job: Job, *arguments: object) -> list[str]:
        return ["--out", str(job.root / "out"), "--checkpoints", str(job.checkpoints), *map(str, arguments)]

    def torchrun(job: Job, *arguments: object) -> int:
        command = [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "2", str(SCRIPT)]
        return job.run([*command, *script(job, *arguments)])

    for name in ("undisturbed", "resumed"):
        (tmp_path / name).mkdir()
    options = ["--persist-every", 5, "--hidden", 400_000]
    with job_in(tmp_path / "undisturbed") as job:
        assert job.plain(SCRIPT, *script(job, *options), ranks=2) == 0, job.output()
        assert saved(job) == [5, 10, 12]
        expected = [result["digest"] for result in results(job, 2)]
    with job_in(tmp_path / "resumed") as job:
        assert torchrun(job, *options, "--end", "raise", "--end-at", 7) != 0
        assert saved(job) == [5]
        assert torchrun(job, *options) == 0, job.output()
        found = results(job, 2)
        assert [result["restored"] for result in found] == [["storage", 5]] * 2
        assert [result["digest"] for result in found] == expected
        stored = sum(image.stat().st_size for image in job.checkpoints.glob("step-00000005/*.safetensors"))
        assert stored <= sum(result["read_bytes"] for result in found) <= 1.05 * stored + BLOCK_BYTES


@pytest.mark.campaign
def test_under_torchrun_one_rank_asks_for_a_save_and_a_stop_and_all_do_it(tmp_path: Path) -> None:
    with job_in(tmp_path) as job:
        asks = ["--save-at", "2", "--end", "stop", "--end-at", "60", "--end-rank", "1", "--steps", "3000"]
        script = [str(SCRIPT), "--out", str(job.root / "out"), "--checkpoints", str(job.checkpoints), *asks]
        assert job.run([str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "2", *script]) == 0, job.output()
        first, second = results(job, 2)
        assert first["step"] == second["step"] < 3000
        assert first["digest"] == second["digest"]
        tagged, name = second["saved"]
        assert name == f"step-{tagged:08d}"
        assert first["told"] == second["told"] == [[tagged, "kept"], [second["step"], None]]
