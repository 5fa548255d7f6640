"""The two sides of the fault table, and what their loads come to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

import holdfast.checkpoint as hc

RIGHT, WRONG = "right values", "**wrong values, no error**"
State = dict[str, Any]


def state(value: float) -> State:
    """Two tensors whose every element is `value`."""
    return {"w": torch.full((64, 8), value), "b": torch.full((16,), value)}


def verdict(load: Callable[[], State], *allowed: State) -> str:
    """What comes of a load: one of the allowed states, something else, or an error."""
    try:
        loaded = load()
    except BaseException as error:  # noqa: BLE001  # DCP's CheckpointException is no Exception; whatever: the finding
        return f"refused ({type(error).__name__})"
    return RIGHT if any(all(torch.equal(loaded[k], s[k]) for k in s) for s in allowed) else WRONG


class Ours:
    """`holdfast.checkpoint`."""

    @staticmethod
    def save(value: State, path: Path) -> None:
        hc.save(value, path)

    @staticmethod
    def load(path: Path) -> State:
        return hc.load(state(0.0), path)


class Dcp:
    """`torch.distributed.checkpoint`, as it comes."""

    @staticmethod
    def save(value: State, path: Path) -> None:
        dcp.save(value, checkpoint_id=path, no_dist=True)

    @staticmethod
    def load(path: Path) -> State:
        found = state(0.0)
        dcp.load(found, checkpoint_id=path, no_dist=True)
        return found


def the_file(path: Path, pattern: str) -> Path:
    (found,) = path.glob(pattern)
    return found


def flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)
