"""What ranks have written, put together on the way up the tree: the same index as from all records at once."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise, product

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from holdfast.checkpoint.boxes import Box, whole
from holdfast.checkpoint.image import pack_pieces
from holdfast.checkpoint.index import ImageRecord, build_index, image_file_name
from holdfast.checkpoint.pieces import Piece
from holdfast.checkpoint.share import Share, _Pieces, join_shares, placed
from holdfast.checkpoint.tiles import EvenImages, Grid, Tiles, tiling
from holdfast.checkpoint.version import GenerationId
from holdfast.errors import CorruptError, MismatchError

GENERATION = GenerationId(incarnation=1, nonce="0badcafe", generation=1)
VERSION = GENERATION.at(7)
Case = tuple[tuple[int, ...], list[Box]]
"""Shape and tiles."""


def _record(rank: int, world: int, pieces: Sequence[Piece], objects: dict[str, bytes] | None = None) -> ImageRecord:
    return ImageRecord(
        name=image_file_name(GENERATION, rank, world), size_bytes=100 + rank, header_digest=bytes([rank % 256] * 16),
        version=VERSION, global_rank=rank, world_size=world, pieces=pack_pieces(pieces), objects=objects or {},
    )  # fmt: skip


@st.composite
def _tilings(draw: st.DrawFn) -> Case:
    """A grid with any cuts; sometimes with a cell split, so that it is none."""
    shape = tuple(draw(st.lists(st.integers(1, 30), max_size=3)))
    edges = []
    for size in shape:
        cuts = draw(st.one_of(st.integers(1, size), st.sets(st.integers(1, max(size - 1, 1)), max_size=6)))
        inner = range(cuts, size, cuts) if isinstance(cuts, int) else sorted(cut for cut in cuts if cut < size)
        edges.append([0, *inner, size])
    cells = list(product(*(pairwise(axis) for axis in edges)))[:400]
    boxes = [Box(tuple(a for a, _ in cell), tuple(b - a for a, b in cell)) for cell in cells]
    splittable = [box for box in boxes if box.lengths and box.lengths[0] > 1]
    if splittable and draw(st.booleans()):
        box = draw(st.sampled_from(splittable))
        boxes.remove(box)
        boxes += [
            Box(box.offsets, (1, *box.lengths[1:])),
            Box((box.offsets[0] + 1, *box.offsets[1:]), (box.lengths[0] - 1, *box.lengths[1:])),
        ]
    return shape, boxes


@given(_tilings(), st.randoms(use_true_random=False))
def test_columns_give_the_tiling_that_boxes_give(
    case: tuple[tuple[int, ...], list[Box]], chance: random.Random
) -> None:
    shape, boxes = case
    shuffled = chance.sample(boxes, len(boxes))
    world = len(boxes)
    shares = [Share.of(_record(rank, world, [Piece("t", "int8", shape, box)])) for rank, box in enumerate(shuffled)]
    chance.shuffle(shares)
    joined = Share.joined(shares)
    [found] = placed(joined.pieces, [image.global_rank for image in joined.images])
    assert found.tiling() == tiling(shape, shuffled, range(world))


def _job(world: int) -> list[ImageRecord]:
    """Row shards of two tensors, a replicated one, state of each rank, a 0-d one, a lost rank's share written twice."""
    records = []
    for rank in range(world):
        pieces = [Piece(f"w{i}", "float32", (world * 2, 3), Box((2 * rank, 0), (2, 3))) for i in range(2)]
        pieces.append(Piece("rng", "uint8", (rank + 1,), whole((rank + 1,)), rank=rank))
        if rank == 3:
            pieces.append(Piece("step", "int64", (), whole(())))
        if rank == 5:
            pieces.append(Piece("w0", "float32", (world * 2, 3), Box((2, 0), (2, 3))))
        records.append(_record(rank, world, pieces, {"args": b"1" if rank != 4 else b"2"}))
    return records


def test_shares_joined_up_a_tree_give_the_index_of_all_records() -> None:
    records = _job(40)
    expected = build_index(records, version=VERSION, world_size=40)
    said = [Share.of(record).encode() for record in records]
    inner = [join_shares(said[first::7]) for first in range(7)]
    index = build_index(Share.decode(join_shares(inner[::-1])), version=VERSION, world_size=40)
    assert index == expected
    assert index.divergence == ("args",)
    by_name = {(tensor.name, tensor.rank): tensor for tensor in index.tensors}
    assert by_name["w1", None].tiling == Grid((2, 3), EvenImages(0, 1))
    assert by_name["w0", None].tiling == Grid((2, 3), EvenImages(0, 1)), "the first image that holds a box is taken"
    assert by_name["step", None].tiling == Grid((), EvenImages(3, 0))
    assert by_name["rng", 17].tiling == Grid((18,), EvenImages(17, 0))


