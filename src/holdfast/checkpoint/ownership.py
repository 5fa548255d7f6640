"""Which rank copies which bytes, worked out on every rank alone (stub: bodies follow)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import msgspec

from holdfast.checkpoint.boxes import Box
from holdfast.checkpoint.pieces import Piece


class Shard(msgspec.Struct, frozen=True):
    """What this rank holds of one global tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    boxes: tuple[Box, ...]
    holders: tuple[int, ...]
    """Global ranks that hold exactly these boxes of this tensor, this rank among them."""
    rank: int | None = None
    """Set for per-rank state: this rank."""


def own(
    shards: Sequence[Shard], *, global_rank: int, node_of: Callable[[int], int] | Mapping[int, int]
) -> tuple[Piece, ...]:
    """The pieces that this rank copies in NODE scope; ``job`` marks those it also owns in JOB scope."""
    raise NotImplementedError
