"""Where the local part of a tensor lies in the global one, and which ranks hold the same part.

Worked out from the DTensor's placements and mesh alone, so that every rank finds the same answer without communication.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import TYPE_CHECKING, Any, TypeGuard

import torch

from holdfast.checkpoint.boxes import Box, flat_range_boxes, whole
from holdfast.checkpoint.flat import FlatRange
from holdfast.checkpoint.planner import strides_of
from holdfast.errors import StateError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.placement_types import Placement

Run = tuple[int, int]
"""Consecutive global indices along one dimension: start and length."""


@dataclass(frozen=True, slots=True)
class Layout:
    """The place of a local tensor in the global one."""

    shape: tuple[int, ...]
    """Of the global tensor."""
    boxes: tuple[Box, ...]
    """What is held here; () where nothing is."""
    origins: tuple[tuple[int, ...], ...]
    """For each box, the indices in the local tensor at which it begins; of a flat range, in the 1-D tensor."""
    holders: tuple[int, ...] | None
    """Global ranks that hold the same boxes, ascending; None for a plain tensor, which says nothing about it; () for
    this rank alone."""
    flat_start: int | None = None
    """Where the local tensor is a range of the flattened global one: the index of its first element."""

    def view(self, local: torch.Tensor, box: Box) -> torch.Tensor:
        """The elements of `box`, which lies within one of `boxes`, in the local tensor; shares its memory.

        Raises:
            ValueError: no box contains it.
        """
        if self.flat_start is not None:
            return flat_view(local, box, self.shape, self.flat_start)
        for held, origin in zip(self.boxes, self.origins, strict=True):
            if held == box and len(self.boxes) == 1:
                return local
            if held.contains(box):
                return box_view(local, box, held, origin)
        raise ValueError(f"this rank holds {self.boxes}, which does not contain {box}")


def flat_view(local: torch.Tensor, box: Box, shape: tuple[int, ...], start: int) -> torch.Tensor:
    """The elements of `box` of a tensor of this shape, where `local` holds the flattened one from `start` on."""
    strides = strides_of(shape, 1)
    first = sum(o * s for o, s in zip(box.offsets, strides, strict=True)) - start
    assert 0 <= first <= local.numel(), (box, shape, start)
    return local.as_strided(box.lengths, strides, local.storage_offset() + first)


def box_view(tensor: torch.Tensor, box: Box, held: Box, origin: tuple[int, ...]) -> torch.Tensor:
    """The part of a local tensor that is `box`, where `held`, a box that contains it, begins at `origin` locally."""
    for dim, (start, length) in enumerate(zip(box.offsets, box.lengths, strict=True)):
        local_start = start - held.offsets[dim] + origin[dim]
        if local_start or length != tensor.shape[dim]:
            tensor = tensor.narrow(dim, local_start, length)
    return tensor


def plain_layout(shape: tuple[int, ...]) -> Layout:
    """A tensor that is held whole."""
    if 0 in shape:
        return Layout(shape, (), (), None)
    return Layout(shape, (whole(shape),), ((0,) * len(shape),), None)


def is_dtensor(tensor: object) -> TypeGuard[DTensor]:
    """Whether it is a DTensor, without importing what only those that use it need: that takes a second."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_part(tensor: torch.Tensor | FlatRange) -> torch.Tensor:
    """The plain tensor that holds this rank's elements; no communication."""
    if isinstance(tensor, FlatRange):
        return tensor.tensor
    local: torch.Tensor = tensor._local_tensor if is_dtensor(tensor) else tensor
    return local


def layout_of(name: str, tensor: torch.Tensor | FlatRange) -> Layout:
    """The layout of a tensor of any kind.

    Raises:
        StateError: as `dtensor_layout`.
    """
    if isinstance(tensor, FlatRange):
        return flat_layout(tensor)
    return dtensor_layout(name, tensor) if is_dtensor(tensor) else plain_layout(tuple(tensor.shape))


def flat_layout(part: FlatRange) -> Layout:
    """A range of the flattened tensor, as boxes."""
    boxes = flat_range_boxes(part.shape, part.start, part.end)
    strides = strides_of(part.shape, 1)
    origins = tuple((sum(o * s for o, s in zip(box.offsets, strides, strict=True)) - part.start,) for box in boxes)
    return Layout(part.shape, boxes, origins, part.holders or (), part.start)


