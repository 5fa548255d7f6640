"""What several ranks have written, by column: what the index is made of, put together on the way up the tree of ranks.

A rank's share names its image and lists its pieces. Shares are joined by whoever passes them on: names are looked up
once per share, columns are put one behind the other. So that rank 0 of ten thousand joins sixteen shares and then finds
every tensor's tiling with a few operations on whole columns, whatever the number of pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from math import prod
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import numpy
import zstandard

from holdfast.checkpoint.boxes import Box
from holdfast.checkpoint.image import piece_rows
from holdfast.checkpoint.index import ImageRecord
from holdfast.checkpoint.tiles import EvenImages, Grid, Tiling, tiling
from holdfast.errors import CorruptError, MismatchError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Numbers = NDArray[numpy.int64]

MAX_SHARE_BYTES = 1 << 34
_INT = numpy.dtype("<i8")
_FEW = 12
"""Fewer pieces than this are looked at one by one, which is sooner than with columns."""


class _Columns(msgspec.Struct, frozen=True, array_like=True):
    """Pieces of tensors with one number of dimensions; int64, little-endian."""

    tensor: bytes
    """Index into `Share.tensors`."""
    image: bytes
    """Index into `Share.images`."""
    offsets: bytes
    """One row for each piece."""
    lengths: bytes


class _Tensor(msgspec.Struct, frozen=True, array_like=True):
    name: str
    rank: int | None
    dtype: str
    shape: tuple[int, ...]


class Placed(NamedTuple):
    """All pieces of one tensor, in the order of their images."""

    name: str
    rank: int | None
    dtype: str
    shape: tuple[int, ...]
    images: Numbers
    offsets: Numbers
    """(pieces, dimensions)."""
    lengths: Numbers

    def tiling(self) -> Tiling:
        """The shortest description of them.

        The same box in two images (a lost rank's share written by another) is taken from the first. A box within a
        larger one is left out: a rank that could not know whether others hold a tensor writes the whole of it, beside
        their parts.
        """
        grid = _grid(self) if len(self.images) > _FEW else None
        if grid is not None:
            return grid
        first: dict[Box, int] = {}
        rows = zip(self.offsets.tolist(), self.lengths.tolist(), self.images.tolist(), strict=True)
        for offsets, lengths, image in rows:
            first.setdefault(Box(tuple(offsets), tuple(lengths)), image)
        boxes = outermost(self.shape, list(first))
        return tiling(self.shape, boxes, [first[box] for box in boxes])


class Share(msgspec.Struct, frozen=True, array_like=True):
    """The images of some ranks, and all their pieces."""

    images: list[ImageRecord]
    """Their `pieces` are empty: they stand in the columns."""
    tensors: list[_Tensor]
    """Each one once."""
    columns: dict[int, _Columns]
    """By number of dimensions."""

    @classmethod
    def of(cls, record: ImageRecord) -> Share:
        """What one image holds.

        Raises:
            CorruptError: its piece table does not parse.
            MismatchError: it holds a tensor as two things.
        """
        tensors = _Tensors()
        rows: dict[int, tuple[list[int], list[list[int]], list[list[int]]]] = {}
        for name, rank, dtype, shape, offsets, lengths in piece_rows(record.pieces):
            number = tensors.add(_Tensor(name, rank, dtype, tuple(shape)), lambda: record.name)
            at, starts, sizes = rows.setdefault(len(shape), ([], [], []))
            at.append(number)
            starts.append(offsets)
            sizes.append(lengths)
        try:
            columns = {
                dims: _Columns(_packed(at), bytes(8 * len(at)), _packed(starts), _packed(sizes))
                for dims, (at, starts, sizes) in rows.items()
            }
        except OverflowError as error:
            raise CorruptError(f"{record.name}: its piece table has numbers beyond 64 bits") from error
        return cls([msgspec.structs.replace(record, pieces=b"")], tensors.listed, columns)

    @classmethod
    def joined(cls, shares: Sequence[Share]) -> Share:
        """One share of all.

        Raises:
            MismatchError: a tensor has another dtype or shape in one than in another; names it and an image.
        """
        if len(shares) == 1:
            return shares[0]
        tensors = _Tensors()
        images: list[ImageRecord] = []
        parts: dict[int, list[_Columns]] = {}
        for share in shares:
            numbers = [
                tensors.add(tensor, partial(share._image_of, number)) for number, tensor in enumerate(share.tensors)
            ]
            renumbered = numpy.array(numbers, _INT)
            for dims, part in share.columns.items():
                tensor = renumbered[_numbers(part.tensor)].tobytes()
                image = (_numbers(part.image) + len(images)).tobytes()
                parts.setdefault(dims, []).append(_Columns(tensor, image, part.offsets, part.lengths))
            images += share.images
        columns = {dims: _one_behind_the_other(of_dims) for dims, of_dims in parts.items()}
        return cls(images, tensors.listed, columns)

    def encode(self) -> bytes:
        """For another rank."""
        return zstandard.compress(msgspec.msgpack.encode(self), 1)

    @classmethod
    def decode(cls, data: bytes) -> Share:
        """
        Raises:
            CorruptError: `data` is none.
        """
        try:
            size = zstandard.frame_content_size(data)
            if not 0 <= size <= MAX_SHARE_BYTES:
                raise CorruptError(f"a share of {size} bytes")
            share = msgspec.msgpack.decode(zstandard.decompress(data, max_output_size=size), type=cls)
        except (msgspec.MsgspecError, zstandard.ZstdError) as error:
            raise CorruptError(f"what a rank says of its image does not parse: {error}") from error
        if not all(share._is_sound(dims, part) for dims, part in share.columns.items()):
            raise CorruptError("the columns of what a rank says of its image contradict each other")
        return share

    def placed(self) -> Iterator[Placed]:
        """Every tensor, by name and rank, with `Placed.images` counted in the order of the images' ranks and names."""
        order = sorted(range(len(self.images)), key=lambda i: (self.images[i].global_rank, self.images[i].name))
        place = numpy.empty(len(order), _INT)
        place[order] = numpy.arange(len(order))
        rows: dict[int, tuple[int, slice]] = {}
        sorted_columns: dict[int, tuple[Numbers, Numbers, Numbers]] = {}
        for dims, part in self.columns.items():
            tensor, image = _numbers(part.tensor), place[_numbers(part.image)]
            by_tensor = numpy.lexsort((image, tensor))
            edges = numpy.flatnonzero(numpy.diff(tensor[by_tensor], prepend=-1, append=-1))
            starts = tensor[by_tensor][edges[:-1]].tolist()
            for number, (start, end) in zip(starts, pairwise(edges.tolist()), strict=True):
                rows[number] = dims, slice(start, end)
            offsets, lengths = (
                _numbers(column).reshape(len(tensor), dims)[by_tensor] for column in (part.offsets, part.lengths)
            )
            sorted_columns[dims] = image[by_tensor], offsets, lengths
        names = [(tensor.name, -1 if tensor.rank is None else tensor.rank) for tensor in self.tensors]
        for number in sorted(range(len(names)), key=names.__getitem__):
            dims, piece_rows = rows[number]
            tensor_ = self.tensors[number]
            columns = (column[piece_rows] for column in sorted_columns[dims])
            yield Placed(tensor_.name, tensor_.rank, tensor_.dtype, tensor_.shape, *columns)

    def _image_of(self, tensor: int) -> str:
        part = self.columns[len(self.tensors[tensor].shape)]
        row = int(numpy.flatnonzero(_numbers(part.tensor) == tensor)[0])
        return self.images[int(_numbers(part.image)[row])].name

    def _is_sound(self, dims: int, part: _Columns) -> bool:
        count = len(part.tensor) // 8
        if not (8 * count == len(part.tensor) == len(part.image)):
            return False
        if not (8 * count * dims == len(part.offsets) == len(part.lengths)):
            return False
        tensor, image = _numbers(part.tensor), _numbers(part.image)
        used = [self.tensors[number] for number in numpy.unique(tensor).tolist() if 0 <= number < len(self.tensors)]
        return (
            all(len(of.shape) == dims for of in used)
            and bool((tensor >= 0).all() and (tensor < len(self.tensors)).all())
            and bool((image >= 0).all() and (image < len(self.images)).all())
        )


def join_shares(said: Sequence[bytes]) -> bytes:
    """One encoded share of several.

    Raises:
        CorruptError: one does not parse.
        MismatchError: they contradict each other.
    """
    return Share.joined([Share.decode(data) for data in said]).encode()


class _Tensors:
    """Tensors by number, each once."""

    def __init__(self) -> None:
        self.listed: list[_Tensor] = []
        self._numbers: dict[tuple[str, int | None], int] = {}

    def add(self, tensor: _Tensor, image: Callable[[], str]) -> int:
        """Its number; `image` names one that holds it, for the error.

        Raises:
            MismatchError: it is known with another dtype or shape.
        """
        number = self._numbers.setdefault((tensor.name, tensor.rank), len(self.listed))
        if number == len(self.listed):
            self.listed.append(tensor)
        elif (known := self.listed[number]) != tensor:
            raise MismatchError(
                f"{tensor.name} is {tensor.dtype}{list(tensor.shape)} in {image()}, "
                f"{known.dtype}{list(known.shape)} in another image"
            )
        return number


def outermost(shape: tuple[int, ...], boxes: list[Box]) -> list[Box]:
    """Boxes of a tensor, each given once, less those within a larger one."""
    if sum(box.volume for box in boxes) <= prod(shape):
        return boxes
    return [box for box in boxes if not any(other != box and other.contains(box) for other in boxes)]


def _grid(tensor: Placed) -> Grid | None:
    """The same grid that `tiling` finds, with operations on whole columns."""
    count, dims = tensor.offsets.shape
    if 0 in tensor.shape or not dims:
        return None
    cell = numpy.zeros(count, _INT)
    axes: list[int | tuple[int, ...]] = []
    cells = 1
    for dim, size in enumerate(tensor.shape):
        starts, index = numpy.unique(tensor.offsets[:, dim], return_inverse=True)
        sizes = numpy.diff(starts, append=size)
        if starts[0] != 0 or not (tensor.lengths[:, dim] == sizes[index]).all():
            return None
        cell = cell * len(starts) + index
        cells *= len(starts)
        is_even = (sizes[:-1] == sizes[0]).all() and sizes[-1] <= sizes[0]
        axes.append(int(sizes[0]) if is_even else tuple(starts[1:].tolist()))
    if cells != count:
        return None
    images = numpy.full(count, -1, _INT)
    images[cell] = tensor.images
    if (images < 0).any():  # a cell twice, so another one not at all
        return None
    steps = numpy.diff(images)
    spaced = (steps == steps[0]).all()
    return Grid(tuple(axes), EvenImages(int(images[0]), int(steps[0])) if spaced else tuple(images.tolist()))


def _one_behind_the_other(parts: Sequence[_Columns]) -> _Columns:
    return _Columns(
        b"".join(part.tensor for part in parts),
        b"".join(part.image for part in parts),
        b"".join(part.offsets for part in parts),
        b"".join(part.lengths for part in parts),
    )


def _packed(rows: Sequence[int] | Sequence[Sequence[int]]) -> bytes:
    return numpy.array(rows, _INT).tobytes()


def _numbers(column: bytes) -> Numbers:
    return numpy.frombuffer(column, _INT)
