"""The share of a node that is gone: decoded where it is coded, copied where others hold it, written for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from holdfast.checkpoint.boxes import whole
from holdfast.checkpoint.commit import image_file_name
from holdfast.checkpoint.image import ImageLayout, ImageMeta, block_checksums, read_header
from holdfast.checkpoint.objects import ObjectRecord, encode_objects
from holdfast.checkpoint.pieces import Piece
from holdfast.checkpoint.source import MemorySource
from holdfast.checkpoint.verified import OpenImage
from holdfast.checkpoint.version import GenerationId
from holdfast.errors import CorruptError, PeerError
from holdfast.snapshot.coding import Extent, coded_ranges
from holdfast.snapshot.lost import LostSource
from holdfast.snapshot.persister import Part, write_part
from holdfast.snapshot.protection import Protection
from holdfast.snapshot.reports import NodeState

GENERATION = GenerationId(incarnation=1, nonce="7f3a9c02", generation=4)
VERSION = GENERATION.at(7)
BLOCK = 256
RNG = np.random.default_rng(0)
SHARED = RNG.integers(0, 256, 3000, np.uint8)
"""Lies on nodes 0 and 1: with one parity it needs none."""


def image_of(rank: int, *, own: int, shared: np.ndarray = SHARED, job: bool = True) -> bytes:
    """An image with a piece of its own before and behind one that another node holds too."""
    arrays = {f"a{rank}": np.full(own, rank, np.uint8), "shared": shared, f"z{rank}": np.full(own, rank + 9, np.uint8)}
    pieces = [
        Piece(name, "uint8", array.shape, whole(array.shape), job=job or name != "shared")
        for name, array in arrays.items()
    ]
    blob = encode_objects({"session": ObjectRecord(b"{}")})
    layout = ImageLayout.plan(pieces, objects_capacity=len(blob), block_bytes=BLOCK)
    data = bytearray(layout.size_bytes)
    for piece, start in zip(layout.pieces, layout.piece_offsets, strict=True):
        data[start : start + piece.size_bytes] = arrays[piece.name].tobytes()
    data[layout.objects_offset : layout.objects_offset + len(blob)] = blob
    checksums = block_checksums([memoryview(data)[layout.data_start :]], BLOCK)
    header = layout.header(
        version=VERSION, global_rank=rank, world_size=2, checksums=checksums, objects_bytes=len(blob)
    )
    return bytes(header + data[layout.data_start :])


def meta_of(image: bytes) -> ImageMeta:
    return read_header(lambda offset, length: memoryview(image)[offset : offset + length])


def opener(image: bytes) -> Callable[[], OpenImage]:
    return lambda: OpenImage("another", meta_of(image), MemorySource(memoryview(image)))


class Decoded:
    """Gives what is coded and nothing else, as `DecodedSource` does."""

    def __init__(self, image: bytes, ranges: tuple[tuple[int, int], ...]) -> None:
        self.image, self.ranges, self.closed = image, ranges, False

    def read(self, offset: int, length: int) -> memoryview:
        if not any(start <= offset and offset + length <= stop for start, stop in self.ranges):
            raise PeerError("not coded")
        return memoryview(self.image)[offset : offset + length]

    def close(self) -> None:
        self.closed = True


def ranges_of(image: bytes) -> tuple[tuple[int, int], ...]:
    meta = meta_of(image)
    pieces = [
        Extent(start, start + piece.size_bytes, (0, 1) if piece.name == "shared" else ())
        for piece, start in zip(meta.pieces, meta.piece_offsets, strict=True)
    ]
    ranges, _ = coded_ranges(
        pieces, data_start=meta.data_start, objects_offset=meta.objects_offset, size_bytes=meta.size_bytes,
        block_bytes=BLOCK, num_parity=1, domains={0: "a", 1: "b"},
    )  # fmt: skip
    return ranges


def source_of(image: bytes, *others: bytes) -> LostSource:
    ranges = ranges_of(image)
    assert len(ranges) == 2, ranges  # the piece that others hold is left out
    return LostSource(Decoded(image, ranges), meta_of(image), ranges, [opener(other) for other in others])


def part(directory: Path, *lost: Callable[[], OpenImage]) -> Part:
    return Part(VERSION, 1, directory, (), lost)


def test_any_range_of_a_lost_image_is_had_from_parity_and_from_other_images() -> None:
    image = image_of(1, own=1100)
    source = source_of(image, image_of(0, own=40, job=False))
    for start, length in ((0, len(image)), (1500, 700), (2000, 1), (len(image) - 9, 9), (700, 4000), (5, 0)):
        assert source.read(start, length) == image[start : start + length], (start, length)
    source.close()


def test_bytes_that_nobody_holds_are_an_error_that_names_them() -> None:
    image = image_of(1, own=1100)
    without = image_of(0, own=40, shared=SHARED[:2999])
    with pytest.raises(PeerError, match="no image that is left has shared"):
        source_of(image, without).read(0, len(image))


@pytest.mark.parametrize("job", [True, False])
def test_the_share_of_a_lost_node_is_written_as_it_would_have_written_it(tmp_path: Path, job: bool) -> None:
    image = image_of(1, own=1100, job=job)
    written, expected = tmp_path / "decoded", tmp_path / "own"
    source = source_of(image, image_of(0, own=40))
    records = write_part(part(written, lambda: OpenImage("lost", meta_of(image), source)))
    assert records == write_part(part(expected, opener(image)))
    name = image_file_name(GENERATION, 1, 2)
    assert (written / name).read_bytes() == (expected / name).read_bytes()


def test_a_copy_that_differs_never_becomes_a_checkpoint(tmp_path: Path) -> None:
    image, changed = image_of(1, own=1100), SHARED.copy()
    changed[1700] ^= 1
    source = source_of(image, image_of(0, own=40, shared=changed))
    with pytest.raises(CorruptError):
        write_part(part(tmp_path, lambda: OpenImage("lost", meta_of(image), source)))
    assert not [path for path in tmp_path.rglob("*") if path.suffix == ".safetensors"]


def state(coded: int) -> NodeState:
    return NodeState(
        generation=GENERATION, node_rank=0, epoch=1, leader_epoch=1, num_slots=6, free=1, held=(), complete=coded,
        pinned=(), ranks=(), coded=GENERATION.at(coded), parity=True,
    )  # fmt: skip


def test_the_parity_that_a_lost_share_is_decoded_from_stays_until_that_is_written() -> None:
    parent = GenerationId(incarnation=1, nonce="7f3a9c02", generation=3).at(5)
    protection = Protection(coded=True, parent=parent, protected=parent)
    protection.held = True
    protection.advance([state(6)], GENERATION.at(7), 6)
    assert protection.current == VERSION
    assert protection.advance([state(7)], GENERATION.at(8), 6) == []
    assert (protection.protected, protection.current) == (parent, VERSION)
    protection.held = False
    [done] = protection.advance([state(7)], GENERATION.at(8), 6)
    assert done.version == VERSION
    assert (protection.protected, protection.current) == (VERSION, GENERATION.at(8))
