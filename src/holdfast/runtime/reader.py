"""Reads a saved state into live tensors: first checks that it fits, then collects what is wanted, then reads that."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from holdfast.checkpoint.boxes import Box
from holdfast.checkpoint.catalog import Catalog, TensorRecord
from holdfast.checkpoint.objects import decode, join_tensors
from holdfast.checkpoint.tensors import dtype_name, empty_for, tensor_bytes
from holdfast.errors import MismatchError, StateError
from holdfast.runtime.layout import FlatRange, Layout, layout_of, local_part, plain_layout

_SHOWN = 6


class Region(NamedTuple):
    """A part of a saved tensor, and the live memory that takes it."""

    name: str
    box: Box
    view: torch.Tensor
    """Detached; of the shape of `box`, of any dtype, on any device, with any strides."""
    rank: int | None
    """Of a per-rank tensor: the old rank whose it is."""


class Fetcher(Protocol):
    """How bytes come from a catalog. These two methods are the whole surface; all ranks call them in the same order."""

    def objects(self, images: Iterable[int]) -> None:
        """The objects of these images will be looked at, beside this rank's own and the first's; called once."""
        ...

    def fetch(self, regions: Sequence[Region]) -> None:
        """Fill the regions; called once, when everything has been checked.

        Raises:
            CorruptError: no image holds sound bytes of one.
        """
        ...


class OwnFetcher:
    """Each rank reads for itself."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    def objects(self, images: Iterable[int]) -> None:
        """They are read when they are looked at."""

    def fetch(self, regions: Sequence[Region]) -> None:
        """See `Fetcher.fetch`."""
        for name, box, view, rank in regions:
            dtype = self._catalog.tensor(name, rank=rank).dtype
            plain = view.device.type == "cpu" and dtype_name(view.dtype) == dtype
            if plain and view.is_contiguous() and not view.is_conj() and not view.is_neg():
                self._catalog.read(name, box, tensor_bytes(view), rank=rank)
                torch.autograd.graph.increment_version(view)
            else:
                staging = empty_for(dtype, box.lengths)
                self._catalog.read(name, box, tensor_bytes(staging), rank=rank)
                with torch.no_grad():
                    view.copy_(staging)


