from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from checkpoint_images import GENERATION, save_step
from hypothesis import given
from hypothesis import strategies as st

from holdfast.checkpoint import save
from holdfast.checkpoint.commit import abandon_after, image_file_name, list_steps, step_dir_name
from holdfast.checkpoint.retention import Retention
from holdfast.checkpoint.steps import StepInfo, tag_step
from holdfast.checkpoint.storage import PosixStorage
from holdfast.errors import UsageError


def _step(step: int, **kwargs: Any) -> StepInfo:
    return StepInfo(step=step, path=Path(f"step-{step:08d}"), complete=True, time=step * 10.0, **kwargs)


STEPS = [_step(step) for step in range(100, 1100, 100)]


def _kept(policy: Retention, steps: list[StepInfo]) -> list[int]:
    keep, delete = policy.choose(steps)
    assert sorted(i.step for i in keep + delete) == sorted(i.step for i in steps if i.complete)
    return [info.step for info in keep]


@pytest.mark.parametrize(
    ("policy", "kept"),
    [
        (Retention(), [i.step for i in STEPS]),
        (Retention(last=3), [800, 900, 1000]),
        (Retention(every_steps=400), [400, 800, 1000]),
        (Retention(last=2, every_steps=300), [300, 600, 900, 1000]),
        (Retention(every_s=2500), [100, 400, 700, 1000]),
        (Retention(last=100), [i.step for i in STEPS]),
    ],
)
def test_policies_keep_what_they_say(policy: Retention, kept: list[int]) -> None:
    assert _kept(policy, STEPS[::-1]) == kept


def test_the_best_by_a_metric_are_kept() -> None:
    losses = {100: 3.0, 200: 1.0, 300: 2.0, 400: float("nan"), 500: 1.0, 600: 9.0}
    steps = [_step(step, metrics={"loss": loss}) for step, loss in losses.items()] + [_step(700)]
    assert _kept(Retention(last=1, best=2, best_by="loss"), steps) == [200, 500, 700]
    assert _kept(Retention(last=1, best=1, best_by="loss"), steps) == [500, 700]
    assert _kept(Retention(last=1, best=1, best_by="loss", lower_is_better=False), steps) == [600, 700]


def test_tagged_ones_are_kept_unless_told_otherwise() -> None:
    steps = [_step(100, tag="paper"), _step(200), _step(300)]
    assert _kept(Retention(last=1), steps) == [100, 300]
    assert _kept(Retention(last=1, tagged=False), steps) == [300]


@given(st.sets(st.integers(0, 1000), min_size=1), st.integers(1, 5), st.none() | st.integers(1, 300))
def test_the_newest_complete_one_is_never_deleted(numbers: set[int], last: int, every: int | None) -> None:
    steps = [_step(n) for n in numbers]
    incomplete = StepInfo(step=5000, path=Path("x"), complete=False)
    keep, delete = Retention(last=last, every_steps=every).choose([*steps, incomplete])
    assert max(numbers) in {info.step for info in keep}
    assert incomplete not in keep + delete


def test_a_policy_travels_as_text() -> None:
    policy = Retention(last=3, best=2, best_by="loss", every_s=60)
    assert Retention.decode(policy.encode()) == policy
    assert Retention.of(4) == Retention(last=4)
    assert Retention.of(policy) is policy


@pytest.mark.parametrize("text", ["", "{", "[]", '{"lasst": 3}', '{"last": 0}', '{"last": "a"}'])
def test_text_that_is_no_policy_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        Retention.decode(text)


@pytest.mark.parametrize(
    "arguments",
    [{"last": 0}, {"every_steps": -1}, {"best": 2}, {"best_by": "loss"}, {"best": -1}, {"every_s": float("nan")}],
)
def test_a_policy_that_makes_no_sense_is_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Retention(**arguments)


@pytest.mark.parametrize("keep", [0, -1, True, "3", None])
def test_a_keep_that_makes_no_sense_is_refused(keep: Any) -> None:
    with pytest.raises(UsageError):
        Retention.of(keep)


