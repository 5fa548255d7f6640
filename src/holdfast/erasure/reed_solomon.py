"""Systematic Cauchy Reed-Solomon codes over preallocated blocks.

A code k + m turns k data blocks into m parity blocks of the same length; any k of the k + m *shards* give back the
others. Shards are numbered: 0..k-1 are the data, k..k+m-1 the parities. The code works byte by byte, so every call may
be given the same range of all its shards, and decoding a range reads and computes only that range.

    code = ReedSolomon(4, 2)
    code.encode(data, parity)                                  # 4 blocks in, 2 blocks written
    code.decode({0: a, 2: c, 3: d, 5: q}, {1: out})            # shards 1 and 4 are lost, 1 is wanted

Shards may differ in length: what a data shard lacks counts as zeros, and a parity is as long as its longest data shard.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from holdfast.erasure.blocks import Block, BlockTransform, readable
from holdfast.erasure.kernels import Kernel, default_kernel
from holdfast.erasure.matrices import cauchy, choose_sources, recovery
from holdfast.errors import UsageError

_MAX_RECOVERIES = 64


@dataclass(frozen=True)
class Recovery:
    """How wanted shards come from others: all at once by ``transform.apply``, or one by one by ``transform.add``."""

    sources: tuple[int, ...]
    """Shards to read, ascending; column j of the transform is ``sources[j]``. Those that contribute nothing are left
    out."""
    wanted: tuple[int, ...]
    """Row i of the transform is shard ``wanted[i]``."""
    transform: BlockTransform


class ReedSolomon:
    """One k + m code. Immutable; any thread may call, several at once on different outputs.

    Attributes:
        num_data: k.
        num_parity: m.
        matrix: uint8 [m, k], see `holdfast.erasure.matrices`.
    """

    def __init__(self, num_data: int, num_parity: int, *, kernel: Kernel | None = None) -> None:
        """Prepare the code.

        Args:
            num_data: k, at least 1.
            num_parity: m, at least 1; k + m at most 255.
            kernel: what does the arithmetic; by default the best one on this host.

        Raises:
            UsageError: no such code, or HOLDFAST_ISAL names a library that cannot be used.
        """
        self.num_data = num_data
        self.num_parity = num_parity
        self.matrix = cauchy(num_data, num_parity)
        self.matrix.setflags(write=False)
        self._kernel = kernel or default_kernel()
        self._encoder = BlockTransform(self.matrix, self._kernel)
        self._recovery = functools.lru_cache(maxsize=_MAX_RECOVERIES)(self._make_recovery)

    def __repr__(self) -> str:
        return f"ReedSolomon({self.num_data}, {self.num_parity}, kernel={self._kernel.name})"

    def encode(self, data: Sequence[Block], parity: Sequence[Block]) -> None:
        """Write every parity block from all data blocks.

        Args:
            data: k blocks; shorter ones count as followed by zeros.
            parity: m writable blocks, each at least as long as the longest data block; what lies behind is zeroed.

        Raises:
            UsageError: see `BlockTransform.apply`; or a parity block that is too short.
        """
        longest = max((len(readable(block)) for block in data), default=0)
        for block in parity:
            if len(readable(block)) < longest:
                raise UsageError(f"a parity block of {len(readable(block))} bytes for {longest} bytes of data")
        self._encoder.apply(data, parity)

    def accumulate(
        self, source: int, block: Block, parity: Mapping[int, Block], *, offset: int = 0, overwrite: bool = False
    ) -> None:
        """Take one data shard, or a part of it, into the parities held here: they grow as chunks arrive.

        After each data shard's bytes were taken in exactly once, in any order, the parities equal those of `encode`.
        Taking a range in twice removes it again: keeping a record of sources is the caller's part.

        Args:
            source: which data shard, 0..k-1.
            block: its bytes from `offset` on.
            parity: parity number 0..m-1 -> the whole writable parity block. Zero them before, or see `overwrite`.
            offset: place of `block` in its shard, in bytes.
            overwrite: the first source of this range: replace what the parities hold in it.

        Raises:
            UsageError: see `BlockTransform.add`.
        """
        self._encoder.add(source, block, parity, offset=offset, overwrite=overwrite)

    def recovery(self, available: Collection[int], wanted: Sequence[int]) -> Recovery:
        """Which of the available shards to read, and the sums that give the wanted ones; prepared once per pattern.

        Args:
            available: shard numbers that can be read, at least k.
            wanted: shard numbers, data or parity.

        Raises:
            UsageError: fewer than k are available, or no such shard.
        """
        self._check_shards([*available, *wanted])
        return self._recovery(choose_sources(self.num_data, available), tuple(wanted))

    def decode(self, available: Mapping[int, Block], wanted: Mapping[int, Block], *, offset: int = 0) -> None:
        """Write wanted shards, or one range of them, from any k available ones.

        Args:
            available: shard number -> the whole block; at least k. A data shard that is shorter than others must be
                given at its true length.
            wanted: shard number -> writable block for its bytes from `offset` on.
            offset: first wanted byte within the shards.

        Raises:
            UsageError: fewer than k are available, no such shard, or see `BlockTransform.apply`.
        """
        if offset < 0:
            raise UsageError(f"decoding cannot begin at offset {offset}")
        if not wanted:
            return
        plan = self.recovery(tuple(available), tuple(wanted))
        outputs = list(wanted.values())
        end = offset + max(len(readable(block)) for block in outputs)
        plan.transform.apply([readable(available[source])[offset:end] for source in plan.sources], outputs)

    def _make_recovery(self, sources: tuple[int, ...], wanted: tuple[int, ...]) -> Recovery:
        matrix = recovery(self.matrix, sources, wanted)
        used = np.flatnonzero(matrix.any(axis=0)) if wanted else np.arange(len(sources))
        return Recovery(
            sources=tuple(sources[column] for column in used),
            wanted=wanted,
            transform=BlockTransform(np.ascontiguousarray(matrix[:, used]), self._kernel),
        )

    def _check_shards(self, shards: Collection[int]) -> None:
        total = self.num_data + self.num_parity
        wrong = sorted(shard for shard in shards if not 0 <= shard < total)
        if wrong:
            raise UsageError(f"no shards {wrong} in a {self.num_data}+{self.num_parity} code: they are 0..{total - 1}")
