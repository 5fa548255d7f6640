"""A tensor of the training state as the copier sees it: its name, its local bytes, its place in the global tensor."""

from __future__ import annotations

import enum
from dataclasses import dataclass

import torch

from holdfast.checkpoint.boxes import Box
from holdfast.runtime.layout import box_view, flat_view


class Timing(enum.Enum):
    """When the bytes of a tensor may be read after a session boundary."""

    OVERLAP = "overlap"
    """Only the optimizer's update changes it: may be copied during the next forward and backward."""
    BOUNDARY = "boundary"
    """Anything may change it (buffers, `extra`, tensors that no optimizer owns): copied at the boundary itself."""
    FROZEN = "frozen"
    """As BOUNDARY, but nothing is expected to change it: copied again only when it did."""


@dataclass(frozen=True, slots=True, eq=False)
class TensorEntry:
    """One tensor of the live state. Two entries are the same only when they are the same object."""

    name: str
    tensor: torch.Tensor
    """The local part, plain and detached, sharing memory and version counter with the live tensor; any strides."""
    dtype: str
    """torch's name without "torch."."""
    shape: tuple[int, ...]
    """Of the global tensor."""
    boxes: tuple[Box, ...]
    """What `tensor` holds of the global tensor; () where the local shard is empty."""
    origins: tuple[tuple[int, ...], ...]
    """For each box, the indices in `tensor` at which it begins."""
    holders: tuple[int, ...]
    """Global ranks that hold exactly these bytes, ascending."""
    rank: int | None
    """Set where the state is per rank (buffers, `PerRank`): the rank in the Session whose state this is."""
    timing: Timing
    flat_start: int | None = None
    """Where `tensor` is a range of the flattened global one: the index of its first element."""

    def view(self, box: Box) -> torch.Tensor:
        """The part of `tensor` that is `box` (global indices, inside one of `boxes`).

        Raises:
            ValueError: no box of this entry contains `box`.
        """
        if self.flat_start is not None:
            return flat_view(self.tensor, box, self.shape, self.flat_start)
        for held, origin in zip(self.boxes, self.origins, strict=True):
            if held == box and len(self.boxes) == 1:
                return self.tensor
            if held.contains(box):
                return box_view(self.tensor, box, held, origin)
        raise ValueError(f"{self.name}: this rank holds {self.boxes}, which does not contain {box}")