class StateReader:
    """A catalog as one rank reads it. Used by the training thread, for one restore.

    The checks (`expect`, `use`, `object`) come first and note what does not fit; `verify` raises once, with all of it.
    Only then `fill` and `whole` collect what is wanted, and `read` reads all of it.
    """

    def __init__(
        self,
        catalog: Catalog,
        *,
        session_rank: int,
        world_size: int,
        is_of_others: Callable[[str], bool] = lambda name: False,
    ) -> None:
        """
        Args:
            catalog: the saved state.
            session_rank: this rank's place in the Session, from 0.
            world_size: ranks of the Session.
            is_of_others: whether a saved name is of a part that some rank of the Session trains.
        """
        self.catalog = catalog
        self.session_rank = session_rank
        self.world_size = world_size
        self._is_of_others = is_of_others
        self._objects = catalog.objects(session_rank)
        self._used: set[str] = set()
        self._used_objects: set[str] = set()
        self._missing: list[str] = []
        self._wrong: list[str] = []
        self._regions: list[Region] = []

    @property
    def resized(self) -> bool:
        """Whether another number of ranks saved the state."""
        return self.catalog.world_size != self.world_size

    def has_object(self, name: str) -> bool:
        """Whether an object of this name is saved; does not count as using it."""
        return name in self._objects

    def object(self, name: str, default: Any = None) -> Any:  # Any: what was encoded
        """The decoded object; where it is missing, that is noted and `default` returned."""
        if name not in self._objects:
            self._missing.append(name)
            return default
        self._used_objects.add(name)
        return decode(self._objects[name])

    def has_object_of(self, name: str, rank: int) -> bool:
        """Whether an old rank saved an object of this name."""
        return name in self.catalog.objects(rank)

    def object_of(self, name: str, rank: int) -> Any:  # Any: what was encoded
        """The decoded object of an old rank; it must be there."""
        return decode(self.catalog.objects(rank)[name])

    def resize_error(self, name: str) -> StateError:
        """What to raise for per-rank state that cannot be spread over another number of ranks."""
        return StateError(
            f"{name} is per rank and was saved by {self.catalog.world_size} ranks, there are {self.world_size} now; "
            "give PerRank(obj, on_resize=...) to say what each rank takes"
        )

    def use(self, names: Iterable[str]) -> None:
        """Note that these saved tensors have a place in the live state."""
        for name in names:
            if name in self.catalog.tensors:
                self._used.add(name)
            else:
                self._missing.append(name)

    def expect(self, name: str, live: torch.Tensor | FlatRange, *, as_name: str | None = None) -> None:
        """Note whether a live tensor is saved (under `as_name`, where that is another) with its shape and dtype."""
        saved_name = as_name or name
        if saved_name not in self.catalog.tensors:
            if live.numel():
                self._missing.append(name)
            return
        self._used.add(saved_name)
        record = self.record(saved_name)
        if record.shape != tuple(live.shape):
            self._wrong.append(f"{name} has shape {tuple(live.shape)} here and {record.shape} there")
        elif record.dtype != dtype_name(live.dtype):
            self._wrong.append(f"{name} is {dtype_name(live.dtype)} here and {record.dtype} there")

    def wrong(self, what: str) -> None:
        """Note another difference, in words."""
        self._wrong.append(what)

    def verify(self) -> None:
        """Raise if anything noted does not fit, or anything saved has no place here.

        Raises:
            MismatchError: in one line, the first few differences of each kind.
        """
        unexpected = [
            name
            for name in (
                *sorted(self.catalog.tensors.keys() - self._used),
                *sorted(self._objects.keys() - self._used_objects),
            )
            if not self._is_of_others(name)
        ]
        found = [
            f"{what}: {', '.join(names[:_SHOWN])}{f' and {len(names) - _SHOWN} more' if len(names) > _SHOWN else ''}"
            for what, names in (
                ("missing there", self._missing),
                ("unknown here", unexpected),
                ("different", self._wrong),
            )
            if names
        ]
        if found:
            raise MismatchError(
                f"the saved state {self.catalog.version} is not of this training state: {'; '.join(found)}"
            )

    def record(self, name: str) -> TensorRecord:
        """What is saved under a name, as this rank sees it."""
        return self.catalog.tensor(name, rank=self.source_rank(name))

    def source_rank(self, name: str) -> int:
        """The rank whose tensor this one takes: its own number, or the next that has one, where ranks differ."""
        for step in range(self.catalog.world_size):
            with contextlib.suppress(MismatchError):
                self.catalog.tensor(name, rank=self.session_rank + step)
                return self.session_rank + step
        return self.session_rank

    def old_ranks(self) -> Iterator[int]:
        """All ranks that saved the state, beginning with the one that this rank follows."""
        world_size = self.catalog.world_size
        return ((self.session_rank + step) % world_size for step in range(world_size))

    def fill(self, name: str, live: torch.Tensor | FlatRange) -> None:
        """The local part of a live tensor is to be overwritten with what is saved."""
        self._want(name, local_part(live).detach(), layout_of(name, live), self.source_rank(name))

    def whole(self, name: str, *, rank: int | None = None) -> torch.Tensor:
        """A new CPU tensor that `read` makes the whole saved tensor (of old rank `rank`, for per-rank ones; default
        this rank's)."""
        rank = self.source_rank(name) if rank is None else rank
        record = self.catalog.tensor(name, rank=rank)
        tensor = empty_for(record.dtype, record.shape)
        self._want(name, tensor, plain_layout(record.shape), rank)
        return tensor

    def read(self, fetcher: Fetcher) -> None:
        """Read all that was asked for.

        Raises:
            CorruptError: no image holds sound bytes of something.
        """
        regions, self._regions = self._regions, []
        fetcher.fetch(regions)

    def _want(self, name: str, local: torch.Tensor, layout: Layout, rank: int) -> None:
        from_rank = rank if self.catalog.tensors[name].per_rank else None
        self._regions += [Region(name, box, layout.view(local, box), from_rank) for box in layout.boxes]


def placeholder_names(tree: Any) -> set[str]:  # Any: a tree with placeholders
    """Names of the tensors that were lifted out of a tree."""
    names: set[str] = set()

    def note(name: str) -> torch.Tensor:
        names.add(name)
        return torch.empty(0)

    join_tensors(tree, note)
    return names
