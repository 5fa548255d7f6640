"""What ``holdfast doctor`` says about erasure coding: the active kernel, the CPU's flags, the speed measured now."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from holdfast.erasure.kernels import Choice, default_choice
from holdfast.erasure.reed_solomon import ReedSolomon

_RELEVANT_FLAGS = frozenset(
    ("ssse3", "sse4_1", "sse4_2", "avx", "avx2", "avx512f", "avx512bw", "gfni", "vpclmulqdq", "asimd", "neon", "sve")
)
"""Instruction sets that ISA-L chooses its code by, x86 and Arm."""

_CPU_INFO = Path("/proc/cpuinfo")
_NUM_DATA, _NUM_PARITY = 4, 2
_REPEATS = 7


@dataclass(frozen=True, kw_only=True)
class KernelReport:
    """All plain data, ready for ``--json``."""

    kernel: str
    """``isa-l`` or ``numpy``."""
    library: str | None
    """Where ISA-L was found."""
    rejected: tuple[tuple[str, str], ...]
    """(library, reason) of each that was tried in vain."""
    machine: str
    cpu_flags: tuple[str, ...]
    """Those that matter here, sorted; empty where /proc/cpuinfo does not tell."""
    encode_gb_s: float
    """4+2 encoding: 10^9 bytes of data per second, one thread, median of seven."""
    memcpy_gb_s: float
    """The same bytes copied, measured in turns with encoding: the limit."""

    def lines(self) -> tuple[str, ...]:
        """For people."""
        where = f" ({self.library})" if self.library else ", slower: `pip install pyeclib` brings ISA-L"
        return (
            f"erasure kernel: {self.kernel}{where}",
            f"CPU: {self.machine}, {' '.join(self.cpu_flags) or 'flags unknown'}",
            f"4+2 encoding: {self.encode_gb_s:.1f} GB/s of data on one core (memcpy {self.memcpy_gb_s:.1f} GB/s)",
        )


def kernel_report(choice: Choice | None = None, *, block_bytes: int = 1 << 20) -> KernelReport:
    """Measure the kernel of this process; takes about 50 ms and 10 MB.

    Args:
        choice: another kernel to report on.
        block_bytes: length of each of the four data blocks.
    """
    choice = choice or default_choice()
    code = ReedSolomon(_NUM_DATA, _NUM_PARITY, kernel=choice.kernel)
    data = list(np.random.default_rng(0).integers(0, 256, (_NUM_DATA, block_bytes), dtype=np.uint8))
    copies = list(np.zeros((_NUM_DATA, block_bytes), dtype=np.uint8))
    parity = list(np.zeros((_NUM_PARITY, block_bytes), dtype=np.uint8))

    def copy() -> None:
        for source, target in zip(data, copies, strict=True):
            np.copyto(target, source)

    times: dict[str, list[float]] = {"copy": [], "encode": []}
    for _ in range(_REPEATS):
        times["copy"].append(_seconds(copy))
        times["encode"].append(_seconds(lambda: code.encode(data, parity)))
    gigabytes = _NUM_DATA * block_bytes / 1e9
    return KernelReport(
        kernel=choice.kernel.name,
        library=choice.library,
        rejected=choice.rejected,
        machine=platform.machine(),
        cpu_flags=_cpu_flags(_CPU_INFO),
        encode_gb_s=gigabytes / statistics.median(times["encode"]),
        memcpy_gb_s=gigabytes / statistics.median(times["copy"]),
    )


def _seconds(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _cpu_flags(cpu_info: Path) -> tuple[str, ...]:
    """The relevant flags of the first CPU in a /proc/cpuinfo; x86 calls the line "flags", Arm "Features"."""
    try:
        text = cpu_info.read_text()
    except OSError:
        return ()
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip().lower() in ("flags", "features"):
            return tuple(sorted(_RELEVANT_FLAGS.intersection(value.split())))
    return ()
