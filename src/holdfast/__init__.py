"""Fault-tolerant training for PyTorch: ``holdfast run`` replaces ``torchrun``, `Session` holds the state of a loop.

Everything is imported on first use (PEP 562), so that a process that needs no torch, such as the snapshot daemon, never
imports it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from holdfast import checkpoint, errors, testing
    from holdfast.checkpoint.objects import register_codec
    from holdfast.checkpoint.retention import Retention
    from holdfast.errors import HoldfastError
    from holdfast.runtime.extra import PerRank
    from holdfast.runtime.guidance import LateToEarly
    from holdfast.runtime.results import Persisted, Restored, SaveHandle
    from holdfast.runtime.sampler import ElasticSampler
    from holdfast.runtime.session import InitFrom, Session, restore_point

__version__ = "0.1.0"

__all__ = [
    "ElasticSampler",
    "HoldfastError",
    "InitFrom",
    "LateToEarly",
    "PerRank",
    "Persisted",
    "Restored",
    "Retention",
    "SaveHandle",
    "Session",
    "__version__",
    "checkpoint",
    "errors",
    "register_codec",
    "restore_point",
    "testing",
]

_SUBMODULES = frozenset({"checkpoint", "errors", "testing"})
_HOMES = {
    "ElasticSampler": "holdfast.runtime.sampler",
    "HoldfastError": "holdfast.errors",
    "InitFrom": "holdfast.runtime.session",
    "LateToEarly": "holdfast.runtime.guidance",
    "PerRank": "holdfast.runtime.extra",
    "Persisted": "holdfast.runtime.results",
    "Restored": "holdfast.runtime.results",
    "Retention": "holdfast.checkpoint.retention",
    "SaveHandle": "holdfast.runtime.results",
    "Session": "holdfast.runtime.session",
    "register_codec": "holdfast.checkpoint.objects",
    "restore_point": "holdfast.runtime.session",
}


def __getattr__(name: str) -> object:
    """Import what `name` stands for.

    Raises:
        AttributeError: no public name of holdfast.
    """
    if name in _SUBMODULES:
        return importlib.import_module(f"holdfast.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'holdfast' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
