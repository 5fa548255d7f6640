"""How fast erasure coding is, beside memcpy and beside other packages: ``python benchmarks/erasure.py``.

For each code k + m and each operation, all implementations take turns over the same data on one core, and every rate is
bytes of data per second (k blocks; 10^9 bytes). A ratio is taken within each round; its median over the rounds is given
with a 95 % bootstrap interval, and a bar passes only if the whole interval does.

* encode: all parities from all data. memcpy: the same data copied into memory touched before.
* accumulate: the data arrive source by source in 1 MiB chunks, as from peers; the parities grow.
* decode: min(k, m) lost data blocks from the others. pyeclib's call returns all the data, zfec's only what was lost.

reedsolo codes one byte of each block at a time, in pure Python, so it gets a small part of the data. pyeclib and zfec
return fresh memory, so their rates depend on what the allocator does at that size: try others with ``--mib``.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from measure import Estimate, estimate, keep, machine, options_of, ratios

from holdfast.erasure import ReedSolomon
from holdfast.erasure.gf256 import ByteArray
from holdfast.erasure.kernels import Kernel, choose_kernel

CODES = ((1, 1), (4, 1), (4, 2), (8, 2), (8, 4))
OPERATIONS = ("encode", "accumulate", "decode")
IMPLEMENTATIONS = ("isa-l", "numpy", "pyeclib", "zfec", "reedsolo")
CHUNK_BYTES = 1 << 20
REEDSOLO_BYTES = 4 << 10


@dataclass(frozen=True)
class Case:
    """Something to time: running it once takes in `data_bytes`."""

    code: str
    operation: str
    implementation: str
    data_bytes: int
    run: Callable[[], object]


@dataclass(frozen=True)
class Rate:
    """One cell of the table."""

    code: str
    operation: str
    implementation: str
    gb_s: Estimate


@dataclass(frozen=True)
class Bar:
    """What must hold: in every round `faster` over `slower`, both of the encode operation of a code."""

    text: str
    code: str
    faster: str
    slower: str
    at_least: float


BARS = (
    Bar("4+2 encode: isa-l / memcpy", "4+2", "isa-l", "memcpy", 0.7),
    Bar("4+2 encode: isa-l / pyeclib's API", "4+2", "isa-l", "pyeclib", 10),
    Bar("4+2 encode: numpy / reedsolo", "4+2", "numpy", "reedsolo", 20),
)


def installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


@dataclass(frozen=True)
class Stripe:
    """Data and parity of one code, all memory touched."""

    num_data: int
    num_parity: int
    data: list[ByteArray]
    parity: list[ByteArray]

    @property
    def name(self) -> str:
        return f"{self.num_data}+{self.num_parity}"

    @property
    def data_bytes(self) -> int:
        return sum(block.nbytes for block in self.data)

    @property
    def lost(self) -> list[int]:
        """The data blocks that decoding rebuilds."""
        return list(range(min(self.num_data, self.num_parity)))

    @classmethod
    def make(cls, num_data: int, num_parity: int, total_bytes: int) -> Stripe:
        length = total_bytes // num_data
        data = list(np.random.default_rng(num_data).integers(0, 256, (num_data, length), dtype=np.uint8))
        parity = list(np.ones((num_parity, length), dtype=np.uint8))
        ReedSolomon(num_data, num_parity).encode(data, parity)
        return cls(num_data, num_parity, data, parity)


def memcpy_cases(stripe: Stripe) -> list[Case]:
    targets = [np.ones_like(block) for block in stripe.data]

    def copy() -> None:
        for target, source in zip(targets, stripe.data, strict=True):
            np.copyto(target, source)

    return [Case(stripe.name, operation, "memcpy", stripe.data_bytes, copy) for operation in OPERATIONS]


def kernel_cases(stripe: Stripe, kernel: Kernel) -> list[Case]:
    code = ReedSolomon(stripe.num_data, stripe.num_parity, kernel=kernel)
    parity = [np.ones_like(block) for block in stripe.parity]
    numbered = dict(enumerate(parity))
    shards = dict(enumerate([*stripe.data, *stripe.parity]))
    available = {shard: block for shard, block in shards.items() if shard not in stripe.lost}
    rebuilt = {shard: np.ones_like(shards[shard]) for shard in stripe.lost}

    def accumulate() -> None:
        for offset in range(0, len(parity[0]), CHUNK_BYTES):
            for source, block in enumerate(stripe.data):
                chunk = block[offset : offset + CHUNK_BYTES]
                code.accumulate(source, chunk, numbered, offset=offset, overwrite=source == 0)

    runs: dict[str, Callable[[], object]] = {
        "encode": lambda: code.encode(stripe.data, parity),
        "accumulate": accumulate,
        "decode": lambda: code.decode(available, rebuilt),
    }
    for run in runs.values():
        run()
        assert all(np.array_equal(ours, reference) for ours, reference in zip(parity, stripe.parity, strict=True))
    assert all(np.array_equal(rebuilt[shard], shards[shard]) for shard in stripe.lost)
    return [Case(stripe.name, name, kernel.name, stripe.data_bytes, run) for name, run in runs.items()]


def pyeclib_cases(stripe: Stripe) -> list[Case]:
    from pyeclib.ec_iface import ECDriver

    driver: Any = ECDriver(k=stripe.num_data, m=stripe.num_parity, ec_type="isa_l_rs_cauchy")
    whole = b"".join(block.tobytes() for block in stripe.data)
    fragments = driver.encode(whole)
    left = fragments[len(stripe.lost) :]
    assert driver.decode(left) == whole
    runs = {"encode": lambda: driver.encode(whole), "decode": lambda: driver.decode(left)}
    return [Case(stripe.name, name, "pyeclib", len(whole), run) for name, run in runs.items()]


def zfec_cases(stripe: Stripe) -> list[Case]:
    import zfec

    k, total = stripe.num_data, stripe.num_data + stripe.num_parity
    encoder: Any = zfec.Encoder(k, total)
    decoder: Any = zfec.Decoder(k, total)
    blocks = [memoryview(block) for block in stripe.data]
    numbers = tuple(range(k, total))
    shares = [*blocks, *encoder.encode(blocks, numbers)]
    # zfec wants a present data block at its own place, and parities in the places of lost ones.
    order = [k + shard if shard in stripe.lost else shard for shard in range(k)]
    chosen = [shares[shard] for shard in order]
    assert all(decoder.decode(chosen, order)[shard] == blocks[shard] for shard in stripe.lost)
    runs = {"encode": lambda: encoder.encode(blocks, numbers), "decode": lambda: decoder.decode(chosen, order)}
    return [Case(stripe.name, name, "zfec", stripe.data_bytes, run) for name, run in runs.items()]


def reedsolo_cases(stripe: Stripe) -> list[Case]:
    import reedsolo

    k, width = stripe.num_data, stripe.num_data + stripe.num_parity
    codec: Any = reedsolo.RSCodec(stripe.num_parity, nsize=width)
    interleaved = np.stack(stripe.data)[:, : REEDSOLO_BYTES // k].T.tobytes()
    words = codec.encode(interleaved)
    erased = [word * width + shard for word in range(len(interleaved) // k) for shard in stripe.lost]
    damaged = bytearray(words)
    for position in erased:
        damaged[position] = 0
    assert codec.decode(damaged, erase_pos=erased)[0] == interleaved
    runs = {"encode": lambda: codec.encode(interleaved), "decode": lambda: codec.decode(damaged, erase_pos=erased)}
    return [Case(stripe.name, name, "reedsolo", len(interleaved), run) for name, run in runs.items()]


def cases_of(stripe: Stripe) -> list[Case]:
    kernels = {kernel.name: kernel for kernel in (choose_kernel().kernel, choose_kernel("none").kernel)}
    cases = memcpy_cases(stripe)
    for kernel in kernels.values():
        cases += kernel_cases(stripe, kernel)
    peers = {"pyeclib": pyeclib_cases, "zfec": zfec_cases, "reedsolo": reedsolo_cases}
    for module, make in peers.items():
        if installed(module):
            cases += make(stripe)
    return cases


def measure(cases: Sequence[Case], repeats: int) -> dict[Case, list[float]]:
    """Rates in GB/s per case and round; within a round the order is shuffled, so that drift hits all alike."""
    rates: dict[Case, list[float]] = {case: [] for case in cases}
    order, draw = list(cases), random.Random(0)
    for round_number in range(repeats + 1):
        draw.shuffle(order)
        for case in order:
            start = time.perf_counter()
            result = case.run()
            seconds = time.perf_counter() - start
            del result
            if round_number > 0:  # the first round warms up
                rates[case].append(case.data_bytes / seconds / 1e9)
    return rates


def judge(bar: Bar, rates: dict[Case, list[float]]) -> dict[str, Any]:
    """The bar's ratio, round by round; without one of the two it is missed, for nothing was shown."""
    found = {case.implementation: values for case, values in rates.items() if _is_encode(case, bar.code)}
    result = {"bar": bar.text, "at_least": bar.at_least}
    if bar.faster not in found or bar.slower not in found:
        missing = bar.slower if bar.faster in found else bar.faster
        return {**result, "ratio": None, "passed": False, "reason": f"{missing} is not installed"}
    ratio = estimate(ratios(found[bar.faster], found[bar.slower]))
    return {**result, "ratio": asdict(ratio), "passed": ratio.low >= bar.at_least}


