"""The dtypes that a checkpoint can hold, without torch.

Names are torch's without ``torch.``. Where the safetensors format has no code for a dtype, or has had one only lately,
its bytes are stored as U8 with one more dimension, and the true dtype stands in the image's piece table.
"""

from __future__ import annotations

from typing import NamedTuple

from holdfast.errors import StateError


class DType(NamedTuple):
    """One row of the table."""

    itemsize: int
    """Bytes per element, as torch counts elements."""
    code: str
    """safetensors code; U8 where it has none."""


DTYPES: dict[str, DType] = {
    "bool": DType(1, "BOOL"),
    "uint8": DType(1, "U8"),
    "int8": DType(1, "I8"),
    "uint16": DType(2, "U16"),
    "int16": DType(2, "I16"),
    "uint32": DType(4, "U32"),
    "int32": DType(4, "I32"),
    "uint64": DType(8, "U64"),
    "int64": DType(8, "I64"),
    "float16": DType(2, "F16"),
    "bfloat16": DType(2, "BF16"),
    "float32": DType(4, "F32"),
    "float64": DType(8, "F64"),
    "float8_e4m3fn": DType(1, "F8_E4M3"),
    "float8_e5m2": DType(1, "F8_E5M2"),
    "float8_e8m0fnu": DType(1, "F8_E8M0"),
    "float8_e4m3fnuz": DType(1, "U8"),
    "float8_e5m2fnuz": DType(1, "U8"),
    "float4_e2m1fn_x2": DType(1, "U8"),
    "complex32": DType(4, "U8"),
    "complex64": DType(8, "C64"),
    "complex128": DType(16, "U8"),
}


def dtype_info(name: str) -> DType:
    """The row of a dtype.

    Raises:
        StateError: the dtype cannot be stored (quantized and sub-byte types).
    """
    try:
        return DTYPES[name]
    except KeyError:
        raise StateError(
            f"dtype {name} cannot be stored: dequantize the tensor, or keep it out of the state "
            f"(known: {', '.join(DTYPES)})"
        ) from None


def itemsize(name: str) -> int:
    """Bytes per element.

    Raises:
        StateError: the dtype cannot be stored.
    """
    return dtype_info(name).itemsize
