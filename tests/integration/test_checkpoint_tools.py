"""The offline tools as processes: killed between any two file operations, and within their memory."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import holdfast.checkpoint
from holdfast.checkpoint import list_steps
from holdfast.checkpoint.tools.cli import main

_KILLED = 77
_OPERATIONS = ("open", "fsync", "replace", "link", "unlink", "mkdir", "rmdir", "rename")


def _dies_at(number: int, arguments: list[str]) -> int:
    """Exit code of a command in a child that is gone, without any cleaning up, before file operation `number`."""
    child = os.fork()
    if child == 0:
        count = 0

        def counted(operation: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:
                nonlocal count
                count += 1
                if count == number:
                    os._exit(_KILLED)
                return operation(*args, **kwargs)

            return run

        for name in _OPERATIONS:
            setattr(os, name, counted(getattr(os, name)))
        try:
            os._exit(main(arguments))
        except BaseException:  # noqa: BLE001  # a child of fork must not go on in pytest
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("command", ["reshard", "edit", "copy", "export"])
def test_a_kill_between_any_two_file_operations_leaves_source_and_way_on(tmp_path: Path, command: str) -> None:
    source = tmp_path / "s" / "step-00000003"
    holdfast.checkpoint.save({"model": {"w": torch.randn(40, 3), "b": torch.arange(4)}, "n": 1}, source)
    before = _contents(source)
    options = {"reshard": ["--world", "2"], "edit": ["--drop", "model.b"], "copy": [], "export": ["--shard-size", "99"]}
    arguments = [command, str(source), str(tmp_path / "whole"), *options[command]]
    assert main(arguments) == 0
    expected = _contents(tmp_path / "whole")
    last = "model.safetensors.index.json" if command == "export" else "root"
    number = 0
    while True:
        number += 1
        to = tmp_path / f"d{number}"
        arguments[2] = str(to)
        code = _dies_at(number, arguments)
        assert _contents(source) == before
        if code == 0:
            break
        assert code == _KILLED
        if not (to / last).exists():
            assert main(arguments) == 0
            assert not list(to.glob(".tmp-*"))
        found = _contents(to)
        # Roots and indices say when they were made; the rest is the same to the bit, leftovers aside.
        for name, data in expected.items():
            assert name in found
            if name.endswith(".safetensors"):
                assert found[name] == data
        if command != "export":
            assert main(["verify", str(to)]) == 0
    assert number > 10, "the operations were not counted"


@pytest.mark.campaign
@pytest.mark.parametrize("options", [["import"], ["export", "--format", "dcp"], ["export", "--format", "torch"]])
def test_a_kill_of_what_reads_or_writes_other_formats_leaves_nothing_or_all_of_it(
    tmp_path: Path, options: list[str]
) -> None:
    source = tmp_path / "m.safetensors"
    save_file({"w": torch.randn(40, 3), "b": torch.arange(4)}, source)
    before = source.read_bytes()
    for number in range(1, 100):
        folder = tmp_path / f"d{number}"
        folder.mkdir()
        arguments = [options[0], str(source), str(folder / "to"), *options[1:]]
        code = _dies_at(number, arguments)
        assert code in (0, _KILLED)
        if not (folder / "to").exists() or (options == ["import"] and not (folder / "to" / "root").exists()):
            assert main(arguments) == 0
            assert not list(folder.rglob(".tmp-*"))
        assert main(["diff", str(source), str(folder / "to")]) == 0
        assert source.read_bytes() == before
        if code == 0:
            break
    assert 4 < number < 99


def test_a_kill_of_prune_leaves_only_whole_checkpoints_and_all_that_stays(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        holdfast.checkpoint.save({"n": step, "w": torch.ones(3)}, tmp_path / "s" / f"step-{step:08d}")
    stays = _contents(tmp_path / "s" / "step-00000003")
    for number in range(1, 100):
        steps = tmp_path / f"d{number}"
        shutil.copytree(tmp_path / "s", steps)
        code = _dies_at(number, ["prune", str(steps), "--last", "1"])
        assert code in (0, _KILLED)
        for info in list_steps(steps):
            assert not info.complete or main(["verify", str(info.path)]) == 0
        assert _contents(steps / "step-00000003") == stays
        if code == 0:
            break
        assert main(["prune", str(steps), "--last", "1"]) == 0
        assert [info.step for info in list_steps(steps) if info.complete] == [3]
    assert 4 < number < 99


@pytest.mark.campaign
def test_a_kill_of_repair_leaves_what_can_be_repaired(tmp_path: Path) -> None:
    source = tmp_path / "s" / "step-00000001"
    holdfast.checkpoint.save({"n": 1, "w": torch.ones(3)}, source)
    whole = _contents(source)
    for damage in ("root", "index"):
        for file in source.iterdir():
            if file.name.startswith(damage):
                file.write_bytes(b"x" * 4080)
        for number in range(1, 100):
            step = tmp_path / f"{damage}{number}" / "step-00000001"
            shutil.copytree(source, step)
            code = _dies_at(number, ["repair", str(step)])
            assert code in (0, _KILLED)
            assert main(["repair", str(step)]) == 0
            assert main(["verify", str(step)]) == 0
            assert {name: data for name, data in _contents(step).items() if name in whole and name != "root"} == {
                name: data for name, data in whole.items() if name != "root"
            }
            if code == 0:
                break
        assert 4 < number < 99
        for name, data in whole.items():
            (source / name).write_bytes(data)


def test_a_state_four_times_the_bound_passes_through(tmp_path: Path) -> None:
    size, bound = 256 << 20, 64 << 20
    rows = size // (4 << 16)
    header = json.dumps({"w": {"dtype": "F32", "shape": [rows, 1 << 16], "data_offsets": [0, size]}}).encode()
    with open(tmp_path / "m.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + size)
    for arguments in (
        ["import", tmp_path / "m.safetensors", tmp_path / "step-00000001"],
        ["reshard", tmp_path / "step-00000001", tmp_path / "r", "--world", "3"],
    ):
        code = (
            "import sys, numpy, holdfast.checkpoint.tools.building\n"
            "from holdfast.checkpoint.tools.cli import main\n"
            # Not ru_maxrss, which a process takes over from the one that started it.
            "def peak(): return int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])\n"
            "idle = peak()\n"
            "assert main(sys.argv[1:]) == 0\n"
            "print(peak() - idle)"
        )
        command = [sys.executable, "-c", code, *map(str, arguments), "--max-memory", str(bound)]
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
        used = int(done.stdout.splitlines()[-1]) << 10
        assert used < bound, f"{arguments[0]} took {used >> 20} MiB beside what the interpreter takes"
