"""The catalog: all images of a version as one set of tensors, and the one reader over them.

Whatever tier the images lie in, a read is: wanted box ∩ tiles -> pieces of images -> byte ranges -> blocks that match
their checksums -> elements. Where an image fails (a block, its header, its source), the region is taken from the next
image that holds it; only when none is left does the read fail.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from holdfast.checkpoint.boxes import Box, whole
from holdfast.checkpoint.dtypes import itemsize
from holdfast.checkpoint.image import ImageMeta
from holdfast.checkpoint.objects import ObjectRecord, decode_objects
from holdfast.checkpoint.pieces import Piece
from holdfast.checkpoint.planner import Segment, segments, strides_of
from holdfast.checkpoint.tiles import Placement, Tiles
from holdfast.checkpoint.verified import WINDOW_BYTES, OpenImage
from holdfast.checkpoint.version import Version
from holdfast.errors import CorruptError, HoldfastError, MismatchError

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Catalog", "OpenImage", "Saved", "TensorRecord"]


@dataclass(frozen=True)
class TensorRecord:
    """What is saved under a name."""

    dtype: str
    """torch's name without ``torch.``."""
    shape: tuple[int, ...]
    """Of the global tensor; of a per-rank one, that of one rank."""
    per_rank: bool
    """Each rank has a tensor of its own."""


class Saved(NamedTuple):
    """One tensor of the version: of the job (`rank` None) or of one rank."""

    name: str
    rank: int | None
    dtype: str
    shape: tuple[int, ...]
    placement: Placement


