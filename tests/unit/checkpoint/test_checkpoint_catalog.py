from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from checkpoint_images import VERSION, build_image, catalog_of, meta_of, read_array, slices
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.checkpoint.boxes import Box, flat_range_boxes, whole
from holdfast.checkpoint.catalog import Catalog, OpenImage
from holdfast.checkpoint.image import Piece
from holdfast.checkpoint.objects import ObjectRecord, encode
from holdfast.checkpoint.planner import segments, strides_of
from holdfast.checkpoint.source import MemorySource
from holdfast.checkpoint.tiles import Grid, Placement, tiling
from holdfast.errors import CorruptError, MismatchError, PeerError


class RangeSource:
    """A source like a peer's: copies, counts, and fails where told to."""

    def __init__(self, image: bytearray, broken: bool = False) -> None:
        self.image = image
        self.broken = broken
        self.bytes_read = 0

    def read(self, offset: int, length: int) -> memoryview:
        if self.broken:
            raise PeerError("node 1 is gone")
        assert 0 <= offset <= offset + length <= len(self.image)
        self.bytes_read += length
        return memoryview(bytes(self.image[offset : offset + length]))

    def close(self) -> None:
        pass


def _ranged(images: list[bytearray]) -> tuple[Catalog, list[RangeSource]]:
    sources = [RangeSource(image) for image in images]
    opened = [OpenImage(f"image {i}", meta_of(s.image), s) for i, s in enumerate(sources)]
    return Catalog(opened), sources


@st.composite
def tilings(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Box]]:
    """A shape, and disjoint boxes that cover it, made by random cuts of random boxes."""
    shape = tuple(draw(st.lists(st.integers(1, 9), max_size=4)))
    if draw(st.booleans()):
        size = int(np.prod(shape))
        cuts = sorted({0, size, *draw(st.lists(st.integers(0, size), max_size=4))})
        return shape, [b for x, y in pairwise(cuts) for b in flat_range_boxes(shape, x, y)]
    boxes = [whole(shape)]
    for _ in range(draw(st.integers(0, 6))):
        box = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        dims = [d for d, n in enumerate(box.lengths) if n > 1]
        if not dims:
            boxes.append(box)
            continue
        d = draw(st.sampled_from(dims))
        at = draw(st.integers(1, box.lengths[d] - 1))
        lengths = box.lengths
        boxes.append(Box(box.offsets, (*lengths[:d], at, *lengths[d + 1 :])))
        offsets = (*box.offsets[:d], box.offsets[d] + at, *box.offsets[d + 1 :])
        boxes.append(Box(offsets, (*lengths[:d], lengths[d] - at, *lengths[d + 1 :])))
    return shape, boxes


@settings(max_examples=150, deadline=None)
@given(tilings(), st.sampled_from(["u1", "f2", "f4", "c16"]), st.sampled_from([16, 64, 1000]), st.booleans(), st.data())
def test_any_region_of_any_tiling_over_any_images_equals_the_source(
    case: tuple[tuple[int, ...], list[Box]], code: str, block_bytes: int, ranged: bool, data: st.DataObject
) -> None:
    shape, boxes = case
    name = {"u1": "uint8", "f2": "float16", "f4": "float32", "c16": "complex128"}[code]
    raw = np.arange(int(np.prod(shape)) * np.dtype(code).itemsize, dtype=np.uint32).astype(np.uint8)
    array = raw.view(f"V{np.dtype(code).itemsize}").reshape(shape)
    world = data.draw(st.integers(1, 3))
    pieces: list[list[Piece]] = [[] for _ in range(world)]
    for box in boxes:
        pieces[data.draw(st.integers(0, world - 1))].append(Piece("t", name, shape, box))
    extra = data.draw(st.sampled_from(boxes))
    holder = data.draw(st.integers(0, world - 1))
    if all(piece.box != extra for piece in pieces[holder]):
        pieces[holder].append(Piece("t", name, shape, extra, None, False))
    images = [
        build_image(p, {"t": array}, rank=r, world_size=world, block_bytes=block_bytes) for r, p in enumerate(pieces)
    ]
    catalog = _ranged(images)[0] if ranged else catalog_of(images)
    for _ in range(3):
        offsets = tuple(data.draw(st.integers(0, n)) for n in shape)
        lengths = tuple(data.draw(st.integers(0, n - o)) for n, o in zip(shape, offsets, strict=True))
        wanted = Box(offsets, lengths)
        found = read_array(catalog, "t", wanted, array.dtype)
        assert found.tobytes() == np.ascontiguousarray(array[slices(wanted)]).tobytes()
    assert read_array(catalog, "t", whole(shape), array.dtype).tobytes() == array.tobytes()
    catalog.check_complete()


