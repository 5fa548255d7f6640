"""The order in which samples come: a permutation for each epoch, computed sample by sample.

A Feistel network on the smallest even number of bits that holds the sample numbers, with cycle walking (Black and
Rogaway, "Ciphers with Arbitrary Finite Domains", 2002): a permutation of exactly ``range(num_samples)`` that needs no
memory, whatever the size of the data, and gives the same order with every version of torch and numpy.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 8
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1

Numbers = NDArray[np.uint64]


def shuffled(positions: Numbers, num_samples: int, *, seed: int, epoch: int) -> Numbers:
    """Which sample stands at each position of an epoch's order.

    Args:
        positions: uint64, each below `num_samples`, any shape.
        num_samples: at least 1.
        seed: of the whole run; any int.
        epoch: 0-based.

    Returns:
        uint64 of the same shape: for all positions together, a permutation of ``range(num_samples)``.
    """
    half_bits = max(1, ((num_samples - 1).bit_length() + 1) // 2)
    keys = _keys(seed, epoch)
    found = _feistel(positions, half_bits, keys)
    while (outside := found >= num_samples).any():
        found[outside] = _feistel(found[outside], half_bits, keys)
    return found


def _keys(seed: int, epoch: int) -> list[np.uint64]:
    """A key for each round: both numbers go through the mixer, so that neighbouring seeds share nothing."""
    state = (seed & _MASK) ^ int(_mix(np.array([(epoch + 1) * _GOLDEN & _MASK], dtype=np.uint64))[0])
    return [_mix(np.array([(state + i * _GOLDEN) & _MASK], dtype=np.uint64))[0] for i in range(1, _ROUNDS + 1)]


def _feistel(values: Numbers, half_bits: int, keys: list[np.uint64]) -> Numbers:
    """A permutation of ``range(2 ** (2 * half_bits))``: each round is undone by running it backwards."""
    bits, low = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> bits, values & low
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & low)
    return (left << bits) | right


def _mix(values: Numbers) -> Numbers:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014): every input bit changes about half of the output bits."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
