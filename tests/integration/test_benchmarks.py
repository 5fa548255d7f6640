"""Each benchmark still runs: its short form ends well and says what it measured, which is not judged here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
RUNNABLE = sorted(path.name for path in BENCHMARKS.glob("*.py") if "__main__" in path.read_text())


@pytest.mark.campaign
@pytest.mark.parametrize("name", RUNNABLE)
def test_the_short_form_of_a_benchmark_runs(name: str) -> None:
    command = [sys.executable, str(BENCHMARKS / name), "--quick", "--json", "-"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    found = json.loads(ended.stdout[ended.stdout.index("{") :])
    assert found["bars"], found


def test_every_benchmark_has_a_short_form_and_a_place_among_the_results() -> None:
    assert {"erasure.py", "stall.py"} <= set(RUNNABLE)
    results = (BENCHMARKS / "RESULTS.md").read_text()
    assert [name for name in RUNNABLE if f"## {name}" not in results] == []
