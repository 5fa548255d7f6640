"""Which tensors of a state are one: the same object, or one memory seen in one way.

A module's ``state_dict`` gives each name of a tied parameter a tensor object of its own.
"""

from __future__ import annotations

from typing import Any

import torch

from holdfast.checkpoint.flat import FlatRange
from holdfast.checkpoint.layout import is_dtensor, local_part

_PLAIN = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)

_Named = tuple[torch.Tensor | FlatRange, str, "_Named | None"]
"""A tensor, its name, and the one that was named before it at the same place."""


class Ties:
    """The names that tensors have got. They must all live as long as this does."""

    def __init__(self, *, by_memory: bool) -> None:
        """
        Args:
            by_memory: False: only the same object is one tensor.
        """
        self._place = _place if by_memory else id
        self._known: dict[int, _Named] = {}
        """By place, the last one that was named there."""

    def name(self, tensor: torch.Tensor | FlatRange, name: str) -> str:
        """Its name: the one that a tensor got which is one with it, or else this."""
        place = self._place(tensor)
        last = known = self._known.get(place)
        while known is not None:
            if _are_one(known[0], tensor):
                return known[1]
            known = known[2]
        self._known[place] = (tensor, name, last)
        return name


def _place(tensor: torch.Tensor | FlatRange) -> int:
    """Equal for tensors that are one; mostly another for those that are not."""
    address = _address(tensor)
    if not address and is_dtensor(tensor) and type(local := local_part(tensor)) in _PLAIN:
        # Not the address: a rank that holds nothing of a tied tensor must find that it is tied, as the others do.
        storage: int = local.untyped_storage()._cdata
        return storage
    return address or id(tensor)


def _are_one(a: torch.Tensor | FlatRange, b: torch.Tensor | FlatRange) -> bool:
    if a is b:
        return True
    if is_dtensor(a) and is_dtensor(b):
        same_cut = (a.shape, a.placements, a.device_mesh) == (b.shape, b.placements, b.device_mesh)
        return same_cut and _seen_as(local_part(a)) == _seen_as(local_part(b))
    return _address(a) != 0 and _address(a) == _address(b) and _seen_as(a) == _seen_as(b)


def _address(tensor: Any) -> int:
    """Of a plain tensor that has one; 0 else: empty, sparse, of a device without memory."""
    if type(tensor) not in _PLAIN:
        return 0
    try:
        address: int = tensor.data_ptr()
    except RuntimeError:
        return 0
    return address


def _seen_as(tensor: Any) -> tuple[object, ...]:
    place = (tensor.device, tensor.data_ptr())
    return (*place, tensor.dtype, tensor.shape, tensor.stride(), tensor.is_conj(), tensor.is_neg())
