"""torch tensors as bytes (stub: bodies follow)."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def dtype_name(dtype: torch.dtype) -> str:
    """Its name without ``torch.``; StateError where it cannot be stored."""
    raise NotImplementedError


def torch_dtype(name: str) -> torch.dtype:
    raise NotImplementedError


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, writable, without a copy."""
    raise NotImplementedError


def empty_for(dtype: str, lengths: Sequence[int]) -> torch.Tensor:
    raise NotImplementedError
