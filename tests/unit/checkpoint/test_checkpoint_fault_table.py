"""docs/fault-table.md says what is observed, in both columns."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from support.fault_table import ROWS, SLOW

_TESTS = Path(__file__).parents[2]
_PAGE = _TESTS.parent / "docs" / "fault-table.md"


def _observed(side: str, *options: str) -> dict[str, str]:
    command = [sys.executable, str(_TESTS / "support" / "fault_table.py"), "--side", side, *options]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=800)
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


def _documented(column: int) -> dict[str, str]:
    lines = [line for line in _PAGE.read_text().splitlines() if line.startswith("| ")][1:]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return {row[0]: row[column] for row in cells}


def test_the_page_has_every_row() -> None:
    assert list(_documented(1)) == list(ROWS)


def test_our_column_is_what_is_observed() -> None:
    found = _observed("ours", "--quick")
    assert found == {name: text for name, text in _documented(1).items() if name not in SLOW}


@pytest.mark.campaign
def test_our_slow_rows_and_the_column_of_dcp_are_what_is_observed() -> None:
    assert _observed("ours") == _documented(1)
    theirs = _observed("dcp")
    assert theirs.keys() == ROWS.keys()
    if torch.__version__.startswith("2.13."):  # the page is about this release
        assert theirs == _documented(2)
