"""Which tensors of a state count as one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import holdfast.checkpoint
from holdfast.checkpoint import FlatRange, open_checkpoint
from holdfast.checkpoint.objects import TensorRef, split_tensors
from holdfast.errors import MismatchError

_BASE = torch.arange(16.0).reshape(4, 4)
_COMPLEX = torch.zeros(3, dtype=torch.complex64)


@pytest.mark.parametrize(
    ("a", "b", "are_one"),
    [
        (_BASE, _BASE, True),
        (_BASE, _BASE.detach(), True),
        (_BASE[1], _BASE[1], True),
        (torch.nn.Parameter(_BASE), _BASE, True),
        (_BASE, _BASE.clone(), False),
        (_BASE, _BASE.t(), False),
        (_BASE[:2], _BASE[2:], False),
        (_BASE[:2], _BASE[:3], False),
        (_BASE, _BASE.view(torch.int32), False),
        (_COMPLEX, _COMPLEX.conj(), False),
        (torch.empty(0, 3), torch.empty(0, 3), False),
        (torch.empty(3, device="meta"), torch.empty(3, device="meta"), False),
        (FlatRange(_BASE[0], (9,), 0), FlatRange(_BASE[0], (9,), 0), False),
        (_BASE.to_sparse(), _BASE.to_sparse(), False),
    ],
)
def test_one_memory_seen_in_one_way_is_one_tensor(a: Any, b: Any, are_one: bool) -> None:
    tree, tensors = split_tensors("", {"a": a, "b": b}, tied=True)
    assert tree == {"a": TensorRef("a"), "b": TensorRef("a" if are_one else "b")}
    assert tensors["a"] is a
    assert list(tensors) == (["a"] if are_one else ["a", "b"])
    apart, _ = split_tensors("", {"a": a, "b": b})
    assert apart["b"] == TensorRef("a" if a is b else "b")


@pytest.mark.parametrize("rank", range(4))
def test_every_rank_finds_that_a_sharded_tensor_is_tied(rank: int) -> None:
    """Those that hold nothing of it, too: else the ranks' states would have other tensors."""
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=4)
    try:
        mesh = init_device_mesh("cpu", (4,))
        whole = torch.zeros(3, 2)
        sharded = torch.nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None))
        state = {
            "a": sharded,
            "b": sharded.detach(),
            "apart": distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None),
            "otherwise": DTensor.from_local(sharded.to_local(), mesh, [Replicate()], run_check=False),
        }
        assert (sharded.to_local().numel() == 0) == (rank == 3)
        tree, tensors = split_tensors("", state, tied=True)
    finally:
        dist.destroy_process_group()
    assert list(tensors) == ["a", "apart", "otherwise"]
    assert tree["b"] == TensorRef("a")


def test_a_sharded_tensor_whose_memory_a_subclass_hides_is_one_only_with_itself() -> None:
    """The memory of the outer tensor says nothing of what lies in the inner ones."""
    from torch.distributed.tensor import DTensor, Shard, init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore
    from torch.testing._internal.two_tensor import TwoTensor

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        local = TwoTensor(torch.zeros(3, 2), torch.ones(3, 2))
        hidden = DTensor.from_local(local, mesh, [Shard(0)], run_check=False)
        _, tensors = split_tensors("", {"a": hidden, "b": hidden.detach(), "c": hidden}, tied=True)
    finally:
        dist.destroy_process_group()
    assert list(tensors) == ["a", "b"]


def test_the_state_dict_of_a_module_has_its_ties(tmp_path: Path) -> None:
    model = _tied()
    holdfast.checkpoint.save({"model": model.state_dict()}, tmp_path / "c")
    with open_checkpoint(tmp_path / "c") as catalog:
        assert sorted(catalog.tensors) == ["model.0.weight"]
    other = _tied()
    holdfast.checkpoint.load({"model": other.state_dict()}, tmp_path / "c")
    assert torch.equal(other[1].weight, model[1].weight)

    apart = {"0.weight": torch.zeros(5, 3), "1.weight": torch.ones(5, 3)}
    holdfast.checkpoint.save({"model": apart}, tmp_path / "apart")
    with pytest.raises(MismatchError, match=r"model\.0\.weight and model\.1\.weight are one tensor in the state"):
        holdfast.checkpoint.load({"model": other.state_dict()}, tmp_path / "apart")


def _tied() -> torch.nn.Sequential:
    model = torch.nn.Sequential(torch.nn.Embedding(5, 3), torch.nn.Linear(3, 5, bias=False))
    model[1].weight = model[0].weight
    return model
