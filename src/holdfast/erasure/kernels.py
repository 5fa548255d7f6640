"""What multiplies a matrix over GF(2^8) with blocks of bytes, and how one is chosen.

Search for Intel ISA-L, first hit wins; each library is checked against the reference on this host before it is used:

1. the path in ``HOLDFAST_ISAL`` (`holdfast.environment.isal_library`); a path that does not work is an error, and
   ``HOLDFAST_ISAL=none`` asks for the numpy kernel;
2. a system library, by the loader's own search: ``libisal.so.2``, ``libisal.so``;
3. the one inside pyeclib's wheel, ``site-packages/pyeclib.libs/libisal*.so*`` (found without importing pyeclib).

Without any of them the numpy kernel (`holdfast.erasure.lanes`) serves: exact, slower.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from holdfast import environment
from holdfast.erasure.gf256 import ByteArray, matmul
from holdfast.errors import UsageError

NO_LIBRARY = "none"
"""The value of HOLDFAST_ISAL that asks for the numpy kernel."""

_SYSTEM_NAMES = ("libisal.so.2", "libisal.so")


class Operator(Protocol):
    """One matrix [rows, columns], ready to be applied. These two methods are the whole surface.

    Blocks are one-dimensional contiguous uint8 arrays of one common length, at any alignment; outputs overlap nothing.
    Any thread may call, several at once; the interpreter lock is released while bytes are worked on.
    """

    def multiply(self, sources: Sequence[ByteArray], outputs: Sequence[ByteArray]) -> None:
        """Overwrite each output i with the sum over j of matrix[i, j] x sources[j]."""

    def add(self, column: int, source: ByteArray, outputs: Sequence[ByteArray]) -> None:
        """Add matrix[i, column] x source to each output i."""


class Kernel(Protocol):
    """An implementation of the arithmetic. `bind` and `name` are the whole surface."""

    @property
    def name(self) -> str:
        """For people: in reports and benchmarks."""

    def bind(self, matrix: ByteArray) -> Operator:
        """Prepare a matrix (uint8 [rows, columns], both at least one). Tables belong to this host and process."""


@dataclass(frozen=True)
class Choice:
    """The kernel in use and why the others are not."""

    kernel: Kernel
    library: str | None
    """Path or loader name of ISA-L; None for the numpy kernel."""
    rejected: tuple[tuple[str, str], ...]
    """(library, reason) of each one that was tried in vain."""


def choose_kernel(isal_library: str | None = None) -> Choice:
    """Search as the head of this module says.

    Args:
        isal_library: path of ISA-L, ``"none"`` for the numpy kernel, None to search.

    Raises:
        UsageError: the library that was asked for cannot be loaded or computes wrongly.
    """
    from holdfast.erasure.isal import IsalKernel
    from holdfast.erasure.lanes import LanesKernel

    rejected: list[tuple[str, str]] = []
    if isal_library != NO_LIBRARY:
        for candidate in [isal_library] if isal_library else _candidates():
            try:
                kernel = IsalKernel(candidate)
                check(kernel)
            except (OSError, AttributeError, ArithmeticError) as error:
                if isal_library:
                    raise UsageError(
                        f"HOLDFAST_ISAL={isal_library} cannot be used: {error}; "
                        f"give the path of libisal.so.2, or {NO_LIBRARY!r} for the slower numpy kernel"
                    ) from error
                rejected.append((candidate, str(error)))
            else:
                return Choice(kernel, candidate, tuple(rejected))
    fallback = LanesKernel()
    check(fallback)
    return Choice(fallback, None, tuple(rejected))


@functools.cache
def default_choice() -> Choice:
    """The choice of this process, made at the first call from the environment; any thread may call."""
    return choose_kernel(environment.isal_library())


def default_kernel() -> Kernel:
    """The kernel of `default_choice`."""
    return default_choice().kernel


def check(kernel: Kernel) -> None:
    """Compare a kernel with the reference on short blocks: lengths around vector widths, aligned and unaligned.

    Raises:
        ArithmeticError: it computes something else. It must not be used: its parity would be silent corruption.
    """
    random = np.random.default_rng(0x11D)
    matrices = [random.integers(0, 256, shape, dtype=np.uint8) for shape in ((1, 1), (1, 5), (2, 4), (3, 2), (7, 13))]
    matrices += [np.ones((1, 1), np.uint8), np.ones((1, 4), np.uint8)]
    for matrix in matrices:
        operator = kernel.bind(matrix)
        for length, shift in itertools.product((1, 15, 33, 64, 333), (0, 1)):
            blocks = list(random.integers(0, 256, (matrix.shape[1], length), dtype=np.uint8))
            sources = _blocks_at(shift, len(blocks), length)
            for source, block in zip(sources, blocks, strict=True):
                source[:] = block
            multiplied, added = (_blocks_at(shift, len(matrix), length) for _ in range(2))
            operator.multiply(sources, multiplied)
            for column, source in enumerate(sources):
                operator.add(column, source, added)
            expected = matmul(matrix, np.stack(blocks))
            if not (np.array_equal(multiplied, expected) and np.array_equal(added, expected)):
                rows, columns = matrix.shape
                raise ArithmeticError(f"{kernel.name} fails its self-check ({rows} x {columns}, {length} bytes)")


def _blocks_at(shift: int, count: int, length: int) -> list[ByteArray]:
    """Zeroed blocks that begin `shift` bytes after cache lines."""
    stride = -(-(length + shift) // 64) * 64
    memory = np.zeros(count * stride + 64, dtype=np.uint8)
    start = -memory.ctypes.data % 64 + shift
    return [memory[start + row * stride : start + row * stride + length] for row in range(count)]


def _candidates() -> Iterator[str]:
    yield from _SYSTEM_NAMES
    spec = importlib.util.find_spec("pyeclib")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        bundled = Path(folder).parent / "pyeclib.libs"
        yield from (str(path) for path in sorted(bundled.glob("libisal*.so*")))
