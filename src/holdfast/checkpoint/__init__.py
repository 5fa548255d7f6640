"""Checkpoints: boxes, images, index, planner, storages. Torch is imported when `save` or `load` is first used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from holdfast.checkpoint.flat import FlatRange
from holdfast.checkpoint.objects import register_codec

if TYPE_CHECKING:
    from holdfast.checkpoint.api import SaveHandle, async_save, load, save
    from holdfast.checkpoint.commit import open_checkpoint
    from holdfast.checkpoint.dcp import HoldfastReader, HoldfastWriter
    from holdfast.checkpoint.retention import Retention
    from holdfast.checkpoint.steps import list_steps

__all__ = [
    "FlatRange",
    "HoldfastReader",
    "HoldfastWriter",
    "Retention",
    "SaveHandle",
    "async_save",
    "list_steps",
    "load",
    "open_checkpoint",
    "register_codec",
    "save",
]

_HOMES = {
    "HoldfastReader": "dcp",
    "HoldfastWriter": "dcp",
    "Retention": "retention",
    "SaveHandle": "api",
    "async_save": "api",
    "list_steps": "steps",
    "load": "api",
    "open_checkpoint": "commit",
    "save": "api",
}


def __getattr__(name: str) -> object:
    """PEP 562: the snapshot daemon imports this package and must not import torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
