"""export, import, reshard, edit, copy: what goes in comes out, and the source stays as it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import save_file
from tools_states import Tool, every_dtype, listing, loaded, same, training_state, zeros_like

import holdfast.checkpoint
from holdfast.checkpoint import HoldfastWriter
from holdfast.checkpoint.commit import open_checkpoint
from holdfast.checkpoint.storage import PosixStorage
from holdfast.checkpoint.tools import building
from holdfast.errors import StorageError

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoints" / "step-00000007"
    holdfast.checkpoint.save(training_state(), path)
    return path


# --- reshard ---


@pytest.mark.parametrize("world", [1, 3, 20])
def test_a_resharded_state_is_the_same_state(tool: Tool, source: Path, tmp_path: Path, world: int) -> None:
    before = listing(source)
    tool.works("reshard", source, tmp_path / "r", "--world", world, "--max-memory", "64MiB")
    assert listing(source) == before
    assert same(loaded(training_state(), tmp_path / "r"), training_state())
    with open_checkpoint(tmp_path / "r") as catalog:
        assert catalog.world_size == world
        assert catalog.version.step == 7
        catalog.verify()
        catalog.check_complete()
        assert len(catalog.boxes("model.0.weight")) == min(world, 9)
    tool.works("verify", tmp_path / "r")
    tool.works("diff", source, tmp_path / "r")


def test_every_dtype_is_resharded_bit_for_bit(tool: Tool, tmp_path: Path) -> None:
    holdfast.checkpoint.save(every_dtype(), tmp_path / "c")
    tool.works("reshard", tmp_path / "c", tmp_path / "r", "--world", "2")
    assert same(loaded(every_dtype(), tmp_path / "r"), every_dtype())


def test_large_tensors_pass_through_small_buffers(tool: Tool, tmp_path: Path) -> None:
    state = {"a": torch.arange(6_000_000).reshape(600, 10_000).contiguous(), "b": torch.randn(3_000_001)}
    holdfast.checkpoint.save(state, tmp_path / "c")
    tool.works("reshard", tmp_path / "c", tmp_path / "r", "--world", "3", "--max-memory", "64MiB")
    assert same(loaded(state, tmp_path / "r"), state)


def test_what_the_dcp_writer_saved_is_resharded_with_its_objects(tool: Tool, tmp_path: Path) -> None:
    state = training_state()
    dcp.save(state, storage_writer=HoldfastWriter(tmp_path / "c"), no_dist=True)
    tool.works("reshard", tmp_path / "c", tmp_path / "r", "--world", "2")
    into = zeros_like(state)
    dcp.load(into, storage_reader=holdfast.checkpoint.HoldfastReader(tmp_path / "r"), no_dist=True)
    assert same(into, state)


class _FullDiskError(OSError):
    pass


@pytest.mark.parametrize("stop_at", [1, 2])
def test_an_interrupted_reshard_goes_on_where_it_stopped(
    tool: Tool, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int
) -> None:
    write, count = building._Image._write, 0

    def failing(*args: object) -> object:
        nonlocal count
        count += 1
        if count == stop_at:
            raise StorageError("no space is left")
        return write(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(building._Image, "_write", failing)
    assert "no space is left" in tool.refused("reshard", source, tmp_path / "r", "--world", "3", "--workers", "1")
    assert not (tmp_path / "r" / "root").exists()
    finished = {file.name: file.stat().st_ino for file in (tmp_path / "r").glob("*")} if stop_at > 1 else {}
    assert len(finished) == stop_at - 1
    monkeypatch.setattr(building._Image, "_write", write)
    tool.works("reshard", source, tmp_path / "r", "--world", "3")
    assert all((tmp_path / "r" / name).stat().st_ino == inode for name, inode in finished.items())
    assert same(loaded(training_state(), tmp_path / "r"), training_state())


def test_a_damaged_leftover_is_written_again(tool: Tool, source: Path, tmp_path: Path) -> None:
    tool.works("reshard", source, tmp_path / "r", "--world", "2")
    for name in ("root", "index.json.zst"):
        (tmp_path / "r" / name).unlink()
    image = sorted((tmp_path / "r").glob("*.safetensors"))[1]
    data = bytearray(image.read_bytes())
    data[-1] ^= 1
    image.write_bytes(data)
    tool.works("reshard", source, tmp_path / "r", "--world", "2")
    tool.works("verify", tmp_path / "r")


def test_nothing_is_written_over_a_checkpoint(tool: Tool, source: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    holdfast.checkpoint.save({"a": 1}, other)
    before = listing(other)
    assert "committed" in tool.refused("reshard", source, other, "--world", "2")
    assert "committed" in tool.refused("copy", source, other)
    assert "committed" in tool.refused("edit", source, other, "--drop", "optimizer")
    assert listing(other) == before


# --- export and import ---


def test_hugging_face_files_open_with_safetensors(tool: Tool, source: Path, tmp_path: Path) -> None:
    tool.works("export", source, tmp_path / "hf", "--only", "model", "--shard-size", "200")
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    model = training_state()["model"]
    assert index["weight_map"].keys() == model.keys()
    assert len(set(index["weight_map"].values())) > 1
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "hf" / file, "pt") as opened:
            assert opened.metadata()["format"] == "pt"
            assert same(opened.get_tensor(name), model[name])


def test_cast_changes_floating_point_only(tool: Tool, source: Path, tmp_path: Path) -> None:
    tool.works("export", source, tmp_path / "hf", "--only", "model", "--cast", "bf16")
    model = training_state()["model"]
    with safe_open(tmp_path / "hf" / "model-00001-of-00001.safetensors", "pt") as opened:
        for name, tensor in model.items():
            expected = tensor.bfloat16() if tensor.is_floating_point() else tensor
            assert same(opened.get_tensor(name), expected), name
    assert "give one of" in tool.refused("export", source, tmp_path / "x", "--cast", "int8", code=2)


def test_every_dtype_that_safetensors_has_is_exported_with_its_value(tool: Tool, tmp_path: Path) -> None:
    state = every_dtype()
    holdfast.checkpoint.save(state, tmp_path / "c")
    assert "cannot hold" in tool.refused("export", tmp_path / "c", tmp_path / "hf", code=2)
    known = {
        k: t for k, t in state.items()
        if not k.startswith(("complex32", "complex128", "float4", "float8_e4m3fnuz", "float8_e5m2fnuz"))
    }  # fmt: skip
    holdfast.checkpoint.save(known, tmp_path / "k")
    tool.works("export", tmp_path / "k", tmp_path / "hf")
    tool.works("import", tmp_path / "hf", tmp_path / "i", "--world", "2")
    assert same(loaded(known, tmp_path / "i"), known)
    tool.works("diff", tmp_path / "k", tmp_path / "hf")


@pytest.mark.parametrize("format", ["dcp", "torch"])
def test_all_of_a_state_goes_out_and_comes_back(tool: Tool, source: Path, tmp_path: Path, format: str) -> None:
    tool.works("export", source, tmp_path / "out", "--format", format)
    state = training_state()
    if format == "torch":
        assert same(torch.load(tmp_path / "out", weights_only=True), state)
        assert same(torch.load(tmp_path / "out", weights_only=True, mmap=True), state)
    else:
        into = zeros_like(state)
        dcp.load(into, checkpoint_id=tmp_path / "out", no_dist=True)
        assert same(into, state)
    tool.works("import", tmp_path / "out", tmp_path / "step-00000009", "--world", "2")
    back = loaded(state, tmp_path / "step-00000009")
    # DCP turns the keys of mappings into text; those of the state that is loaded into count.
    assert same(back, state)
    with open_checkpoint(tmp_path / "step-00000009") as catalog:
        assert catalog.version.step == 9
    assert not list(tmp_path.glob(".tmp*"))


@pytest.mark.parametrize("format", ["dcp", "torch"])
def test_every_dtype_goes_out_and_comes_back(tool: Tool, tmp_path: Path, format: str) -> None:
    state = every_dtype()
    holdfast.checkpoint.save(state, tmp_path / "c")
    tool.works("export", tmp_path / "c", tmp_path / "out", "--format", format)
    tool.works("import", tmp_path / "out", tmp_path / "i")
    assert same(loaded(state, tmp_path / "i"), state)


def test_large_tensors_are_exported_in_parts(tool: Tool, tmp_path: Path) -> None:
    state = {"a": torch.randn(700, 3001), "b": torch.arange(5)}
    holdfast.checkpoint.save(state, tmp_path / "c")
    for format in ("dcp", "torch", "hf"):
        out = tmp_path / format
        tool.works("export", tmp_path / "c", out, "--format", format, "--max-memory", "64MiB")
        tool.works("diff", tmp_path / "c", out, "--max-memory", "64MiB")


def test_tied_tensors_stay_tied_in_a_torch_file(tool: Tool, tmp_path: Path) -> None:
    tensor = torch.ones(3)
    holdfast.checkpoint.save({"a": tensor, "b": tensor}, tmp_path / "c")
    tool.works("export", tmp_path / "c", tmp_path / "t.pt", "--format", "torch")
    back = torch.load(tmp_path / "t.pt", weights_only=True)
    back["a"][0] = 5
    assert back["b"][0] == 5
    tool.works("import", tmp_path / "t.pt", tmp_path / "again")
    with open_checkpoint(tmp_path / "again") as catalog:
        assert list(catalog.tensors) == ["a"]


def test_an_import_below_a_key_is_exported_without_it(tool: Tool, tmp_path: Path) -> None:
    save_file({"w": torch.ones(2, 2), "x.b": torch.zeros(())}, tmp_path / "m.safetensors")
    tool.works("import", tmp_path / "m.safetensors", tmp_path / "c", "--prefix", "model")
    state = {"model": {"w": torch.ones(2, 2), "x.b": torch.zeros(())}}
    assert same(loaded(state, tmp_path / "c"), state)
    tool.works("export", tmp_path / "c", tmp_path / "hf", "--only", "model")
    tool.works("diff", tmp_path / "m.safetensors", tmp_path / "hf")


def test_a_dcp_checkpoint_of_two_chunks_per_tensor_is_imported(tool: Tool, tmp_path: Path) -> None:
    import torch.distributed as dist
    from torch.distributed.tensor import DeviceMesh, Shard, distribute_tensor

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        sharded = distribute_tensor(torch.arange(12.0).reshape(4, 3), DeviceMesh("cpu", [0]), [Shard(0)])
        dcp.save({"w": sharded, "n": 5, "l": [torch.ones(2), 3]}, checkpoint_id=tmp_path / "d")
    finally:
        dist.destroy_process_group()
    tool.works("import", tmp_path / "d", tmp_path / "c")
    state = {"w": torch.arange(12.0).reshape(4, 3), "n": 5, "l": [torch.ones(2), 3]}
    assert same(loaded(state, tmp_path / "c"), state)


def test_an_interrupted_export_goes_on_where_it_stopped(
    tool: Tool, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, names = PosixStorage.write, []

    def failing(self: PosixStorage, path: Path, *args: object, **kwargs: object) -> int:
        if len(names) == 2:
            raise StorageError("no space is left")
        names.append(Path(path).name)
        return write(self, path, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(PosixStorage, "write", failing)
    assert "no space" in tool.refused("export", source, tmp_path / "hf", "--shard-size", "300", "--workers", "1")
    assert not (tmp_path / "hf" / "model.safetensors.index.json").exists()
    monkeypatch.setattr(PosixStorage, "write", write)
    inodes = {name: (tmp_path / "hf" / name).stat().st_ino for name in names}
    tool.works("export", source, tmp_path / "hf", "--shard-size", "300")
    assert {name: (tmp_path / "hf" / name).stat().st_ino for name in names} == inodes
    tool.works("diff", source, tmp_path / "hf")
    assert "already" in tool.refused("export", source, tmp_path / "hf")


# --- edit and copy ---


def test_parts_are_renamed_and_dropped(tool: Tool, source: Path, tmp_path: Path) -> None:
    tool.works(
        "edit", source, tmp_path / "e", "--rename", "model.0=model.in.first", "--drop", "optimizer", "--drop", "*.bias"
    )
    model = training_state()["model"]
    expected = {
        "model": {k.replace("0.", "in.first.") if k.startswith("0.") else k: v for k, v in model.items()
                  if not k.endswith(".bias")},
        "step": 7, "names": ["a", ("b", None)],
    }  # fmt: skip
    assert same(loaded(expected, tmp_path / "e"), expected)


def test_what_the_dcp_writer_saved_is_edited_with_its_nesting(tool: Tool, tmp_path: Path) -> None:
    state = {"model": {"a": torch.ones(2), "b": torch.zeros(3)}, "lr": 0.5, "seed": 3}
    dcp.save(state, storage_writer=HoldfastWriter(tmp_path / "c"), no_dist=True)
    tool.works("edit", tmp_path / "c", tmp_path / "e", "--rename", "model=net", "--drop", "seed")
    into = {"net": {"a": torch.zeros(2), "b": torch.ones(3)}, "lr": 0.0}
    dcp.load(into, storage_reader=holdfast.checkpoint.HoldfastReader(tmp_path / "e"), no_dist=True)
    assert same(into, {"net": state["model"], "lr": 0.5})


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rename", "nothing=other"], "nothing has that name"),
        (["--drop", "nothing"], "nothing has that name"),
        (["--rename", "model.0.weight"], "OLD=NEW"),
        (["--rename", "model.0.weight=other.w"], "its name must start so"),
        (["--rename", "model.0.weight=model.2.weight"], "one name"),
        ([], "nothing to edit"),
    ],
)
def test_an_edit_that_cannot_be_is_refused(
    tool: Tool, source: Path, tmp_path: Path, arguments: list[str], said: str
) -> None:
    code = 1 if said == "nothing has that name" else 2
    assert said in tool.refused("edit", source, tmp_path / "e", *arguments, code=code)
    assert not (tmp_path / "e").exists()


def test_a_copy_is_the_same_files(tool: Tool, source: Path, tmp_path: Path) -> None:
    tool.works("copy", source.parent, tmp_path / "c")
    assert listing(tmp_path / "c") == listing(source)


def test_a_damaged_source_is_not_copied(tool: Tool, source: Path, tmp_path: Path) -> None:
    (image,) = source.glob("*.safetensors")
    data = bytearray(image.read_bytes())
    data[-1] ^= 1
    image.write_bytes(data)
    assert image.name in tool.refused("copy", source, tmp_path / "c")
    assert not (tmp_path / "c" / "root").exists()
    image.write_bytes(bytes(data[:-1]) + bytes([data[-1] ^ 1]))
    tool.works("copy", source, tmp_path / "c")
    assert listing(tmp_path / "c") == listing(source)
