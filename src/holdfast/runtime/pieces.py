"""From the tensors of a rank to the pieces that it copies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from holdfast.checkpoint.ownership import Shard, own
from holdfast.checkpoint.pieces import Piece
from holdfast.runtime.entries import TensorEntry, Timing


@dataclass(frozen=True, slots=True, eq=False)
class OwnedPiece:
    """A piece that this rank copies, and where its bytes are."""

    piece: Piece
    tensor: torch.Tensor
    """View of the live tensor, of shape `piece.box.lengths`; any strides, any device."""
    timing: Timing


class PieceTable:
    """Finds the pieces of this rank, again only where entries have changed. Used by the training thread only.

    Args:
        global_rank: this rank.
        nodes: node rank of every global rank that may hold a tensor.
    """

    def __init__(self, global_rank: int, nodes: Mapping[int, int]) -> None:
        self._global_rank = global_rank
        self.nodes = nodes
        self._entries: Sequence[TensorEntry] | None = None
        self._by_name: dict[str, TensorEntry] = {}
        self._owned: tuple[OwnedPiece, ...] = ()

    def of(self, entries: Sequence[TensorEntry]) -> tuple[OwnedPiece, ...]:
        """The pieces to copy, sorted as `own` sorts them; the same tuple for the same `entries` (by identity)."""
        if entries is self._entries:
            return self._owned
        by_name = {entry.name: entry for entry in entries if entry.boxes}
        if self._has_same_layout(by_name):
            self._owned = tuple(self._owned_piece(owned.piece, by_name, owned) for owned in self._owned)
        else:
            pieces = own(list(map(_shard, by_name.values())), global_rank=self._global_rank, node_of=self.nodes)
            self._owned = tuple(self._owned_piece(piece, by_name, None) for piece in pieces)
        self._entries, self._by_name = entries, by_name
        return self._owned

    def _has_same_layout(self, by_name: dict[str, TensorEntry]) -> bool:
        if self._entries is None or by_name.keys() != self._by_name.keys():
            return False
        return all(old is by_name[name] or _shard(old) == _shard(by_name[name]) for name, old in self._by_name.items())

    def _owned_piece(self, piece: Piece, by_name: dict[str, TensorEntry], before: OwnedPiece | None) -> OwnedPiece:
        entry = by_name[piece.name]
        if before is not None and self._by_name[piece.name] is entry:
            return before
        return OwnedPiece(piece, entry.view(piece.box), entry.timing)


def _shard(entry: TensorEntry) -> Shard:
    return Shard(
        name=entry.name,
        dtype=entry.dtype,
        shape=entry.shape,
        boxes=entry.boxes,
        holders=entry.holders,
        rank=entry.rank,
    )
