"""The numpy kernel: GF(2^8) by whole-word operations on eight bytes at a time, in blocks that stay in cache.

A product with a constant is a sum of doublings: c x = sum over the bits b of c of 2^b x. So an output is computed by
Horner's rule over the bits,

    output = (...((S7) 2 + S6) 2 + ...) 2 + S0,    S_b = XOR of the sources whose coefficient has bit b,

which doubles outputs, of which there are few, and only XORs sources. Doubling eight bytes in a uint64 (Anvin, "The
mathematics of RAID-6", section 4) masks the top bits off, shifts, and adds 0x1d to the bytes that overflowed. Table
look-ups in numpy are several times slower, because they convert every byte to an index.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from holdfast.erasure.gf256 import ByteArray

_BLOCK_BYTES = 1 << 16
"""A multiple of eight; sources, accumulator and scratch of one block fit an L2 cache, and the cost of calling numpy is
small beside the work."""

_TOP_BITS = np.uint64(0x8080808080808080)
_OTHER_BITS = np.uint64(0x7F7F7F7F7F7F7F7F)
_OVERFLOW = np.uint64(0x1D)
_SEVEN = np.uint64(7)


class LanesKernel:
    """The kernel that is always there."""

    @property
    def name(self) -> str:
        return "numpy"

    def bind(self, matrix: ByteArray) -> LanesOperator:
        return LanesOperator(matrix)


class _Scratch:
    """Working space of one call: an accumulator and a temporary, each one block long."""

    def __init__(self, length: int) -> None:
        words = -(-min(length, _BLOCK_BYTES) // 8)
        self._words = np.zeros(words, dtype=np.uint64)
        self._overflows = np.empty(words, dtype=np.uint64)
        self.bytes: ByteArray = self._words.view(np.uint8)

    def double(self) -> None:
        """Multiply the accumulator by 2, all of it: what lies behind a shorter block is never read."""
        words, overflows = self._words, self._overflows
        np.bitwise_and(words, _TOP_BITS, out=overflows)
        np.right_shift(overflows, _SEVEN, out=overflows)
        np.multiply(overflows, _OVERFLOW, out=overflows)
        np.bitwise_and(words, _OTHER_BITS, out=words)
        np.add(words, words, out=words)
        np.bitwise_xor(words, overflows, out=words)


class LanesOperator:
    """One matrix as lists of bits. Immutable after construction; scratch belongs to each call."""

    def __init__(self, matrix: ByteArray) -> None:
        self._matrix = matrix.copy()
        self._rows, self._columns = matrix.shape
        self._columns_of_bit = [_columns_of_bit(row) for row in self._matrix]

    def multiply(self, sources: Sequence[ByteArray], outputs: Sequence[ByteArray]) -> None:
        length = len(outputs[0])
        scratch = _Scratch(length)
        for start in range(0, length, _BLOCK_BYTES):
            block = slice(start, min(start + _BLOCK_BYTES, length))
            from_ = [source[block] for source in sources]
            to = [output[block] for output in outputs]
            if self._columns < self._rows:
                for output in to:
                    output.fill(0)
                for column, source in enumerate(from_):
                    self._add_block(column, source, to, scratch)
            else:
                for columns_of_bit, output in zip(self._columns_of_bit, to, strict=True):
                    _evaluate(columns_of_bit, from_, output, scratch)

    def add(self, column: int, source: ByteArray, outputs: Sequence[ByteArray]) -> None:
        scratch = _Scratch(len(source))
        for start in range(0, len(source), _BLOCK_BYTES):
            block = slice(start, min(start + _BLOCK_BYTES, len(source)))
            self._add_block(column, source[block], [output[block] for output in outputs], scratch)

    def _add_block(self, column: int, source: ByteArray, outputs: Sequence[ByteArray], scratch: _Scratch) -> None:
        """Add the multiples of one source: its doublings are shared by all outputs."""
        coefficients = [int(coefficient) for coefficient in self._matrix[:, column]]
        highest = max(coefficients).bit_length()
        multiple = scratch.bytes[: len(source)]
        for bit in range(highest):
            if bit == 0:
                multiple_now = source
                if highest > 1:
                    np.copyto(multiple, source)
            else:
                scratch.double()
                multiple_now = multiple
            for coefficient, output in zip(coefficients, outputs, strict=True):
                if coefficient >> bit & 1:
                    np.bitwise_xor(output, multiple_now, out=output)


def _columns_of_bit(row: npt.NDArray[np.uint8]) -> list[list[int]]:
    """For each bit from the highest set one down to bit 0: the columns whose coefficient has it."""
    highest = int(row.max()).bit_length()
    return [np.flatnonzero(row >> bit & 1).tolist() for bit in reversed(range(highest))]


def _evaluate(
    columns_of_bit: list[list[int]], sources: Sequence[ByteArray], output: ByteArray, scratch: _Scratch
) -> None:
    """Horner's rule for one output and one block."""
    if len(columns_of_bit) <= 1:
        _xor_all([sources[column] for columns in columns_of_bit for column in columns], output)
        return
    accumulator = scratch.bytes[: len(output)]
    _xor_all([sources[column] for column in columns_of_bit[0]], accumulator)
    for columns in columns_of_bit[1:]:
        scratch.double()
        for column in columns:
            np.bitwise_xor(accumulator, sources[column], out=accumulator)
    np.copyto(output, accumulator)


def _xor_all(sources: Sequence[ByteArray], output: ByteArray) -> None:
    if not sources:
        output.fill(0)
    elif len(sources) == 1:
        np.copyto(output, sources[0])
    else:
        np.bitwise_xor(sources[0], sources[1], out=output)
        for source in sources[2:]:
            np.bitwise_xor(output, source, out=output)
