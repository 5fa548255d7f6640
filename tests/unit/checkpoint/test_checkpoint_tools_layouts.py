"""``reshard --layout``, work in parallel, and exports that other programs open."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tools_states import Tool, loaded, same

import holdfast.checkpoint
from holdfast.checkpoint.boxes import Box
from holdfast.checkpoint.commit import open_checkpoint
from holdfast.checkpoint.tools.inspecting import ranges
from holdfast.checkpoint.tools.layouts import Layout
from holdfast.checkpoint.tools.parallel import in_parallel, workers_within
from holdfast.checkpoint.tools.states import SavedTensor
from holdfast.checkpoint.tools.units import Progress
from holdfast.errors import StorageError, UsageError


def _state() -> dict[str, Any]:
    return {
        "wq": torch.arange(60.0).reshape(10, 6), "norm": torch.arange(7.0), "scale": torch.tensor(3.0),
        "late": torch.arange(12, dtype=torch.int64).reshape(3, 4), "empty": torch.zeros(0, 3), "step": 4,
    }  # fmt: skip


def _layout(path: Path, value: object) -> Path:
    path.write_text(json.dumps(value))
    return path


LAYOUT = {
    "mesh": {"dp": 2, "tp": 2},
    "default": {"axes": {"dp": 0}},
    "tensors": [{"match": "w*", "axes": {"tp": 1, "dp": 0}}, {"match": "late", "axes": {"tp": 0}, "only": {"dp": 1}}],
}


def test_images_hold_what_the_ranks_of_the_layout_will_load(tool: Tool, tmp_path: Path) -> None:
    holdfast.checkpoint.save(_state(), tmp_path / "c")
    layout = _layout(tmp_path / "layout.json", LAYOUT)
    tool.works("reshard", tmp_path / "c", tmp_path / "r", "--layout", layout)
    assert same(loaded(_state(), tmp_path / "r"), _state())
    tool.works("verify", tmp_path / "r")
    with open_checkpoint(tmp_path / "r") as catalog:
        held = {
            rank: {(piece.name, piece.box) for piece in image.meta.pieces}
            for rank, image in zip(catalog.ranks, catalog.images, strict=True)
        }
    for rank, (dp, tp) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
        assert ("wq", Box((5 * dp, 3 * tp), (5, 3))) in held[rank]
    assert ("late", Box((0, 0), (2, 4))) in held[2]
    assert ("late", Box((2, 0), (1, 4))) in held[3]
    # Replicated on tp: one of the two holders has it.
    for box, holders in ((Box((0,), (4,)), {0, 1}), (Box((4,), (3,)), {2, 3})):
        having = {rank for rank, pieces in held.items() if ("norm", box) in pieces}
        assert len(having) == 1
        assert having <= holders


def test_a_layout_cuts_as_distributed_tensors_are_cut() -> None:
    """The reference is torch.chunk, applied to the local part axis by axis."""
    layout = Layout(mesh={"a": 3, "b": 2})
    for axes in ({"a": 0, "b": 0}, {"b": 0, "a": 0}, {"a": 1, "b": 0}, {"b": 1}):
        rule = Layout(mesh=layout.mesh, default=type(layout.default)(axes=axes))
        for shape in ((7, 5), (1, 4), (6, 6)):
            full = torch.arange(shape[0] * shape[1]).reshape(shape)
            boxes = list(rule.boxes(SavedTensor("w", None, "int64", shape)))
            for rank, box in enumerate(boxes):
                at = {"a": rank // 2, "b": rank % 2}
                part = full
                for axis, dim in axes.items():
                    chunks = torch.chunk(part, layout.mesh[axis], dim)
                    part = chunks[at[axis]] if at[axis] < len(chunks) else part.narrow(dim, 0, 0)
                assert box is not None
                got = full[tuple(slice(o, o + n) for o, n in zip(box.offsets, box.lengths, strict=True))]
                assert got.tolist() == part.tolist() or (not got.numel() and not part.numel()), (axes, shape, rank)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"mesh": {}}, "at least one axis"),
        ({"mesh": {"dp": 2}, "default": {"axes": {"tp": 0}}}, "no axis tp"),
        ({"mesh": {"dp": 2}, "default": {"only": {"dp": 2}}}, "outside of the mesh"),
        ({"mesh": {"dp": 2}, "tensors": [{"match": "*", "axis": 1}]}, "is no layout"),
        ({"mesh": {"dp": 2}, "default": {"axes": {"dp": 3}}}, "has no dim 3"),
    ],
)
def test_a_layout_that_makes_no_sense_is_one_line(tool: Tool, tmp_path: Path, value: object, said: str) -> None:
    holdfast.checkpoint.save(_state(), tmp_path / "c")
    layout = _layout(tmp_path / "layout.json", value)
    assert said in tool.refused("reshard", tmp_path / "c", tmp_path / "r", "--layout", layout, code=2)
    assert not (tmp_path / "r").exists()


def test_workers_stay_within_the_bound_and_the_first_error_ends_the_rest() -> None:
    assert workers_within(8, 200 << 20) == 3
    for workers, bound in ((0, 1 << 30), (1, 1 << 20)):
        with pytest.raises(UsageError):
            workers_within(workers, bound)
    done: list[int] = []
    together, raises = threading.Barrier(2), threading.Event()

    def work(item: int, tool: str) -> None:
        if item < 2:
            together.wait(120)
        if item == 1:
            raises.set()
            raise KeyError(item)
        if item > 1:
            assert raises.wait(120)
            time.sleep(0.02)  # so that the error is heard of before all is done
            done.append(item)

    with pytest.raises(KeyError):
        in_parallel(work, range(100), ["a", "b"], "test")
    assert len(done) < 98


def test_what_is_under_way_is_stopped_by_an_error_of_another() -> None:
    began, stopped = threading.Event(), []
    progress = Progress("testing", 100)

    def work(item: int, tool: str) -> None:
        if item == 1:
            assert began.wait(120)
            raise KeyboardInterrupt
        for _ in range(10_000_000):
            try:
                progress.add(1)
            except StorageError:
                stopped.append(item)
                raise
            began.set()

    with pytest.raises(KeyboardInterrupt):
        in_parallel(work, range(2), ["a", "b"], "test", progress)
    assert stopped == [0]


def test_numbers_are_shown_as_ranges() -> None:
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8"
    assert ranges([]) == ""


def test_inspect_says_who_wrote_what(tool: Tool, tmp_path: Path) -> None:
    holdfast.checkpoint.save(_state(), tmp_path / "c")
    tool.works("reshard", tmp_path / "c", tmp_path / "r", "--world", 3)
    rows = {row["name"]: row for row in json.loads(tool.works("inspect", tmp_path / "r", "--json"))["tensors"]}
    assert rows["wq"]["written_by"] == [0, 1, 2]
    assert rows["scale"]["written_by"] == [0]
    assert "0-2" in tool.works("inspect", tmp_path / "r")


def test_transformers_opens_an_export_of_the_model_in_bf16(tool: Tool, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=16,
    )  # fmt: skip
    torch.manual_seed(1)
    model = LlamaForCausalLM(config)
    state = {"model": dict(model.state_dict()), "optimizer": {"state": torch.ones(3)}, "step": 3}
    holdfast.checkpoint.save(state, tmp_path / "step-00000003")
    out = tmp_path / "hf"
    tool.works("export", tmp_path / "step-00000003", out, "--only", "model", "--cast", "bf16", "--shard-size", "2KB")
    assert len(list(out.glob("*.safetensors"))) > 1
    config.save_pretrained(out)
    opened, info = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for name, tensor in opened.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name].to(torch.bfloat16)), name
