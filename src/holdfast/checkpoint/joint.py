"""A checkpoint that all ranks read together: each byte is read from storage once in the job.

1. One rank of each host reads root and index, and hands them to the others there (`holdfast.checkpoint.hostwide`).
2. Ranks tell each other of which images they want something; each header is read by one of those that want it.
3. Every rank works out which blocks it wants (planner) and tells the others; each run of blocks is read and verified by
   one of the ranks that want it, which hands it on (`holdfast.checkpoint.handing`).
4. Bytes go straight into the tensors. Beyond these a rank needs a few units of 8 MiB.

Ranks tell each other through the process group's store (`Meeting`); images' bytes are looked at where they were read,
or go over sockets of their own to other hosts; there is no collective call. An error of any rank is raised by all, with
its number.
"""

from __future__ import annotations

import logging
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import msgspec
import torch

from holdfast.checkpoint.boxes import Box, whole
from holdfast.checkpoint.catalog import Catalog
from holdfast.checkpoint.commit import catalog_of
from holdfast.checkpoint.dtypes import itemsize
from holdfast.checkpoint.handing import Handing, Post, Tagger, digest, own_address
from holdfast.checkpoint.hostwide import HostRead, host_name
from holdfast.checkpoint.index import decode_index
from holdfast.checkpoint.meeting import Meeting, Ranks
from holdfast.checkpoint.sinks import Sink, in_place, scatter
from holdfast.checkpoint.wants import HEADER, Unit, Wants, blocks_wanted, header_units, merged, units
from holdfast.errors import HoldfastError

logger = logging.getLogger(__name__)


class Want(NamedTuple):
    """A region of a saved tensor, and where it goes."""

    name: str
    sink: Sink
    rank: int | None = None
    """Of a per-rank tensor: the old rank whose it is, as in `Catalog.read`."""


class _Pull(NamedTuple):
    """A part of a piece that goes into a sink."""

    name: str
    """That is saved."""
    start: int
    """First byte of the piece, from the start of its image."""
    end: int
    tile: Box
    wanted: Box
    itemsize: int
    sink: Sink


@dataclass
class _OfImage:
    """What this rank wants of one image, by place in it."""

    pulls: list[_Pull]
    starts: list[int]
    ends: list[int]

    @classmethod
    def of(cls, pulls: list[_Pull]) -> _OfImage:
        pulls.sort(key=lambda pull: pull.start)
        return cls(pulls, [pull.start for pull in pulls], [pull.end for pull in pulls])

    def within(self, start: int, end: int) -> Sequence[_Pull]:
        """Those of which a part lies in these bytes."""
        return self.pulls[bisect_right(self.ends, start) : bisect_left(self.starts, end)]