@given(tilings(), st.data())
def test_segments_read_over_small_gaps_only_and_stay_below_their_limit(
    case: tuple[tuple[int, ...], list[Box]], data: st.DataObject
) -> None:
    shape, _ = case
    lengths = tuple(data.draw(st.integers(1, n)) for n in shape)
    offsets = tuple(data.draw(st.integers(0, n - m)) for n, m in zip(shape, lengths, strict=True))
    wanted, max_gap, max_bytes = Box(offsets, lengths), data.draw(st.integers(0, 40)), data.draw(st.integers(1, 400))
    plan = list(segments(whole(shape), wanted, piece_offset=7, itemsize=2, max_gap=max_gap, max_bytes=max_bytes))
    counts = np.zeros(shape, int)
    order = np.arange(int(np.prod(shape))).reshape(shape)
    for segment in plan:
        counts[slices(segment.box)] += 1
        inside = np.sort(order[slices(segment.box)].reshape(-1))
        assert segment.start == 7 + 2 * inside[0]
        assert segment.length == 2 * (inside[-1] - inside[0] + 1)
        gaps = np.diff(inside) - 1
        assert not len(gaps) or 2 * gaps.max() <= max_gap
        assert segment.length <= max_bytes or segment.length == 2 * segment.box.volume
    expected = np.zeros(shape, int)
    expected[slices(wanted)] = 1
    assert (counts == expected).all()


def test_a_small_region_of_a_large_piece_reads_little() -> None:
    array = np.arange(1 << 20, dtype=np.float32).reshape(1024, 1024)
    image = build_image([Piece("w", "float32", (1024, 1024), whole((1024, 1024)))], {"w": array}, block_bytes=4096)
    catalog, (source,) = _ranged([image])
    box = Box((100, 0), (3, 1024))
    assert (read_array(catalog, "w", box, array.dtype) == array[100:103]).all()
    assert source.bytes_read <= 4 * 4096
    source.bytes_read = 0
    box = Box((0, 5), (1024, 1))
    assert (read_array(catalog, "w", box, array.dtype) == array[:, 5:6]).all()
    assert source.bytes_read <= array.nbytes + 4096


def test_neighbours_in_one_block_read_it_once() -> None:
    arrays = {f"t{i:02d}": np.full(8, i, np.float32) for i in range(30)}
    image = build_image([Piece(n, "float32", (8,), whole((8,))) for n in arrays], arrays, block_bytes=1 << 16)
    catalog, (source,) = _ranged([image])
    for name, array in arrays.items():
        assert (read_array(catalog, name, whole((8,)), array.dtype) == array).all()
    assert source.bytes_read <= len(image)


def _two_copies() -> tuple[np.ndarray, list[bytearray]]:
    array = np.arange(400, dtype=np.float32)
    images = [
        build_image([Piece("w", "float32", (400,), whole((400,)))], {"w": array}, rank=rank, world_size=2)
        for rank in range(2)
    ]
    return array, images


