"""torch tensors as bytes and back, and as shards of global tensors."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from holdfast.checkpoint.boxes import whole
from holdfast.checkpoint.dtypes import dtype_info
from holdfast.checkpoint.flat import FlatRange
from holdfast.checkpoint.ownership import Shard
from holdfast.errors import StateError

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

    from holdfast.checkpoint.layout import Layout


_NUMPY_HAS = frozenset((torch.float32, torch.float64, torch.float16, torch.int64, torch.int32, torch.uint8))
"""Types that need no detour, which is half of what a small tensor costs."""


@cache
def dtype_name(dtype: torch.dtype) -> str:
    """Its name without ``torch.``.

    Raises:
        StateError: it cannot be stored.
    """
    name = str(dtype).removeprefix("torch.")
    dtype_info(name)
    return name


def torch_dtype(name: str) -> torch.dtype:
    """The dtype of a name.

    Raises:
        StateError: it cannot be stored, or this torch does not have it.
    """
    dtype_info(name)
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise StateError(f"this torch ({torch.__version__}) has no dtype {name}: update torch to read this state")
    return dtype


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, in C order, writable, without a copy; valid while the tensor lives.

    Raises:
        ValueError: it is not on the CPU, not contiguous, or lazily conjugated or negated.
    """
    if tensor.device.type != "cpu" or not tensor.is_contiguous() or tensor.is_conj() or tensor.is_neg():
        raise ValueError(f"the bytes of a {tensor.device} tensor with strides {tensor.stride()} cannot be had in place")
    if tensor.numel() == 0:
        return memoryview(bytearray())
    array: Any  # numpy's type is no Buffer before Python 3.12
    if tensor.dtype in _NUMPY_HAS:
        array = tensor.detach().numpy()
        return memoryview(array).cast("B")
    array = tensor.detach().view(-1).view(torch.uint8).numpy()
    return memoryview(array)


def check_tensor(name: str, local: torch.Tensor) -> None:
    """Refuse what has no plain bytes.

    Raises:
        StateError: sparse, nested, quantized, meta and wrapper tensors.
    """
    if local.layout is not torch.strided:
        raise StateError(f"{name} is a {local.layout} tensor; only dense tensors can be stored: `to_dense()`")
    if local.is_nested:
        raise StateError(f"{name} is a nested tensor, which cannot be stored: pad it, or store its parts")
    if local.is_quantized:
        raise StateError(f"{name} is a quantized tensor ({local.dtype}), which cannot be stored: dequantize it")
    if local.device.type == "meta":
        raise StateError(f"{name} is on the meta device and has no values; materialise the model first")
    if hasattr(local, "__tensor_flatten__"):
        raise StateError(f"{name} is a {type(local).__name__}, made of other tensors, which cannot be stored")


def contiguous_on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    """The same storage where `tensor_bytes` takes it, else a copy that it takes."""
    if tensor.device.type == "cpu" and tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg():
        return tensor.detach()
    return tensor.detach().resolve_conj().resolve_neg().to("cpu").contiguous()


def empty_for(dtype: str, lengths: Sequence[int]) -> torch.Tensor:
    """A new, uninitialised CPU tensor.

    Raises:
        StateError: the dtype cannot be stored, or this torch does not have it.
    """
    # Made as bytes: torch warns when it makes some dtypes (complex32) itself.
    info = dtype_info(dtype)
    count = info.itemsize
    for n in lengths:
        count *= n
    return torch.empty(count, dtype=torch.uint8).view(torch_dtype(dtype)).view(tuple(lengths))


def as_numbers(tensor: torch.Tensor) -> torch.Tensor | None:
    """The elements, flattened, as float64 or complex128; None of a dtype that torch does not convert (packed ones)."""
    if tensor.dtype is getattr(torch, "float4_e2m1fn_x2", None):
        return None
    return tensor.reshape(-1).to(torch.complex128 if tensor.is_complex() else torch.float64)


def plain_shard(name: str, tensor: torch.Tensor, *, holders: tuple[int, ...], rank: int | None = None) -> Shard:
    """A whole plain tensor that all `holders` have, or (with `rank`) that is this rank's own."""
    return Shard(name, dtype_name(tensor.dtype), tuple(tensor.shape), (whole(tensor.shape),), holders, rank)


def dtensor_shard(name: str, tensor: DTensor) -> Shard:
    """What this rank holds of a DTensor: even and uneven shards, strided ones, several mesh axes, replicas. No
    communication.

    Raises:
        StateError: it has partial (not yet reduced) placements.
    """
    from holdfast.checkpoint.layout import dtensor_layout

    return layout_shard(name, tensor, dtensor_layout(name, tensor))


def layout_shard(name: str, tensor: DTensor | FlatRange, layout: Layout, *, rank: int = 0) -> Shard:
    """The shard that a layout of a DTensor or of a flat range describes.

    Args:
        name: of the tensor.
        tensor: laid out so.
        layout: its own.
        rank: this global rank, which holds a flat range.
    """
    if isinstance(tensor, FlatRange):
        # Nobody holds elements of an empty tensor: whoever has it says that it is there.
        return Shard(name, dtype_name(tensor.dtype), layout.shape, layout.boxes, layout.holders or (rank,))
    mesh = tensor.device_mesh
    me = mesh.get_rank()
    holders = layout.holders or (me,)
    if 0 in layout.shape:
        # One rank must say that there is such a tensor, though nobody holds anything of it.
        everyone = tuple(sorted(mesh.mesh.flatten().tolist()))
        holders = everyone if me in everyone else (me,)
    return Shard(name, dtype_name(tensor.dtype), layout.shape, layout.boxes, holders)