def _is_encode(case: Case, code: str) -> bool:
    return case.code == code and case.operation == "encode"


def print_table(rates: Sequence[Rate]) -> None:
    columns = ("memcpy", *IMPLEMENTATIONS)
    cells = {(rate.code, rate.operation, rate.implementation): rate.gb_s for rate in rates}
    print("MB/s of data, one core: median [95 % interval]")
    print(f"{'code':5} {'operation':11}" + "".join(f"{column:>21}" for column in columns))
    for code, operation in dict.fromkeys((rate.code, rate.operation) for rate in rates):
        row = (cells.get((code, operation, column)) for column in columns)
        print(f"{code:5} {operation:11}" + "".join(f"{_cell(value):>21}" for value in row))


def _cell(value: Estimate | None) -> str:
    if value is None:
        return "-"
    mb_s = [1000 * part for part in (value.median, value.low, value.high)]
    digits = 0 if mb_s[0] >= 100 else 1 if mb_s[0] >= 1 else 3
    median, low, high = (f"{part:.{digits}f}" for part in mb_s)
    return f"{median} [{low}, {high}]"


def print_bars(bars: Sequence[dict[str, Any]], *, quick: bool) -> None:
    for bar in bars:
        if bar["ratio"] is None:
            outcome = f"not measured: {bar['reason']}"
        else:
            ratio = Estimate(**bar["ratio"])
            outcome = f"{ratio.median:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"
        verdict = "not judged in --quick" if quick else "ok" if bar["passed"] else "MISSED"
        print(f"{verdict:6} {bar['bar']:36} at least {bar['at_least']:g}: {outcome}")


