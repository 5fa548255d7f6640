"""The planner: wanted boxes ∩ saved pieces -> byte ranges. Pure.

A piece lies in its image in C order. The part of it that is wanted is read as *segments*: sub-boxes whose bytes, with
the gaps between them, are one range. A gap that is not larger than a block is read over (the block that holds it is
read anyhow, to verify it); at a larger one a new segment starts.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from operator import mul

import msgspec

from holdfast.checkpoint.boxes import Box


class Segment(msgspec.Struct, frozen=True):
    """A part of a piece that is read as one range."""

    box: Box
    """Of the global tensor."""
    start: int
    """First byte, from the start of the image."""
    length: int
    """Bytes from the first element of `box` to the end of its last, gaps included."""


def strides_of(lengths: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Bytes between neighbours, per dimension, of a C-ordered box."""
    return tuple(accumulate((itemsize, *lengths[:0:-1]), mul))[::-1] if lengths else ()


def segments(
    piece: Box, wanted: Box, *, piece_offset: int, itemsize: int, max_gap: int, max_bytes: int
) -> Iterator[Segment]:
    """Byte ranges that give `wanted`, a part of `piece`.

    Args:
        piece: the box that the piece holds.
        wanted: not empty, within `piece`.
        piece_offset: first byte of the piece, from the start of the image.
        itemsize: bytes per element.
        max_gap: bytes; larger gaps are not read.
        max_bytes: a segment longer than this is cut where it can be; contiguous ones are not cut (a reader can cut
            those at any byte).
    """
    assert piece.contains(wanted), (piece, wanted)
    assert not wanted.is_empty, wanted
    strides = strides_of(piece.lengths, itemsize)
    yield from _cut(wanted, piece, strides, piece_offset, itemsize, max_gap, max_bytes)


def _cut(
    box: Box, piece: Box, strides: tuple[int, ...], offset: int, itemsize: int, max_gap: int, max_bytes: int
) -> Iterator[Segment]:
    span = itemsize
    widest = 0
    for n, stride in zip(reversed(box.lengths), reversed(strides), strict=True):
        if n > 1:
            widest = max(widest, stride - span)
            span += (n - 1) * stride
    if widest == 0 or (widest <= max_gap and span <= max_bytes):
        start = sum((o - p) * s for o, p, s in zip(box.offsets, piece.offsets, strides, strict=True))
        yield Segment(box, offset + start, span)
        return
    dim = next(d for d, n in enumerate(box.lengths) if n > 1)
    rows = max(1, max_bytes // strides[dim]) if widest <= max_gap else 1
    for first in range(0, box.lengths[dim], rows):
        offsets, lengths = list(box.offsets), list(box.lengths)
        offsets[dim] += first
        lengths[dim] = min(rows, box.lengths[dim] - first)
        yield from _cut(Box(tuple(offsets), tuple(lengths)), piece, strides, offset, itemsize, max_gap, max_bytes)
