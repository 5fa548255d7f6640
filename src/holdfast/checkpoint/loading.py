"""`load`: a checkpoint into a state, by all ranks together, each byte read from storage once in the job.

1. One rank of each host reads root, index and the tree of the state, and hands them to the others there.
2. Every rank compares its state with them, and tells all others of which images it wants something; each header is read
   by one of the ranks that want it.
3. Every rank works out which blocks it wants (planner) and tells the others; each run of blocks is read and verified by
   one of the ranks that want it, which hands it on (`holdfast.checkpoint.handing`).
4. Bytes go straight into the tensors. Beyond these a rank needs a few units of 4 MiB.

Ranks tell each other through the process group's store (`Meeting`); images' bytes are looked at where they were read,
or go over sockets of their own to other hosts; there is no collective call. An error of any rank is raised by all, with
its number.
"""

from __future__ import annotations

import logging
import socket
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import msgspec
import xxhash

from holdfast.checkpoint.boxes import Box
from holdfast.checkpoint.catalog import Catalog
from holdfast.checkpoint.commit import catalog_of, read_index
from holdfast.checkpoint.dtypes import itemsize
from holdfast.checkpoint.handing import Handing, Post, own_address
from holdfast.checkpoint.held import Held, StateTensor, hold
from holdfast.checkpoint.index import decode_index, encode_index
from holdfast.checkpoint.meeting import Meeting, Ranks, await_key, store_errors
from holdfast.checkpoint.objects import decode, join_tensors
from holdfast.checkpoint.pairing import pair
from holdfast.checkpoint.sinks import Sink, scatter
from holdfast.checkpoint.wants import HEADER, Unit, Wants, blocks_wanted, header_units, merged, units
from holdfast.errors import HoldfastError, MismatchError, PeerError

logger = logging.getLogger(__name__)

TREE = "state"
"""The object that holds the state, with `TensorRef` in the place of tensors."""
_SHOWN = 10
_calls: Counter[tuple[str, int]] = Counter()
"""Loads of this process by (path, world size): ranks that load together agree on the count. Main thread only."""


def load_tree(
    tree: Any,
    tensors: Mapping[str, StateTensor],
    path: str | Path,
    *,
    strict: bool,
    cast: bool,
    process_group: Any,
    timeout: timedelta,
) -> Any:
    """Fill tensors from a checkpoint; the saved tree with them in their places. Every rank of the group calls it.

    Args:
        tree: the state without its tensors (`split_tensors`). Any: that is the point.
        tensors: those, by name; filled in place.
        path: of the checkpoint.
        strict: whether what is only here or only there is an error.
        cast: whether other dtypes are converted.
        process_group: as `load` takes it.
        timeout: how long to wait for the slowest rank.

    Raises:
        MismatchError, CorruptError, StorageError, PeerTimeout, PeerError: as `load` says.
    """
    ranks = Ranks.of(process_group)
    _calls[str(path), ranks.world_size] += 1
    place = xxhash.xxh3_64_hexdigest(str(path).encode())
    name = f"load/{place}/{_calls[str(path), ranks.world_size]}"
    meeting = Meeting(ranks, name, what=f"{path}: the load", timeout=timeout)
    try:
        with _Load(path, ranks, meeting, name, timeout) as running:
            held = hold(tensors, ranks, process_group)
            filled = running.compare(tree, dict(zip(tensors, held, strict=True)), strict=strict, cast=cast)
            running.fill()
    except Exception as error:  # the other ranks learn of it here, ours by the raise
        meeting.alarm(error)
        raise
    return join_tensors(filled, tensors.__getitem__)


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


class _Target(NamedTuple):
    """A region of the state to fill."""

    saved: str
    sink: Sink