def test_apply_removes_the_folders_root_first(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save_step(tmp_path / step_dir_name(step), GENERATION.at(step))
    (tmp_path / step_dir_name(4)).mkdir()
    deleted = Retention(last=1).apply(tmp_path)
    assert [info.step for info in deleted] == [1, 2]
    assert [info.step for info in list_steps(tmp_path)] == [3, 4]


def test_what_interrupted_saves_left_is_removed_but_never_what_may_still_be_written_or_repaired(tmp_path: Path) -> None:
    for step in (5, 6, 7, 9):
        (tmp_path / step_dir_name(step)).mkdir()
        (tmp_path / step_dir_name(step) / image_file_name(GENERATION, 0, 1)).write_text("half an image")
    (tmp_path / step_dir_name(6) / "root").write_text("damaged")
    for step in (5, 6, 9):
        os.utime(tmp_path / step_dir_name(step), (1e9, 1e9))
    Retention(last=1).apply(tmp_path)
    assert [info.step for info in list_steps(tmp_path)] == [5, 6, 7, 9]
    save_step(tmp_path / step_dir_name(8), GENERATION.at(8))
    Retention(last=1).apply(tmp_path)
    assert [info.step for info in list_steps(tmp_path)] == [6, 7, 8, 9]


def test_what_was_set_aside_goes_once_the_run_has_passed_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    now = 1_000_000.0
    monkeypatch.setattr("holdfast.checkpoint.commit.time.time", lambda: now)
    for step in (1, 2, 5):
        save({"w": torch.ones(2)}, tmp_path / f"step-{step:08d}")
    folder = abandon_after(tmp_path, 1)
    assert folder is not None
    policy = Retention(last=9)
    now += 10_000.0
    save({"w": torch.ones(2)}, tmp_path / "step-00000004")
    policy.apply(tmp_path)
    assert folder.exists(), "the run has not come as far yet"
    save({"w": torch.ones(2)}, tmp_path / "step-00000006")
    Retention().apply(tmp_path)
    assert folder.exists(), "this policy deletes nothing"
    policy.apply(tmp_path)
    assert not folder.exists()
    assert [info.step for info in list_steps(tmp_path)] == [1, 4, 6]
    folder = abandon_after(tmp_path, 4)
    assert folder is not None
    save({"w": torch.ones(2)}, tmp_path / "step-00000009")
    policy.apply(tmp_path)
    assert folder.exists(), "it was set aside just now"


def _old(path: Path) -> None:
    os.utime(path, (1e9, 1e9))


def test_what_other_programs_left_under_such_names_is_never_removed(tmp_path: Path) -> None:
    theirs = tmp_path / step_dir_name(5)
    theirs.mkdir()
    (theirs / "__0_0.distcp").write_bytes(b"a checkpoint of DCP")
    aside = tmp_path / "abandoned-20200101T000000Z-0123"
    for folder in (aside / step_dir_name(6), aside / "notes"):
        folder.mkdir(parents=True)
    (aside / "notes" / "text").write_text("x")
    other = tmp_path / "abandoned-20200101T000000Z-4567" / step_dir_name(6)
    other.mkdir(parents=True)
    (other / "weights.pt").write_bytes(b"somebody's")
    for path in (theirs, aside / step_dir_name(6), aside, other, other.parent):
        _old(path)
    save_step(tmp_path / step_dir_name(8), GENERATION.at(8))
    found = Retention(last=1).find(tmp_path)
    assert (found.steps, found.left_over, found.abandoned) == ([], [], [])
    Retention(last=1).apply(tmp_path)
    assert (theirs / "__0_0.distcp").exists()
    assert (aside / "notes" / "text").exists()
    assert (other / "weights.pt").exists()


def test_the_newest_one_that_has_all_its_files_stays(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for step in (1, 2, 3, 4):
        save_step(tmp_path / step_dir_name(step), GENERATION.at(step))
    image = tmp_path / step_dir_name(4) / image_file_name(GENERATION, 1, 2)
    image.write_bytes(image.read_bytes()[:-1])
    for copy in (tmp_path / step_dir_name(3)).glob("index*"):
        copy.unlink()
    deleted = Retention(last=2).apply(tmp_path)
    assert [info.step for info in deleted] == [1]
    assert [info.step for info in list_steps(tmp_path)] == [2, 3, 4]
    assert "bytes" in caplog.text
    assert str(tmp_path / step_dir_name(2)) in caplog.text
    (tmp_path / step_dir_name(2) / image_file_name(GENERATION, 0, 2)).unlink()
    assert Retention(last=1).apply(tmp_path) == []
    assert [info.step for info in list_steps(tmp_path)] == [2, 3, 4]


def test_a_step_whose_tag_is_damaged_stays_as_if_tagged(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save_step(tmp_path / step_dir_name(step), GENERATION.at(step))
    tag_step(tmp_path / step_dir_name(1), "paper")
    (tmp_path / step_dir_name(1) / "tag").write_bytes(b"{")
    assert [info.step for info in Retention(last=1).apply(tmp_path)] == [2]
    assert [info.step for info in Retention(last=1, tagged=False).apply(tmp_path)] == [1]


def test_of_a_linked_step_the_link_goes_and_what_it_leads_to_stays(tmp_path: Path) -> None:
    archived = save_step(tmp_path / "archive" / step_dir_name(1), GENERATION.at(1))
    runs = tmp_path / "runs"
    for step in (2, 3):
        save_step(runs / step_dir_name(step), GENERATION.at(step))
    (runs / step_dir_name(1)).symlink_to(archived)
    assert [info.step for info in Retention(last=2).apply(runs)] == [1]
    assert [info.step for info in list_steps(runs)] == [2, 3]
    assert [info.complete for info in list_steps(tmp_path / "archive")] == [True]


def test_a_link_that_leads_to_itself_is_passed_over(tmp_path: Path) -> None:
    save_step(tmp_path / step_dir_name(1), GENERATION.at(1))
    (tmp_path / step_dir_name(2)).symlink_to(tmp_path / step_dir_name(2))
    assert [info.step for info in list_steps(tmp_path)] == [1]
    assert [entry.name for entry in PosixStorage().list(tmp_path)] == [step_dir_name(1)]
