"""What a rank holds of the tensors of a state, and how pieces of them are reached."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, NamedTuple

import torch

from holdfast.checkpoint.boxes import Box
from holdfast.checkpoint.flat import FlatRange
from holdfast.checkpoint.layout import Layout, is_dtensor, layout_of, local_part
from holdfast.checkpoint.meeting import Ranks
from holdfast.checkpoint.ownership import Shard
from holdfast.checkpoint.retries import first_line
from holdfast.checkpoint.tensors import check_tensor, contiguous_on_cpu, layout_shard, plain_shard
from holdfast.errors import StateError

StateTensor = torch.Tensor | FlatRange


class Held(NamedTuple):
    """The local part of a tensor of the state."""

    tensor: torch.Tensor
    """Plain and detached."""
    layout: Layout
    shard: Shard

    @property
    def boxes(self) -> tuple[Box, ...]:
        """What is held."""
        return self.shard.boxes

    def view(self, box: Box) -> torch.Tensor:
        """The elements of a region that lies in one of `boxes`; shares memory."""
        if box.is_empty or box.lengths == self.tensor.shape:
            return self.tensor.reshape(box.lengths) if box.is_empty else self.tensor
        return self.layout.view(self.tensor, box)

    def copy(self, box: Box) -> torch.Tensor:
        """The elements of a region in memory of their own, on the CPU."""
        view = self.view(box)
        part = contiguous_on_cpu(view)
        # Bytes compare what matters: `part` may be a view of the caller's storage or already a copy of it.
        shared = part.untyped_storage().data_ptr() == view.untyped_storage().data_ptr()
        return part.clone(memory_format=torch.contiguous_format) if shared else part


def signature(tensors: Mapping[str, StateTensor], ranks: Ranks, process_group: Any) -> Hashable:
    """Equal for states that are planned alike: names, shapes, dtypes and placements of all tensors.

    Raises:
        StateError: a tensor has no shape: a lazy module's before its first forward, a nested one.
    """
    parts: list[Hashable] = [ranks.rank, ranks.world_size, id(process_group)]
    for name, tensor in tensors.items():
        if isinstance(tensor, FlatRange):
            parts += (name, tensor.dtype, tensor.shape, tensor.start, tensor.numel(), tensor.holders)
        elif is_dtensor(tensor):
            # Mesh, placements, shape and dtype in one, which knows its hash: properties of a DTensor take long.
            parts += (name, tensor._spec, tensor._local_tensor.shape)
        else:
            try:
                parts += (name, tensor.dtype, tensor.shape)
            except RuntimeError as error:
                raise StateError(f"{name} has no shape yet, or none at all: {first_line(error)}") from error
    return tuple(parts)


def hold_again(tensors: Mapping[str, StateTensor], before: list[tuple[Layout, Shard]]) -> list[Held]:
    """What `hold` gives, where a state of the same `signature` was held before."""
    return [
        Held(_detached(local_part(tensor)), layout, shard)
        for tensor, (layout, shard) in zip(tensors.values(), before, strict=True)
    ]


def _detached(tensor: torch.Tensor) -> torch.Tensor:
    """Only where it is not: one among thousands takes microseconds."""
    return tensor.detach() if tensor.requires_grad else tensor


def hold(tensors: Mapping[str, StateTensor], ranks: Ranks, process_group: Any) -> list[Held]:
    """The local parts of all tensors, in the same order.

    Args:
        tensors: by name; plain ones are taken to be on all ranks.
        ranks: who save or load together.
        process_group: theirs; None: the default one (Any: torch's).

    Raises:
        StateError: a tensor that cannot be stored.
    """
    everyone = tuple(range(ranks.world_size))
    held: list[Held] = []
    for name, tensor in tensors.items():
        check_tensor(name, local_part(tensor))
        layout = layout_of(name, tensor)
        if isinstance(tensor, FlatRange) or is_dtensor(tensor):
            shard = _in_group(layout_shard(name, tensor, layout, rank=_global_rank(ranks)), process_group)
        else:
            shard = plain_shard(name, tensor, holders=everyone)
        held.append(Held(_detached(local_part(tensor)), layout, shard))
    return held


def _global_rank(ranks: Ranks) -> int:
    import torch.distributed as dist

    return dist.get_rank() if dist.is_available() and dist.is_initialized() else ranks.rank


def _in_group(shard: Shard, process_group: Any) -> Shard:
    """The shard with holders counted in the process group."""
    if process_group is None:
        return shard
    import torch.distributed as dist

    holders = tuple(sorted(dist.get_group_rank(process_group, rank) for rank in shard.holders))
    return Shard(shard.name, shard.dtype, shard.shape, shard.boxes, holders, shard.rank)