class JointReading:
    """One reading as one rank sees it; a context. Every rank makes the same calls in the same order, from one thread.

    What is raised within the context is raised by all ranks.
    """

    def __init__(
        self,
        path: str | Path,
        ranks: Ranks,
        *,
        name: str,
        what: str,
        timeout: timedelta,
        more: Callable[[Catalog], bytes] | None = None,
        tagger: Tagger | None = None,
    ) -> None:
        """
        Args:
            path: of the checkpoint.
            ranks: who read it.
            name: the same on all ranks, another one each time.
            what: for messages: "the load".
            timeout: how long to wait for the slowest rank.
            more: what else one rank of each host reads for all there.
            tagger: guards what is sent between hosts; the same on all ranks. None: a digest.
        """
        self._path = path
        self._ranks = ranks
        self._name = name
        self._timeout = timeout
        self._read_more = more
        self._tagger = tagger or digest
        self._meeting = Meeting(ranks, name, what=f"{path}: {what}", timeout=timeout)
        self._catalog: Catalog | None = None
        self._post: Post | None = None
        self._handing: Handing | None = None
        self._has_met = False
        """Whether the others' addresses are known."""
        self._wanted: dict[int, _OfImage] = {}
        self.more = b""

    def __enter__(self) -> Self:
        try:
            self._open()
        except Exception as error:  # the other ranks learn of it here, ours by the raise
            self._leave(error)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._leave(error)

    def _open(self) -> None:
        read = HostRead.get(self._path, self._ranks, name=self._name, timeout=self._timeout, more=self._read_more)
        self.more = read.more
        self._catalog = catalog_of(self._path, decode_index(read.index))
        if self._ranks.world_size > 1:
            self._post = Post(self._ranks.rank, own_address(self._ranks.store), host_name(), self._tagger)
        self._handing = Handing(
            self._ranks.rank,
            self._post,
            read=self._read,
            will_read=self._will_read,
            take=self._take,
            check=self._meeting.check,
            timeout=self._timeout,
        )

    def _leave(self, error: BaseException | None) -> None:
        if isinstance(error, Exception):
            self._meeting.alarm(error)
        if self._catalog is not None:
            self._catalog.close()
        if self._post is not None:
            self._post.close()

    @property
    def catalog(self) -> Catalog:
        """The checkpoint. Headers of images and objects that were not handed on are read when they are looked at."""
        assert self._catalog is not None
        return self._catalog

    def objects(self, images: Iterable[int]) -> None:
        """Have the objects of some images (by number; other ranks may want others, or none) read once, for the catalog.

        Raises:
            CorruptError, StorageError: they cannot be read.
            PeerTimeout, PeerError: another rank.
        """
        wanted = {image for image in images if not self.catalog.images[image].has_objects}
        self._meet_headers(wanted)
        blobs: dict[int, torch.Tensor] = {}
        pulls: dict[int, list[_Pull]] = {}
        for image in wanted:
            meta = self.catalog.images[image].meta
            if meta.objects_bytes:
                blobs[image] = torch.empty(meta.objects_bytes, dtype=torch.uint8)
                box = whole((meta.objects_bytes,))
                sink = Sink(blobs[image], box, dtype="uint8", itemsize=1)
                start, end = meta.objects_offset, meta.objects_offset + meta.objects_bytes
                pulls[image] = [_Pull("the objects", start, end, box, box, 1, sink)]
        self._pull(pulls)
        for image, blob in blobs.items():
            raw: Any = blob.numpy()  # numpy's type is no Buffer before Python 3.12
            self.catalog.images[image].adopt_objects(memoryview(raw))

    def fill(self, wants: Sequence[Want]) -> None:
        """Read what is wanted, hand on what others want too; returns when all ranks have what they want.

        Raises:
            CorruptError, StorageError: it cannot be read; some sinks are filled by then.
            MismatchError: it is not saved.
            PeerTimeout, PeerError: another rank.
        """
        images: set[int] = set()
        for want in wants:
            images.update(number for _, number in self.catalog.tiles(want.name, want.sink.box, rank=want.rank))
        self._meet_headers(images)
        pulls: dict[int, list[_Pull]] = {image: [] for image in images}
        for want in wants:
            self._plan(want, pulls)
        self._pull(pulls)
        for want in wants:
            want.sink.end()
        self._meeting.gather(b"")  # nobody leaves while others may still ask
        assert self._handing is not None
        logger.debug(
            "%s: rank %d read %d bytes and was handed %d",
            self._path, self._ranks.rank, self._handing.bytes_read, self._handing.bytes_received,
        )  # fmt: skip

    # --- inside

    def _plan(self, want: Want, pulls: Mapping[int, list[_Pull]]) -> None:
        name, sink, rank = want
        size = itemsize(self.catalog.tensor(name, rank=rank).dtype)
        for tile, image in self.catalog.tiles(name, sink.box, rank=rank):
            wanted = tile.intersection(sink.box)
            assert wanted is not None
            start = self.catalog.piece_start(name, tile, image, rank=rank)
            pulls[image].append(_Pull(name, start, start + tile.volume * size, tile, wanted, size, sink))

    def _meet_headers(self, images: Collection[int]) -> None:
        """Tell which images are wanted; have their headers read, each by one rank."""
        unknown = sorted(image for image in images if not self.catalog.images[image].is_known)
        endpoint = b"" if self._post is None or self._has_met else self._post.endpoint
        said = self._meeting.gather(msgspec.msgpack.encode((endpoint, unknown)))
        told = [msgspec.msgpack.decode(data, type=tuple[bytes, list[int]]) for data in said]
        if self._post is not None and not self._has_met:
            self._post.know([endpoint for endpoint, _ in told])
            self._has_met = True
        assert self._handing is not None
        self._handing.run(header_units({rank: of_rank for rank, (_, of_rank) in enumerate(told)}, self._ranks.rank))

    def _pull(self, pulls: Mapping[int, list[_Pull]]) -> None:
        """Tell which blocks are wanted; have each read by one rank."""
        self._wanted = {image: _OfImage.of(of_image) for image, of_image in pulls.items()}
        images = sorted(pulls)
        mine = Wants(images, [[edge for run in self._runs(image, pulls[image]) for edge in run] for image in images])
        told = [msgspec.msgpack.decode(data, type=Wants) for data in self._meeting.gather(msgspec.msgpack.encode(mine))]
        by_image: dict[int, dict[int, Sequence[tuple[int, int]]]] = {image: {} for image in images}
        for rank, wants in enumerate(told):
            for image, of_image in wants.by_image():
                if image in by_image:
                    by_image[image][rank] = of_image
        assert self._handing is not None
        self._handing.run(
            unit
            for image, of_ranks in by_image.items()
            for unit in units(
                image, of_ranks, self._ranks.rank, block_bytes=self.catalog.images[image].meta.block_bytes
            )
        )

    def _runs(self, image: int, pulls: Sequence[_Pull]) -> list[tuple[int, int]]:
        meta = self.catalog.images[image].meta
        runs: list[tuple[int, int]] = []
        for pull in pulls:
            runs += blocks_wanted(meta, pull.tile, pull.wanted, start=pull.start, itemsize=pull.itemsize)
        return merged(runs)

    def _read(self, unit: Unit, memory: memoryview) -> memoryview:
        """For reading threads."""
        image = self.catalog.images[unit.image]
        if unit.first == HEADER:
            return image.header()
        with self._named(unit):
            return image.blocks(unit.first, unit.end, self._place(unit) or memory)

    @contextmanager
    def _named(self, unit: Unit) -> Iterator[None]:
        """Errors say which tensor it is about."""
        try:
            yield
        except HoldfastError as error:
            block_bytes = self.catalog.images[unit.image].meta.block_bytes
            pull = next(iter(self._within(unit, (unit.end - unit.first) * block_bytes)))
            raise type(error)(f"{pull.name}{pull.wanted} cannot be read: {error}") from error

    def _will_read(self, unit: Unit) -> None:
        """For reading threads."""
        if unit.first != HEADER:
            self.catalog.images[unit.image].will_read(unit.first, unit.end)

    def _place(self, unit: Unit) -> memoryview | None:
        """The memory of a tensor of this rank that takes the unit as it is, where no other rank wants it."""
        if len(unit.wanters) > 1:
            return None
        start, length = self.catalog.images[unit.image].extent(unit.first, unit.end)
        pulls = self._within(unit, length)
        if len(pulls) != 1:
            return None
        pull = pulls[0]
        return in_place(
            pull.sink,
            pull.tile,
            pull.wanted,
            piece_start=pull.start,
            data_start=start,
            length=length,
            itemsize=pull.itemsize,
        )

    def _within(self, unit: Unit, length: int) -> Sequence[_Pull]:
        meta = self.catalog.images[unit.image].meta
        start = meta.data_start + unit.first * meta.block_bytes
        return self._wanted[unit.image].within(start, start + length)

    def _take(self, unit: Unit, data: memoryview) -> None:
        image = self.catalog.images[unit.image]
        if unit.first == HEADER:
            image.adopt(data)
            return
        place = self._place(unit)
        if place is not None and data.obj is place.obj:
            return  # it was read there
        start = image.meta.data_start + unit.first * image.meta.block_bytes
        for pull in self._within(unit, len(data)):
            scatter(
                pull.sink,
                pull.tile,
                pull.wanted,
                piece_start=pull.start,
                data_start=start,
                data=data,
                itemsize=pull.itemsize,
            )