def parse_arguments() -> argparse.Namespace:
    parser = options_of(__doc__, quick="4+2 only, the code of the bars, which are not judged")
    parser.add_argument("--repeats", type=int, default=9, help="interleaved rounds, at least 7 (default 9)")
    parser.add_argument("--mib", type=int, default=64, help="MiB of data per stripe (default 64)")
    arguments = parser.parse_args()
    if arguments.repeats < 7 or arguments.mib < 1:
        parser.error("--repeats must be at least 7 and --mib at least 1")
    return arguments


def main() -> int:
    arguments = parse_arguments()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    total_bytes = arguments.mib << 20
    codes = ((4, 2),) if arguments.quick else CODES
    rates: dict[Case, list[float]] = {}
    for num_data, num_parity in codes:
        rates |= measure(cases_of(Stripe.make(num_data, num_parity, total_bytes)), arguments.repeats)
    table = [Rate(c.code, c.operation, c.implementation, estimate(values)) for c, values in rates.items()]
    bars = [judge(bar, rates) for bar in BARS]
    if arguments.quick:
        bars = [{**bar, "passed": None} for bar in bars]
    facts = {
        **machine(),
        "mib": total_bytes >> 20,
        "repeats": arguments.repeats,
        "library": choose_kernel().library,
    }
    keep(json.dumps({**facts, "rates": [asdict(rate) for rate in table], "bars": bars}, indent=2), arguments.json)
    if arguments.json != "-":
        print_table(table)
        print_bars(bars, quick=arguments.quick)
    return int(not (arguments.quick or all(bar["passed"] for bar in bars)))


if __name__ == "__main__":
    sys.exit(main())
