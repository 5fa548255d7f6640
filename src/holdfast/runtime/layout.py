"""Where the local part of a tensor lies in the global one: `holdfast.checkpoint.layout`, under the name used here."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, TypeGuard

import torch

from holdfast.checkpoint.layout import Layout, Run, dtensor_layout, local_part, plain_layout, shard_runs

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

__all__ = ["Layout", "Run", "dtensor_layout", "is_dtensor", "local_part", "plain_layout", "shard_runs"]


def is_dtensor(tensor: object) -> TypeGuard[DTensor]:
    """Whether it is a DTensor, without importing what only those that use it need: that takes a second."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, torch.Tensor) and isinstance(tensor, module.DTensor)
