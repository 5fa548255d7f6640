"""The random number generators that a training script draws from: torch's, numpy's global one and Python's.

Reading a generator's state does not advance it. CUDA states are read from the host's copy, without a synchronisation.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

RngState = dict[str, Any]  # Any: a tree for the object codec


def read_rng(devices: Sequence[torch.device] = ()) -> RngState:
    """The state of every generator, exact.

    Args:
        devices: the CUDA devices that this rank uses, in a fixed order.
    """
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "torch": _to_bytes(torch.get_rng_state()),
        "cuda": [_to_bytes(torch.cuda.get_rng_state(device)) for device in devices],
        "numpy": [kind, np.asarray(keys, dtype="<u4").tobytes(), int(position), int(has_gauss), float(cached)],
        "python": [version, np.asarray(words, dtype="<u8").tobytes(), gauss],
    }


def write_rng(state: RngState, devices: Sequence[torch.device] = ()) -> None:
    """Set every generator to what `read_rng` gave. The i-th device takes the state of the i-th device then."""
    torch.set_rng_state(to_state_tensor(state["torch"]))
    for device, saved in zip(devices, state["cuda"], strict=False):
        torch.cuda.set_rng_state(to_state_tensor(saved), device)
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.frombuffer(keys, dtype="<u4").copy(), position, has_gauss, cached))
    version, words, gauss = state["python"]
    random.setstate((version, tuple(np.frombuffer(words, dtype="<u8").tolist()), gauss))


def cuda_devices(used: set[torch.device]) -> tuple[torch.device, ...]:
    """The CUDA devices among `used` and the current one, ordered; () where CUDA was never initialised."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return ()
    indices = {device.index for device in used if device.type == "cuda" and device.index is not None}
    indices.add(torch.cuda.current_device())
    return tuple(torch.device("cuda", index) for index in sorted(indices))


def to_state_tensor(state: bytes) -> torch.Tensor:
    """The bytes of a generator as the uint8 tensor that torch wants."""
    return torch.frombuffer(bytearray(state), dtype=torch.uint8)


def _to_bytes(state: torch.Tensor) -> bytes:
    return state.numpy().tobytes()