class Catalog:
    """All images of a version, by tensor name. One thread at a time; closes its images."""

    def __init__(
        self,
        images: Sequence[OpenImage],
        *,
        saved: Sequence[Saved] | None = None,
        ranks: Sequence[int] | None = None,
        version: Version | None = None,
        world_size: int | None = None,
    ) -> None:
        """
        Args:
            images: of one version; earlier ones are preferred where several hold a region.
            saved: what the index says of the tensors, with images numbered as in `images`; None: every image's header
                is read now and says it.
            ranks: global rank of each image, where `saved` is given.
            version: where `saved` is given.
            world_size: where `saved` is given.

        Raises:
            CorruptError: a header cannot be read, or images contradict each other.
            UsageError: there is no image.
        """
        self._images = tuple(images)
        if saved is None:
            metas = [image.meta for image in self._images]
            version, world_size = _common(self._images, metas)
            ranks = [meta.global_rank for meta in metas]
            saved = _saved_in(self._images, metas)
        assert ranks is not None
        assert version is not None
        assert world_size is not None
        self.version: Version = version
        self.world_size: int = world_size
        """Ranks of the job that saved it."""
        self._ranks = tuple(ranks)
        self._saved = {(entry.name, entry.rank): entry for entry in saved}
        self.tensors: Mapping[str, TensorRecord] = _records(self._saved)
        """By name. Of a per-rank tensor, the lowest rank's."""
        self._offsets: dict[int, dict[tuple[str, int | None, Box], int]] = {}

    @property
    def images(self) -> tuple[OpenImage, ...]:
        """The images, in the order in which `saved` numbers them."""
        return self._images

    @property
    def ranks(self) -> tuple[int, ...]:
        """The rank that each of `images` is of."""
        return self._ranks

    @property
    def saved(self) -> tuple[Saved, ...]:
        """Every tensor of the job and of each rank, and which image holds what of it, by name and rank."""
        return tuple(sorted(self._saved.values(), key=lambda entry: (entry.name, entry.rank or 0)))

    def leave_out(self, name: str, box: Box, images: Collection[int]) -> None:
        """Never read this region of a tensor of the job from these images: others hold it (see `replicas`)."""
        entry = self._saved[name, None]
        kept = [
            (tile, number)
            for tile, number in entry.placement.overlapping(whole(entry.shape))
            if tile != box or number not in images
        ]
        tiles = Tiles(tuple(tile for tile, _ in kept), tuple(number for _, number in kept))
        self._saved[name, None] = entry._replace(placement=Placement(entry.shape, tiles, len(self._images)))

    # --- objects ---

    @property
    def divergence(self) -> tuple[str, ...]:
        """Names of replicated objects whose bytes differ between ranks. Reads the objects of all images.

        Raises:
            CorruptError, StorageError, PeerError: an image's objects cannot be read.
        """
        seen: dict[str, bytes] = {}
        differing: set[str] = set()
        for number in range(len(self._images)):
            for name, record in self._objects_of(number).items():
                if not record.per_rank and seen.setdefault(name, record.data) != record.data:
                    differing.add(name)
        return tuple(sorted(differing))

    def objects(self, rank: int) -> dict[str, bytes]:
        """Encoded objects as rank `rank` of the new world sees them: the replicated ones, and the per-rank ones of old
        rank ``rank % world_size``.

        Raises:
            CorruptError, StorageError, PeerError: they cannot be read from any image.
            MismatchError: no image is of that old rank.
        """
        return {name: record.data for name, record in self.object_records(rank).items()}

    def object_records(self, rank: int) -> dict[str, ObjectRecord]:
        """The same as `objects`, with whether each is of one rank.

        Raises:
            CorruptError, StorageError, PeerError: they cannot be read from any image.
            MismatchError: no image is of that old rank.
        """
        lowest, own = self.object_images(rank)
        mine = self._first_readable(own)
        found = {name: record for name, record in mine.items() if record.per_rank}
        shared = {name: record for name, record in mine.items() if not record.per_rank}
        if lowest not in own:
            # Where replicas differ, every rank must take the same one: the lowest rank's.
            others = [lowest, *own]
            shared |= {n: r for n, r in self._first_readable(others).items() if not r.per_rank}
        return found | shared

    def object_images(self, rank: int) -> tuple[int, list[int]]:
        """Numbers of the images that `objects` looks into: of the lowest rank's, and of those of this one's old rank.

        Raises:
            MismatchError: no image is of that old rank.
        """
        old = rank % self.world_size
        own = [number for number, saved_by in enumerate(self._ranks) if saved_by == old]
        if not own:
            raise MismatchError(
                f"no image of rank {old} of {self.world_size} is there: its own state cannot be restored"
            )
        return min(range(len(self._ranks)), key=self._ranks.__getitem__), own

    def _first_readable(self, numbers: Sequence[int]) -> dict[str, ObjectRecord]:
        failures: list[HoldfastError] = []
        for number in numbers:
            try:
                return self._objects_of(number)
            except HoldfastError as error:
                failures.append(error)
        raise failures[0]

    def _objects_of(self, number: int) -> dict[str, ObjectRecord]:
        image = self._images[number]
        return decode_objects(image.objects_blob()) if image.meta.objects_bytes else {}

    # --- tensors ---

    def tensor(self, name: str, *, rank: int | None = None) -> TensorRecord:
        """The record as rank `rank` sees it: per-rank tensors may have another shape on each rank.

        Raises:
            MismatchError: nothing is saved under the name for that rank.
        """
        entry = self._entry(name, rank)
        return TensorRecord(entry.dtype, entry.shape, entry.rank is not None)

    def boxes(self, name: str, *, rank: int | None = None) -> tuple[Box, ...]:
        """The boxes in which the tensor is saved, repeated where several images hold one.

        Raises:
            MismatchError: nothing is saved under the name.
        """
        entry = self._entry(name, rank)
        return tuple(tile for tile, _ in entry.placement.overlapping(whole(entry.shape)))

    def tiles(self, name: str, box: Box, *, rank: int | None = None) -> Iterator[tuple[Box, int]]:
        """The tiles of a tensor (`rank`: as in `read`) that hold a part of `box`, and the image that each lies in.

        Raises:
            MismatchError: nothing is saved under the name.
        """
        return self._entry(name, rank).placement.overlapping(box)

    def missing(self, name: str, box: Box, *, rank: int | None = None) -> tuple[Box, ...]:
        """The parts of `box` that no image holds.

        Raises:
            MismatchError: nothing is saved under the name.
        """
        return self._entry(name, rank).placement.missing(box)

    def piece_start(self, name: str, tile: Box, number: int, *, rank: int | None = None) -> int:
        """First byte of a tile, from the start of its image.

        Raises:
            CorruptError: the image does not hold it, or as something else.
            MismatchError: nothing is saved under the name.
        """
        return self._piece_offset(self._entry(name, rank), tile, number)

    def check_complete(self) -> None:
        """Check that every element of every tensor lies in some image.

        Raises:
            MismatchError: a region lies in none; names it.
        """
        for entry in self._saved.values():
            missing = entry.placement.missing(whole(entry.shape))
            if missing:
                raise MismatchError(f"no image holds {_label(entry)}{missing[0]}")

    def read(self, name: str, box: Box, out: Any, *, rank: int | None = None) -> None:
        """Read a region of a tensor into a buffer.

        Args:
            name: of the tensor.
            box: the region, within its shape.
            out: writable, C-contiguous, exactly the bytes of the box (C order). On an error its content is undefined.
                Any: whatever has the buffer protocol.
            rank: of a per-rank tensor: that of old rank ``rank % world_size`` is read; None reads that of the lowest.

        Raises:
            MismatchError: nothing is saved under the name, the region is not within the tensor, or no image holds it.
            CorruptError: it is saved, but no image gives it intact; names tensor, file and block.
            StorageError, PeerError: it is saved, but the last source that holds it does not give it.
            ValueError: `out` has another size.
        """
        entry = self._entry(name, rank)
        if len(box.offsets) != len(entry.shape) or not whole(entry.shape).contains(box):
            raise MismatchError(f"{name}{box} is not within the saved shape {entry.shape}")
        size = itemsize(entry.dtype)
        buffer = memoryview(out).cast("B") if box.volume else memoryview(b"")
        if len(buffer) != box.volume * size:
            raise ValueError(f"{name}{box} takes {box.volume * size} bytes, the buffer has {len(buffer)}")
        if box.volume:
            self._fill(entry, box, _Target(buffer, box, size))

    def verify(self) -> None:
        """Read every block of every image once.

        Raises:
            CorruptError, StorageError, PeerError: the first thing that is not as it should be.
        """
        for image in self._images:
            image.verify()

    def close(self) -> None:
        """Close all images."""
        for image in self._images:
            image.close()

    def __enter__(self) -> Catalog:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _entry(self, name: str, rank: int | None) -> Saved:
        entry = self._saved.get((name, None))
        if entry is not None:
            return entry
        if name not in self.tensors:
            raise MismatchError(f"no tensor {name!r} is saved")
        if rank is None:
            rank = min(saved_by for saved, saved_by in self._saved if saved == name and saved_by is not None)
        entry = self._saved.get((name, rank % self.world_size))
        if entry is None:
            raise MismatchError(f"no tensor {name!r} of rank {rank % self.world_size} is saved")
        return entry

    def _fill(self, entry: Saved, box: Box, target: _Target) -> None:
        if entry.placement.only is not None:
            # One tile, so one place to read from; there is no other that could stand in for it.
            tile, number = entry.placement.only
            try:
                self._copy(entry, tile, number, box, target)
            except HoldfastError as error:
                raise type(error)(f"{_label(entry)}{box} cannot be read: {error}") from error
            return
        rest = [box]
        failures: list[HoldfastError] = []
        for tile, number in entry.placement.overlapping(box):
            left: list[Box] = []
            for part in rest:
                hit = part.intersection(tile)
                if hit is None:
                    left.append(part)
                    continue
                try:
                    self._copy(entry, tile, number, hit, target)
                except HoldfastError as error:
                    # This region is taken from the next image that holds it; the error is raised if there is none.
                    failures.append(error)
                    left.append(part)
                else:
                    left.extend(part.minus(hit))
            rest = left
            if not rest:
                return
        if not rest:
            return
        region = f"{_label(entry)}{rest[0]}"
        if failures:
            raise type(failures[0])(f"{region} cannot be read: {failures[0]}") from failures[0]
        raise MismatchError(f"no image holds {region}")

    def _copy(self, entry: Saved, tile: Box, number: int, wanted: Box, target: _Target) -> None:
        image = self._images[number]
        offset = self._piece_offset(entry, tile, number)
        size = itemsize(entry.dtype)
        if wanted == tile and target.is_of(tile):
            target.put_all(image.windows(offset, tile.volume * size))
            return
        strides = strides_of(tile.lengths, size)
        plan = segments(
            tile,
            wanted,
            piece_offset=offset,
            itemsize=size,
            max_gap=image.meta.block_bytes,
            max_bytes=WINDOW_BYTES,
        )
        for segment in plan:
            if segment.length == segment.box.volume * size and target.holds_in_a_row(segment.box):
                target.put_row(segment, image.windows(segment.start, segment.length))
            else:
                target.put(segment, image.range(segment.start, segment.length), strides)

    def _piece_offset(self, entry: Saved, tile: Box, number: int) -> int:
        table = self._offsets.get(number)
        if table is None:
            meta = self._images[number].meta
            table = {
                (piece.name, piece.rank, piece.box): start
                for piece, start in zip(meta.pieces, meta.piece_offsets, strict=True)
                if not piece.box.is_empty
            }
            self._check_types(number, meta)
            self._offsets[number] = table
        start = table.get((entry.name, entry.rank, tile))
        if start is None:
            raise CorruptError(f"{self._images[number].name} does not hold {_label(entry)}{tile}, as the index says")
        return start

    def _check_types(self, number: int, meta: ImageMeta) -> None:
        for piece in meta.pieces:
            entry = self._saved.get((piece.name, piece.rank))
            if entry is not None and (entry.dtype, entry.shape) != (piece.dtype, piece.shape):
                raise CorruptError(
                    f"{self._images[number].name} holds {piece.name} as {piece.dtype}{list(piece.shape)}, "
                    f"the index or another image as {entry.dtype}{list(entry.shape)}"
                )


