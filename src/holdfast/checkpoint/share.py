"""What several ranks have written, by column: what the index is made of, put together on the way up the tree of ranks.

A rank's share names its image and lists its pieces. Shares are joined by whoever passes them on: names are looked up
once per share, columns are put one behind the other. So that rank 0 of ten thousand joins sixteen shares and then finds
every tensor's tiling with a few operations on whole columns, whatever the number of pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from itertools import pairwise
from math import prod
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import numpy
import zstandard

from holdfast.checkpoint.boxes import Box
from holdfast.checkpoint.compressed import unpacked
from holdfast.checkpoint.image import piece_rows
from holdfast.checkpoint.index import ImageRecord
from holdfast.checkpoint.tiles import EvenImages, Grid, Tiling, tiling
from holdfast.errors import DECODE_ERRORS, CorruptError, MismatchError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Numbers = NDArray[numpy.int64]

MAX_SHARE_BYTES = 1 << 34
_WHAT = "what a rank says of its pieces"
_INT = numpy.dtype("<i8")
_KEPT = 4
"""States whose pieces are not put together again when they are saved again."""
_FEW = 12
"""Fewer pieces than this are looked at one by one, which is sooner than with columns."""


class _Columns(msgspec.Struct, frozen=True, array_like=True):
    """Pieces of tensors with one number of dimensions; int64, little-endian."""

    tensor: bytes
    """Index into `_Pieces.tensors`."""
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
    """Their own `pieces` are empty: those of all stand together."""
    pieces: bytes
    """zstd of msgpack. The same from save to save while the state is laid out as before: what is made of it is kept."""

    @classmethod
    def of(cls, record: ImageRecord) -> Share:
        """What one image holds.

        Raises:
            CorruptError: its piece table does not parse.
            MismatchError: it holds a tensor as two things.
        """
        try:
            return cls([msgspec.structs.replace(record, pieces=b"")], _pieces_of_one(record.pieces))
        except _Conflict as conflict:
            raise conflict.named(record.name) from conflict

    @classmethod
    def joined(cls, shares: Sequence[Share]) -> Share:
        """One share of all.

        Raises:
            CorruptError: a share's pieces do not parse.
            MismatchError: a tensor has another dtype or shape in one than in another; names it and an image.
        """
        if len(shares) == 1:
            return shares[0]
        images = [image for share in shares for image in share.images]
        try:
            pieces = _pieces_of_all(tuple((share.pieces, len(share.images)) for share in shares))
        except _Conflict as conflict:
            raise conflict.named(images[conflict.image].name) from conflict
        return cls(images, pieces)

    def encode(self) -> bytes:
        """For another rank."""
        return msgspec.msgpack.encode(self)

    @classmethod
    def decode(cls, data: bytes) -> Share:
        """
        Raises:
            CorruptError: `data` is none.
        """
        try:
            return msgspec.msgpack.decode(data, type=cls)
        except DECODE_ERRORS as error:
            raise CorruptError(f"what a rank says of its image does not parse: {error}") from error


def join_shares(said: Sequence[bytes]) -> bytes:
    """One encoded share of several.

    Raises:
        CorruptError: one does not parse.
        MismatchError: they contradict each other.
    """
    return Share.joined([Share.decode(data) for data in said]).encode()


def placed(pieces: bytes, order: Sequence[int]) -> Iterator[Placed]:
    """Every tensor of a share, by name and rank.

    Args:
        pieces: the share's.
        order: the place that each of its images gets, by which `Placed.images` names them.

    Raises:
        CorruptError: `pieces` do not parse.
    """
    share = _Pieces.decode(pieces, len(order))
    place = numpy.array(order, _INT)
    rows: dict[int, tuple[int, slice]] = {}
    columns: dict[int, tuple[Numbers, Numbers, Numbers]] = {}
    for dims, part in share.columns.items():
        tensor, image = _numbers(part.tensor), place[_numbers(part.image)]
        by_tensor = numpy.lexsort((image, tensor))
        edges = numpy.flatnonzero(numpy.diff(tensor[by_tensor], prepend=-1, append=-1))
        starts = tensor[by_tensor][edges[:-1]].tolist()
        for number, (start, end) in zip(starts, pairwise(edges.tolist()), strict=True):
            rows[number] = dims, slice(start, end)
        offsets, lengths = (_numbers(column).reshape(len(tensor), dims) for column in (part.offsets, part.lengths))
        columns[dims] = image[by_tensor], offsets[by_tensor], lengths[by_tensor]
    names = [(tensor.name, -1 if tensor.rank is None else tensor.rank) for tensor in share.tensors]
    for number in sorted(rows, key=names.__getitem__):
        of = share.tensors[number]
        dims, where = rows[number]
        yield Placed(of.name, of.rank, of.dtype, of.shape, *(column[where] for column in columns[dims]))


class _Pieces(msgspec.Struct, frozen=True, array_like=True):
    """Pieces of some images, by column."""

    tensors: list[_Tensor]
    """Each one once."""
    columns: dict[int, _Columns]
    """By number of dimensions."""

    def encode(self) -> bytes:
        return zstandard.compress(msgspec.msgpack.encode(self), 1)

    @classmethod
    def decode(cls, data: bytes, num_images: int) -> _Pieces:
        """
        Raises:
            CorruptError: `data` is none, or speaks of other images.
        """
        try:
            found = msgspec.msgpack.decode(unpacked(data, limit_bytes=MAX_SHARE_BYTES, what=_WHAT), type=cls)
        except DECODE_ERRORS as error:
            raise CorruptError(f"{_WHAT} does not parse: {error}") from error
        if not all(found._is_sound(dims, part, num_images) for dims, part in found.columns.items()):
            raise CorruptError("the columns of what a rank says of its pieces contradict each other")
        return found

    def _is_sound(self, dims: int, part: _Columns, num_images: int) -> bool:
        count = len(part.tensor) // 8
        if not (8 * count == len(part.tensor) == len(part.image)):
            return False
        if not (8 * count * dims == len(part.offsets) == len(part.lengths)):
            return False
        tensor, image = _numbers(part.tensor), _numbers(part.image)
        within = (
            (tensor >= 0).all()
            and (tensor < len(self.tensors)).all()
            and (image >= 0).all()
            and (image < num_images).all()
        )
        return bool(within) and all(len(self.tensors[number].shape) == dims for number in numpy.unique(tensor).tolist())

    def image_of(self, tensor: int) -> int:
        """One that holds some of a tensor."""
        part = self.columns[len(self.tensors[tensor].shape)]
        return int(_numbers(part.image)[numpy.flatnonzero(_numbers(part.tensor) == tensor)[0]])


@lru_cache(_KEPT)
def _pieces_of_one(packed: bytes) -> bytes:
    """Of an image, by its packed table."""
    tensors = _Tensors()
    rows: dict[int, tuple[list[int], list[list[int]], list[list[int]]]] = {}
    for name, rank, dtype, shape, offsets, lengths in piece_rows(packed):
        number = tensors.add(_Tensor(name, rank, dtype, tuple(shape)), lambda: 0)
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
        raise CorruptError("a piece table has numbers beyond 64 bits") from error
    return _Pieces(tensors.listed, columns).encode()


@lru_cache(_KEPT)
def _pieces_of_all(shares: tuple[tuple[bytes, int], ...]) -> bytes:
    """Of several shares, given by their pieces and numbers of images."""
    tensors = _Tensors()
    parts: dict[int, list[_Columns]] = {}
    first = 0
    for data, num_images in shares:
        share = _Pieces.decode(data, num_images)
        numbers = [
            tensors.add(tensor, partial(_holder, share, number, first)) for number, tensor in enumerate(share.tensors)
        ]
        renumbered = numpy.array(numbers, _INT)
        for dims, part in share.columns.items():
            tensor = renumbered[_numbers(part.tensor)].tobytes()
            image = (_numbers(part.image) + first).tobytes()
            parts.setdefault(dims, []).append(_Columns(tensor, image, part.offsets, part.lengths))
        first += num_images
    return _Pieces(tensors.listed, {dims: _one_behind_the_other(of) for dims, of in parts.items()}).encode()


def _holder(share: _Pieces, tensor: int, first: int) -> int:
    return first + share.image_of(tensor)


class _Conflict(Exception):
    """A tensor is two things."""

    def __init__(self, tensor: _Tensor, known: _Tensor, image: int) -> None:
        super().__init__()
        self.image = image
        """One that holds `tensor`."""
        self._tensor, self._known = tensor, known

    def named(self, image: str) -> MismatchError:
        """The error for users."""
        tensor, known = self._tensor, self._known
        return MismatchError(
            f"{tensor.name} is {tensor.dtype}{list(tensor.shape)} in {image}, "
            f"{known.dtype}{list(known.shape)} in another image"
        )


class _Tensors:
    """Tensors by number, each once."""

    def __init__(self) -> None:
        self.listed: list[_Tensor] = []
        self._numbers: dict[tuple[str, int | None], int] = {}

    def add(self, tensor: _Tensor, image: Callable[[], int]) -> int:
        """Its number; `image` gives one that holds it.

        Raises:
            _Conflict: it is known with another dtype or shape.
        """
        number = self._numbers.setdefault((tensor.name, tensor.rank), len(self.listed))
        if number == len(self.listed):
            self.listed.append(tensor)
        elif self.listed[number] != tensor:
            raise _Conflict(tensor, self.listed[number], image())
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
