"""A restarted worker never meets the addresses of the dead attempt."""

from __future__ import annotations

from pathlib import Path

import launcher_stale_store as script
import pytest

from support.jobs import BIN


@pytest.mark.campaign  # `make test`: one recovery for one kill in the kill matrix; a store each in test_launcher_run
def test_one_kill_costs_one_restart_with_gloo(tmp_path: Path) -> None:
    flags = ["--standalone", "--hold-snapshot-memory", "0", "--hold-run-dir", str(tmp_path / "run")]
    code, attempts, _ = script.measure([str(BIN / "holdfast"), "run", *flags])
    assert (code, attempts) == (0, 2)
