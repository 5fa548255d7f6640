"""`holdfast.checkpoint.save` and `load` (stub: bodies follow)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def save(state: Mapping[str, Any], path: str | Path, *, process_group: Any = None) -> None:
    """Save a nested state; every rank calls it. Any: whatever `objects` can encode, tensors, DTensors, Stateful."""
    raise NotImplementedError


def load(state: Mapping[str, Any], path: str | Path, *, process_group: Any = None) -> dict[str, Any]:
    """Load into the tensors of `state` in place; returns the state with its other values replaced."""
    raise NotImplementedError
