"""In-process saves by all ranks of a process group, through its store (stub: bodies follow)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from holdfast.checkpoint.commit import StepInfo
from holdfast.checkpoint.objects import ObjectRecord
from holdfast.checkpoint.pieces import Piece
from holdfast.checkpoint.version import Version


@dataclass(frozen=True)
class Ranks:
    """The ranks that save together: a process group's store, no collectives. `alone()` for one process."""

    rank: int
    """Global rank, or rank in the group: what images are named by; 0 <= rank < world_size."""
    world_size: int
    store: Any
    """torch.distributed.Store; None where world_size is 1. Any: torch ships no type for all of them."""

    @classmethod
    def alone(cls) -> Ranks:
        return cls(0, 1, None)

    @classmethod
    def of(cls, process_group: Any = None) -> Ranks:
        """Of a process group (None: the default one, or alone where there is none)."""
        raise NotImplementedError


def save_pieces(
    directory: str | Path,
    *,
    ranks: Ranks,
    version: Version,
    pieces: Sequence[Piece],
    data: Callable[[Piece], memoryview],
    objects: Mapping[str, ObjectRecord],
    metrics: Mapping[str, float] | None = None,
    tag: str | None = None,
    history: str | None = None,
    attempt: int = 0,
    timeout: timedelta = timedelta(minutes=30),
) -> StepInfo:
    """Write a step directory; every rank calls it, and all return, or all raise.

    Pieces with ``job=False`` are left out. ``data(piece)`` gives the bytes of a piece (C order).
    """
    raise NotImplementedError
