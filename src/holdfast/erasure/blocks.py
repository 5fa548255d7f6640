"""Matrices over GF(2^8) that act on blocks of bytes in place: lengths, offsets and overlaps checked, nothing copied."""

from __future__ import annotations

import mmap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from holdfast.erasure.gf256 import ByteArray
from holdfast.erasure.kernels import Kernel, Operator
from holdfast.errors import UsageError

Block = bytes | bytearray | memoryview | mmap.mmap | npt.NDArray[Any]
"""Contiguous bytes at any alignment: whatever offers the buffer protocol. Any: arrays of every dtype are bytes here."""

_MAX_OPERATORS = 256


class BlockTransform:
    """outputs = matrix x sources, at once or one source at a time.

    Blocks need not be equally long: a source that ends early counts as followed by zeros, so nobody pads, and an output
    that ends early is cut off. Any thread may call, several at once on different outputs; the interpreter lock is
    released while bytes are worked on.
    """

    def __init__(self, matrix: ByteArray, kernel: Kernel) -> None:
        """Prepare the matrix.

        Args:
            matrix: uint8 [outputs, sources], both at least one.
            kernel: what does the arithmetic.
        """
        self.matrix = matrix
        self._kernel = kernel
        self._whole = kernel.bind(np.ascontiguousarray(matrix))
        self._operators: dict[tuple[tuple[int, ...], tuple[int, ...]], Operator] = {}

    def apply(self, sources: Sequence[Block], outputs: Sequence[Block]) -> None:
        """Overwrite every output.

        Args:
            sources: one block per column.
            outputs: one writable block per row; they overlap neither each other nor a source.

        Raises:
            UsageError: a wrong number of blocks, one that is not contiguous or not writable, or an overlap.
        """
        rows, columns = self.matrix.shape
        if len(sources) != columns or len(outputs) != rows:
            raise UsageError(
                f"a {rows} x {columns} matrix takes {columns} sources and {rows} outputs, "
                f"got {len(sources)} and {len(outputs)}"
            )
        from_ = [readable(block) for block in sources]
        to = [writable(block) for block in outputs]
        _check_disjoint(from_, to)
        lengths = {len(block) for block in (*from_, *to)}
        if len(lengths) == 1 and 0 not in lengths:
            self._whole.multiply(from_, to)
            return
        start = 0
        for end in sorted(lengths - {0}):
            alive = tuple(column for column in range(columns) if len(from_[column]) >= end)
            open_ = tuple(row for row in range(rows) if len(to[row]) >= end)
            targets = [to[row][start:end] for row in open_]
            if alive and open_:
                self._operator(open_, alive).multiply([from_[column][start:end] for column in alive], targets)
            else:
                for target in targets:
                    target.fill(0)
            start = end

    def add(
        self, column: int, source: Block, outputs: Mapping[int, Block], *, offset: int = 0, overwrite: bool = False
    ) -> None:
        """Take in one source: outputs grow as sources arrive, in any order, each exactly once.

        Args:
            column: which source this is.
            source: its bytes from `offset` on; may be a part of it.
            outputs: row of the matrix -> writable block, whole (not cut at `offset`); rows left out are not touched.
            offset: where in each output the bytes go, in bytes.
            overwrite: replace what these bytes of the outputs hold instead of adding to it: for the first source, in
                place of zeroing.

        Raises:
            UsageError: no such column or row, an output that ends before the source does, or an overlap.
        """
        if not outputs:
            return
        num_rows, columns = self.matrix.shape
        rows = tuple(sorted(outputs))
        if not (0 <= column < columns and rows[0] >= 0 and rows[-1] < num_rows):
            raise UsageError(f"no source {column} or no output in {rows}: the matrix is {num_rows} x {columns}")
        from_ = readable(source)
        to = [writable(outputs[row]) for row in rows]
        for row, output in zip(rows, to, strict=True):
            if not 0 <= offset <= offset + len(from_) <= len(output):
                raise UsageError(
                    f"{len(from_)} bytes at offset {offset} do not fit output {row} of {len(output)} bytes"
                )
        targets = [output[offset : offset + len(from_)] for output in to]
        _check_disjoint([from_], targets)
        if not len(from_):
            return
        if overwrite:
            self._operator(rows, (column,)).multiply([from_], targets)
        else:
            self._operator(rows, (column,)).add(0, from_, targets)

    def _operator(self, rows: tuple[int, ...], columns: tuple[int, ...]) -> Operator:
        """The prepared part of the matrix; a race of threads prepares it twice and loses nothing."""
        operator = self._operators.get((rows, columns))
        if operator is None:
            if len(self._operators) >= _MAX_OPERATORS:
                self._operators.clear()
            operator = self._kernel.bind(np.ascontiguousarray(self.matrix[np.ix_(rows, columns)]))
            self._operators[rows, columns] = operator
        return operator


def readable(block: Block) -> ByteArray:
    """The bytes of a block as a uint8 array, without a copy.

    Raises:
        UsageError: it is not contiguous or offers no buffer.
    """
    if isinstance(block, np.ndarray) and block.dtype == np.uint8 and block.ndim == 1 and block.flags.c_contiguous:
        return block
    try:
        view = memoryview(block)  # type: ignore[arg-type]  # arrays of every dtype offer the buffer protocol
        return np.frombuffer(view if view.nbytes == 0 else view.cast("B"), dtype=np.uint8)
    except (TypeError, ValueError) as error:
        raise UsageError(f"a block must be contiguous bytes, got {type(block).__name__}: {error}") from error


def writable(block: Block) -> ByteArray:
    """As `readable`, for an output.

    Raises:
        UsageError: it cannot be written.
    """
    array = readable(block)
    if not array.flags.writeable:
        raise UsageError(f"an output must be writable, got a read-only {type(block).__name__}")
    return array


def _check_disjoint(sources: Sequence[ByteArray], outputs: Sequence[ByteArray]) -> None:
    """Sources may share memory with each other; an output shares it with nothing."""
    for index, output in enumerate(outputs):
        for other in (*sources, *outputs[:index]):
            if np.may_share_memory(output, other):  # by bounds, which is exact for contiguous blocks
                raise UsageError("an output overlaps another block: give each output memory of its own")
