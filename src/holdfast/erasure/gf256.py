"""Arithmetic in GF(2^8) with the reduction polynomial x^8 + x^4 + x^3 + x^2 + 1 (0x11d), by tables.

The field of RAID-6 (H. P. Anvin, "The mathematics of RAID-6"), of ISA-L and of most storage codes. Addition is XOR;
2 generates the multiplicative group. This module is the reference: short, exact and slow. Blocks of state go through
the kernels (`holdfast.erasure.kernels`), which are checked against it before they are used.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

ByteArray = npt.NDArray[np.uint8]

POLYNOMIAL = 0x11D


def _multiplication_table() -> ByteArray:
    """All 256 x 256 products, from powers and logarithms of the generator 2."""
    powers = np.zeros(510, dtype=np.uint8)
    logarithms = np.zeros(256, dtype=np.int64)
    element = 1
    for exponent in range(255):
        powers[exponent] = powers[exponent + 255] = element
        logarithms[element] = exponent
        element <<= 1
        if element & 0x100:
            element ^= POLYNOMIAL
    table: ByteArray = powers[logarithms[:, None] + logarithms[None, :]]
    table[0, :] = 0
    table[:, 0] = 0
    return table


PRODUCTS: ByteArray = _multiplication_table()
"""uint8 [256, 256], read only: ``PRODUCTS[a, b]`` is a times b."""
PRODUCTS.setflags(write=False)

INVERSES: ByteArray = np.concatenate([np.zeros(1, np.uint8), np.argmax(PRODUCTS[1:] == 1, axis=1).astype(np.uint8)])
"""uint8 [256], read only: ``INVERSES[a]`` times a is 1; entry 0 means nothing."""
INVERSES.setflags(write=False)


def matmul(a: ByteArray, b: ByteArray) -> ByteArray:
    """The product of two matrices over the field.

    Args:
        a: uint8 [rows, inner].
        b: uint8 [inner, columns]; its rows may be blocks of state, which makes this the oracle of every kernel.

    Returns:
        uint8 [rows, columns].
    """
    product = np.zeros((a.shape[0], b.shape[1]), dtype=np.uint8)
    for inner in range(a.shape[1]):
        product ^= PRODUCTS[a[:, inner, None], b[inner][None, :]]
    return product


def invert(matrix: ByteArray) -> ByteArray:
    """The inverse of a square matrix over the field, by Gauss-Jordan elimination.

    Raises:
        ValueError: the matrix is singular.
    """
    size = matrix.shape[0]
    work = np.concatenate([matrix, np.eye(size, dtype=np.uint8)], axis=1)
    for column in range(size):
        candidates = np.flatnonzero(work[column:, column])
        if candidates.size == 0:
            raise ValueError(f"a {size} x {size} matrix over GF(2^8) is singular: no pivot in column {column}")
        pivot = column + int(candidates[0])
        work[[column, pivot]] = work[[pivot, column]]
        work[column] = PRODUCTS[INVERSES[work[column, column]], work[column]]
        factors = work[:, column].copy()
        factors[column] = 0
        work ^= PRODUCTS[factors[:, None], work[column][None, :]]
    return work[:, size:].copy()
