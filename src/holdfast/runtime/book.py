"""Keeps the entries of a training state: made once per tensor, made again only where a tensor has changed place."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import chain

import torch
from torch.distributed.tensor import DTensor

from holdfast.checkpoint.tensors import dtype_name
from holdfast.errors import StateError
from holdfast.runtime.entries import TensorEntry, Timing
from holdfast.runtime.layout import Layout, dtensor_layout, local_part, plain_layout


class EntryBook:
    """The entries of one rank by name. Used by the training thread only.

    A reading is ``begin()``, one `put` per tensor, ``finish()``. Between readings `is_current` tells whether the memory
    of all tensors is where it was.
    """

    def __init__(self, ranks: tuple[int, ...], global_rank: int) -> None:
        self._ranks = ranks
        self._global_rank = global_rank
        self._old: dict[str, TensorEntry] = {}
        self._new: dict[str, TensorEntry] = {}
        self._entries: tuple[TensorEntry, ...] = ()
        self._layouts: dict[Hashable, Layout] = {}
        self._staged: set[str] = set()
        self._seen: dict[str, tuple[torch.Tensor, int]] = {}
        self._watched: list[torch.Tensor] = []
        self._watched_dtensors: list[DTensor] = []
        self._watched_sizes: list[torch.Tensor] = []
        self._places: tuple[list[int], list[int]] = ([], [])

    def begin(self) -> None:
        """Start a reading: every tensor has to be put again."""
        self._new = {}
        self._watched, self._watched_dtensors, self._watched_sizes = [], [], []

    def put(
        self,
        name: str,
        live: torch.Tensor,
        *,
        timing: Timing,
        per_rank: bool = False,
        stage: bool = False,
        has_fixed_size: bool = False,
    ) -> TensorEntry:
        """Record a tensor under a name.

        Args:
            name: unique within the state.
            live: the tensor or DTensor of the training state.
            timing: when its bytes may be read.
            per_rank: each rank has one of its own under this name (a DTensor never is).
            stage: where the script replaces the tensor again and again (a buffer assigned in forward, an object's
                ``state_dict`` that builds new tensors), keep one copy of our own from then on and fill it at each
                `put`, so that what is planned for this entry stays good. Only for tensors copied at the boundary.
            has_fixed_size: nobody shrinks it within its memory (optimizer state), so only its place is watched.

        Raises:
            StateError: two tensors under one name, or a tensor that cannot be captured.
        """
        if name in self._new:
            raise StateError(
                f"two tensors of the training state are named {name}; rename one (models and extra: the key)"
            )
        local = local_part(live)
        old, seen = self._old.get(name), self._seen.get(name)
        if old is None or old.timing is not timing:
            entry = self._entry(name, live, local, timing, per_rank)
        elif name not in self._staged and (_is_in_place(seen, old, live, local) or self._is_same(old, live, local)):
            entry = old
        elif stage and _fits(old.tensor, local):
            entry = self._staged_entry(old, local)
        else:
            self._staged.discard(name)
            entry = self._entry(name, live, local, timing, per_rank)
        if name not in self._staged:
            self._watch(name, live, local, has_fixed_size)
        self._new[name] = entry
        return entry

    def _watch(self, name: str, live: torch.Tensor, local: torch.Tensor, has_fixed_size: bool) -> None:
        self._seen[name] = (live, local.data_ptr())
        if isinstance(live, DTensor):
            self._watched_dtensors.append(live)
        else:
            self._watched.append(live)
            if not has_fixed_size:
                self._watched_sizes.append(live)

    def refresh(self, name: str, live: torch.Tensor) -> bool:
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

    def _is_same(self, old: TensorEntry, live: torch.Tensor, local: torch.Tensor) -> bool:
        return (
            old.tensor.data_ptr() == local.data_ptr()
            and _fits(old.tensor, local)
            and old.tensor.stride() == local.stride()
            and old.boxes == self._layout(old.name, live, local).boxes
        )

    def _entry(self, name: str, live: torch.Tensor, local: torch.Tensor, timing: Timing, per_rank: bool) -> TensorEntry:
        check_tensor(name, local)
        layout = self._layout(name, live, local)
        holders, rank = self._ranks, None
        if layout.holders is not None:
            holders = layout.holders
        elif per_rank:
            holders, rank = (self._global_rank,), self._global_rank
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
        )

    def _staged_entry(self, old: TensorEntry, local: torch.Tensor) -> TensorEntry:
        with torch.no_grad():
            if old.name in self._staged:
                old.tensor.copy_(local)
                return old
            copy = _detached(local).clone()
        self._staged.add(old.name)
        return TensorEntry(
            name=old.name,
            tensor=copy,
            dtype=old.dtype,
            shape=old.shape,
            boxes=old.boxes,
            origins=old.origins,
            holders=old.holders,
            rank=old.rank,
            timing=old.timing,
        )

    def _layout(self, name: str, live: torch.Tensor, local: torch.Tensor) -> Layout:
        shape = tuple(live.shape)
        if not isinstance(live, DTensor):
            if shape not in self._layouts:
                self._layouts[shape] = plain_layout(shape)
            return self._layouts[shape]
        key = (shape, tuple(local.shape), live.device_mesh, live.placements)
        if key not in self._layouts:
            self._layouts[key] = dtensor_layout(name, live)
        return self._layouts[key]


def check_tensor(name: str, local: torch.Tensor) -> None:
    """Refuse what has no plain bytes.

    Raises:
        StateError: sparse, quantized, meta and wrapper tensors.
    """
    if local.layout is not torch.strided:
        raise StateError(f"{name} is a {local.layout} tensor; only dense tensors can be captured")
    if local.is_quantized:
        raise StateError(f"{name} is a quantized tensor ({local.dtype}), which cannot be captured")
    if local.device.type == "meta":
        raise StateError(f"{name} is on the meta device and has no values; materialise the model first")
    if hasattr(local, "__tensor_flatten__"):
        raise StateError(f"{name} is a {type(local).__name__}, made of other tensors, which cannot be captured")


def _is_in_place(
    seen: tuple[torch.Tensor, int] | None, old: TensorEntry, live: torch.Tensor, local: torch.Tensor
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


def total_bytes(entries: Sequence[TensorEntry]) -> int:
    """Bytes of the local tensors."""
    return sum(entry.tensor.numel() * entry.tensor.element_size() for entry in entries)
