"""Copies that should agree: the same region of one tensor in the images of several nodes.

Replicas of a data-parallel state are equal bit for bit; where two copies are not, memory or a processor has changed
bits silently before the checksum was taken. The copies are compared by the checksums of their blocks, which every
reader has from the headers. Only where a block also holds other bytes, and so proves nothing, its part of the copy is
read, up to a limit. Every reader of the same images comes to the same result.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from holdfast.checkpoint.boxes import Box
from holdfast.checkpoint.verified import OpenImage
from holdfast.errors import HoldfastError

COMPARED_BYTES = 16 << 20
"""Most bytes that are read to compare; what lies beyond is taken for equal."""
UNSYNCHRONISED = "unsynchronised"
"""Object of an image: names of the tensors that its rank holds and that nothing keeps equal on other ranks."""

Region = tuple[str, Box]


@dataclass(frozen=True)
class Divergence:
    """Copies of one region that do not agree."""

    name: str
    box: Box
    copies: tuple[tuple[int, ...], ...]
    """Numbers of the images that agree with each other, the largest set first."""

    @property
    def has_majority(self) -> bool:
        """Whether more than half of the copies agree."""
        return 2 * len(self.copies[0]) > sum(map(len, self.copies))

    @property
    def outvoted(self) -> frozenset[int]:
        """Images whose copy is not to be used; all where there is no majority."""
        refused = self.copies[1:] if self.has_majority else self.copies
        return frozenset(number for copies in refused for number in copies)

    def describe(self, places: Sequence[str]) -> str:
        """One line: tensor, region, who agrees with whom, and what follows.

        Args:
            places: of each image, for people.
        """
        verdict = "the majority's copy is used" if self.has_majority else "no copy has a majority"
        return f"copies of {self.name}{self.box} differ (silent corruption): {self._sides(places)}; {verdict}"

    def describe_drift(self, places: Sequence[str]) -> str:
        """The same of a tensor that nothing keeps equal."""
        return (
            f"copies of {self.name}{self.box} differ, and nothing keeps them equal (no DDP, no DTensor): "
            f"{self._sides(places)}; each node goes on with its own"
        )

    def _sides(self, places: Sequence[str]) -> str:
        return " against ".join(", ".join(places[number] for number in copies) for copies in self.copies)


@dataclass(frozen=True)
class _Copy:
    number: int
    """Of its image."""
    image: OpenImage
    start: int
    """Bytes from the start of the image."""
    size_bytes: int

    @property
    def phase(self) -> int:
        """Where in its first block it begins."""
        return (self.start - self.image.meta.data_start) % self.image.meta.block_bytes

    def blocks(self) -> Iterator[tuple[int, int, int, bool]]:
        """Each block of the copy: its number, first and last byte of the copy within, whether it holds nothing else."""
        meta = self.image.meta
        end = self.start + self.size_bytes
        first = (self.start - meta.data_start) // meta.block_bytes
        for block in range(first, (end - 1 - meta.data_start) // meta.block_bytes + 1):
            begins = meta.data_start + block * meta.block_bytes
            ends = min(begins + meta.block_bytes, meta.size_bytes)
            yield block, max(begins, self.start), min(ends, end), self.start <= begins and ends <= end

    def checksum(self, block: int) -> bytes:
        return self.image.meta.checksums[8 * block : 8 * block + 8]


def divergences(images: Sequence[OpenImage], *, limit_bytes: int = COMPARED_BYTES) -> list[Divergence]:
    """Compare every region that several images hold; images that cannot be read are left out.

    Args:
        images: of one version.
        limit_bytes: most that is read of copies whose checksums prove nothing.
    """
    budget = _Budget(limit_bytes)
    found = []
    shared = _shared(images)
    for name, box in sorted(shared, key=lambda region: (region[0], region[1].offsets, region[1].lengths)):
        classes: list[list[_Copy]] = []
        for copy in shared[name, box]:
            agreeing = next((known for known in classes if _equal(known[0], copy, budget)), None)
            if agreeing is None:
                classes.append([copy])
            else:
                agreeing.append(copy)
        if len(classes) > 1:
            sides = sorted((tuple(copy.number for copy in known) for known in classes), key=lambda c: (-len(c), c))
            found.append(Divergence(name, box, tuple(sides)))
    return found


def _shared(images: Sequence[OpenImage]) -> Mapping[Region, list[_Copy]]:
    """Regions of the job's tensors with more than one copy; copies in the order of the ranks that made them."""
    copies: dict[Region, list[_Copy]] = {}
    for number in sorted(range(len(images)), key=lambda number: _rank(images[number])):
        if _rank(images[number]) < 0:
            continue
        meta = images[number].meta
        for piece, start in zip(meta.pieces, meta.piece_offsets, strict=True):
            if piece.rank is None and piece.size_bytes:
                copy = _Copy(number, images[number], start, piece.size_bytes)
                copies.setdefault((piece.name, piece.box), []).append(copy)
    return {region: found for region, found in copies.items() if len(found) > 1}


def _rank(image: OpenImage) -> int:
    """Global rank of the image, -1 where its header cannot be read."""
    try:
        return image.meta.global_rank
    except HoldfastError:
        return -1


@dataclass
class _Budget:
    left_bytes: int


def _equal(one: _Copy, other: _Copy, budget: _Budget) -> bool:
    """Whether two copies agree, as far as that can be told."""
    if one.size_bytes != other.size_bytes:
        return False
    if one.phase != other.phase or one.image.meta.block_bytes != other.image.meta.block_bytes:
        return _same_bytes(one, one.start, other, other.start, one.size_bytes, budget)
    for (block, begins, ends, alone), (twin, begins_there, _, alone_there) in zip(
        one.blocks(), other.blocks(), strict=True
    ):
        if one.checksum(block) == other.checksum(twin):
            continue
        if alone and alone_there:
            return False
        if not _same_bytes(one, begins, other, begins_there, ends - begins, budget):
            return False
    return True


def _same_bytes(one: _Copy, start: int, other: _Copy, start_there: int, length: int, budget: _Budget) -> bool:
    """Read both; equal where the budget is used up, or where a source does not give them: who restores will see."""
    if 2 * length > budget.left_bytes:
        return True
    budget.left_bytes -= 2 * length
    try:
        return one.image.range(start, length) == other.image.range(start_there, length)
    except HoldfastError:
        return True