@pytest.mark.parametrize("ranged", [False, True])
def test_a_block_that_fails_is_taken_from_another_image(ranged: bool) -> None:
    array, images = _two_copies()
    images[0][meta_of(images[0]).piece_offsets[0] + 900] ^= 1
    catalog = _ranged(images)[0] if ranged else catalog_of(images)
    assert (read_array(catalog, "w", whole((400,)), array.dtype) == array).all()
    images[1][meta_of(images[1]).piece_offsets[0] + 900] ^= 1
    catalog = _ranged(images)[0] if ranged else catalog_of(images)
    with pytest.raises(CorruptError, match=r"w\[0:400\] cannot be read: image 0: block 3"):
        read_array(catalog, "w", whole((400,)), array.dtype)
    # What the broken blocks do not touch is still there.
    assert (read_array(catalog, "w", Box((0,), (64,)), array.dtype) == array[:64]).all()


def test_a_source_that_is_gone_is_replaced_by_another() -> None:
    array, images = _two_copies()
    catalog, sources = _ranged(images)
    sources[0].broken = True
    assert (read_array(catalog, "w", whole((400,)), array.dtype) == array).all()
    sources[1].broken = True
    with pytest.raises(PeerError, match="node 1 is gone"):
        read_array(catalog, "w", Box((300,), (100,)), array.dtype)


def test_an_uncovered_region_is_named() -> None:
    array = np.arange(12, dtype=np.int64).reshape(3, 4)
    image = build_image([Piece("w", "int64", (3, 4), Box((0, 0), (3, 3)))], {"w": array})
    catalog = catalog_of([image])
    assert (read_array(catalog, "w", Box((0, 0), (3, 3)), array.dtype) == array[:, :3]).all()
    with pytest.raises(MismatchError, match=r"no image holds w\[0:3,3:4\]"):
        read_array(catalog, "w", whole((3, 4)), array.dtype)
    with pytest.raises(MismatchError, match=r"no image holds w\[0:3,3:4\]"):
        catalog.check_complete()
    with pytest.raises(MismatchError, match="no tensor 'v' is saved"):
        read_array(catalog, "v", whole((3, 4)), array.dtype)
    with pytest.raises(MismatchError, match="not within the saved shape"):
        read_array(catalog, "w", Box((0, 0), (4, 3)), array.dtype)
    with pytest.raises(ValueError, match="takes 72 bytes, the buffer has 8"):
        catalog.read("w", Box((0, 0), (3, 3)), bytearray(8))


def test_per_rank_tensors_and_objects_come_from_the_old_rank() -> None:
    images = []
    for rank in range(2):
        array = np.full(3 + rank, rank, np.float32)
        images.append(
            build_image(
                [Piece("rng", "float32", array.shape, whole(array.shape), rank)],
                {"rng": array},
                rank=rank,
                world_size=2,
                objects={
                    "step": ObjectRecord(encode(7)),
                    "seen": ObjectRecord(encode(rank)),
                    "loader": ObjectRecord(encode(rank), per_rank=True),
                },
            )
        )
    catalog = catalog_of(images[::-1])
    assert catalog.tensors["rng"].per_rank
    assert catalog.tensor("rng", rank=3).shape == (4,)
    assert read_array(catalog, "rng", whole((4,)), np.dtype(np.float32), rank=5).tolist() == [1.0] * 4
    assert read_array(catalog, "rng", whole((3,)), np.dtype(np.float32)).tolist() == [0.0] * 3
    assert catalog.objects(4) == {"step": encode(7), "seen": encode(0), "loader": encode(0)}
    assert catalog.objects(3) == {"step": encode(7), "seen": encode(0), "loader": encode(1)}
    assert catalog.divergence == ("seen",)
    with pytest.raises(MismatchError, match="no image of rank 0 of 2"):
        catalog_of(images[1:]).objects(0)


def test_images_of_different_versions_or_that_contradict_each_other_are_refused() -> None:
    array = np.zeros(4, np.float32)
    first = build_image([Piece("w", "float32", (4,), whole((4,)))], {"w": array}, rank=0, world_size=2)
    older = build_image(
        [Piece("w", "float32", (4,), whole((4,)))], {"w": array}, rank=1, world_size=2,
        version=VERSION.generation.at(99),
    )  # fmt: skip
    with pytest.raises(CorruptError, match="images of different versions"):
        catalog_of([first, older])
    other = build_image([Piece("w", "int32", (4,), whole((4,)))], {"w": array}, rank=1, world_size=2)
    with pytest.raises(CorruptError, match="contradict"):
        catalog_of([first, other])


