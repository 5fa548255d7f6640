"""A restarted worker never meets the addresses of the dead attempt."""

from __future__ import annotations

import launcher_stale_store as script
import pytest

from support.jobs import BIN


@pytest.mark.campaign  # `make test`: one recovery for one kill in the kill matrix; a store each in test_launcher_run
def test_one_kill_costs_one_restart_with_gloo() -> None:
    launcher = [str(BIN / "holdfast"), "run", "--standalone", "--hold-snapshot-memory", "0"]
    code, attempts, _ = script.measure(launcher)
    assert (code, attempts) == (0, 2)
