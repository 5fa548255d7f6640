"""What the tools never do: touch what is not theirs, delete by a slip of the pen, or answer with a traceback."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from tools_states import Tool, every_dtype, listing

import holdfast.checkpoint
from holdfast.checkpoint import HoldfastWriter
from holdfast.checkpoint.root import decode_root, encode_root
from holdfast.checkpoint.steps import read_step_info, tag_step
from holdfast.checkpoint.storage import PosixStorage
from holdfast.checkpoint.tools import native
from holdfast.checkpoint.tools.parallel import workers_within
from holdfast.checkpoint.tools.states import open_states
from holdfast.errors import StorageError

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


@pytest.fixture
def steps(tmp_path: Path) -> Path:
    for step in (10, 20, 30):
        holdfast.checkpoint.save({"x": torch.arange(5.0), "n": step}, tmp_path / "c" / f"step-{step:08d}")
    return tmp_path / "c"


def _long_ago(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        os.utime(path, (1e9, 1e9))


# --- what belongs to others ---


def test_repair_leaves_folders_of_other_programs_alone(tool: Tool, steps: Path, tmp_path: Path) -> None:
    model = tmp_path / "Llama"
    model.mkdir()
    save_file({"w": torch.ones(2)}, model / "model.safetensors")
    dcp.save({"w": torch.ones(2)}, checkpoint_id=steps / "step-00000005", no_dist=True)
    before = listing(tmp_path)
    _long_ago(tmp_path)
    assert "no step directory" in tool.refused("repair", model, "--min-age", "0", code=2)
    assert "no step directory" in tool.refused("verify", model, code=2)
    assert tool("repair", steps, "--min-age", "0") == 1
    assert "no file of holdfast: left alone" in tool.out
    assert listing(tmp_path) == before


def test_repair_sets_the_folder_aside_in_which_it_is_called(
    tool: Tool, steps: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = steps / "step-00000020"
    (step / "root").unlink()
    files = listing(step)
    monkeypatch.chdir(step)
    tool.works("repair", ".", "--min-age", "0")
    (aside,) = steps.glob("incomplete-*/step-00000020")
    assert listing(aside) == files


def test_an_export_is_not_mixed_with_files_of_others(tool: Tool, steps: Path, tmp_path: Path) -> None:
    for name in ("model-00001-of-00001.safetensors", "model.safetensors", "other.safetensors"):
        folder = tmp_path / name.removesuffix(".safetensors")
        folder.mkdir()
        save_file({"w": torch.ones(2)}, folder / name)
        before = listing(folder)
        assert "was not written by an export" in tool.refused("export", steps, folder)
        assert listing(folder) == before
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "config.json").write_text("{}")
    (tmp_path / "own" / ".tmp-mine").write_text("mine")
    tool.works("export", steps, tmp_path / "own")
    assert {"config.json", ".tmp-mine"} < set(listing(tmp_path / "own"))


@pytest.mark.parametrize("which", [0, 1])
def test_names_in_a_root_lead_no_tool_out_of_its_directory(tool: Tool, steps: Path, tmp_path: Path, which: int) -> None:
    step = steps / "step-00000020"
    root, _ = decode_root((step / "root").read_bytes())
    copies = list(root.index_copies)
    copies[which] = msgspec.structs.replace(copies[which], name="../stolen")
    (step / "root").write_bytes(encode_root(msgspec.structs.replace(root, index_copies=tuple(copies))))
    assert "not in its directory" in tool.refused("copy", step, tmp_path / "to" / "copy")
    tool("verify", step)
    tool.works("repair", step)
    tool.works("verify", step)
    assert not list(tmp_path.rglob("stolen"))


def test_a_state_is_not_put_under_the_name_of_another_step(tool: Tool, steps: Path, tmp_path: Path) -> None:
    for command in (["reshard", "--world", "2"], ["edit", "--drop", "n"], ["copy"]):
        to = tmp_path / "to" / "step-00000021"
        said = tool.refused(command[0], steps / "step-00000020", to, *command[1:], code=2)
        assert "is the name of step 21, the state is of step 20" in said
        assert not to.exists()
        tool.works(command[0], steps / "step-00000020", tmp_path / command[0] / "step-00000020", *command[1:])


def test_a_copy_takes_a_late_tag_along_before_it_is_one(
    tool: Tool, steps: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tag_step(steps / "step-00000020", "paper")
    write = PosixStorage.write

    def dies(self: PosixStorage, path: Path, *args: Any, **kwargs: Any) -> int:
        size = write(self, path, *args, **kwargs)
        if Path(path).name == "root":
            raise StorageError("killed")
        return size

    monkeypatch.setattr(PosixStorage, "write", dies)
    tool.refused("copy", steps / "step-00000020", tmp_path / "copy")
    assert read_step_info(tmp_path / "copy").tag == "paper"


# --- prune ---


def test_prune_by_a_metric_that_nobody_has_deletes_nothing(tool: Tool, tmp_path: Path) -> None:
    for step in (1, 2, 3):
        path = tmp_path / "c" / f"step-{step:08d}"
        holdfast.checkpoint.save({"n": step}, path)
        root, _ = decode_root((path / "root").read_bytes())
        (path / "root").write_bytes(encode_root(msgspec.structs.replace(root, metrics={"loss": -float(step)})))
    before = listing(tmp_path)
    said = tool.refused("prune", tmp_path / "c", "--best", "2", "--by", "los", code=2)
    assert "no checkpoint has this metric (known: loss)" in said
    assert listing(tmp_path) == before
    said = tool.refused("prune", tmp_path / "c" / "step-00000001", "--best", "2", "--by", "los", code=2)
    assert "is one checkpoint: give the directory that holds it" in said
    assert listing(tmp_path) == before
    assert "2 deleted" not in tool.works("prune", tmp_path / "c", "--best", "2", "--by", "loss")
    assert sorted(path.name for path in (tmp_path / "c").glob("step-*")) == ["step-00000002", "step-00000003"]


def test_prune_says_where_there_is_nothing_to_prune(tool: Tool, tmp_path: Path) -> None:
    assert tool.works("prune", tmp_path, "--best", "2", "--by", "loss") == "0 deleted, 0 B\n"
    assert f"{tmp_path} holds no steps" in tool.err


def test_prune_tells_all_that_it_deletes_before_it_does(tool: Tool, steps: Path) -> None:
    shutil.copytree(steps / "step-00000010", steps / "abandoned-20200101T000000Z-0123" / "step-00000010")
    aside = steps / "abandoned-20200101T000000Z-0123" / "step-00000010"
    root, _ = decode_root((aside / "root").read_bytes())
    (aside / "root").write_bytes(encode_root(msgspec.structs.replace(root, time=1e9)))
    (steps / "step-00000015").mkdir()
    _long_ago(steps / "step-00000015")
    before = listing(steps)
    told = tool.works("prune", steps, "--last", "2", "--dry-run").replace("would be deleted", "deleted")
    as_json = json.loads(tool.works("prune", steps, "--last", "2", "--dry-run", "--json"))
    assert listing(steps) == before
    there = {path for path in steps.rglob("*") if path.is_dir()}
    assert tool.works("prune", steps, "--last", "2") == told
    gone = {str(path) for path in there if not path.exists()}
    assert gone == {*as_json["deleted"], *as_json["left_over"], *as_json["abandoned"], str(aside)}
    assert all(path in told for path in gone - {str(aside)})


# --- one line ---


def test_an_unforeseen_error_is_one_line(tool: Tool, steps: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise ZeroDivisionError("division\nby zero")

    monkeypatch.setattr(native.NativeState, "nested", broken)
    assert r"ZeroDivisionError: division\nby zero (not foreseen" in tool.refused("inspect", steps)

    def hungry(*args: object) -> None:
        raise MemoryError

    monkeypatch.setattr(native.NativeState, "nested", hungry)
    assert "not enough memory" in tool.refused("inspect", steps)


def test_names_with_control_characters_are_shown_as_escapes(tool: Tool, tmp_path: Path) -> None:
    name = "w\x1b[2J\nfake: sound"
    save_file({name: torch.ones(2)}, tmp_path / "m.safetensors")
    save_file({"w": torch.ones(2)}, tmp_path / "n.safetensors")
    for arguments in (("inspect", tmp_path / "m.safetensors"), ("diff", *tmp_path.glob("*.safetensors"))):
        tool(*arguments)
        assert r"w\x1b[2J\nfake: sound" in tool.out
        assert "\x1b" not in tool.out
    assert json.loads(tool.works("inspect", tmp_path / "m.safetensors", "--json"))["tensors"][0]["name"] == name
    tool.works("import", tmp_path / "m.safetensors", tmp_path / "c")
    tool.works("diff", tmp_path / "m.safetensors", tmp_path / "c")


def test_a_path_that_is_no_text_and_a_terminal_that_knows_ascii_only(tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xe9"))
    holdfast.checkpoint.save({"w\u2026": torch.ones(2)}, folder / "step-00000001")
    commands = [["--help"], ["ls"], ["inspect"], ["verify"], ["repair"], ["ls", "--json"], ["ls", "--latest"]]
    code = (
        "import sys; from holdfast.checkpoint.tools.cli import main\n"
        f"for command in {commands}: assert main([*command[:1], sys.argv[1], *command[1:]]) == 0"
    )
    environ = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-c", code, folder]
    done = subprocess.run(command, check=False, timeout=240, capture_output=True, env=environ)
    assert (done.returncode, done.stderr) == (0, b"")
    assert rb"w\u2026" in done.stdout
    assert done.stdout.endswith(b"\n" + os.fsencode(folder / "step-00000001") + b"\n")


def test_a_reader_that_has_seen_enough_is_no_error(steps: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    code = "import sys; from holdfast.checkpoint.tools.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", code, "ls", str(steps)], check=False, timeout=240, stdout=write, stderr=subprocess.PIPE
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (1, b"")


def test_a_damaged_source_is_one_line_in_every_format(tool: Tool, tmp_path: Path) -> None:
    holdfast.checkpoint.save({"w": torch.arange(5000.0)}, tmp_path / "c")
    (image,) = (tmp_path / "c").glob("*.safetensors")
    data = bytearray(image.read_bytes())
    data[5000] ^= 4
    image.write_bytes(data)
    for format in ("hf", "dcp", "torch"):
        said = tool.refused("export", tmp_path / "c", tmp_path / "out", "--format", format)
        assert "does not match its checksum" in said
        assert not list(tmp_path.glob("*out*/*")) or format == "hf"
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["c"]


# --- every dtype, many tensors ---


def test_every_dtype_is_measured_compared_and_cast(tool: Tool, tmp_path: Path) -> None:
    state, changed = every_dtype(), every_dtype()
    holdfast.checkpoint.save(state, tmp_path / "a")
    for tensor in changed.values():
        if tensor.numel() == 12:
            tensor.view(-1).view(torch.uint8)[0] ^= 1
    holdfast.checkpoint.save(changed, tmp_path / "b")
    tool.works("inspect", tmp_path / "a", "--stats")
    assert tool("diff", tmp_path / "a", tmp_path / "b", "--json") == 1
    found = {entry["name"]: entry for entry in json.loads(tool.out)["differences"]}
    assert found.keys() == {name for name, tensor in state.items() if tensor.numel() == 12}
    assert (found["int64-2-7"]["largest"], found["uint64-2-7"]["largest"]) == (1, 1)
    assert "largest" not in found["float4_e2m1fn_x2-2-7"]
    for format in ("dcp", "torch"):
        tool.works("export", tmp_path / "a", tmp_path / format, "--format", format, "--cast", "bf16")


def test_who_wrote_what_is_looked_up_once_for_all_tensors(
    tool: Tool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    holdfast.checkpoint.save({f"w{i}": torch.ones(1) for i in range(50)}, tmp_path / "c")
    saved, asked = native.Catalog.saved, []
    monkeypatch.setattr(native.Catalog, "saved", property(lambda self: (asked.append(1), saved.fget(self))[1]))  # type: ignore[attr-defined]
    tool.works("inspect", tmp_path / "c")
    assert len(asked) <= 2, "each time sorts all of them"


# --- destinations and names ---


def test_a_checkpoint_is_made_of_a_new_folder_only(
    tool: Tool, steps: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "m.safetensors")
    before = listing(tmp_path)
    commands = (["copy", steps], ["reshard", steps, "--world", "2"], ["edit", steps, "--drop", "n"])
    for command in (*commands, ["import", tmp_path / "m.safetensors"]):
        said = tool.refused(command[0], command[1], steps, *command[2:])
        assert "holds 'step-00000010', which is no part of a checkpoint" in said
    assert listing(tmp_path) == before
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / ".nfs0001").touch()
    tool.works("copy", steps, tmp_path / "new")
    shutil.rmtree(tmp_path / "new")
    monkeypatch.chdir(tmp_path)
    assert "as files only" in tool.refused("export", steps, "s3://bucket/x", code=2)
    assert "exists already" in tool.refused("export", steps, "x/..", "--format", "torch")
    assert listing(tmp_path) == before


def test_an_edit_loses_nothing_to_a_name_that_is_taken(tool: Tool, tmp_path: Path) -> None:
    holdfast.checkpoint.save({"model": {"w": torch.ones(2)}, "n": 5}, tmp_path / "c")
    said = tool.refused("edit", tmp_path / "c", tmp_path / "e", "--rename", "model=n", code=2)
    assert "two things would be named n" in said
    assert "give a name" in tool.refused("edit", tmp_path / "c", tmp_path / "e", "--drop", "", code=2)
    dcp.save({"w": torch.ones(2), "a": "x", "b": "y"}, storage_writer=HoldfastWriter(tmp_path / "d"), no_dist=True)
    said = tool.refused("edit", tmp_path / "d", tmp_path / "e", "--rename", "a=b", code=2)
    assert "two things would be named b" in said
    assert not (tmp_path / "e").exists()


def test_what_torch_does_not_read_is_said_without_its_advice(tool: Tool, tmp_path: Path) -> None:
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "empty.pt").write_bytes(b"")
    torch.save({"m": torch.empty(3, device="meta")}, tmp_path / "meta.pt")
    for name, reason in (("text.pt", "KeyError"), ("empty.pt", "EOFError")):
        assert reason in tool.refused("inspect", tmp_path / name)
    assert "meta device" in tool.refused("import", tmp_path / "meta.pt", tmp_path / "c", code=2)
    torch.save({"path": tmp_path}, tmp_path / "code.pt")
    said = tool.refused("inspect", tmp_path / "code.pt")
    assert "WeightsUnpickler error" in said
    assert "weights_only" not in said


def test_numbers_that_nobody_means_are_refused(tool: Tool, steps: Path, tmp_path: Path) -> None:
    assert "ranks: give 1 to" in tool.refused("reshard", steps, tmp_path / "r", "--world", "10" + "0" * 20, code=2)
    (tmp_path / "layout").write_text('{"mesh": {"a": 1000000, "b": 1000000}}')
    assert "ranks: give 1 to" in tool.refused("reshard", steps, tmp_path / "r", "--layout", tmp_path / "layout", code=2)
    assert "give seconds" in tool.refused("repair", steps, "--min-age", "nan", code=2)
    assert workers_within(1_000_000_000, 1 << 60) <= 1000


def test_several_at_a_time_find_what_one_finds(tool: Tool, tmp_path: Path) -> None:
    for name, add in (("a", 0.0), ("b", 1.0)):
        state = {f"w{i}": torch.full((7, 5), float(i)) + add * (i % 3 == 0) for i in range(20)}
        holdfast.checkpoint.save(state, tmp_path / name)
        torch.save(state, tmp_path / f"{name}.pt")
    for suffix in ("", ".pt"):
        pair = (tmp_path / f"a{suffix}", tmp_path / f"b{suffix}")
        found = []
        for workers in (1, 3):
            assert tool("diff", *pair, "--json", "--workers", workers) == 1
            assert len(json.loads(tool.out)["differences"]) == 7
            found.append((tool.out, tool.works("inspect", pair[0], "--stats", "--json", "--workers", workers)))
        assert found[0] == found[1]
    one, other = open_states(tmp_path / "a", 2)
    assert one is not other
    assert len({id(state) for state in open_states(tmp_path / "a.pt", 3)}) == 1, "it would be read three times"
