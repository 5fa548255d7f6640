"""XOR parity on the device: the m = 1 code on tensors where they lie, so that only parity crosses to the host.

The one module of this package that needs torch, and it imports torch inside its functions. Everything is queued on the
tensor's current stream, nothing waits for the device. The bytes equal those of `ReedSolomon` with m = 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from holdfast.errors import UsageError

if TYPE_CHECKING:
    import torch

_WORD_BYTES = 8


def xor_encode(sources: Sequence[torch.Tensor], parity: torch.Tensor) -> None:
    """Overwrite `parity` with the XOR of all sources.

    Args:
        sources: at least one contiguous tensor of any dtype, on the device of `parity`, none longer than it in bytes;
            shorter ones count as followed by zeros.
        parity: contiguous, any dtype; shares memory with no source.

    Raises:
        UsageError: no source, one that is not contiguous, too long, or on another device.
    """
    if not sources:
        raise UsageError("XOR parity needs at least one source")
    target = _bytes_of(parity)
    first = _bytes_of(sources[0])
    _check(first, target)
    target[: first.numel()].copy_(first)
    target[first.numel() :].zero_()
    for source in sources[1:]:
        xor_accumulate(source, parity)


def xor_accumulate(source: torch.Tensor, parity: torch.Tensor, *, offset: int = 0) -> None:
    """Add (XOR) one source to `parity` in place, in stream order.

    Args:
        source: contiguous tensor of any dtype.
        parity: contiguous tensor on the same device.
        offset: where in `parity` the source's bytes go, in bytes.

    Raises:
        UsageError: one is not contiguous, the source does not fit, or the devices differ.
    """
    target, data = _bytes_of(parity), _bytes_of(source)
    if offset < 0:
        raise UsageError(f"XOR parity cannot begin at offset {offset}")
    target = target[offset:]
    _check(data, target)
    target = target[: data.numel()]
    words = data.numel() // _WORD_BYTES * _WORD_BYTES if _aligned(data) and _aligned(target) else 0
    if words:
        _xor(_as_words(target[:words]), _as_words(data[:words]))
    if words < data.numel():
        _xor(target[words:], data[words:])


def _xor(target: torch.Tensor, data: torch.Tensor) -> None:
    import torch

    torch.bitwise_xor(target, data, out=target)


def _as_words(data: torch.Tensor) -> torch.Tensor:
    import torch

    return data.view(torch.int64)


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    import torch

    if not tensor.is_contiguous():
        raise UsageError(f"XOR parity needs contiguous tensors, got strides {tuple(tensor.stride())}")
    return tensor.detach().reshape(-1).view(torch.uint8)


def _aligned(data: torch.Tensor) -> bool:
    """Whether the bytes may be seen as int64: torch asks for the storage offset, the device for the address."""
    return data.data_ptr() % _WORD_BYTES == 0 and data.storage_offset() % _WORD_BYTES == 0


def _check(source: torch.Tensor, target: torch.Tensor) -> None:
    if source.device != target.device:
        raise UsageError(f"XOR parity on {target.device} cannot take a source on {source.device}")
    if source.numel() > target.numel():
        raise UsageError(f"a source of {source.numel()} bytes does not fit a parity of {target.numel()} bytes")
