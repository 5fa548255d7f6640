"""The offline tools on checkpoints in an object store."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tools_states import Tool, listing, loaded, same, training_state

import holdfast.checkpoint
from holdfast.checkpoint.storage import storage_of
from holdfast.errors import CorruptError
from support.s3 import S3


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoints" / "step-00000007"
    holdfast.checkpoint.save(training_state(), path)
    return path


def test_a_copy_goes_up_and_down_again(tool: Tool, s3: S3, runs: Path, source: Path, tmp_path: Path) -> None:
    before = listing(source)
    rules = [s3.fail("503", "PUT", "root"), s3.fail("reset", "PUT", "safetensors"), s3.fail("lost", "PUT", "index")]
    assert "every checksum matched" in tool.works("copy", source, runs / "step-00000007")
    assert [rule.fired for rule in rules] == [1, 1, 1]
    assert listing(source) == before
    assert same(loaded(training_state(), runs / "step-00000007"), training_state())
    tool.works("copy", str(runs / "step-00000007"), tmp_path / "back")
    assert listing(tmp_path / "back") == before
    assert "never changed" in tool.refused("copy", source, runs / "step-00000007")


def test_a_copy_that_was_cut_off_goes_on(tool: Tool, s3: S3, runs: Path, source: Path, tmp_path: Path) -> None:
    tool.works("reshard", source, tmp_path / "r", "--world", "3")
    to = runs / "r"
    s3.fail("403", "PUT", "rank-00002", times=1)
    tool.refused("copy", tmp_path / "r", to, "--workers", "1")
    there = [entry.name for entry in storage_of(to).list(to)]
    assert len(there) == 2
    assert "root" not in there
    # One of them is damaged meanwhile: it is copied again, the sound one is not.
    storage_of(to).write(to / there[0], [bytes(storage_of(to).list(to)[0].size_bytes)])
    s3.requests.clear()
    tool.works("copy", tmp_path / "r", to)
    put = [line for line in s3.requests if line.startswith("PUT") and "safetensors" in line]
    assert len(put) == 2
    tool.works("verify", to)
    assert [line.rsplit("/", 1)[-1] for line in s3.requests if line.startswith("PUT")][-1] == "root"


def test_every_tool_takes_a_url(tool: Tool, runs: Path, source: Path, tmp_path: Path) -> None:
    step = runs / "step-00000007"
    tool.works("reshard", source, step, "--world", "2")
    assert tool.works("ls", runs, "--latest") == f"{step}\n"
    assert "complete" in tool.works("ls", str(runs))
    assert "sound" in tool.works("verify", runs)
    assert "model.0.weight" in tool.works("inspect", step, "--stats")
    tool.works("diff", source, step)
    tool.works("edit", step, runs / "edited", "--drop", "optimizer")
    assert "optimizer" not in tool.works("inspect", runs / "edited")
    tool.works("export", step, tmp_path / "hf", "--only", "model")
    tool.works("import", tmp_path / "hf", runs / "imported" / "step-00000001", "--prefix", "model")
    storage = storage_of(step)
    root = bytearray(storage.read(step / "root", limit=5000))
    root[40] ^= 255
    storage.write(step / "root", [root])
    index = next(entry for entry in storage.list(step) if entry.name.startswith("index-"))
    storage.write(step / index.name, [b"x"])
    assert tool("verify", step) == 1
    tool.works("repair", step)
    tool.works("verify", step)
    holdfast.checkpoint.save(training_state(), runs / "step-00000009")
    assert "1 deleted" in tool.works("prune", runs, "--last", "1")
    assert tool.works("ls", runs, "--latest") == f"{runs / 'step-00000009'}\n"


def test_an_unfinished_step_is_set_aside(tool: Tool, runs: Path, source: Path) -> None:
    tool.works("copy", source, runs / "step-00000007")
    storage_of(runs).remove(runs / "step-00000007" / "root")
    assert "left alone" in (tool("repair", runs), tool.out)[1]
    assert tool("repair", runs, "--min-age", "0") == 0
    assert [entry.name[:11] for entry in storage_of(runs).list(runs)] == ["incomplete-"]
    assert "no complete" in tool.refused("inspect", runs, code=2)
    assert torch.is_tensor(training_state()["model"]["0.weight"])


@pytest.mark.parametrize("command", ["load", "verify", "copy", "reshard", "edit"])
def test_each_byte_of_an_object_is_read_once_and_verified_on_the_way(
    tool: Tool, s3: S3, runs: Path, command: str
) -> None:
    step = runs / "step-00000001"
    state = {"w": torch.arange(2_500_000.0).reshape(2500, 1000), "few": torch.ones(3)}
    holdfast.checkpoint.save(state, step)
    size = sum(entry.size_bytes for entry in storage_of(step).list(step) if entry.name.endswith(".safetensors"))
    s3.got.clear()
    if command == "load":
        found = holdfast.checkpoint.load({name: torch.zeros_like(tensor) for name, tensor in state.items()}, step)
        assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
    else:
        options = {"reshard": ("--world", "2", "--workers", "1"), "edit": ("--drop", "few")}.get(command, ())
        tool.works(command, step, *([] if command == "verify" else [runs / "new"]), *options)
    # Beside them the header, which is looked at before, and blocks at the edges: of the objects, and of the halves.
    assert size <= s3.got_of(str(step), ".safetensors") <= size + 3 * (1 << 20)
    # One block is damaged: whoever reads must see it.
    name = next(entry for entry in storage_of(step).list(step) if entry.name.endswith(".safetensors"))
    data = bytearray(storage_of(step).read(step / name.name, limit=name.size_bytes))
    data[size // 2] ^= 1
    storage_of(step).write(step / name.name, [data])
    if command == "load":
        with pytest.raises(CorruptError):
            holdfast.checkpoint.load({name: torch.zeros_like(tensor) for name, tensor in state.items()}, step)
    else:
        assert tool(command, step, *([] if command == "verify" else [runs / "again"]), *options) == 1
        assert not storage_of(runs).list(runs / "again") or command == "verify"
