"""Non-tensor state as bytes, without pickle (stub: bodies follow)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


class ObjectRecord(msgspec.Struct, frozen=True):
    """One named object of an image."""

    data: bytes
    """What `encode` gave."""
    per_rank: bool = False


def register_codec(cls: type[T], name: str, encode: Callable[[T], Any], decode: Callable[[Any], T]) -> None:
    """Teach holdfast to store instances of `cls`: `encode` gives any value that can be stored, `decode` reads it back."""
    raise NotImplementedError


def encode(value: Any, *, path: str = "") -> bytes:
    """The bytes of a value; StateError names the key path (after `path`) of what has no codec."""
    raise NotImplementedError


def decode(data: bytes | memoryview) -> Any:
    """The value; CorruptError where the bytes are none."""
    raise NotImplementedError


def split_tensors(prefix: str, value: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """Lift the tensors out of a nested value: (tree with placeholders that `encode` takes, name -> tensor)."""
    raise NotImplementedError


def join_tensors(tree: Any, get: Callable[[str], torch.Tensor]) -> Any:
    """Put tensors back in the place of placeholders."""
    raise NotImplementedError


def encode_objects(objects: Mapping[str, ObjectRecord]) -> bytes:
    """The objects blob of an image."""
    raise NotImplementedError


def decode_objects(data: bytes | memoryview) -> dict[str, ObjectRecord]:
    """Read it back; CorruptError where it does not parse."""
    raise NotImplementedError
