"""`async_save` and DCP's `save` and `load` with our writer and reader, by real processes over gloo."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import holdfast.checkpoint
from holdfast.checkpoint import HoldfastReader, HoldfastWriter
from holdfast.checkpoint.commit import open_checkpoint
from holdfast.errors import StateError
from support.ranks import processes

_LIMIT = timedelta(seconds=300)


def _rank(rank: int, world: int, folder: Path, body: Callable[[int, Path], None]) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / f"store-{body.__name__}-{world}"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=_LIMIT)
    try:
        body(rank, folder)
        dist.barrier()
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        dist.destroy_process_group()


def _run(body: Callable[[int, Path], None], folder: Path, world: int = 2) -> None:
    processes(_rank, (world, folder, body), world)


def _full() -> torch.Tensor:
    return torch.arange(7 * 6, dtype=torch.float32).reshape(7, 6)


def _async_save(rank: int, folder: Path) -> None:
    mesh = init_device_mesh("cpu", (2,))
    sharded = distribute_tensor(_full(), mesh, [Shard(0)])
    columns = distribute_tensor(_full(), mesh, [Shard(1)])
    handle = holdfast.checkpoint.async_save({"rows": sharded, "columns": columns, "n": 3}, folder / "c")
    sharded.to_local().zero_()
    assert handle.result(_LIMIT).complete


def test_async_save_of_shards_holds_what_they_were_when_it_was_called(tmp_path: Path) -> None:
    _run(_async_save, tmp_path)
    loaded = holdfast.checkpoint.load({"rows": torch.zeros(7, 6), "columns": torch.zeros(7, 6), "n": 0}, tmp_path / "c")
    assert torch.equal(loaded["rows"], _full())
    assert torch.equal(loaded["columns"], _full())
    assert loaded["n"] == 3


def _one_rank_cannot(rank: int, folder: Path) -> None:
    handle = holdfast.checkpoint.async_save({"n": object() if rank == 1 else 1}, folder / "a", timeout=_LIMIT)
    with pytest.raises(StateError, match="register_codec"):
        handle.result(_LIMIT)
    assert isinstance(handle.error(), StateError)
    with pytest.raises(StateError, match="register_codec"):
        holdfast.checkpoint.save({"n": object() if rank == 0 else 1}, folder / "s", timeout=_LIMIT)


def test_a_state_that_one_rank_cannot_store_fails_on_all_at_once(tmp_path: Path) -> None:
    _run(_one_rank_cannot, tmp_path)
    assert not (tmp_path / "a" / "root").exists()
    assert not (tmp_path / "s" / "root").exists()


def _strided(rank: int, folder: Path) -> None:
    model = _tp_then_fsdp(folder)
    holdfast.checkpoint.save({"model": model}, folder / "strided")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.to_local().zero_()  # type: ignore[attr-defined]
    holdfast.checkpoint.load({"model": model}, folder / "strided")
    weight = model[0].weight
    assert isinstance(weight, DTensor)
    assert torch.equal(weight.full_tensor(), _plain_model()[0].weight)


def _plain_model() -> torch.nn.Sequential:
    torch.manual_seed(5)
    return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Linear(8, 5))


def _tp_then_fsdp(folder: Path) -> torch.nn.Sequential:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = _plain_model()
    parallelize_module(model, mesh["tp"], {"0": ColwiseParallel()})
    fully_shard(model, mesh=mesh["dp"])
    return model


def test_fsdp_over_tensor_parallel_is_saved_and_loaded(tmp_path: Path) -> None:
    _run(_strided, tmp_path, world=4)
    model = _plain_model()
    into = {"model": _plain_model()}
    with torch.no_grad():
        for parameter in into["model"].parameters():
            parameter.zero_()
    holdfast.checkpoint.load(into, tmp_path / "strided")
    for a, b in zip(model.parameters(), into["model"].parameters(), strict=True):
        assert torch.equal(a, b)


def _dcp_save(rank: int, folder: Path) -> None:
    mesh = init_device_mesh("cpu", (2,))
    model = _plain_model()
    fully_shard(model, mesh=mesh)
    state = {"model": get_model_state_dict(model), "same": torch.ones(300), "step": 9}
    dcp.save(state, storage_writer=HoldfastWriter(folder / "step-00000009"))
    future = dcp.async_save(state, storage_writer=HoldfastWriter(folder / "async"))
    future.result(300)  # type: ignore[union-attr]


def _dcp_load(rank: int, folder: Path) -> None:
    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    for placement in (Shard(0), Shard(1), Replicate()):
        target = distribute_tensor(torch.zeros(8, 6), mesh, [placement])
        state = {"model": {"0.weight": target}, "same": torch.zeros(300), "step": 0}
        dcp.load(state, storage_reader=HoldfastReader(folder / "step-00000009"))
        assert torch.equal(target.full_tensor(), _plain_model()[0].weight)
        assert state["step"] == 9
        assert bool(state["same"].eq(1).all())  # type: ignore[union-attr]


def test_dcp_saves_over_two_ranks_and_loads_over_others(tmp_path: Path) -> None:
    _run(_dcp_save, tmp_path)
    for world in (1, 3):
        _run(_dcp_load, tmp_path, world)
    with open_checkpoint(tmp_path / "async") as catalog:
        catalog.verify()
        assert (catalog.world_size, catalog.version.step) == (2, 0)
        assert len(catalog.boxes("model.0.weight")) == 2
    with open_checkpoint(tmp_path / "step-00000009") as catalog:
        assert catalog.version.step == 9