class _Target:
    """The reader's buffer, which takes elements of one box."""

    def __init__(self, buffer: memoryview, box: Box, size: int) -> None:
        self._buffer = buffer
        self._box = box
        self._itemsize = size

    @cached_property
    def _strides(self) -> tuple[int, ...]:
        return strides_of(self._box.lengths, self._itemsize)

    def _start(self, box: Box) -> int:
        return sum((o - b) * s for o, b, s in zip(box.offsets, self._box.offsets, self._strides, strict=True))

    def is_of(self, box: Box) -> bool:
        """Whether exactly the elements of `box` are wanted."""
        return self._box == box

    def put_all(self, windows: Iterator[memoryview]) -> None:
        """Take the bytes of all elements."""
        start = 0
        for window in windows:
            self._buffer[start : start + len(window)] = window
            start += len(window)

    def holds_in_a_row(self, box: Box) -> bool:
        """Whether the elements of `box` have no others between them here."""
        span = self._itemsize
        for n, stride in zip(reversed(box.lengths), reversed(self._strides), strict=True):
            if n > 1:
                if stride != span:
                    return False
                span += (n - 1) * stride
        return True

    def put_row(self, segment: Segment, windows: Iterator[memoryview]) -> None:
        """Take contiguous bytes."""
        start = self._start(segment.box)
        for window in windows:
            self._buffer[start : start + len(window)] = window
            start += len(window)

    def put(self, segment: Segment, data: memoryview, strides: tuple[int, ...]) -> None:
        """Take the elements of a segment out of its range of bytes, in which they lie `strides` bytes apart."""
        import numpy

        dtype = numpy.dtype(f"V{self._itemsize}")
        lengths = segment.box.lengths
        source: NDArray[Any] = numpy.ndarray(lengths, dtype, buffer=data, strides=strides)
        here: NDArray[Any] = numpy.ndarray(
            lengths, dtype, buffer=self._buffer, offset=self._start(segment.box), strides=self._strides
        )
        here[...] = source