def test_a_zero_sized_tensor_and_a_scalar_are_read() -> None:
    pieces = [Piece("none", "float32", (0, 3), whole((0, 3))), Piece("one", "int64", (), whole(()))]
    catalog = catalog_of([build_image(pieces, {"none": np.empty((0, 3), np.float32), "one": np.array(5)})])
    assert read_array(catalog, "none", whole((0, 3)), np.dtype(np.float32)).shape == (0, 3)
    assert read_array(catalog, "one", whole(()), np.dtype(np.int64)) == 5


def test_a_memory_source_does_not_read_outside_of_its_memory() -> None:
    source = MemorySource(memoryview(bytearray(10)))
    for offset, length in ((-1, 2), (9, 2), (0, -1)):
        with pytest.raises(CorruptError):
            source.read(offset, length)


@given(tilings(), st.data())
def test_a_placement_finds_the_same_tiles_as_a_grid_as_box_by_box(
    case: tuple[tuple[int, ...], list[Box]], data: st.DataObject
) -> None:
    shape, boxes = case
    images = [data.draw(st.integers(0, 4)) for _ in boxes]
    found = tiling(shape, boxes, images)
    placement = Placement(shape, found, 5)
    placement.check_once("t")
    offsets = tuple(data.draw(st.integers(0, n)) for n in shape)
    lengths = tuple(data.draw(st.integers(0, n - o)) for n, o in zip(shape, offsets, strict=True))
    wanted = Box(offsets, lengths)
    expected = {(b, i) for b, i in zip(boxes, images, strict=True) if b.intersection(wanted)}
    assert set(placement.overlapping(wanted)) == expected


def test_regular_tilings_are_stored_as_grids_of_a_few_numbers() -> None:
    rows = [Box((i * 4, 0), (min(4, 1022 - 4 * i), 8)) for i in range(256)]
    grid = tiling((1022, 8), rows, list(range(256)))
    assert isinstance(grid, Grid)
    assert grid.axes == (4, 8)
    assert (grid.images.first, grid.images.step) == (0, 1)  # type: ignore[union-attr]


def test_a_tiling_with_a_hole_or_an_overlap_is_noticed() -> None:
    hole = Placement((4,), tiling((4,), [Box((0,), (2,)), Box((3,), (1,))], [0, 0]), 1)
    with pytest.raises(MismatchError, match=r"no image holds w\[2:3\]"):
        hole.check_once("w")
    overlap = Placement((4,), tiling((4,), [Box((0,), (3,)), Box((2,), (2,))], [0, 1]), 2)
    with pytest.raises(MismatchError, match="more than one image"):
        overlap.check_once("w")


def test_many_boxes_are_looked_up_like_few() -> None:
    boxes = [Box((i, j), (3 if i < 60 else 4, 2)) for i in range(0, 63, 3) for j in (0, 2, 4)]
    irregular = [*boxes[:-1], Box((60, 4), (2, 2)), Box((62, 4), (2, 2))]
    placement = Placement((64, 6), tiling((64, 6), irregular[::-1], list(range(len(irregular)))), len(irregular))
    placement.check_once("t")
    for box in (whole((64, 6)), Box((2, 1), (2, 2)), Box((63, 5), (1, 1)), Box((10, 0), (0, 6)), Box((59, 0), (5, 6))):
        expected = [(b, i) for i, b in enumerate(irregular[::-1]) if b.intersection(box)]
        assert list(placement.overlapping(box)) == expected


def test_strides_are_those_of_c_order() -> None:
    assert strides_of((2, 3, 4), 8) == (96, 32, 8)
    assert strides_of((), 8) == ()
