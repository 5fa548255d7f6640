"""The matrices of the code: which sum of data blocks each parity block is, and which sum gives a lost block back.

**Construction.** Start from the Cauchy matrix a[i, j] = 1 / (x_i + y_j) with x_i = k + i and y_j = j, every square
submatrix of which is invertible (J. Blömer et al., "An XOR-based erasure-resilient coding scheme", 1995). Multiplying
a row or a column by a non-zero constant keeps that, so each column is scaled to make the first row all ones, then each
row to make the first column all ones. This gives, for nothing:

* parity 0 is the XOR of the data, so k + 1 is plain RAID-5 and one lost block costs one XOR;
* with k = 1 every parity is a copy: 1 + 1 is a mirror;
* rows do not depend on m: lowering m means dropping the last parity blocks, the others stay valid.

A Vandermonde matrix would not do: stacked under the identity it is not always invertible (ISA-L, ``erasure_code.h``).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from holdfast.erasure.gf256 import INVERSES, PRODUCTS, ByteArray, invert, matmul
from holdfast.erasure.redundancy import MAX_SHARDS
from holdfast.errors import UsageError


def cauchy(num_data: int, num_parity: int) -> ByteArray:
    """The coding matrix of a k + m code: parity = matrix x data.

    Returns:
        uint8 [num_parity, num_data].

    Raises:
        UsageError: a number below one, or more than 255 shards in all.
    """
    if num_data < 1 or num_parity < 1 or num_data + num_parity > MAX_SHARDS:
        raise UsageError(
            f"no {num_data}+{num_parity} code: at least one data and one parity shard, at most {MAX_SHARDS} in all"
        )
    rows = np.arange(num_data, num_data + num_parity)
    columns = np.arange(num_data)
    matrix: ByteArray = INVERSES[rows[:, None] ^ columns[None, :]]
    matrix = PRODUCTS[matrix, INVERSES[matrix[0]][None, :]]
    scale = INVERSES[matrix[:, 0]][:, None]
    matrix = PRODUCTS[matrix, scale]
    assert matrix.all()
    return matrix


def choose_sources(num_data: int, available: Collection[int]) -> tuple[int, ...]:
    """The k shards to decode from: data shards first (their bytes are copied, not computed), then low parities.

    Raises:
        UsageError: fewer than k are available.
    """
    chosen = tuple(sorted(set(available))[:num_data])
    if len(chosen) < num_data:
        raise UsageError(f"decoding needs {num_data} shards, only {len(chosen)} are available: {list(chosen)}")
    return chosen


def recovery(matrix: ByteArray, sources: Sequence[int], wanted: Sequence[int]) -> ByteArray:
    """The matrix that computes wanted shards from k others.

    With the lost data D_l, the present data D_p and the parities P in use, C_l D_l = P + C_p D_p; only C_l, as large as
    the number of lost data shards, is inverted.

    Args:
        matrix: uint8 [num_parity, num_data], the coding matrix.
        sources: k shard indices in ascending order (0..k-1 data, k.. parity).
        wanted: shard indices, any.

    Returns:
        uint8 [len(wanted), k]: row i times the blocks of `sources` is shard ``wanted[i]``.
    """
    num_data = matrix.shape[1]
    present = [shard for shard in sources if shard < num_data]
    used = [shard - num_data for shard in sources if shard >= num_data]
    lost = sorted(set(range(num_data)) - set(present))
    assert len(used) == len(lost), (sources, num_data)
    data = np.zeros((num_data, num_data), dtype=np.uint8)
    data[present, range(len(present))] = 1
    if lost:
        inverse = invert(matrix[np.ix_(used, lost)])
        data[lost, : len(present)] = matmul(inverse, matrix[np.ix_(used, present)])
        data[lost, len(present) :] = inverse
    rows = [data[shard] if shard < num_data else matmul(matrix[[shard - num_data]], data)[0] for shard in wanted]
    return np.array(rows, dtype=np.uint8).reshape(len(wanted), num_data)
