"""What a copy is made of: the pieces of one image, where their bytes lie now, and how each is moved.

A plan is made once and used for every version until a tensor is replaced or grows. It sorts the pieces into lanes:

    views    small or strided pieces: one ``torch._foreach_copy_`` moves all of them (a Python loop would cost more
             than the bytes)
    bulk     large contiguous pieces: moved block by block of the image, so that each block is hashed while it is in
             the cache
    device   pieces on an accelerator (`holdfast.snapshot.cuda`)

and each lane by the time at which its bytes may be read: at the session boundary, or while training goes on.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from holdfast.checkpoint.image import ImageLayout

PARALLEL_GRAIN = 32768
"""Elements from which on torch splits a copy over its thread pool; the copying thread must not start one of its own."""
INLINE_BYTES = 16 << 20
"""Host tensors of a state on an accelerator are copied at the boundary where they are not more than this."""


@dataclass(frozen=True, eq=False)
class Source:
    """One piece of the image and the memory that holds it now."""

    name: str
    """Name of the tensor that the piece is of; appears in warnings."""
    tensor: torch.Tensor
    """Exactly the piece's box (a detached view; any strides, any device)."""
    offset: int
    """Where the piece starts in the image (bytes)."""
    overlap: bool
    """May be copied while training goes on; else at the boundary itself."""
    frozen: bool = False
    """Copied again only where it has changed since the slot was last written."""

    @property
    def size_bytes(self) -> int:
        """Bytes of the piece."""
        return self.tensor.numel() * self.tensor.element_size()


@dataclass(frozen=True)
class Segment:
    """A run of bytes of one piece within one block."""

    offset: int
    """In the image."""
    address: int
    """Of the source."""
    length: int


class CopyPlan:
    """The pieces of one image, sorted into lanes. Immutable; shared by the training thread and the copying thread."""

    def __init__(self, layout: ImageLayout, sources: Sequence[Source]) -> None:
        """Sort `sources`.

        Args:
            layout: of the image; `sources` lie in it without overlap.
            sources: all pieces of the image.
        """
        self.layout = layout
        self.sources = tuple(source for source in sources if source.tensor.numel())
        host = [source for source in self.sources if source.tensor.device.type == "cpu"]
        if len(host) < len(self.sources) and sum(source.size_bytes for source in host) < INLINE_BYTES:
            # Counters of optimizers and the like: waiting for a thread would cost more than copying them.
            host = [replace(source, overlap=False) for source in host]
        self.device = tuple(source for source in self.sources if source.tensor.device.type != "cpu")
        bulk = [source for source in host if _is_bulk(source.tensor)]
        self.views = tuple(source for source in host if not _is_bulk(source.tensor))
        self.boundary_views = tuple(index for index, source in enumerate(self.views) if not source.overlap)
        self.overlap_views = tuple(index for index, source in enumerate(self.views) if source.overlap)
        self.boundary_bulk = tuple(source for source in bulk if not source.overlap and not source.frozen)
        self.frozen_bulk = tuple(source for source in bulk if source.frozen)
        self.overlap_bulk = tuple(source for source in bulk if source.overlap and not source.frozen)
        self.overlap_segments = self._segments(self.overlap_bulk)
        self.view_tensors = [_flat(source.tensor) for source in self.views]
        self._overlapping = tuple(source for source in host if source.overlap)
        self._counted = [source.tensor for source in self._overlapping]

    @property
    def num_blocks(self) -> int:
        """Checksummed blocks of the image."""
        return self.layout.num_blocks

    def block(self, index: int) -> tuple[int, int]:
        """Start and end of block `index` in the image (bytes)."""
        start = self.layout.data_start + index * self.layout.block_bytes
        return start, min(start + self.layout.block_bytes, self.layout.size_bytes)

    def mutations(self) -> list[int]:
        """Version counters of the host tensors that are read while training goes on."""
        return [tensor._version for tensor in self._counted]

    def mutated(self, before: list[int]) -> tuple[str, ...]:
        """Names of those that were changed in place since `mutations` gave `before`."""
        return tuple(
            source.name
            for source, old, new in zip(self._overlapping, before, self.mutations(), strict=True)
            if old != new
        )

    def blocks_within(self, sources: Iterable[Source]) -> set[int]:
        """Blocks that hold nothing but bytes of one of `sources`."""
        found: set[int] = set()
        for source in sources:
            start = source.offset - self.layout.data_start
            first = -(-start // self.layout.block_bytes)
            found.update(range(first, (start + source.size_bytes) // self.layout.block_bytes))
        return found

    def _segments(self, sources: Iterable[Source]) -> dict[int, list[Segment]]:
        segments: dict[int, list[Segment]] = {}
        size = self.layout.block_bytes
        for source in sources:
            done, address = 0, source.tensor.data_ptr()
            while done < source.size_bytes:
                offset = source.offset + done
                index = (offset - self.layout.data_start) // size
                length = min(self.layout.data_start + (index + 1) * size - offset, source.size_bytes - done)
                segments.setdefault(index, []).append(Segment(offset, address + done, length))
                done += length
        return segments


def _is_bulk(tensor: torch.Tensor) -> bool:
    return tensor.numel() >= PARALLEL_GRAIN and tensor.is_contiguous()


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(-1) if tensor.is_contiguous() else tensor
