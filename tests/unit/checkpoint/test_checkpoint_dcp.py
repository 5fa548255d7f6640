from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

import holdfast.checkpoint
from holdfast.checkpoint import HoldfastReader, HoldfastWriter
from holdfast.checkpoint.dcp import _attempt
from holdfast.checkpoint.dtypes import DTYPES
from holdfast.checkpoint.tensors import empty_for, tensor_bytes
from holdfast.errors import CorruptError, MismatchError, StateError, StorageError, UsageError

# dcp says so, rightly, whenever it runs in one process.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


def _model() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    return model, optimizer


def _save(state: dict[str, Any], path: Path, **kwargs: Any) -> None:
    dcp.save(state, storage_writer=HoldfastWriter(path), no_dist=True, **kwargs)


def _load(state: dict[str, Any], path: Path, **kwargs: Any) -> None:
    dcp.load(state, storage_reader=HoldfastReader(path, **kwargs), no_dist=True)


def _cause(caught: pytest.ExceptionInfo[BaseException]) -> BaseException:
    """What a rank met inside of DCP's CheckpointException."""
    assert isinstance(caught.value, CheckpointException)
    return caught.value.failures[0][0]


def test_dcp_saves_and_loads_a_training_state(tmp_path: Path) -> None:
    model, optimizer = _model()
    _save(
        {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 7, "tags": {"a": (1, "b")}},
        tmp_path / "c",
    )
    other, other_optimizer = _model()
    state = {"model": other.state_dict(), "optimizer": other_optimizer.state_dict(), "step": 0, "tags": {"a": None}}
    _load(state, tmp_path / "c")
    assert state["step"] == 7
    assert state["tags"] == {"a": (1, "b")}
    for key, value in model.state_dict().items():
        assert torch.equal(state["model"][key], value), key
    for index, fields in optimizer.state_dict()["state"].items():
        for key, value in fields.items():
            assert torch.equal(state["optimizer"]["state"][index][key], value), key


def test_every_dtype_and_shape_goes_through_dcp(tmp_path: Path) -> None:
    state: dict[str, torch.Tensor] = {}
    for number, name in enumerate(DTYPES):
        for shape in ((), (0, 3), (3, 4)):
            tensor = empty_for(name, shape)
            raw = tensor_bytes(tensor)
            raw[:] = bytes((i + number) % (2 if name == "bool" else 256) for i in range(len(raw)))
            state[f"{name}{len(shape)}"] = tensor
    _save(dict(state), tmp_path / "c")
    into = {key: empty_for(str(t.dtype)[6:], t.shape) for key, t in state.items()}
    _load(into, tmp_path / "c")
    for key, tensor in state.items():
        assert tensor_bytes(into[key]).tobytes() == tensor_bytes(tensor).tobytes(), key


def test_the_metadata_is_what_the_reader_of_dcp_gives(tmp_path: Path) -> None:
    state = {"model": _model()[0].state_dict(), "step": 7}
    _save(dict(state), tmp_path / "c")
    dcp.save(dict(state), checkpoint_id=tmp_path / "d", no_dist=True)
    ours, theirs = HoldfastReader(tmp_path / "c").read_metadata(), dcp.FileSystemReader(tmp_path / "d").read_metadata()
    assert ours.state_dict_metadata == theirs.state_dict_metadata
    assert ours.planner_data == theirs.planner_data
    assert getattr(ours, "version", None) == getattr(theirs, "version", None)  # torch 2.8 knows none


def test_async_save_of_dcp_takes_the_writer(tmp_path: Path) -> None:
    tensor = torch.arange(4.0)
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        future = dcp.async_save({"a": tensor}, storage_writer=HoldfastWriter(tmp_path / "c"))
        tensor.zero_()
        future.result(60)
        into = {"a": torch.zeros(4)}
        dcp.load(into, storage_reader=HoldfastReader(tmp_path / "c"))
    finally:
        dist.destroy_process_group()
    assert into["a"].tolist() == [0, 1, 2, 3]


def test_the_checkpoint_id_of_dcp_names_the_directory(tmp_path: Path) -> None:
    dcp.save({"a": torch.ones(2)}, checkpoint_id=tmp_path / "c", storage_writer=HoldfastWriter(), no_dist=True)
    into = {"a": torch.zeros(2)}
    dcp.load(into, checkpoint_id=tmp_path / "c", storage_reader=HoldfastReader(), no_dist=True)
    assert into["a"].tolist() == [1, 1]


