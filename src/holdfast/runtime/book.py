"""Keeps the entries of a training state: made once per tensor, made again only where a tensor has changed place."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
import xxhash

from holdfast.checkpoint.tensors import check_tensor, dtype_name
from holdfast.errors import StateError
from holdfast.runtime.entries import TensorEntry, Timing
from holdfast.runtime.holdings import Holders, Holding
from holdfast.runtime.layout import FlatRange, Layout, dtensor_layout, flat_layout, is_dtensor, local_part, plain_layout

_SAMPLE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class _Origin:
    """What decides who holds a tensor."""

    kind: str
    """As in `holdfast.runtime.holdings.Holding`."""
    parameter: str | None
    """Name of the parameter that it is state of."""
    of_part: bool
    """Whether its name means something else on a rank that trains another part."""


class EntryBook:
    """The entries of one rank by name. Used by the training thread only.

    A reading is ``begin()``, one `put` per tensor, ``finish()``. Between readings `is_current` tells whether the memory
    of all tensors is where it was.
    """

    def __init__(self, holders: Holders) -> None:
        self._holders = holders
        self._global_rank = holders.global_rank
        self._session_rank = holders.ranks.index(holders.global_rank)
        self._origins: dict[str, _Origin] = {}
        self._own: set[str] = set()
        """Plain tensors that turned out to be other ones on each rank: they stay so."""
        self._old: dict[str, TensorEntry] = {}
        self._new: dict[str, TensorEntry] = {}
        self._entries: tuple[TensorEntry, ...] = ()
        self._layouts: dict[Hashable, Layout] = {}
        self._staged: set[str] = set()
        self._seen: dict[str, tuple[torch.Tensor | FlatRange, int]] = {}
        self._watched: list[torch.Tensor] = []
        self._watched_dtensors: list[Any] = []
        self._watched_sizes: list[torch.Tensor] = []
        self._places: tuple[list[int], list[int]] = ([], [])

    def begin(self) -> None:
        """Start a reading: every tensor has to be put again."""
        self._new = {}
        self._watched, self._watched_dtensors, self._watched_sizes = [], [], []

    def put(
        self,
        name: str,
        live: torch.Tensor | FlatRange,
        *,
        timing: Timing,
        per_rank: bool = False,
        stage: bool = False,
        has_fixed_size: bool = False,
        parameter: str | None = None,
        of_part: bool = False,
    ) -> TensorEntry:
        """Record a tensor under a name.

        Args:
            name: unique within the state.
            live: the tensor, DTensor or flat range of the training state.
            timing: when its bytes may be read.
            per_rank: each rank has one of its own under this name (a DTensor never is).
            stage: where the script replaces the tensor again and again (a buffer assigned in forward, an object's
                ``state_dict`` that builds new tensors), keep one copy of our own from then on and fill it at each
                `put`, so that what is planned for this entry stays good. Only for tensors copied at the boundary.
            has_fixed_size: nobody shrinks it within its memory (optimizer state), so only its place is watched.
            parameter: name of the parameter that it is state of: who holds that may come to hold this.
            of_part: the name says nothing about the parameters (those of parameter groups), so that ranks which train
                different parts have different tensors under it.

        Raises:
            StateError: two tensors under one name, or a tensor that cannot be captured.
        """
        if name in self._new:
            raise StateError(
                f"two tensors of the training state are named {name}; rename one (models and extra: the key)"
            )
        local = local_part(live)
        kind = "rank" if per_rank else "plain"
        says_holders = is_dtensor(live) or isinstance(live, FlatRange)
        self._origins[name] = _Origin("dtensor" if says_holders else kind, parameter, of_part)
        old, seen = self._old.get(name), self._seen.get(name)
        if old is None or old.timing is not timing:
            entry = self._entry(name, live, local, timing)
        elif name not in self._staged and (_is_in_place(seen, old, live, local) or self._is_same(old, live, local)):
            entry = old
        elif stage and _fits(old.tensor, local):
            entry = self._staged_entry(old, local)
        else:
            self._staged.discard(name)
            entry = self._entry(name, live, local, timing)
        if name not in self._staged:
            self._watch(name, live, local, has_fixed_size)
        self._new[name] = entry
        return entry

    def _watch(self, name: str, live: torch.Tensor | FlatRange, local: torch.Tensor, has_fixed_size: bool) -> None:
        self._seen[name] = (live, local.data_ptr())
        if is_dtensor(live):
            self._watched_dtensors.append(live)
        else:
            self._watched.append(local)
            if not has_fixed_size:
                self._watched_sizes.append(local)

    def refresh(self, name: str, live: torch.Tensor | FlatRange) -> bool:
        """Take a tensor again outside a reading: fill the copy of a staged one, check the place of another.

        Returns:
            False where the entry is no longer good and all has to be read again.
        """
        entry = self._old[name]
        local = local_part(live)
        if not _fits(entry.tensor, local):
            return False
        if name in self._staged:
            with torch.no_grad():
                entry.tensor.copy_(local)
            return True
        return entry.tensor.data_ptr() == local.data_ptr() and entry.tensor.stride() == local.stride()

    def has(self, name: str) -> bool:
        """Whether this reading has put the name already."""
        return name in self._new

    def is_staged(self, name: str) -> bool:
        """Whether the entry of this name is a copy of our own."""
        return name in self._staged

    def finish(self) -> tuple[TensorEntry, ...]:
        """End a reading: the entries in the order of `put`, the same tuple as before if nothing changed."""
        self._staged &= self._new.keys()
        if len(self._seen) > len(self._new):
            self._seen = {name: seen for name, seen in self._seen.items() if name in self._new}
        entries = tuple(self._new.values())
        if len(entries) != len(self._entries) or any(a is not b for a, b in zip(entries, self._entries, strict=True)):
            self._entries = entries
        self._old = self._new
        self._places = self._places_now()
        return self._entries

    def is_current(self) -> bool:
        """Whether every watched tensor still has the memory and the number of elements that it had."""
        return self._places_now() == self._places

    def _places_now(self) -> tuple[list[int], list[int]]:
        locals_now = [tensor._local_tensor for tensor in self._watched_dtensors]
        return (
            list(map(torch.Tensor.data_ptr, chain(self._watched, locals_now))),
            list(map(torch.Tensor.numel, chain(self._watched_sizes, locals_now))),
        )

    def _is_same(self, old: TensorEntry, live: torch.Tensor | FlatRange, local: torch.Tensor) -> bool:
        return (
            old.tensor.data_ptr() == local.data_ptr()
            and _fits(old.tensor, local)
            and old.tensor.stride() == local.stride()
            and old.boxes == self._layout(old.name, live, local).boxes
        )

    def keep_own(self, names: Iterable[str]) -> None:
        """Tensors of these names, and their state, are this rank's own from the next `hold` on."""
        self._own.update(names)

    def hold(self, holders: Holders) -> tuple[TensorEntry, ...]:
        """From now on `holders` tells who holds the plain tensors; the entries as they are now."""
        self._holders = holders
        self._own.update(name for name, known in (holders.known or {}).items() if known is None)
        changed = False
        for name, entry in self._old.items():
            if self._origins[name].kind == "plain":
                place = self._place(name)
                if place != (entry.holders, entry.rank):
                    self._old[name] = replace(entry, holders=place[0], rank=place[1])
                    changed = True
        if changed:
            self._entries = tuple(self._old.values())
        return self._entries

    def holdings(self, *, sample: bool) -> dict[str, Holding]:
        """What this rank has, by name.

        Args:
            sample: with a hash of some bytes of each plain tensor.
        """
        return {
            name: Holding(
                self._origins[name].kind if entry.rank is None else "rank",
                entry.dtype,
                entry.shape,
                _sample(entry.tensor) if sample and self._origins[name].kind == "plain" else "",
            )
            for name, entry in self._old.items()
        }

    def parameters(self) -> dict[str, str | None]:
        """Name -> the parameter that it is state of."""
        return {name: self._origins[name].parameter for name in self._old}

    def _place(self, name: str) -> tuple[tuple[int, ...], int | None]:
        """Holders and rank of a tensor that is no DTensor."""
        origin = self._origins[name]
        holders = None
        is_own = name in self._own or origin.parameter in self._own or (origin.of_part and self._holders.uneven)
        if origin.kind == "plain" and not is_own:
            holders = self._holders.of(name, origin.parameter)
        return ((self._global_rank,), self._session_rank) if holders is None else (holders, None)

    def _entry(self, name: str, live: torch.Tensor | FlatRange, local: torch.Tensor, timing: Timing) -> TensorEntry:
        check_tensor(name, local)
        layout = self._layout(name, live, local)
        if layout.holders is not None:
            holders, rank = layout.holders or (self._global_rank,), None
        else:
            holders, rank = self._place(name)
        return TensorEntry(
            name=name,
            tensor=_detached(local),
            dtype=dtype_name(local.dtype),
            shape=layout.shape,
            boxes=layout.boxes,
            origins=layout.origins,
            holders=holders,
            rank=rank,
            timing=timing,
            flat_start=layout.flat_start,
        )

    def _staged_entry(self, old: TensorEntry, local: torch.Tensor) -> TensorEntry:
        with torch.no_grad():
            if old.name in self._staged:
                old.tensor.copy_(local)
                return old
            copy = _detached(local).clone()
        self._staged.add(old.name)
        return replace(old, tensor=copy)

    def _layout(self, name: str, live: torch.Tensor | FlatRange, local: torch.Tensor) -> Layout:
        if isinstance(live, FlatRange):
            return flat_layout(live)
        shape = tuple(live.shape)
        if not is_dtensor(live):
            if shape not in self._layouts:
                self._layouts[shape] = plain_layout(shape)
            return self._layouts[shape]
        key = (shape, tuple(local.shape), live.device_mesh, live.placements)
        if key not in self._layouts:
            self._layouts[key] = dtensor_layout(name, live)
        return self._layouts[key]