class _Load:
    """One load as one rank sees it."""

    def __init__(self, path: str | Path, ranks: Ranks, meeting: Meeting, name: str, timeout: timedelta) -> None:
        self._path = path
        self._ranks = ranks
        self._meeting = meeting
        self._timeout = timeout
        shared = _Shared.get(path, ranks, name, timeout)
        self._catalog: Catalog = catalog_of(path, decode_index(shared.index))
        self._tree = decode(shared.tree)
        self._targets: list[_Target] = []
        self._wanted: dict[int, _OfImage] = {}
        self._locks: dict[int, Lock] = {}
        self._post = None if ranks.world_size == 1 else Post(ranks.rank, own_address(ranks.store), _host())

    def __enter__(self) -> _Load:
        return self

    def __exit__(self, *exc: object) -> None:
        self._catalog.close()
        if self._post is not None:
            self._post.close()

    # --- comparing

    def compare(self, tree: Any, held: Mapping[str, Held], *, strict: bool, cast: bool) -> Any:
        """Check that what is saved fits; the resulting tree.

        Raises:
            MismatchError: it does not; lists the keys.
        """
        pairing, filled = pair(tree, self._tree)
        problems = list(self._differences(pairing.tensors, held, cast=cast))
        if strict:
            problems += [f"{place} is not saved" for place in pairing.missing]
            problems += [f"{place} is saved but not in the state" for place in pairing.unexpected]
        if problems:
            more = f" and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
            raise MismatchError(
                f"{self._path} is a checkpoint of another state: {'; '.join(sorted(problems)[:_SHOWN])}{more}"
            )
        for name, saved in pairing.tensors.items():
            record, part = self._catalog.tensors[saved], held[name]
            size = itemsize(record.dtype)
            self._targets += [
                _Target(saved, Sink(part.view(box), box, dtype=record.dtype, itemsize=size))
                for box in part.boxes
                if not box.is_empty
            ]
        return filled

    def _differences(self, names: Mapping[str, str], held: Mapping[str, Held], *, cast: bool) -> Iterator[str]:
        for name, saved in names.items():
            record, shard = self._catalog.tensors.get(saved), held[name].shard
            if record is None:
                yield f"{name} is named in the saved state, but no image holds it"
                continue
            if record.shape != shard.shape or (record.dtype != shard.dtype and not cast):
                yield (
                    f"{name} is saved as {record.dtype}{list(record.shape)}, "
                    f"in the state it is {shard.dtype}{list(shard.shape)}"
                )
                continue
            missing = [gap for box in shard.boxes for gap in self._catalog.missing(saved, box)]
            if missing:
                yield f"no image holds {name}{missing[0]}"

    # --- filling

    def fill(self) -> None:
        """Read what is wanted, hand on what others want too.

        Raises:
            CorruptError, StorageError: it cannot be read; some tensors are filled by then.
            PeerTimeout, PeerError: another rank.
        """
        handing = Handing(
            self._ranks.rank,
            self._post,
            read=self._read,
            take=self._take,
            check=self._meeting.check,
            timeout=self._timeout,
        )
        handing.run(self._headers())
        handing.run(self._blocks())
        for target in self._targets:
            target.sink.end()
        self._meeting.gather(b"")  # nobody leaves while others may still ask
        logger.debug(
            "%s: rank %d read %d bytes and was handed %d",
            self._path, self._ranks.rank, handing.bytes_read, handing.bytes_received,
        )  # fmt: skip

    def _headers(self) -> list[Unit]:
        """Tell which images are wanted; who reads their headers."""
        images: set[int] = set()
        for target in self._targets:
            images.update(number for _, number in self._catalog.tiles(target.saved, target.sink.box))
        self._locks = {image: Lock() for image in images}
        endpoint = b"" if self._post is None else self._post.endpoint
        said = self._meeting.gather(msgspec.msgpack.encode((endpoint, sorted(images))))
        told = [msgspec.msgpack.decode(data, type=tuple[bytes, list[int]]) for data in said]
        if self._post is not None:
            self._post.know([endpoint for endpoint, _ in told])
        return header_units({rank: of_rank for rank, (_, of_rank) in enumerate(told)}, self._ranks.rank)

    def _blocks(self) -> list[Unit]:
        """Tell which blocks are wanted; who reads them."""
        pulls: dict[int, list[_Pull]] = {image: [] for image in self._locks}
        runs: dict[int, list[tuple[int, int]]] = {image: [] for image in self._locks}
        for saved, sink in self._targets:
            size = itemsize(self._catalog.tensors[saved].dtype)
            for tile, image in self._catalog.tiles(saved, sink.box):
                wanted = tile.intersection(sink.box)
                assert wanted is not None
                start = self._catalog.piece_start(saved, tile, image)
                pulls[image].append(_Pull(saved, start, start + tile.volume * size, tile, wanted, size, sink))
                meta = self._catalog.images[image].meta
                runs[image] += blocks_wanted(meta, tile, wanted, start=start, itemsize=size)
        self._wanted = {image: _OfImage.of(of_image) for image, of_image in pulls.items()}
        images = sorted(runs)
        mine = Wants(images, [[edge for run in merged(runs[image]) for edge in run] for image in images])
        told = [msgspec.msgpack.decode(data, type=Wants) for data in self._meeting.gather(msgspec.msgpack.encode(mine))]
        by_image: dict[int, dict[int, Sequence[tuple[int, int]]]] = {image: {} for image in images}
        for rank, wants in enumerate(told):
            for image, of_image in wants.by_image():
                if image in by_image:
                    by_image[image][rank] = of_image
        return [
            unit
            for image, of_ranks in by_image.items()
            for unit in units(
                image, of_ranks, self._ranks.rank, block_bytes=self._catalog.images[image].meta.block_bytes
            )
        ]

    def _read(self, unit: Unit, memory: memoryview) -> memoryview:
        """For reading threads."""
        with self._locks[unit.image]:
            image = self._catalog.images[unit.image]
            if unit.first == HEADER:
                return image.header()
            try:
                return image.blocks(unit.first, unit.end, memory)
            except HoldfastError as error:
                pull = next(iter(self._within(unit, (unit.end - unit.first) * image.meta.block_bytes)))
                raise type(error)(f"{pull.name}{pull.wanted} cannot be read: {error}") from error

    def _within(self, unit: Unit, length: int) -> Sequence[_Pull]:
        meta = self._catalog.images[unit.image].meta
        start = meta.data_start + unit.first * meta.block_bytes
        return self._wanted[unit.image].within(start, start + length)

    def _take(self, unit: Unit, data: memoryview) -> None:
        image = self._catalog.images[unit.image]
        if unit.first == HEADER:
            image.adopt(data)
            return
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