@pytest.mark.parametrize("missing", [0, 7, 20])
def test_gap_among_many_pieces_is_named(missing: int) -> None:
    rows = [row for row in range(21) if row != missing]
    records = [_record(rank, 20, [Piece("w", "int8", (21,), Box((row,), (1,)))]) for rank, row in enumerate(rows)]
    with pytest.raises(MismatchError, match=rf"no image holds w\[{missing}:{missing + 1}\]"):
        build_index(records, version=VERSION, world_size=20)


def test_missing_cell_of_a_grid_is_named() -> None:
    cells = [Box((row, column), (1, 1)) for row, column in product(range(4), repeat=2)]
    records = [_record(rank, 15, [Piece("w", "int8", (4, 4), cell)]) for rank, cell in enumerate(cells[:15])]
    with pytest.raises(MismatchError, match=r"no image holds w\[3:4,3:4\]"):
        build_index(records, version=VERSION, world_size=15)


def test_many_uneven_pieces_stay_a_list_of_boxes() -> None:
    cuts = [0, *range(5, 20), 40]
    pieces = [Piece("w", "int8", (2, 40), Box((0, a), (2, b - a))) for a, b in pairwise(cuts)]
    split = Piece("w", "int8", (2, 40), Box((0, 0), (1, 5))), Piece("w", "int8", (2, 40), Box((1, 0), (1, 5)))
    records = [_record(rank, 17, [piece]) for rank, piece in enumerate([*split, *pieces[1:]])]
    [tensor] = build_index(records, version=VERSION, world_size=17).tensors
    assert isinstance(tensor.tiling, Tiles)
    assert tensor.tiling.images == tuple(range(17))


def test_parts_beside_the_whole_of_a_tensor_are_left_out() -> None:
    boxes = [Box((0,), (3,)), whole((6,)), Box((3,), (3,))]
    records = [_record(rank, 3, [Piece("w", "int8", (6,), box)]) for rank, box in enumerate(boxes)]
    [tensor] = build_index(records, version=VERSION, world_size=3).tensors
    assert tensor.tiling == Grid((6,), EvenImages(1, 0))


def test_tensor_that_two_ranks_hold_as_two_things_is_named_with_an_image() -> None:
    shares = [
        Share.of(_record(0, 2, [Piece("a", "int8", (1,), whole((1,))), Piece("b", "int8", (2,), Box((0,), (1,)))])),
        Share.of(_record(1, 2, [Piece("b", "int16", (2,), Box((1,), (1,)))])),
    ]
    with pytest.raises(MismatchError, match=r"b is int16\[2\] in .*rank-00001.*, int8\[2\] in another"):
        Share.joined(shares)


def test_what_is_no_share_is_refused() -> None:
    record = _job(2)[0]
    share = Share.of(record)
    data = _Pieces.decode(share.pieces, 1)
    shortened = {
        dims: type(part)(part.tensor, part.image, part.offsets, part.lengths[:-8])
        for dims, part in data.columns.items()
    }
    broken = [
        _Pieces(data.tensors, shortened),
        _Pieces(data.tensors[:1], data.columns),
        _Pieces(data.tensors, {dims + 1: part for dims, part in data.columns.items()}),
    ]
    for dims, part in data.columns.items():
        broken.append(_Pieces(data.tensors, {**data.columns, dims: replace(part, image=part.image[8:])}))
        other = next(number for number, tensor in enumerate(data.tensors) if len(tensor.shape) != dims)
        wrong_tensors = [("tensor", number) for number in (-1, len(data.tensors), other)]
        for column, number in (*wrong_tensors, ("image", -1), ("image", 1)):
            numbers = numpy.frombuffer(getattr(part, column), "<i8").copy()
            numbers[0] = number
            changed = replace(part, **{column: numbers.tobytes()})
            broken.append(_Pieces(data.tensors, {**data.columns, dims: changed}))
    wrong = [b"", b"\0" * 40, *(pieces.encode() for pieces in broken)]
    for other in [*(Share(share.images, pieces) for pieces in wrong), Share([], share.pieces)]:
        with pytest.raises(CorruptError):
            Share.joined([share, other])
    with pytest.raises(CorruptError):
        Share.decode(b"\0" * 40)
    name = record.name.encode()
    with pytest.raises(CorruptError):
        Share.decode(share.encode().replace(name, b"\xff" * len(name)))  # no UTF-8
