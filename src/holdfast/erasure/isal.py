"""Intel ISA-L's erasure code through ctypes: raw pointers, nothing copied, the interpreter lock released.

What the library demands (``erasure_code.h``, ``raid.h``), and what is done about it:

* ``len`` is a C int: longer blocks go in pieces below 2 GiB;
* the tables' format depends on the CPU (plain or GFNI) and on the version: they are built per matrix in this process
  and never leave it;
* ``xor_gen`` wants 32-byte aligned pointers and two sources at least: others take the general path, which has no
  demands;
* a matrix with more rows than one pass of the library takes is applied in pieces that keep the sources in cache.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence

import numpy as np

from holdfast.erasure.gf256 import ByteArray

_MAX_CALL_BYTES = 1 << 30
"""A multiple of every vector width, below the 2 GiB of a C int."""
_ROWS_PER_PASS = 4
"""More rows than this read the sources several times on some CPUs."""
_CACHED_BYTES = 1 << 19
"""What the sources of a piece may take where they are read several times: about an L2 cache."""
_XOR_ALIGNMENT = 32
_TABLE_BYTES = 32
"""Per matrix entry; the GFNI form needs less."""


class _Library:
    """The functions in use, with their signatures.

    Raises:
        OSError: the library cannot be loaded.
        AttributeError: it lacks a function.
    """

    def __init__(self, path: str) -> None:
        library = ctypes.CDLL(path)
        integer, pointer = ctypes.c_int, ctypes.c_void_p
        self.init_tables = library.ec_init_tables
        self.init_tables.argtypes = (integer, integer, pointer, pointer)
        self.init_tables.restype = None
        self.encode = library.ec_encode_data
        self.encode.argtypes = (integer, integer, integer, pointer, pointer, pointer)
        self.encode.restype = None
        self.update = library.ec_encode_data_update
        self.update.argtypes = (integer, integer, integer, integer, pointer, pointer, pointer)
        self.update.restype = None
        self.xor = library.xor_gen
        self.xor.argtypes = (integer, integer, pointer)
        self.xor.restype = integer


class IsalKernel:
    """The kernel over one loaded library.

    Raises:
        OSError: the library cannot be loaded.
        AttributeError: it is no ISA-L, or one without the erasure code.
    """

    def __init__(self, path: str) -> None:
        self._library = _Library(path)

    @property
    def name(self) -> str:
        return "isa-l"

    def bind(self, matrix: ByteArray) -> IsalOperator:
        return IsalOperator(self._library, matrix)


class IsalOperator:
    """One matrix as ISA-L's tables. Immutable after construction, so any number of threads may use it."""

    def __init__(self, library: _Library, matrix: ByteArray) -> None:
        self._library = library
        self._rows, self._columns = matrix.shape
        self._only_ones = bool((matrix == 1).all())
        coefficients = np.ascontiguousarray(matrix)
        self._tables = np.zeros(_TABLE_BYTES * matrix.size, dtype=np.uint8)
        self._tables_address = _address(self._tables)
        library.init_tables(self._columns, self._rows, coefficients.ctypes.data, self._tables_address)
        several_passes = self._rows > _ROWS_PER_PASS and self._columns > 1
        self._piece_bytes = max(4096, _CACHED_BYTES // self._columns & ~63) if several_passes else _MAX_CALL_BYTES

    def multiply(self, sources: Sequence[ByteArray], outputs: Sequence[ByteArray]) -> None:
        if self._only_ones and self._columns == 1:
            for output in outputs:
                np.copyto(output, sources[0])
            return
        from_, to = [_address(block) for block in sources], [_address(block) for block in outputs]
        if self._only_ones and self._rows == 1 and not any(address % _XOR_ALIGNMENT for address in from_ + to):
            self._multiply_by_ones(from_ + to, len(outputs[0]))
            return
        for offset, length in _pieces(len(outputs[0]), self._piece_bytes):
            self._library.encode(
                length,
                self._columns,
                self._rows,
                self._tables_address,
                _pointers(from_, offset),
                _pointers(to, offset),
            )

    def add(self, column: int, source: ByteArray, outputs: Sequence[ByteArray]) -> None:
        if self._only_ones:
            for output in outputs:
                np.bitwise_xor(output, source, out=output)
            return
        from_, to = _address(source), [_address(block) for block in outputs]
        for offset, length in _pieces(len(source), _MAX_CALL_BYTES):
            self._library.update(
                length,
                self._columns,
                self._rows,
                column,
                self._tables_address,
                from_ + offset,
                _pointers(to, offset),
            )

    def _multiply_by_ones(self, addresses: Sequence[int], length: int) -> None:
        """The vectors of ``xor_gen``: all sources, then the output."""
        for offset, piece in _pieces(length, _MAX_CALL_BYTES):
            failed = self._library.xor(len(addresses), piece, _pointers(addresses, offset))
            assert not failed, f"xor_gen refused {len(addresses)} vectors of {piece} bytes"


def _pieces(length: int, piece_bytes: int) -> Iterator[tuple[int, int]]:
    for offset in range(0, length, piece_bytes):
        yield offset, min(piece_bytes, length - offset)


def _address(array: ByteArray) -> int:
    """Address of the first byte; the array must be kept alive by the caller."""
    if array.flags.writeable and len(array):  # three times as fast as numpy's own way, which serves the others
        return ctypes.addressof(ctypes.c_char.from_buffer(array))  # type: ignore[arg-type]  # numpy offers a buffer
    address: int = array.__array_interface__["data"][0]
    return address


def _pointers(addresses: Sequence[int], offset: int) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(addresses))(*[address + offset for address in addresses])
