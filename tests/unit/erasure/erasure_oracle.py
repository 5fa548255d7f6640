"""Reed-Solomon parity computed another way: reedsolo's field arithmetic, a closed formula, and bytes.translate."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import reedsolo

from holdfast.erasure.kernels import Kernel, choose_kernel

reedsolo.init_tables(0x11D)


def kernels() -> dict[str, Kernel]:
    """Every kernel of this host by name."""
    chosen = (choose_kernel().kernel, choose_kernel("none").kernel)
    return {kernel.name: kernel for kernel in chosen}


def coefficient(num_data: int, row: int, column: int) -> int:
    """Entry of the normalised Cauchy matrix: (k ^ j) (k + i) / (((k + i) ^ j) k)."""
    numerator = reedsolo.gf_mul(num_data ^ column, num_data + row)
    return int(reedsolo.gf_div(numerator, reedsolo.gf_mul((num_data + row) ^ column, num_data)))


def parity_of(data: Sequence[bytes], num_parity: int) -> list[bytes]:
    """All parities of data blocks, as long as the longest."""
    length = max((len(block) for block in data), default=0)
    parities = []
    for row in range(num_parity):
        total = 0
        for column, block in enumerate(data):
            factor = coefficient(len(data), row, column)
            table = bytes(int(reedsolo.gf_mul(factor, value)) for value in range(256))
            total ^= int.from_bytes(block.ljust(length, b"\0").translate(table), "little")
        parities.append(total.to_bytes(length, "little"))
    return parities


def random_blocks(seed: int, count: int, length: int) -> list[bytes]:
    """Reproducible blocks."""
    return [block.tobytes() for block in np.random.default_rng(seed).integers(0, 256, (count, length), dtype=np.uint8)]
