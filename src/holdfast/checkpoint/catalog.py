"""The one reader over images (stub: bodies follow)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from holdfast.checkpoint.boxes import Box
from holdfast.checkpoint.image import ImageMeta
from holdfast.checkpoint.source import Source
from holdfast.checkpoint.version import Version


@dataclass(frozen=True)
class OpenImage:
    """An image to read from; earlier ones in a Catalog are preferred."""

    name: str
    """For messages: file name or slot path."""
    meta: ImageMeta
    source: Source


@dataclass(frozen=True)
class TensorRecord:
    """What is saved under a name."""

    dtype: str
    shape: tuple[int, ...]
    per_rank: bool


class Catalog:
    """All images of a version, by tensor name."""

    tensors: Mapping[str, TensorRecord]
    world_size: int
    version: Version

    def __init__(self, images: Sequence[OpenImage]) -> None:
        raise NotImplementedError

    @property
    def divergence(self) -> tuple[str, ...]:
        """Names of replicated objects whose bytes differ between ranks."""
        raise NotImplementedError

    def objects(self, rank: int) -> dict[str, bytes]:
        """Replicated objects and the per-rank ones of old rank ``rank % world_size``, encoded."""
        raise NotImplementedError

    def tensor(self, name: str, *, rank: int = 0) -> TensorRecord:
        """The record as rank `rank` sees it (per-rank tensors may have another shape on each rank)."""
        raise NotImplementedError

    def read(self, name: str, box: Box, out: Any, *, rank: int | None = None) -> None:
        """Fill `out`, a writable C-contiguous buffer of exactly the box's bytes. Any: the buffer protocol."""
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Catalog:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
