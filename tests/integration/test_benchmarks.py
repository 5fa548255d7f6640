"""Each benchmark still runs: its short form ends well and says what it measured; of that it judges no time."""

from __future__ import annotations

import importlib
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
    timed = [bar for bar in found["bars"] if not bar.get("counts")]
    assert timed
    assert all(bar.get("met", bar.get("passed")) is None for bar in timed), timed


def test_every_benchmark_has_a_short_form_and_a_place_among_the_results() -> None:
    assert {"erasure.py", "stall.py"} <= set(RUNNABLE)
    results = (BENCHMARKS / "RESULTS.md").read_text()
    assert [name for name in RUNNABLE if f"## {name}" not in results] == []


def test_a_short_form_says_what_it_does_not_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    measure = importlib.import_module("measure")
    missed = measure.Estimate(2.0, 2.0, 2.0, 1)
    timed, counted = measure.Bar("seconds", missed, 1.0), measure.Bar("bytes", missed, 1.0, counts=True)
    assert measure.lines_of([timed, counted], quick=True).splitlines() == [
        "MISSED  bytes: 2 [2, 2] (bar 1)",
        "not judged in --quick  seconds: 2 [2, 2] (bar 1)",
    ]
    codes = [measure.exit_code(bars, quick=quick) for bars in ([timed], [counted]) for quick in (False, True)]
    assert codes == [1, 0, 1, 1]
    assert measure.exit_code([], quick=True, whole=False) == 1
    assert [bar["met"] for bar in json.loads(measure.as_json({}, [timed, counted], quick=True))["bars"]] == [
        None,
        False,
    ]


def test_rivals_in_a_folder_beside_are_found_from_anywhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    recovery = importlib.import_module("recovery")
    monkeypatch.chdir(tmp_path)
    for subject in recovery.GUESTS:
        _, environment = recovery.commands(subject, tmp_path / "run", 9, 1, Path(".rivals"))
        assert environment["PYTHONPATH"] == str(tmp_path / ".rivals")
