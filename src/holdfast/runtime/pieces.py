"""From the tensors of a rank to the pieces that it copies."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from holdfast.checkpoint.image import Piece
from holdfast.runtime.entries import Timing


@dataclass(frozen=True, slots=True, eq=False)
class OwnedPiece:
    """A piece that this rank copies, and where its bytes are."""

    piece: Piece
    tensor: torch.Tensor
    """View of the live tensor, of shape `piece.box.lengths`; any strides, any device."""
    timing: Timing
