"""A range of a flattened tensor, as ZeRO-style optimizers and FSDP1 shard: state of its own, without an all-gather."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from holdfast.errors import StateError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False, slots=True)
class FlatRange:
    """Elements ``start <= i < start + tensor.numel()`` of a flattened (C order) global tensor, in a state.

    It stands in a state under the global tensor's name. Saved, it becomes at most ``2 * (n - 1) + 1`` boxes of that
    tensor (ByteCheckpoint, section 3.2), so that any other layout can load it; loaded, it is filled in place. A rank
    without elements of the tensor has one with an empty `tensor`.

    Raises:
        StateError: the tensor is not 1-D and contiguous, or does not lie within the global one.
    """

    tensor: torch.Tensor
    """1-D, contiguous: this rank's elements."""
    shape: tuple[int, ...]
    """Of the global tensor."""
    start: int
    """Index of the first element."""
    holders: tuple[int, ...] | None = None
    """Global ranks that hold exactly these elements, this one among them; None: this one alone."""

    def __post_init__(self) -> None:
        if self.tensor.dim() != 1 or not self.tensor.is_contiguous():
            raise StateError(f"a flat range is a contiguous 1-D tensor, not one of shape {tuple(self.tensor.shape)}")
        if not 0 <= self.start <= self.end <= prod(self.shape):
            raise StateError(f"elements {self.start} to {self.end} are not within a tensor of shape {self.shape}")

    @property
    def end(self) -> int:
        """One past the last element."""
        return self.start + int(self.tensor.numel())

    @property
    def dtype(self) -> torch.dtype:
        """Of the tensor."""
        return self.tensor.dtype

    def numel(self) -> int:
        """Elements of the global tensor that are here."""
        return int(self.tensor.numel())
