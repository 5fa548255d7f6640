"""Erasure coding of state in memory: GF(2^8), Reed-Solomon codes, kernels, groups of nodes and their rotation.

Torch-free, except `holdfast.erasure.cuda`. The names below are imported on first use (PEP 562): the snapshot daemon
needs groups before it needs numpy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from holdfast.erasure.blocks import Block, BlockTransform
    from holdfast.erasure.reed_solomon import Recovery, ReedSolomon

__all__ = ["Block", "BlockTransform", "Recovery", "ReedSolomon"]

_HOMES = {
    "Block": "holdfast.erasure.blocks",
    "BlockTransform": "holdfast.erasure.blocks",
    "Recovery": "holdfast.erasure.reed_solomon",
    "ReedSolomon": "holdfast.erasure.reed_solomon",
}


def __getattr__(name: str) -> object:
    """Import what `name` stands for."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
