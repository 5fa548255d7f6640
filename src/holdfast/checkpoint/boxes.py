"""n-D boxes: the regions of a global tensor that pieces hold and readers want.

A box is half-open: along dimension d it covers ``offsets[d] <= i < offsets[d] + lengths[d]``, in elements. A 0-d tensor
has the one box ``Box((), ())``, of volume 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from math import prod

import msgspec


class Box(msgspec.Struct, frozen=True, order=True, gc=False):
    """A region of a global tensor, in elements."""

    offsets: tuple[int, ...]
    lengths: tuple[int, ...]

    @property
    def ends(self) -> tuple[int, ...]:
        """One past the last index, per dimension."""
        return tuple(o + n for o, n in zip(self.offsets, self.lengths, strict=True))

    @property
    def volume(self) -> int:
        """Number of elements; 1 for a 0-d box."""
        return prod(self.lengths)

    @property
    def is_empty(self) -> bool:
        """Whether it holds no element."""
        return 0 in self.lengths

    def intersection(self, other: Box) -> Box | None:
        """The elements in both, None where there are none.

        Raises:
            ValueError: the boxes have different numbers of dimensions.
        """
        offsets = []
        lengths = []
        for a, m, b, n in zip(self.offsets, self.lengths, other.offsets, other.lengths, strict=True):
            start = a if a > b else b
            length = min(a + m, b + n) - start
            if length <= 0:
                return None
            offsets.append(start)
            lengths.append(length)
        return Box(tuple(offsets), tuple(lengths))

    def contains(self, other: Box) -> bool:
        """Whether every element of `other` is in this box; an empty box is in every box."""
        if other.is_empty:
            return True
        return all(
            a <= b and b + n <= a + m
            for a, m, b, n in zip(self.offsets, self.lengths, other.offsets, other.lengths, strict=True)
        )

    def relative_to(self, outer: Box) -> Box:
        """The same elements with offsets counted from the start of `outer`."""
        return Box(tuple(a - b for a, b in zip(self.offsets, outer.offsets, strict=True)), self.lengths)

    def minus(self, other: Box) -> tuple[Box, ...]:
        """Disjoint boxes that hold the elements of this box that are not in `other`; at most two per dimension."""
        hit = self.intersection(other)
        if hit is None:
            return () if self.is_empty else (self,)
        rest: list[Box] = []
        offsets, lengths = list(self.offsets), list(self.lengths)
        for dim, (start, length) in enumerate(zip(hit.offsets, hit.lengths, strict=True)):
            before = start - offsets[dim]
            after = offsets[dim] + lengths[dim] - (start + length)
            if before:
                rest.append(Box(tuple(offsets), (*lengths[:dim], before, *lengths[dim + 1 :])))
            if after:
                rest.append(
                    Box(
                        (*offsets[:dim], start + length, *offsets[dim + 1 :]),
                        (*lengths[:dim], after, *lengths[dim + 1 :]),
                    )
                )
            offsets[dim], lengths[dim] = start, length
        return tuple(rest)

    def __str__(self) -> str:
        return "[" + ",".join(f"{o}:{o + n}" for o, n in zip(self.offsets, self.lengths, strict=True)) + "]"


def whole(shape: Sequence[int]) -> Box:
    """The box of a whole tensor of this shape."""
    return Box((0,) * len(shape), tuple(shape))


def flat_range_boxes(shape: Sequence[int], start: int, end: int) -> tuple[Box, ...]:
    """Boxes that hold elements ``start <= i < end`` of the flattened (C order) tensor, in order.

    At most ``2 * (n - 1) + 1`` boxes for n dimensions, each contiguous in the flattened tensor: a flat shard (FSDP1,
    ZeRO) is n-D boxes without an all-gather (ByteCheckpoint, section 3.2).

    Raises:
        ValueError: the range is not within the tensor.
    """
    size = prod(shape)
    if not 0 <= start <= end <= size:
        raise ValueError(f"elements {start} to {end} are not within a tensor of shape {tuple(shape)} ({size} elements)")
    if start == end:
        return ()
    return tuple(_flat_range(tuple(shape), start, end))


def _flat_range(shape: tuple[int, ...], start: int, end: int) -> list[Box]:
    if not shape:
        return [Box((), ())]
    row = prod(shape[1:])
    first, last = start // row, end // row
    head, tail = start % row, end % row
    if head == 0 and tail == 0:
        return [Box((first, *(0,) * (len(shape) - 1)), (last - first, *shape[1:]))]
    if first == last:
        return _in_row(first, _flat_range(shape[1:], head, tail))
    boxes: list[Box] = []
    if head:
        boxes += _in_row(first, _flat_range(shape[1:], head, row))
        first += 1
    if first < last:
        boxes.append(Box((first, *(0,) * (len(shape) - 1)), (last - first, *shape[1:])))
    if tail:
        boxes += _in_row(last, _flat_range(shape[1:], 0, tail))
    return boxes


def _in_row(row: int, boxes: list[Box]) -> list[Box]:
    return [Box((row, *box.offsets), (1, *box.lengths)) for box in boxes]


def split_rows(box: Box, parts: int) -> tuple[Box, ...]:
    """Cut into at most `parts` boxes of nearly equal volume, each contiguous in the C order of `box`, in order.

    The cut runs along the first dimension that has more than one index; where that has fewer indices than `parts`, each
    row is cut again along the next one.

    Raises:
        ValueError: `parts` is less than 1.
    """
    if parts < 1:
        raise ValueError(f"cannot cut a box into {parts} parts")
    dim = next((d for d, n in enumerate(box.lengths) if n > 1), None)
    if parts == 1 or dim is None or box.is_empty:
        return (box,)
    length = box.lengths[dim]
    count = min(parts, length)
    cuts = [length * i // count for i in range(count + 1)]
    rows = [_slice(box, dim, a, b) for a, b in pairwise(cuts)]
    if parts <= length:
        return tuple(rows)
    return tuple(part for row in rows for part in split_rows(row, parts // length))


def cut_rows(box: Box, max_volume: int) -> Iterator[Box]:
    """Cut into boxes of at most `max_volume` elements, each contiguous in the C order of `box`, in order.

    Raises:
        ValueError: `max_volume` is less than 1.
    """
    if max_volume < 1:
        raise ValueError(f"cannot cut a box into parts of {max_volume} elements")
    if box.volume <= max_volume:
        yield box
        return
    dim = next(d for d, n in enumerate(box.lengths) if n > 1)
    length = box.lengths[dim]
    row = box.volume // length
    if row <= max_volume:
        step = max_volume // row
        yield from (_slice(box, dim, start, min(start + step, length)) for start in range(0, length, step))
    else:
        for start in range(length):
            yield from cut_rows(_slice(box, dim, start, start + 1), max_volume)


def _slice(box: Box, dim: int, start: int, end: int) -> Box:
    offsets, lengths = list(box.offsets), list(box.lengths)
    offsets[dim] += start
    lengths[dim] = end - start
    return Box(tuple(offsets), tuple(lengths))
