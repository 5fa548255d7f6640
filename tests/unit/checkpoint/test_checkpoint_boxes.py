from __future__ import annotations

import numpy as np
import pytest
from checkpoint_images import slices
from hypothesis import given
from hypothesis import strategies as st

from holdfast.checkpoint.boxes import Box, flat_range_boxes, split_rows, whole

shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)


@st.composite
def boxes_in(draw: st.DrawFn, shape: tuple[int, ...]) -> Box:
    offsets = [draw(st.integers(0, n)) for n in shape]
    lengths = [draw(st.integers(0, n - o)) for n, o in zip(shape, offsets, strict=True)]
    return Box(tuple(offsets), tuple(lengths))


@st.composite
def two_boxes(draw: st.DrawFn) -> tuple[tuple[int, ...], Box, Box]:
    shape = draw(shapes)
    return shape, draw(boxes_in(shape)), draw(boxes_in(shape))


def mask(shape: tuple[int, ...], box: Box) -> np.ndarray:
    found = np.zeros(shape, bool)
    found[slices(box)] = True
    return found


@given(two_boxes())
def test_intersection_difference_and_containment_are_those_of_sets_of_elements(
    case: tuple[tuple[int, ...], Box, Box],
) -> None:
    shape, a, b = case
    inter, rest = a.intersection(b), a.minus(b)
    both = mask(shape, a) & mask(shape, b)
    assert (inter is None) == (not both.any())
    if inter is not None:
        assert (mask(shape, inter) == both).all()
    counts = np.zeros(shape, int)
    for box in rest:
        assert not box.is_empty
        counts += mask(shape, box)
    assert (counts == (mask(shape, a) & ~mask(shape, b))).all()
    assert len(rest) <= 2 * len(shape) + (not shape)
    assert a.contains(b) == (not (mask(shape, b) & ~mask(shape, a)).any())
    assert a.volume == mask(shape, a).sum()


@given(shapes.filter(lambda s: 0 not in s), st.data())
def test_a_flat_range_becomes_few_boxes_in_order(shape: tuple[int, ...], data: st.DataObject) -> None:
    size = int(np.prod(shape))
    start = data.draw(st.integers(0, size))
    end = data.draw(st.integers(start, size))
    boxes = flat_range_boxes(shape, start, end)
    numbers = np.arange(size).reshape(shape)
    found = [int(i) for box in boxes for i in numbers[slices(box)].reshape(-1)]
    assert found == list(range(start, end))
    assert len(boxes) <= 2 * (max(len(shape), 1) - 1) + 1


def test_a_flat_range_outside_of_the_tensor_is_refused() -> None:
    with pytest.raises(ValueError, match="not within"):
        flat_range_boxes((2, 3), 0, 7)


@given(two_boxes(), st.integers(1, 30))
def test_row_chunks_are_contiguous_cover_the_box_in_order_and_are_balanced(
    case: tuple[tuple[int, ...], Box, Box], parts: int
) -> None:
    _, box, _ = case
    cut = split_rows(box, parts)
    assert 1 <= len(cut) <= parts
    order = np.arange(box.volume).reshape(box.lengths)
    found = [int(i) for part in cut for i in order[slices(part.relative_to(box))].reshape(-1)]
    assert found == list(range(box.volume))


def test_a_box_prints_as_in_tensor_keys() -> None:
    assert str(Box((0, 8), (4, 8))) == "[0:4,8:16]"
    assert whole(()) == Box((), ())
    assert Box((), ()).volume == 1