def dtensor_layout(name: str, tensor: DTensor) -> Layout:
    """The layout of this rank's part of a DTensor.

    Raises:
        StateError: a pending reduction (Partial), or a local tensor that is not what the placements say.
    """
    mesh, placements, shape = tensor.device_mesh, tensor.placements, tuple(tensor.shape)
    local_shape = tuple(local_part(tensor).shape)
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return Layout(shape, (), (), ())
    runs = shard_runs(name, shape, tuple(mesh.shape), coordinate, placements)
    expected = tuple(sum(length for _, length in of_dim) for of_dim in runs)
    if 0 in local_shape and 0 in expected:
        return Layout(shape, (), (), ())
    if expected != local_shape:
        raise StateError(
            f"{name}: placements {placements} on a mesh of shape {tuple(mesh.shape)} give this rank a part of shape "
            f"{expected}, but the local tensor has shape {local_shape}; shard this dimension evenly"
        )
    boxes, origins = _boxes(runs)
    return Layout(shape, boxes, origins, _holders(mesh, tuple(coordinate), tuple(placements)))


def shard_runs(
    name: str,
    shape: Sequence[int],
    mesh_shape: Sequence[int],
    coordinate: Sequence[int],
    placements: Sequence[Placement],
) -> tuple[tuple[Run, ...], ...]:
    """For each dimension, the global indices held at `coordinate` in local order, as runs.

    Placements apply from left to right, each to what the ones before it left (torch's
    ``compute_local_shape_and_global_offset``); a _StridedShard first chunks into `split_factor` parts and takes its
    share of each.

    Raises:
        StateError: a placement that is no state (Partial) or unknown.
    """
    from torch.distributed.tensor.placement_types import Replicate, Shard, _StridedShard

    runs: list[tuple[Run, ...]] = [((0, length),) if length else () for length in shape]
    for mesh_dim, placement in enumerate(placements):
        if isinstance(placement, Replicate):
            continue
        if isinstance(placement, _StridedShard):
            parts = _chunks(runs[placement.dim], int(placement.split_factor))
            shares = [_chunks(part, mesh_shape[mesh_dim])[coordinate[mesh_dim]] for part in parts]
            runs[placement.dim] = _merge([run for share in shares for run in share])
        elif isinstance(placement, Shard):
            runs[placement.dim] = _chunks(runs[placement.dim], mesh_shape[mesh_dim])[coordinate[mesh_dim]]
        else:
            raise StateError(f"{name}: a DTensor with placement {placement} is not state; redistribute it first")
    return tuple(runs)


def _chunks(runs: Sequence[Run], count: int) -> list[tuple[Run, ...]]:
    """Exactly `count` parts, as torch.chunk cuts, the last ones possibly empty."""
    total = sum(length for _, length in runs)
    size = -(-total // count)
    return [_take(runs, min(i * size, total), min((i + 1) * size, total)) for i in range(count)]


def _take(runs: Sequence[Run], start: int, end: int) -> tuple[Run, ...]:
    taken: list[Run] = []
    position = 0
    for first, length in runs:
        low, high = max(start, position), min(end, position + length)
        if low < high:
            taken.append((first + low - position, high - low))
        position += length
    return tuple(taken)


def _merge(runs: Sequence[Run]) -> tuple[Run, ...]:
    merged: list[Run] = []
    for start, length in runs:
        if merged and sum(merged[-1]) == start:
            merged[-1] = (merged[-1][0], merged[-1][1] + length)
        else:
            merged.append((start, length))
    return tuple(merged)


def _boxes(runs: Sequence[Sequence[Run]]) -> tuple[tuple[Box, ...], tuple[tuple[int, ...], ...]]:
    with_origin: list[list[tuple[int, int, int]]] = []
    for of_dim in runs:
        position, placed = 0, []
        for start, length in of_dim:
            placed.append((start, length, position))
            position += length
        with_origin.append(placed)
    boxes, origins = [], []
    for choice in product(*with_origin):
        boxes.append(Box(tuple(start for start, _, _ in choice), tuple(length for _, length, _ in choice)))
        origins.append(tuple(origin for _, _, origin in choice))
    return tuple(boxes), tuple(origins)


@lru_cache(maxsize=64)
def _holders(mesh: DeviceMesh, coordinate: tuple[int, ...], placements: tuple[Placement, ...]) -> tuple[int, ...]:
    """Global ranks with this rank's coordinate on every sharding axis of the mesh. A state has few meshes, and torch
    works out their ranks anew each time."""
    from torch.distributed.tensor.placement_types import Replicate

    index: list[Any] = [  # Any: an int or a slice, as tensor indexing takes them
        slice(None) if isinstance(placement, Replicate) else position
        for position, placement in zip(coordinate, placements, strict=True)
    ]
    return tuple(sorted(mesh.mesh[tuple(index)].flatten().tolist()))
