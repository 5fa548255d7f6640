"""Statistics shared by the benchmarks: medians of interleaved repeats, bootstrap intervals, bars, a table."""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

RESAMPLES = 4000


@dataclass(frozen=True)
class Estimate:
    """A median and its 95 % bootstrap interval."""

    median: float
    low: float
    high: float
    repeats: int

    def __str__(self) -> str:
        return f"{self.median:.4g} [{self.low:.4g}, {self.high:.4g}]"


def estimate(values: Sequence[float]) -> Estimate:
    """Median of `values`, with the interval in which 95 % of resampled medians lie (percentile bootstrap, seeded)."""
    generator = random.Random(0)
    medians = sorted(statistics.median(generator.choices(values, k=len(values))) for _ in range(RESAMPLES))
    return Estimate(
        statistics.median(values), medians[int(0.025 * RESAMPLES)], medians[int(0.975 * RESAMPLES) - 1], len(values)
    )


@dataclass(frozen=True)
class Bar:
    """An upper limit for an estimate. It is met only if the whole interval is below it."""

    name: str
    value: Estimate
    limit: float
    unit: str = ""
    counts: bool = False
    """Whether it is about what can be counted (bytes, recoveries), not about time: short forms judge nothing else."""

    @property
    def met(self) -> bool:
        return self.value.high <= self.limit

    def judged(self, *, quick: bool) -> bool:
        """Whether a form of the benchmark says anything about it."""
        return self.counts or not quick

    def line(self, *, quick: bool) -> str:
        """The verdict, and what it rests on."""
        verdict = ("met   " if self.met else "MISSED") if self.judged(quick=quick) else "not judged in --quick"
        return f"{verdict}  {self.name}: {self.value}{self.unit} (bar {self.limit:g}{self.unit})"


def lines_of(bars: Sequence[Bar], *, quick: bool) -> str:
    """A line for each bar; those that the short form judges first."""
    return "\n".join(bar.line(quick=quick) for bar in sorted(bars, key=lambda bar: not bar.judged(quick=quick)))


def exit_code(bars: Sequence[Bar], *, quick: bool, whole: bool = True) -> int:
    """1 where a bar that is judged is missed, or where not all of it ran."""
    return int(not (whole and all(bar.met for bar in bars if bar.judged(quick=quick))))


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Ratio of each interleaved pair."""
    return [a / b for a, b in zip(above, below, strict=True)]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown, with columns of one width."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in
             [header, ["-" * width for width in widths], *rows]]  # fmt: skip
    return "\n".join(lines)


def machine() -> dict[str, object]:
    """What the numbers were measured on."""
    import torch

    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.machine(),
    )
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "load": os.getloadavg()[0],
    }


def options_of(doc: str | None, *, quick: str) -> argparse.ArgumentParser:
    """A parser with the options that benchmarks share: ``--quick`` and ``--json``.

    Args:
        doc: the module's.
        quick: what the short form is.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--json", metavar="FILE", help="write everything that was measured here; - is stdout")
    return parser


def keep(text: str, path: str | None) -> None:
    """Write where ``--json`` says."""
    if path == "-":
        print(text)
    elif path is not None:
        Path(path).write_text(text)


def as_json(results: dict[str, object], bars: Sequence[Bar], *, quick: bool) -> str:
    """Everything that was measured, for machines. ``met`` is null for bars that are not judged."""
    judged = [{**asdict(bar), "met": bar.met if bar.judged(quick=quick) else None} for bar in bars]
    return json.dumps({"machine": machine(), "results": results, "bars": judged}, indent=1)
