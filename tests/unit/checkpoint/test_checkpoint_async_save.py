from __future__ import annotations

import threading
from datetime import timedelta
from pathlib import Path

import pytest
import torch

import holdfast.checkpoint
from holdfast.checkpoint.commit import list_steps
from holdfast.checkpoint.storage import PosixStorage
from holdfast.errors import MismatchError, StateError, StorageError

_LIMIT = timedelta(seconds=60)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Writes wait until it is set."""
    opened = threading.Event()
    write = PosixStorage.write

    def gated(self: PosixStorage, *args: object, **kwargs: object) -> int:
        assert opened.wait(60)
        return write(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(PosixStorage, "write", gated)
    return opened


def test_what_changes_after_the_call_is_not_saved(tmp_path: Path, gate: threading.Event) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    state = {"a": base, "view": base.t(), "row": base[1], "list": [1, 2], "big": torch.ones(4, dtype=torch.bfloat16)}
    expected = {key: value.clone() if isinstance(value, torch.Tensor) else list(value) for key, value in state.items()}
    handle = holdfast.checkpoint.async_save(state, tmp_path / "c")
    assert not handle.done()
    assert handle.error() is None
    base.zero_()
    state["big"].zero_()
    state["list"].append(3)
    gate.set()
    assert handle.result(_LIMIT).complete
    assert handle.done()
    into = {
        "a": torch.zeros(3, 4), "view": torch.zeros(4, 3), "row": torch.zeros(4), "list": None,
        "big": torch.zeros(4, dtype=torch.bfloat16),
    }  # fmt: skip
    loaded = holdfast.checkpoint.load(into, tmp_path / "c")
    assert loaded["list"] == expected["list"]
    for key in ("a", "view", "row", "big"):
        assert torch.equal(loaded[key], expected[key]), key


def test_an_error_of_the_writer_is_the_handle_s(tmp_path: Path) -> None:
    holdfast.checkpoint.save({"a": 1}, tmp_path / "c")
    handle = holdfast.checkpoint.async_save({"a": 2}, tmp_path / "c")
    with pytest.raises(StorageError, match="committed"):
        handle.result(_LIMIT)
    assert isinstance(handle.error(), StorageError)
    assert handle.done()


def test_a_state_that_cannot_be_stored_is_the_handle_s_error_too(tmp_path: Path) -> None:
    handle = holdfast.checkpoint.async_save({"a": {"b": object()}}, tmp_path / "step-00000001")
    with pytest.raises(StateError, match=r"a\.b is a builtins\.object"):
        handle.result(_LIMIT)
    assert list_steps(tmp_path) == []


def test_waiting_may_be_limited_and_the_save_goes_on(tmp_path: Path, gate: threading.Event) -> None:
    handle = holdfast.checkpoint.async_save({"a": torch.ones(2)}, tmp_path / "c")
    with pytest.raises(TimeoutError):
        handle.result(timedelta(seconds=0.01))
    gate.set()
    handle.result(_LIMIT)
    assert holdfast.checkpoint.load({"a": torch.zeros(2)}, tmp_path / "c")["a"].tolist() == [1, 1]


def test_the_step_is_that_of_the_directory_s_name(tmp_path: Path) -> None:
    assert holdfast.checkpoint.save({"a": 1}, tmp_path / "step-00000042").step == 42
    assert [(info.step, info.complete) for info in list_steps(tmp_path)] == [(42, True)]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_loading_what_another_writer_saved_says_so(tmp_path: Path) -> None:
    dcp = pytest.importorskip("torch.distributed.checkpoint")
    dcp.save({"a": torch.ones(2)}, storage_writer=holdfast.checkpoint.HoldfastWriter(tmp_path / "c"), no_dist=True)
    with pytest.raises(MismatchError, match="not written by holdfast"):
        holdfast.checkpoint.load({"a": torch.zeros(2)}, tmp_path / "c")