def test_saving_into_a_checkpoint_is_refused(tmp_path: Path) -> None:
    _save({"a": torch.ones(2)}, tmp_path / "c")
    with pytest.raises(CheckpointException) as caught:
        _save({"a": torch.zeros(2)}, tmp_path / "c")
    assert isinstance(_cause(caught), StorageError)
    assert "committed" in str(_cause(caught))
    into = {"a": torch.zeros(2)}
    _load(into, tmp_path / "c")
    assert into["a"].tolist() == [1, 1]


def test_another_dtype_is_an_error_unless_cast_is_asked_for(tmp_path: Path) -> None:
    _save({"a": torch.full((2,), 1.5)}, tmp_path / "c")
    into = {"a": torch.zeros(2, dtype=torch.bfloat16)}
    with pytest.raises(CheckpointException) as caught:
        _load(into, tmp_path / "c")
    assert isinstance(_cause(caught), MismatchError)
    assert into["a"].tolist() == [0, 0]
    _load(into, tmp_path / "c", cast=True)
    assert into["a"].tolist() == [1.5, 1.5]


def test_a_flipped_bit_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    _save({"a": torch.ones(400_000)}, tmp_path / "c")
    (image,) = (tmp_path / "c").glob("*.safetensors")
    data = bytearray(image.read_bytes())
    data[5000] ^= 1
    image.write_bytes(data)
    with pytest.raises(CheckpointException) as caught:
        _load({"a": torch.zeros(400_000)}, tmp_path / "c")
    assert isinstance(_cause(caught), CorruptError)
    assert image.name in str(_cause(caught))


class _Custom:
    pass


def test_an_object_that_would_need_pickle_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointException) as caught:
        _save({"fine": 1, "odd": _Custom()}, tmp_path / "c")
    assert isinstance(_cause(caught), StateError)
    assert "odd is a " in str(_cause(caught))
    assert "register_codec" in str(_cause(caught))
    assert not (tmp_path / "c" / "root").exists()


def test_nothing_pickled_is_stored(tmp_path: Path) -> None:
    _save({"a": torch.ones(2), "step": 7, "names": ["x"]}, tmp_path / "c")
    for file in (tmp_path / "c").iterdir():
        assert b"PK\x03\x04" not in file.read_bytes(), file


def test_a_planner_that_makes_its_own_bytes_may_give_plain_data_only(tmp_path: Path) -> None:
    class Planner(DefaultSavePlanner):
        def resolve_data(self, write_item: Any) -> Any:
            return super().resolve_data(write_item)

    _save({"step": 7}, tmp_path / "c", planner=Planner())
    into = {"step": 0}
    _load(into, tmp_path / "c")
    assert into == {"step": 7}
    with pytest.raises(CheckpointException) as caught:
        _save({"odd": _Custom()}, tmp_path / "d", planner=Planner())
    assert isinstance(_cause(caught), StateError)


def test_the_reader_reads_what_holdfast_save_wrote(tmp_path: Path) -> None:
    holdfast.checkpoint.save({"model": {"w": torch.arange(3.0)}, "step": 7}, tmp_path / "c")
    into = {"model": {"w": torch.zeros(3)}}
    _load(into, tmp_path / "c")
    assert into["model"]["w"].tolist() == [0, 1, 2]


def test_images_of_another_start_of_the_job_have_other_names(tmp_path: Path) -> None:
    names = []
    for start in range(2):
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            assert _attempt() == _attempt(), "the same on all ranks"
            dcp.save({"w": torch.ones(2)}, storage_writer=HoldfastWriter(tmp_path / str(start)))
        finally:
            dist.destroy_process_group()
        names += [path.name.split("-")[1] for path in (tmp_path / str(start)).glob("*.safetensors")]
    assert names[0] != names[1]
    assert _attempt() == _attempt()


def test_a_save_without_collectives_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="use_collectives"):
        HoldfastWriter(tmp_path).set_up_storage_writer(True, rank=0, use_collectives=False)
    with pytest.raises(UsageError, match="where to save"):
        HoldfastWriter().set_up_storage_writer(True)


def test_the_classes_are_imported_when_they_are_used() -> None:
    code = "import sys, holdfast.checkpoint as c; assert 'torch' not in sys.modules; c.HoldfastWriter"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=240)
