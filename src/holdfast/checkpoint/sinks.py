"""Where what is read goes: regions of live tensors, filled from verified bytes of pieces in any order."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

import numpy
import torch

from holdfast.checkpoint.boxes import Box, flat_range_boxes
from holdfast.checkpoint.planner import strides_of
from holdfast.checkpoint.tensors import torch_dtype

if TYPE_CHECKING:
    from numpy.typing import NDArray

_WORDS: dict[int, Any] = {size: numpy.dtype(code) for size, code in ((1, "u1"), (2, "u2"), (4, "u4"), (8, "u8"))}
_WORDS[16] = numpy.dtype("c16")
"""Types of the right size to move elements in; what the elements are does not matter."""


class Sink:
    """A region of a live tensor, of any device, strides and dtype. One thread at a time."""

    def __init__(self, view: torch.Tensor, box: Box, *, dtype: str, itemsize: int) -> None:
        """
        Args:
            view: of shape ``box.lengths``, detached; written in place.
            box: of the global tensor.
            dtype: that is saved; another one than the view's is converted to that.
            itemsize: of `dtype`, in bytes.
        """
        self.box = box
        self._view = view
        self._dtype = torch_dtype(dtype)
        self._itemsize = itemsize
        plain = view.device.type == "cpu" and view.dtype == self._dtype and not view.is_conj() and not view.is_neg()
        self._array = _array(view, itemsize) if plain else None
        self._bytes = None
        if self._array is not None and view.is_contiguous():
            raw: Any = self._array.reshape(-1).view(numpy.uint8)  # numpy's type is no Buffer before Python 3.12
            self._bytes = memoryview(raw)

    def memory(self, start: int, length: int) -> memoryview | None:
        """The memory of bytes of the region in its C order; None where they do not lie so."""
        return None if self._bytes is None else self._bytes[start : start + length]

    def put_bytes(self, start: int, data: memoryview) -> bool:
        """Take bytes of the region in its C order, from byte `start` on; False where it cannot take them so."""
        if self._bytes is None:
            return False
        # By numpy, which lets other threads read and verify meanwhile.
        numpy.asarray(self._bytes)[start : start + len(data)] = numpy.asarray(data)
        return True

    def put(self, box: Box, elements: NDArray[Any]) -> None:
        """Take the elements of a part of the region (of the right item size, whatever their numpy type)."""
        where = tuple(
            slice(o - b, o - b + n) for o, b, n in zip(box.offsets, self.box.offsets, box.lengths, strict=True)
        )
        if self._array is not None:
            self._array[where] = elements
            return
        raw = bytearray(numpy.ascontiguousarray(elements).tobytes())
        fragment = torch.frombuffer(raw, dtype=torch.uint8).view(self._dtype).view(box.lengths)
        with torch.no_grad():
            self._view[where].copy_(fragment)

    def end(self) -> None:
        """All is there: tell autograd that the tensor has changed."""
        if self._array is not None:
            torch.autograd.graph.increment_version(self._view)


def in_place(
    sink: Sink, tile: Box, wanted: Box, *, piece_start: int, data_start: int, length: int, itemsize: int
) -> memoryview | None:
    """The memory that takes a run of bytes as it is; None where it would be cut, or holds anything that is not wanted.

    Args:
        sink, tile, wanted, piece_start, itemsize: as for `scatter`.
        data_start: first byte of the run, from the start of the image.
        length: of the run.
    """
    rows = tile.lengths[1:]
    if not rows == wanted.lengths[1:] == sink.box.lengths[1:] or not tile.lengths:
        return None
    stride = strides_of(tile.lengths, itemsize)[0]
    start = data_start - piece_start - (wanted.offsets[0] - tile.offsets[0]) * stride
    if start < 0 or start + length > wanted.lengths[0] * stride:
        return None
    return sink.memory(start + (wanted.offsets[0] - sink.box.offsets[0]) * stride, length)


def scatter(
    sink: Sink, tile: Box, wanted: Box, *, piece_start: int, data_start: int, data: memoryview, itemsize: int
) -> None:
    """Give a sink what it wants of a run of bytes.

    Args:
        sink: takes it.
        tile: the box of the piece that the bytes are of.
        wanted: the part of it that lies in the sink's box.
        piece_start: first byte of the piece, from the start of the image.
        data_start: first byte of `data`, from the start of the image.
        data: may begin before the piece and end after it, never within an element.
        itemsize: bytes per element.
    """
    low = max(piece_start, data_start)
    high = min(piece_start + tile.volume * itemsize, data_start + len(data))
    if low >= high:
        return
    here = data[low - data_start : high - data_start]
    if wanted == tile == sink.box and sink.put_bytes(low - piece_start, here):
        return
    first = (low - piece_start) // itemsize
    strides = strides_of(tile.lengths, itemsize)
    for flat in flat_range_boxes(tile.lengths, first, (high - piece_start) // itemsize):
        offsets = tuple(o + t for o, t in zip(flat.offsets, tile.offsets, strict=True))
        part = Box(offsets, flat.lengths).intersection(wanted)
        if part is None:
            continue
        begin = sum((o - t) * s for o, t, s in zip(part.offsets, tile.offsets, strides, strict=True))
        elements: NDArray[Any] = numpy.ndarray(
            part.lengths, _WORDS[itemsize], buffer=here, offset=begin - first * itemsize, strides=strides
        )
        sink.put(part, elements)


def _array(view: torch.Tensor, itemsize: int) -> NDArray[Any]:
    """The memory of a CPU tensor of any strides."""
    if not prod(view.shape):
        return numpy.empty(tuple(view.shape), _WORDS[itemsize])
    raw = torch.empty(0, dtype=torch.uint8).set_(view.untyped_storage())
    strides = tuple(stride * itemsize for stride in view.stride())
    return numpy.ndarray(
        tuple(view.shape),
        _WORDS[itemsize],
        buffer=raw.numpy(),
        offset=view.storage_offset() * itemsize,
        strides=strides,
    )
