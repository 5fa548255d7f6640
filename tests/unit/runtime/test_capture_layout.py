"""Local parts of sharded tensors, against a walk over index tensors and against torch's own computation."""

from __future__ import annotations

from itertools import product
from math import prod
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import Partial, Replicate, Shard, _StridedShard

from holdfast.checkpoint.layout import _boxes, shard_runs
from holdfast.errors import StateError
from holdfast.runtime.layout import box_view


@st.composite
def shardings(draw: Any) -> tuple[tuple[int, ...], tuple[int, ...], tuple[Any, ...]]:
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
    mesh = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    dims = st.integers(0, len(shape) - 1)
    placement = st.one_of(
        st.builds(Replicate),
        st.builds(Shard, dims),
        st.builds(lambda dim, factor: _StridedShard(dim, split_factor=factor), dims, st.integers(1, 3)),
    )
    return shape, mesh, tuple(draw(placement) for _ in mesh)


def local_tensor(whole: torch.Tensor, mesh: tuple[int, ...], at: tuple[int, ...], placements: Any) -> torch.Tensor:
    """What torch's own splitting leaves on one rank."""
    local = whole
    for size, position, placement in zip(mesh, at, placements, strict=True):
        if not isinstance(placement, Replicate):
            local = placement._split_tensor(local, size, with_padding=False, contiguous=True)[0][position]
    return local


@settings(max_examples=150, deadline=None)
@given(shardings())
def test_boxes_hold_exactly_what_torch_leaves_on_each_rank(sharding: Any) -> None:
    shape, mesh, placements = sharding
    whole = torch.arange(prod(shape)).reshape(shape)
    for at in product(*map(range, mesh)):
        expected = local_tensor(whole, mesh, at, placements)
        runs = shard_runs("t", shape, mesh, at, placements)
        assert tuple(sum(length for _, length in of_dim) for of_dim in runs) == tuple(expected.shape)
        if expected.numel() == 0:
            continue
        boxes, origins = _boxes(runs)
        assert sum(box.volume for box in boxes) == expected.numel()
        for box, origin in zip(boxes, origins, strict=True):
            here = box_view(expected, box, box, origin)
            there = whole[tuple(slice(o, o + n) for o, n in zip(box.offsets, box.lengths, strict=True))]
            assert torch.equal(here, there)


@settings(max_examples=100, deadline=None)
@given(shardings())
def test_local_shapes_and_first_offsets_equal_torchs(sharding: Any) -> None:
    shape, mesh, placements = sharding
    for at in product(*map(range, mesh)):
        local_shape, offset = _compute_local_shape_and_global_offset(shape, mesh, list(at), placements)
        runs = shard_runs("t", shape, mesh, at, placements)
        assert tuple(sum(length for _, length in of_dim) for of_dim in runs) == tuple(local_shape)
        if 0 not in local_shape:
            assert tuple(of_dim[0][0] for of_dim in runs) == tuple(offset)


def test_fsdp_over_tensor_parallel_gives_one_box_per_rank() -> None:
    placements = (_StridedShard(0, split_factor=2), Shard(0))
    starts = {at: shard_runs("t", (8, 3), (2, 2), at, placements)[0] for at in product(range(2), range(2))}
    assert starts == {(0, 0): ((0, 2),), (0, 1): ((4, 2),), (1, 0): ((2, 2),), (1, 1): ((6, 2),)}


def test_a_pending_reduction_is_no_state() -> None:
    with pytest.raises(StateError, match="grad: a DTensor with placement P"):
        shard_runs("grad", (4,), (2,), (0,), (Partial(),))
