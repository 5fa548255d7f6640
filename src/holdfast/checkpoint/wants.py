"""What ranks want of the images of a checkpoint, and who reads it: each block once in the whole job. Pure.

A rank's wants are runs of blocks (the unit of verification), by image. All ranks know all wants of the images that they
want something of; each cuts them into the same *units*, runs that the same ranks want, and finds the same reader for
each: the ranks that want a unit take turns, so that reads are spread without any further word.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import msgspec

from holdfast.checkpoint.boxes import Box
from holdfast.checkpoint.image import ImageMeta
from holdfast.checkpoint.planner import segments

UNIT_BYTES = 8 << 20
"""Most bytes that are read at once, unless a block is larger."""
HEADER = -1
"""In place of the first block: the header of the image."""

Runs = Sequence[tuple[int, int]]
"""Blocks ``first <= i < end``, ascending, apart from each other."""


class Wants(msgspec.Struct, frozen=True, array_like=True):
    """What one rank wants, as it tells the others."""

    images: list[int]
    runs: list[list[int]]
    """For each image: first and end of each run, in turn."""

    def by_image(self) -> Iterator[tuple[int, Runs]]:
        """Each image, and the runs of it."""
        for image, flat in zip(self.images, self.runs, strict=True):
            yield image, list(zip(flat[::2], flat[1::2], strict=True))


class Unit(NamedTuple):
    """Blocks of an image that the same ranks want, or its header. Ordered; all ranks handle them in this order."""

    image: int
    first: int
    """Block, or `HEADER`."""
    end: int
    reader: int
    wanters: tuple[int, ...]
    """Ascending; the reader is among them."""


def blocks_wanted(meta: ImageMeta, tile: Box, wanted: Box, *, start: int, itemsize: int) -> list[tuple[int, int]]:
    """Blocks that hold `wanted`, a part of the piece `tile`; neighbouring runs joined.

    Args:
        meta: of the image.
        tile: the box of the piece.
        wanted: not empty, within `tile`.
        start: of the piece, bytes from the start of the image.
        itemsize: bytes per element.
    """
    size = meta.block_bytes
    if wanted == tile:
        begin = start - meta.data_start
        return [(begin // size, (begin + tile.volume * itemsize - 1) // size + 1)]
    plan = segments(tile, wanted, piece_offset=start, itemsize=itemsize, max_gap=size, max_bytes=1 << 62)
    return merged(
        (
            (part.start - meta.data_start) // size,
            (part.start + part.length - 1 - meta.data_start) // size + 1,
        )
        for part in plan
    )


def merged(runs: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same blocks as ascending runs that do not touch."""
    joined: list[tuple[int, int]] = []
    for first, end in sorted(runs):
        if joined and first <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((first, end))
    return joined


def header_units(images: Mapping[int, Sequence[int]], rank: int) -> list[Unit]:
    """Who reads the headers that this rank wants.

    Args:
        images: for each rank, the images of which it wants something.
        rank: this one.
    """
    wanters: dict[int, list[int]] = {image: [] for image in images[rank]}
    for other in sorted(images):
        for image in images[other]:
            if image in wanters:
                wanters[image].append(other)
    return [Unit(image, HEADER, 0, ranks[image % len(ranks)], tuple(ranks)) for image, ranks in sorted(wanters.items())]


def units(image: int, runs: Mapping[int, Runs], rank: int, *, block_bytes: int) -> list[Unit]:
    """Cut what is wanted of an image; the units that `rank` wants.

    Args:
        image: its number.
        runs: for each rank that wants something of it.
        rank: this one.
        block_bytes: of the image.
    """
    step = max(1, UNIT_BYTES // block_bytes)
    events: dict[int, list[tuple[int, bool]]] = {}
    for other, of_rank in runs.items():
        for first, end in of_rank:
            events.setdefault(first, []).append((other, True))
            events.setdefault(end, []).append((other, False))
    found: list[Unit] = []
    wanting: set[int] = set()
    for begin, end in pairwise([*sorted(events), -1]):
        for other, starts in events[begin]:
            (wanting.add if starts else wanting.discard)(other)
        if rank not in wanting:
            continue
        wanters = tuple(sorted(wanting))
        cuts = [begin, *range((begin // step + 1) * step, end, step), end]
        found += [Unit(image, a, b, wanters[(a // step + image) % len(wanters)], wanters) for a, b in pairwise(cuts)]
    return found
