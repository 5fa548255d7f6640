"""Steps in a directory: listed, set aside, tagged; their history."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from typing import Any

import pytest
from checkpoint_images import GENERATION, VERSION, save_step

from holdfast.checkpoint.commit import (
    abandon_after,
    abandon_step,
    history_id,
    list_steps,
    newest_step,
    step_dir_name,
)
from holdfast.checkpoint.steps import read_step_info, tag_step
from holdfast.checkpoint.storage import PosixStorage, refuse
from holdfast.errors import CorruptError, FenceError, StorageError


def test_later_steps_are_set_aside_when_a_run_goes_on_from_an_older_one(tmp_path: Path) -> None:
    assert abandon_after(tmp_path, 50) is None
    for step in (90, 100, 110):
        save_step(tmp_path / step_dir_name(step), GENERATION.at(step))
    (tmp_path / step_dir_name(120)).mkdir()
    folder = abandon_after(tmp_path, 90)
    assert folder is not None
    assert [info.step for info in list_steps(tmp_path)] == [90]
    assert sorted(f.name for f in folder.iterdir()) == [step_dir_name(step) for step in (100, 110, 120)]
    assert [info.complete for info in list_steps(folder)] == [True, True, False]
    save_step(tmp_path / step_dir_name(100))
    assert abandon_step(tmp_path, 90) is not None
    assert [info.step for info in list_steps(tmp_path)] == [100]


def test_nothing_is_set_aside_for_a_run_that_has_gone_on_without_it(tmp_path: Path) -> None:
    for step in (90, 100, 110):
        save_step(tmp_path / step_dir_name(step), GENERATION.at(step))
    answers = iter((True, False))
    with pytest.raises(FenceError, match="step 100 stays"):
        abandon_after(tmp_path, 90, wanted=lambda: next(answers))
    with pytest.raises(FenceError, match="step 90 stays"):
        abandon_step(tmp_path, 90, wanted=lambda: False)
    assert [info.step for info in list_steps(tmp_path)] == [90, 100]


def test_incomplete_and_foreign_folders_are_listed_as_such(tmp_path: Path) -> None:
    assert list_steps(tmp_path / "absent") == []
    (tmp_path / step_dir_name(5)).mkdir()
    (tmp_path / "step-7").mkdir()
    (tmp_path / "step-00000009").write_text("a file")
    save_step(tmp_path / step_dir_name(6))  # holds step 100
    five, six = list_steps(tmp_path)
    assert (five.complete, six.complete) == (False, False)
    assert "does not exist" in five.problem
    assert "holds the root of step 100" in six.problem
    assert newest_step(tmp_path) is None


def test_a_history_is_made_once(tmp_path: Path) -> None:
    directory = tmp_path / "runs" / "checkpoints"
    assert history_id(directory) is None
    first = history_id(directory, create=True)
    assert first is not None
    assert len(first) == 32
    assert history_id(directory, create=True) == first == history_id(directory)
    shutil.rmtree(directory)
    assert history_id(directory, create=True) != first
    (directory / ".holdfast-history").write_text("x")
    with pytest.raises(CorruptError):
        history_id(directory)


def test_errors_say_what_to_do(tmp_path: Path) -> None:
    storage = PosixStorage()
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="a part of the path is a file"):
        storage.write(tmp_path / "file" / "x", [b""])
    with pytest.raises(StorageError, match="does not exist"):
        storage.read(tmp_path / "absent", limit=10)
    (tmp_path / "large").write_bytes(bytes(11))
    with pytest.raises(StorageError, match="at most 10"):
        storage.read(tmp_path / "large", limit=10)
    with pytest.raises(StorageError, match="cannot be removed"):
        storage.remove(tmp_path / "absent")
    for done, right in (("read", "to read it"), ("listed", "to read it"), ("written", "to write there")):
        with pytest.raises(
            StorageError, match=f"cannot be {done}: permission denied: give this user the right {right}"
        ):
            refuse(done, tmp_path, PermissionError(errno.EACCES, "Permission denied"))


def test_a_step_is_tagged_after_its_commit_and_keeps_that_tag(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    step, tagged = save_step(tmp_path / "step-00000100"), save_step(tmp_path / "other", tag="at once")
    root = (step / "root").read_bytes()
    assert tag_step(step, "late").tag == tag_step(step, "late").tag == "late"
    assert [info.tag for info in list_steps(tmp_path)] == ["late"]
    assert (step / "root").read_bytes() == root
    for path in (step, tagged):
        with pytest.raises(StorageError, match="is tagged"):
            tag_step(path, "another")
    with pytest.raises(StorageError, match="does not exist"):
        tag_step(tmp_path / "step-00000099", "late")
    # A damaged one, or one that another version left, is none; the step is there all the same.
    sound = (step / "tag").read_bytes()
    for damage in (sound.replace(b"late", b"lame"), sound[:-3], b"", sound.replace(b"late", b"lat\xe5")):
        caplog.clear()
        (step / "tag").write_bytes(damage)
        assert [(info.complete, info.tag, info.is_tagged) for info in list_steps(tmp_path)] == [(True, None, True)]
        assert str(step) in caplog.text
    (tagged / "tag").write_bytes(sound)
    assert read_step_info(tagged).tag == "at once"
    newer = save_step(tmp_path / "newer", VERSION.generation.at(VERSION.step + 1))
    (newer / "tag").write_bytes(sound)
    assert read_step_info(newer).tag is None
    assert not read_step_info(newer).is_tagged


def test_of_two_tags_given_at_once_the_first_stays(tmp_path: Path) -> None:
    class Slow(PosixStorage):
        def write(self, path: str | Path, *args: Any, **kwargs: Any) -> int:
            tag_step(step, "first")  # meanwhile, by somebody else
            return super().write(path, *args, **kwargs)

    step = save_step(tmp_path / "step-00000100")
    with pytest.raises(StorageError, match="is tagged 'first'"):
        tag_step(step, "second", storage=Slow())
    assert read_step_info(step).tag == "first"
