"""Which image holds which region of a tensor: regular tilings as grids, others box by box. Pure.

The index stores these; a grid takes a few numbers however many pieces it has:

- per dimension, a chunk size where all chunks but the last are equal (what FSDP and tensor parallelism give), else the
  list of cuts;
- the images of the cells in C order, as first and step where they are evenly spaced, else as a list.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from itertools import pairwise, product
from math import prod

import msgspec

from holdfast.checkpoint.boxes import Box, whole
from holdfast.errors import CorruptError, MismatchError

MAX_CELLS = 100_000_000
_FEW = 16
"""Fewer boxes than this are looked through one by one."""


class EvenImages(msgspec.Struct, frozen=True):
    """Image numbers ``first + i * step`` for cell i."""

    first: int
    step: int


class Grid(msgspec.Struct, frozen=True, tag="grid"):
    """A regular tiling that covers the whole tensor."""

    axes: tuple[int | tuple[int, ...], ...]
    """Per dimension: the chunk size, or the inner cuts."""
    images: EvenImages | tuple[int, ...]
    """Of the cells in C order."""


class Tiles(msgspec.Struct, frozen=True, tag="tiles"):
    """Any set of boxes. More than one image may hold a region; earlier ones are preferred."""

    boxes: tuple[Box, ...]
    images: tuple[int, ...]
    """Parallel to `boxes`."""


Tiling = Grid | Tiles


def tiling(shape: tuple[int, ...], boxes: Sequence[Box], images: Sequence[int]) -> Tiling:
    """The shortest description of these boxes."""
    if len(boxes) == 1 and boxes[0].lengths == shape and 0 not in shape:
        # Most tensors of most states; what _as_grid gives, sooner.
        return Grid(shape, EvenImages(images[0], 0))
    tiles = Tiles(tuple(boxes), tuple(images))
    return _as_grid(shape, tiles) or tiles


def _as_grid(shape: tuple[int, ...], tiles: Tiles) -> Grid | None:
    starts = [sorted({box.offsets[d] for box in tiles.boxes}) for d in range(len(shape))]
    if 0 in shape or not tiles.boxes or len(tiles.boxes) != prod(len(s) for s in starts):
        return None
    if any(s[0] != 0 for s in starts):
        return None
    edges = [(*s, n) for s, n in zip(starts, shape, strict=True)]
    by_offsets = {box.offsets: (box, image) for box, image in zip(tiles.boxes, tiles.images, strict=True)}
    images: list[int] = []
    for cell in product(*(pairwise(e) for e in edges)):
        box, image = by_offsets.get(tuple(a for a, _ in cell), (None, 0))
        if box is None or box.lengths != tuple(b - a for a, b in cell):
            return None
        images.append(image)
    return Grid(tuple(_axis(e) for e in edges), _spaced(images))


def _axis(edges: tuple[int, ...]) -> int | tuple[int, ...]:
    chunk = edges[1]
    if all(b - a == chunk for a, b in pairwise(edges[:-1])) and edges[-1] - edges[-2] <= chunk:
        return chunk
    return edges[1:-1]


def _spaced(images: list[int]) -> EvenImages | tuple[int, ...]:
    step = images[1] - images[0] if len(images) > 1 else 0
    if all(b - a == step for a, b in pairwise(images)):
        return EvenImages(images[0], step)
    return tuple(images)


class Placement:
    """Where the regions of one tensor lie; looks up without going through all cells of a grid."""

    def __init__(self, shape: tuple[int, ...], tiling: Tiling, num_images: int) -> None:
        """
        Raises:
            CorruptError: the tiling does not fit the shape, or names images that are not there.
        """
        self._shape = shape
        self._tiling = tiling
        self.only: tuple[Box, int] | None = None
        """The tile that is the whole tensor, and its image; None where there are more."""
        if isinstance(tiling, Grid):
            if tiling.axes == shape and isinstance(tiling.images, EvenImages) and 0 not in shape:
                self.only = (whole(shape), tiling.images.first)
            self._edges = _edges(shape, tiling.axes) if self.only is None else [(0, n) for n in shape]
            count = prod(len(e) - 1 for e in self._edges)
            images = tiling.images
            used = (
                (images.first, images.first + (count - 1) * images.step) if isinstance(images, EvenImages) else images
            )
            if not isinstance(images, EvenImages) and len(images) != count:
                raise CorruptError(f"a grid of {count} cells names {len(images)} images")
        else:
            used = tiling.images
            if len(tiling.boxes) != len(used) or not all(_fits(box, shape) for box in tiling.boxes):
                raise CorruptError(f"tiles do not fit the shape {shape}")
            self._rows = _Rows(tiling.boxes)
        if any(not 0 <= image < num_images for image in used):
            raise CorruptError(f"tiles name images beyond the {num_images} of the checkpoint")

    def overlapping(self, box: Box) -> Iterator[tuple[Box, int]]:
        """The tiles that hold a part of `box`: (tile, image), preferred ones first."""
        if isinstance(self._tiling, Tiles):
            for number in self._rows.near(box):
                tile = self._tiling.boxes[number]
                if tile.intersection(box) is not None:
                    yield tile, self._tiling.images[number]
            return
        if box.is_empty or 0 in self._shape:
            return
        if self.only is not None:
            yield self.only
            return
        counts = [len(e) - 1 for e in self._edges]
        ranges = [
            range(bisect_right(e, o) - 1, bisect_left(e, o + n))
            for e, o, n in zip(self._edges, box.offsets, box.lengths, strict=True)
        ]
        images = self._tiling.images
        for cell in product(*ranges):
            number = 0
            for index, count in zip(cell, counts, strict=True):
                number = number * count + index
            offsets = tuple(e[i] for e, i in zip(self._edges, cell, strict=True))
            lengths = tuple(e[i + 1] - e[i] for e, i in zip(self._edges, cell, strict=True))
            image = images.first + number * images.step if isinstance(images, EvenImages) else images[number]
            yield Box(offsets, lengths), image

    def missing(self, box: Box) -> tuple[Box, ...]:
        """The parts of `box` that no tile holds."""
        if isinstance(self._tiling, Grid):
            return ()
        rest: list[Box] = [] if box.is_empty else [box]
        for tile, _ in self.overlapping(box):
            rest = [part for old in rest for part in old.minus(tile)]
        return tuple(rest)

    def check_once(self, name: str) -> None:
        """Check that each element lies in exactly one tile.

        Raises:
            MismatchError: one lies in none or in two; names the region.
        """
        if isinstance(self._tiling, Grid):
            return
        missing = self.missing(whole(self._shape))
        if missing:
            raise MismatchError(f"no image holds {name}{missing[0]}")
        if sum(box.volume for box in self._tiling.boxes) != prod(self._shape):
            raise MismatchError(f"regions of {name} lie in more than one image")


class _Rows:
    """Finds boxes by their extent along the first dimension, so that a lookup does not go through all of them."""

    def __init__(self, boxes: Sequence[Box]) -> None:
        self._count = len(boxes)
        self._at: dict[int, list[int]] = {}
        self._longest = 0
        if len(boxes) < _FEW or not boxes[0].lengths:
            return
        for number, box in enumerate(boxes):
            self._at.setdefault(box.offsets[0], []).append(number)
            self._longest = max(self._longest, box.lengths[0])
        self._starts = sorted(self._at)

    def near(self, box: Box) -> Sequence[int]:
        """Numbers, ascending, of boxes that may hold a part of `box`; all that do are among them."""
        if not self._at:
            return range(self._count)
        first = bisect_right(self._starts, box.offsets[0] - self._longest)
        last = bisect_left(self._starts, box.offsets[0] + box.lengths[0])
        return sorted(number for start in self._starts[first:last] for number in self._at[start])


def _fits(box: Box, shape: tuple[int, ...]) -> bool:
    return len(box.offsets) == len(box.lengths) == len(shape) and all(
        o >= 0 and n >= 0 and o + n <= size for o, n, size in zip(box.offsets, box.lengths, shape, strict=True)
    )


def _edges(shape: tuple[int, ...], axes: tuple[int | tuple[int, ...], ...]) -> list[tuple[int, ...]]:
    if len(axes) != len(shape) or any(n < 1 for n in shape):
        raise CorruptError(f"a grid of {len(axes)} dimensions for the shape {shape}")
    edges: list[tuple[int, ...]] = []
    cells = 1
    for axis, size in zip(axes, shape, strict=True):
        if isinstance(axis, int):
            cells *= -(-size // axis) if axis > 0 else 0
            if not 0 < cells <= MAX_CELLS:
                raise CorruptError(f"a grid with chunks of {axis} for the shape {shape}")
            edges.append((*range(0, size, axis), size))
        else:
            edges.append((0, *axis, size))
            if any(a >= b for a, b in pairwise(edges[-1])):
                raise CorruptError(f"a grid with the cuts {axis} for the shape {shape}")
    return edges