def _label(entry: Saved) -> str:
    return entry.name if entry.rank is None else f"{entry.name}@rank{entry.rank}"


def _common(images: Sequence[OpenImage], metas: Sequence[ImageMeta]) -> tuple[Version, int]:
    if not metas:
        raise MismatchError("there is no image to read from")
    for image, meta in zip(images, metas, strict=True):
        if (meta.version, meta.world_size) != (metas[0].version, metas[0].world_size):
            raise CorruptError(
                f"images of different versions: {images[0].name} is of {metas[0].version} "
                f"({metas[0].world_size} ranks), {image.name} of {meta.version} ({meta.world_size} ranks)"
            )
    return metas[0].version, metas[0].world_size


def _saved_in(images: Sequence[OpenImage], metas: Sequence[ImageMeta]) -> list[Saved]:
    """What the headers of all images say together."""
    first: dict[tuple[str, int | None], Piece] = {}
    tiles: dict[tuple[str, int | None], tuple[list[Box], list[int]]] = {}
    for number, meta in enumerate(metas):
        for piece in meta.pieces:
            key = (piece.name, piece.rank)
            known = first.setdefault(key, piece)
            if (known.dtype, known.shape) != (piece.dtype, piece.shape):
                raise CorruptError(
                    f"images contradict each other: {images[number].name} holds {piece.name} as "
                    f"{piece.dtype}{list(piece.shape)}, another as {known.dtype}{list(known.shape)}"
                )
            boxes, numbers = tiles.setdefault(key, ([], []))
            boxes.append(piece.box)
            numbers.append(number)
    return [
        Saved(name, rank, piece.dtype, piece.shape, Placement(piece.shape, _tiles(tiles[name, rank]), len(images)))
        for (name, rank), piece in first.items()
    ]


def _tiles(placed: tuple[list[Box], list[int]]) -> Tiles:
    return Tiles(tuple(placed[0]), tuple(placed[1]))


def _records(saved: Mapping[tuple[str, int | None], Saved]) -> dict[str, TensorRecord]:
    records: dict[str, TensorRecord] = {}
    for (name, rank), entry in sorted(saved.items(), key=lambda item: (item[0][0], item[0][1] or 0)):
        records.setdefault(name, TensorRecord(entry.dtype, entry.shape, rank is not None))
    return records