class _Shared(msgspec.Struct, frozen=True, array_like=True):
    """What every rank needs, as the one that read it hands it to the others of its host."""

    index: bytes = b""
    tree: bytes = b""
    error: str = ""
    kind: str = ""

    @classmethod
    def read(cls, path: str | Path) -> _Shared:
        index = read_index(path)
        with catalog_of(path, index) as catalog:
            tree = catalog.objects(0).get(TREE)
        if tree is None:
            raise MismatchError(
                f"{path} was not written by holdfast.checkpoint.save: load it with the Session or the HoldfastReader "
                f"that its writer belongs to, or bring it into this form with `holdfast ckpt export` and `import`"
            )
        return cls(encode_index(index), tree)

    @classmethod
    def get(cls, path: str | Path, ranks: Ranks, name: str, timeout: timedelta) -> _Shared:
        """The first rank of a host that comes reads; the others wait for it."""
        if ranks.world_size == 1:
            return cls.read(path)
        key = f"holdfast/{name}/{_host()}"
        with store_errors():
            is_first = ranks.store.add(f"{key}/claim", 1) == 1
            if is_first:
                ranks.store.set(f"{key}/reader", str(ranks.rank))
        if not is_first:
            reader = await_key(ranks, f"{key}/reader", timeout, lambda: f"{path}: a rank of this host vanished")
            missing = f"{path}: rank {reader.decode()} did not read the index within {timeout}"
            shared = msgspec.msgpack.decode(await_key(ranks, key, timeout, lambda: missing), type=cls)
            if shared.error:
                raise _error(shared.kind)(f"rank {reader.decode()}: {shared.error}")
            return shared
        try:
            shared = cls.read(path)
        except Exception as error:  # the other ranks of this host learn of it, ours by the raise
            with store_errors():
                ranks.store.set(key, msgspec.msgpack.encode(cls(error=str(error), kind=type(error).__name__)))
            raise
        with store_errors():
            ranks.store.set(key, msgspec.msgpack.encode(shared))
        return shared


def _error(kind: str) -> type[HoldfastError]:
    import holdfast.errors

    found = getattr(holdfast.errors, kind, PeerError)
    return found if isinstance(found, type) and issubclass(found, HoldfastError) else PeerError


def _host() -> str:
    """The same for the processes of one host, whatever container they are in."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = ""
    return f"{boot}{socket.gethostname()}"