def _is_in_place(
    seen: tuple[torch.Tensor | FlatRange, int] | None,
    old: TensorEntry,
    live: torch.Tensor | FlatRange,
    local: torch.Tensor,
) -> bool:
    """The quick answer for most tensors: the same object, in the same place."""
    if seen is None or seen[0] is not live:
        return False
    return local.data_ptr() == seen[1] and local.numel() == old.tensor.numel()


def _fits(ours: torch.Tensor, local: torch.Tensor) -> bool:
    return ours.shape == local.shape and ours.dtype == local.dtype and ours.device == local.device


def _detached(local: torch.Tensor) -> torch.Tensor:
    detached = local.detach()
    return detached if type(detached) is torch.Tensor else detached.as_subclass(torch.Tensor)


def _sample(tensor: torch.Tensor) -> str:
    """Hash of the first, middle and last bytes; on an accelerator this waits for it, which is why it is done once."""
    if not tensor.numel() or tensor.is_conj() or tensor.is_neg():
        return ""
    with torch.no_grad():
        flat = tensor.reshape(-1).view(torch.uint8)
        length = min(flat.numel(), _SAMPLE_BYTES)
        starts = (0, (flat.numel() - length) // 2, flat.numel() - length)
        picked = torch.cat([flat[start : start + length] for start in starts]).cpu()
    return xxhash.xxh3_64_hexdigest(picked.numpy().data)


def total_bytes(entries: Sequence[TensorEntry]) -> int:
    """Bytes of the local tensors."""
    return sum(entry.tensor.numel() * entry.tensor.element_size() for entry in entries)
