"""ls, inspect, verify, diff, repair, prune, the command line itself, and what hostile files are met with."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from tools_states import Tool, listing, loaded, same, training_state

import holdfast.checkpoint
from holdfast.checkpoint import objects, register_codec
from holdfast.checkpoint.commit import open_checkpoint
from holdfast.checkpoint.steps import read_step_info
from holdfast.checkpoint.tools import cli
from holdfast.checkpoint.tools.units import human, parse_size
from holdfast.errors import UsageError

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


@pytest.fixture
def steps(tmp_path: Path) -> Path:
    for step in (10, 20, 30):
        holdfast.checkpoint.save({**training_state(), "step": step}, tmp_path / "c" / f"step-{step:08d}")
    (tmp_path / "c" / "step-00000040").mkdir()
    return tmp_path / "c"


def _flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def _image(step: Path) -> Path:
    (image,) = step.glob("*.safetensors")
    return image


# --- ls, inspect ---


def test_steps_are_listed_with_what_keeps_them(tool: Tool, steps: Path) -> None:
    out = tool.works("ls", steps)
    assert [line.split()[0] for line in out.splitlines()] == ["STEP", "10", "20", "30", "40"]
    assert "incomplete" in out.splitlines()[4]
    assert tool.works("ls", steps, "--latest") == f"{steps / 'step-00000030'}\n"
    listed = json.loads(tool.works("ls", steps, "--json", "--keep", '{"every_steps": 20}'))
    assert [(info["step"], info["complete"], info["kept_because"]) for info in listed] == [
        (10, True, []), (20, True, ["every_steps"]), (30, True, ["newest"]), (40, False, []),
    ]  # fmt: skip


def test_a_step_that_lacks_a_file_is_not_the_latest(tool: Tool, steps: Path) -> None:
    image = _image(steps / "step-00000030")
    image.write_bytes(image.read_bytes()[:-1])
    assert tool.works("ls", steps, "--latest") == f"{steps / 'step-00000020'}\n"
    *_, cut, _ = json.loads(tool.works("ls", steps, "--json"))
    assert (cut["complete"], "bytes, not" in cut["problem"]) == (False, True)
    _image(steps / "step-00000020").unlink()
    assert "incomplete: its images have 0 bytes" in tool.works("ls", steps / "step-00000020")


def test_an_empty_directory_has_no_latest(tool: Tool, tmp_path: Path) -> None:
    assert "no complete checkpoint" in tool.refused("ls", tmp_path, "--latest")
    assert tool("ls", tmp_path) == 0
    assert "holds no steps" in tool.err
    assert "is no directory" in tool.refused("ls", tmp_path / "none", code=2)


def test_a_checkpoint_of_any_name_is_listed_by_itself(tool: Tool, tmp_path: Path) -> None:
    holdfast.checkpoint.save({"x": torch.ones(2)}, tmp_path / "best")
    assert len(tool.works("ls", tmp_path / "best").splitlines()) == 2
    assert tool.works("ls", tmp_path / "best", "--latest") == f"{tmp_path / 'best'}\n"


def test_inspect_shows_tensors_and_where_values_are_bad(tool: Tool, tmp_path: Path) -> None:
    state = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([1.0, float("nan"), float("inf")]), "n": torch.tensor(5)}
    holdfast.checkpoint.save(state, tmp_path / "c")
    found = json.loads(tool.works("inspect", tmp_path / "c", "--json"))
    assert found["num_tensors"] == 3
    assert found["dtypes"] == {"float32": 20, "int64": 8}
    assert [(t["name"], t["dtype"], t["shape"]) for t in found["tensors"]] == [
        ("a", "float32", [2]), ("b", "float32", [3]), ("n", "int64", []),
    ]  # fmt: skip
    assert tool("inspect", tmp_path / "c", "--stats", "--json") == 1
    a, b, n = json.loads(tool.out)["tensors"]
    assert (a["min"], a["max"], a["mean"], a["norm"], a["nan"], a["inf"]) == (3, 4, 3.5, 5, 0, 0)
    assert (b["nan"], b["inf"], b["max"]) == (1, 1, 1)
    assert n["min"] == 5
    assert "float32" in tool.works("inspect", tmp_path / "c", "--stats", "--only", "a")


def test_inspect_shows_what_is_no_tensor(tool: Tool, tmp_path: Path) -> None:
    state = {
        "x": [torch.ones(1), 5],
        "groups": [{"betas": (0.9, 0.99), "names": ["n" * 70]}],
        "raw": b"abc",
        "none": [],
    }
    holdfast.checkpoint.save(state, tmp_path / "c")
    lines = tool.works("inspect", tmp_path / "c").splitlines()
    shown = ["groups.0.betas = (0.9, 0.99)", f"groups.0.names = ['{'n' * 57}…", "none = []", "raw = 3 bytes", "x.1 = 5"]
    assert lines[-6:] == ["", *shown]
    found = json.loads(tool.works("inspect", tmp_path / "c", "--json", "--only", "x"))
    assert found["values"] == {"x.1": "5"}


def test_foreign_formats_are_inspected_too(tool: Tool, tmp_path: Path) -> None:
    save_file({"w": torch.ones(2, dtype=torch.bfloat16)}, tmp_path / "m.safetensors")
    torch.save({"w": [torch.ones(2)]}, tmp_path / "m.pt")
    dcp.save({"w": torch.ones(2)}, checkpoint_id=tmp_path / "d", no_dist=True)
    for path, name, dtype in (("m.safetensors", "w", "bfloat16"), ("m.pt", "w.0", "float32"), ("d", "w", "float32")):
        (tensor,) = json.loads(tool.works("inspect", tmp_path / path, "--json", "--stats"))["tensors"]
        assert (tensor["name"], tensor["dtype"], tensor["mean"]) == (name, dtype, 1)


# --- verify ---


def test_verify_says_which_tensor_of_which_file_is_broken(tool: Tool, steps: Path) -> None:
    step = steps / "step-00000020"
    assert "sound" in tool.works("verify", step)
    with open_checkpoint(step) as catalog:
        (meta,) = (image.meta for image in catalog.images)
        name, at = meta.pieces[0].key, meta.piece_offsets[0]
    _flip(_image(step), at)
    assert tool("verify", steps, "--json") == 1
    found = json.loads(tool.out)
    assert found[str(steps / "step-00000010")]["sound"]
    (problem,) = found[str(step)]["problems"]
    assert _image(step).name in problem
    assert name in problem


@pytest.mark.parametrize("what", ["truncated", "longer", "header", "missing", "index", "root", "both indices"])
def test_verify_finds_every_kind_of_damage(tool: Tool, steps: Path, what: str) -> None:
    step = steps / "step-00000020"
    image = _image(step)
    damage = {
        "truncated": lambda: os.truncate(image, image.stat().st_size - 1),
        "longer": lambda: image.write_bytes(image.read_bytes() + b"x"),
        "header": lambda: _flip(image, 200),
        "missing": image.unlink,
        "index": lambda: _flip(step / "index.json.zst", 30),
        "root": lambda: _flip(step / "root", 40),
        "both indices": lambda: [_flip(file, 30) for file in step.glob("index*")],
    }
    damage[what]()
    assert tool("verify", step) == 1
    assert "Traceback" not in tool.out + tool.err
    expected = {"root": "root:", "index": "index.json.zst", "both indices": "index.json.zst"}.get(what, image.name)
    assert expected in tool.out


# --- diff ---


def test_diff_names_the_first_element_and_the_largest_difference(tool: Tool, tmp_path: Path) -> None:
    a = {
        "x": torch.zeros(3, 4),
        "only": torch.ones(1),
        "shape": torch.ones(2),
        "type": torch.ones(2),
        "eq": torch.ones(2),
    }
    b = {"x": torch.zeros(3, 4), "shape": torch.ones(3), "type": torch.ones(2, dtype=torch.int32), "eq": torch.ones(2)}
    b["x"][1, 2], b["x"][2, 0] = 0.5, -2.0
    holdfast.checkpoint.save(a, tmp_path / "a")
    torch.save(b, tmp_path / "b.pt")
    assert tool("diff", tmp_path / "a", tmp_path / "b.pt", "--json") == 1
    found = json.loads(tool.out)
    assert found == {
        "equal": 1,
        "equal_values": 0,
        "differences": [
            {"name": "only", "what": "only in A"},
            {"name": "shape", "what": "shape", "a": "[2]", "b": "[3]"},
            {"name": "type", "what": "dtype", "a": "float32", "b": "int32"},
            {"name": "x", "what": "values", "largest": 2.0, "first": [1, 2]},
        ],
    }
    assert tool("diff", tmp_path / "b.pt", tmp_path / "b.pt") == 0


def test_diff_compares_what_is_no_tensor(tool: Tool, tmp_path: Path) -> None:
    a = {"x": torch.ones(2), "step": 3, "groups": [{"lr": 0.1, "nesterov": False}], "nothing": {}, "long": "y" * 99}
    b = {**a, "step": 4, "groups": [{"lr": 0.1}], "nothing": []}
    holdfast.checkpoint.save(a, tmp_path / "a")
    holdfast.checkpoint.save(b, tmp_path / "b")
    torch.save({**b, "long": "y" * 98}, tmp_path / "b.pt")
    assert tool("diff", tmp_path / "a", tmp_path / "b") == 1
    assert tool.out.splitlines() == [
        "groups.0.nesterov: only in A: False",
        "nothing: value {} in A, [] in B",
        "step: value 3 in A, 4 in B",
        "1 tensors are equal, 0 are not; of other values 2 are equal, 3 are not",
    ]
    assert tool("diff", tmp_path / "b", tmp_path / "b.pt", "--json") == 1
    (difference,) = json.loads(tool.out)["differences"]
    assert (difference["name"], difference["what"], len(difference["a"])) == ("long", "value", 60)
    assert tool("diff", tmp_path / "a", tmp_path / "b", "--strip-a", "x", "--strip-b", "x") == 0
    tool.works("export", tmp_path / "a", tmp_path / "hf", "--format", "hf")
    assert tool("diff", tmp_path / "a", tmp_path / "hf") == 0


def test_diff_compares_objects_that_nobody_here_can_read_as_bytes(tool: Tool, tmp_path: Path) -> None:
    class Counter:
        def __init__(self, count: int) -> None:
            self.count = count

    register_codec(Counter, "tests.counter", lambda counter: counter.count, Counter)
    try:
        holdfast.checkpoint.save({"x": torch.ones(2), "counter": Counter(3)}, tmp_path / "a")
        holdfast.checkpoint.save({"x": torch.ones(2), "counter": Counter(4)}, tmp_path / "b")
    finally:
        del objects._codecs_by_type[Counter], objects._codecs_by_name["tests.counter"]
    assert tool("diff", tmp_path / "a", tmp_path / "a") == 0
    assert tool("diff", tmp_path / "a", tmp_path / "b") == 1
    assert "state: value" in tool.out
    assert "bytes in A" in tool.out
    torch.save({"x": torch.ones(2)}, tmp_path / "x.pt")
    assert tool("diff", tmp_path / "a", tmp_path / "x.pt") == 0
    assert "cannot be compared" in tool.err
    assert len(tool.works("inspect", tmp_path / "a").splitlines()) > 5
    assert "cannot be shown" in tool.err


# --- repair, prune ---


@pytest.mark.parametrize("damage", ["root byte", "one index", "both indices", "whole root"])
def test_repair_makes_the_checkpoint_readable_again(tool: Tool, steps: Path, damage: str) -> None:
    step = steps / "step-00000020"
    before = listing(step)
    info = read_step_info(step)
    if damage == "root byte":
        _flip(step / "root", 40)
    elif damage == "whole root":
        (step / "root").write_bytes(b"x" * 4080)
    else:
        for file in [step / "index.json.zst"] if damage == "one index" else list(step.glob("index*")):
            file.write_bytes(b"nonsense")
    damaged = listing(step)
    tool("repair", step, "--dry-run")
    assert listing(step) == damaged
    tool.works("repair", step)
    assert tool.works("repair", step) == f"{step}: sound, nothing to do\n"
    state = {**training_state(), "step": 20}
    assert same(loaded(state, step), state)
    assert read_step_info(step).version == info.version
    if damage != "whole root":
        assert listing(step) == before
    tool.works("verify", step)


def test_repair_sets_aside_what_was_never_finished_but_not_what_may_be_under_way(tool: Tool, steps: Path) -> None:
    step = steps / "step-00000030"
    (step / "root").unlink()
    files = listing(step)
    tool.works("repair", steps / "step-00000020")
    tool("repair", steps)
    assert "left alone" in tool.out
    assert listing(step) == files
    shutil.rmtree(steps / "step-00000040")
    tool.works("repair", steps, "--min-age", "0")
    assert not step.exists()
    (aside,) = steps.glob("incomplete-*/step-00000030")
    assert listing(aside) == files


def test_repair_finishes_a_whole_step_when_asked_to(tool: Tool, steps: Path) -> None:
    step = steps / "step-00000030"
    (step / "root").unlink()
    shutil.rmtree(steps / "step-00000040")
    tool.works("repair", steps, "--min-age", "0", "--rebuild")
    state = {**training_state(), "step": 30}
    assert same(loaded(state, step), state)


def test_repair_does_not_finish_a_step_with_a_broken_image(tool: Tool, steps: Path) -> None:
    step = steps / "step-00000030"
    (step / "root").unlink()
    _flip(_image(step), -1)
    shutil.rmtree(steps / "step-00000040")
    tool("repair", steps, "--min-age", "0", "--rebuild")
    assert "cannot be finished" in tool.out
    assert not (step / "root").exists()


def test_prune_deletes_what_the_policy_does_not_keep(tool: Tool, steps: Path) -> None:
    before = listing(steps)
    assert "1 would be deleted" in tool.works("prune", steps, "--last", "2", "--dry-run")
    assert listing(steps) == before
    assert json.loads(tool.works("prune", steps, "--last", "2", "--json"))["deleted"] == [str(steps / "step-00000010")]
    assert not (steps / "step-00000010").exists()
    assert (steps / "step-00000020" / "root").exists()
    assert "what to keep" in tool.refused("prune", steps, code=2)


# --- hostile files ---


class _Evil:
    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._mark),)


def test_code_in_the_metadata_of_dcp_is_not_run(tool: Tool, tmp_path: Path) -> None:
    dcp.save({"w": torch.ones(2)}, checkpoint_id=tmp_path / "d", no_dist=True)
    (tmp_path / "d" / ".metadata").write_bytes(pickle.dumps(_Evil(tmp_path / "run")))
    for command in (["inspect"], ["import"], ["export"], ["diff"]):
        extra = [] if command == ["inspect"] else [tmp_path / "out"]
        error = tool.refused(*command, tmp_path / "d", *extra)
        assert "posix.mkdir" in error
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "out").exists()


def test_code_in_an_object_of_dcp_is_not_run(tool: Tool, tmp_path: Path) -> None:
    dcp.save({"w": torch.ones(2), "evil": _Evil(tmp_path / "run")}, checkpoint_id=tmp_path / "d", no_dist=True)
    assert "evil in " in tool.refused("import", tmp_path / "d", tmp_path / "out", code=2)
    assert not (tmp_path / "run").exists()


def test_code_in_a_torch_file_is_not_run(tool: Tool, tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2), "evil": _Evil(tmp_path / "run")}, tmp_path / "m.pt")
    assert "refused" in tool.refused("import", tmp_path / "m.pt", tmp_path / "out")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["../m.safetensors", "/etc/passwd", "..", "a/../../b", "a\\b", ""])
def test_an_index_cannot_name_what_is_outside(tool: Tool, tmp_path: Path, name: str) -> None:
    (tmp_path / "hf").mkdir()
    save_file({"w": torch.ones(2)}, tmp_path / "m.safetensors")
    (tmp_path / "hf" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    save_file({"w": torch.ones(2)}, tmp_path / "hf" / "other.safetensors")
    assert "not in its directory" in tool.refused("import", tmp_path / "hf", tmp_path / "out")


def test_the_metadata_of_dcp_cannot_name_what_is_outside(tool: Tool, tmp_path: Path) -> None:
    dcp.save({"w": torch.ones(2)}, checkpoint_id=tmp_path / "d", no_dist=True)
    metadata = (tmp_path / "d" / ".metadata").read_bytes()
    (tmp_path / "d" / ".metadata").write_bytes(metadata.replace(b"__0_0.distcp", b"../../../etc"))
    assert "not in its directory" in tool.refused("import", tmp_path / "d", tmp_path / "out")


@pytest.mark.parametrize(
    "content",
    [
        struct.pack("<Q", 4 << 30) + b"{}",
        struct.pack("<Q", (1 << 64) - 1) + b"{}",
        b"",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 64) + b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'.ljust(64),
        struct.pack("<Q", 64) + b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[-8,0]}}'.ljust(64) + bytes(8),
        struct.pack("<Q", 64) + b'{"w":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}}'.ljust(64) + bytes(8),
        struct.pack("<Q", 64) + b'{"w":{"dtype":"X9","shape":[2],"data_offsets":[0,8]}}'.ljust(64) + bytes(8),
        struct.pack("<Q", 64) + b'{"\xff":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'.ljust(64) + bytes(8),
    ],
)
def test_a_hostile_safetensors_header_is_one_line(tool: Tool, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.safetensors").write_bytes(content)
    assert "not foreseen" not in tool.refused("import", tmp_path / "m.safetensors", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("cut", [0, 1, 10, 100])
def test_a_damaged_dcp_or_torch_file_is_one_line(tool: Tool, tmp_path: Path, cut: int) -> None:
    dcp.save({"w": torch.ones(200)}, checkpoint_id=tmp_path / "d", no_dist=True)
    torch.save({"w": torch.ones(200)}, tmp_path / "m.pt")
    for file in (tmp_path / "m.pt", tmp_path / "d" / "__0_0.distcp", tmp_path / "d" / ".metadata"):
        file.write_bytes(file.read_bytes()[:cut])
        source = file if file.suffix == ".pt" else tmp_path / "d"
        tool.refused("import", source, tmp_path / f"out{file.name}")


# --- the command line ---


def test_every_command_has_help_with_an_example(tool: Tool) -> None:
    listed = tool.works("--help")
    for command in cli._COMMANDS:
        assert f"  {command}" in listed
        assert f"example:\n  holdfast ckpt {command} " in tool.works(command, "--help")


def test_a_wrong_command_line_is_2(tool: Tool, tmp_path: Path) -> None:
    assert tool() == 2
    assert tool("nothing") == 2
    assert tool("reshard", tmp_path, tmp_path / "x") == 2
    assert "is no size" in tool.err or tool("inspect", tmp_path, "--max-memory", "much") == 2
    save_file({"w": torch.ones(2)}, tmp_path / "m.safetensors")
    assert "at least 64MiB" in tool.refused(
        "import", tmp_path / "m.safetensors", tmp_path / "x", "--max-memory", "1MiB", code=2
    )
    assert "does not exist" in tool.refused("inspect", tmp_path / "none", code=2)


def test_sizes_are_read_and_written_as_people_do() -> None:
    assert [parse_size(text) for text in ("2GiB", "500MB", "4096", "1.5kib", "3 G")] == [
        2 << 30, 500_000_000, 4096, 1536, 3_000_000_000,
    ]  # fmt: skip
    for bad in ("", "GiB", "-1", "0", "1 furlong", "nan", "inf"):
        with pytest.raises(UsageError, match="is no size"):
            parse_size(bad)
    assert [human(n) for n in (0, 1023, 1536, 5 << 30)] == ["0 B", "1023 B", "1.5 KiB", "5.0 GiB"]


def test_what_needs_no_torch_does_not_import_it(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "m.safetensors")
    code = f"""
import sys
from holdfast.checkpoint.tools.cli import main
assert main(["import", {str(tmp_path / "m.safetensors")!r}, {str(tmp_path / "c/step-00000001")!r}]) == 0
assert main(["reshard", {str(tmp_path / "c")!r}, {str(tmp_path / "r")!r}, "--world", "2"]) == 0
assert main(["edit", {str(tmp_path / "c")!r}, {str(tmp_path / "e")!r}, "--rename", "w=v"]) == 0
assert main(["copy", {str(tmp_path / "c")!r}, {str(tmp_path / "k")!r}]) == 0
assert main(["export", {str(tmp_path / "c")!r}, {str(tmp_path / "h")!r}]) == 0
for command in ("ls", "verify", "inspect", "repair"):
    assert main([command, {str(tmp_path / "c")!r}]) == 0, command
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, timeout=240, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"2 images", done.stdout)
