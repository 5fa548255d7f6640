"""Seats: one living agent each, the lowest free one first, nothing left of a job that has ended."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from holdfast.errors import PeerError, UsageError
from holdfast.launcher.seats import RunRecord, Seat, Tenant, runtime_directory


@pytest.fixture(autouse=True)
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Seats of these tests are in a directory of their own (a short one: sockets have short names)."""
    monkeypatch.setattr("holdfast.launcher.seats.runtime_directory", lambda: tmp_path)
    return tmp_path


def seat(endpoint: str = "h:1", num_seats: int = 2, pid: int = os.getpid()) -> Seat:
    return Seat("job", Tenant(pid=pid, endpoint=endpoint), num_seats=num_seats)


def test_agents_of_one_run_take_the_lowest_free_seat(base: Path) -> None:
    with seat() as first, seat() as second:
        assert (first.number, second.number) == (0, 1)
        with pytest.raises(PeerError, match="all 2 seats"):
            seat().__enter__()
    with seat() as third:
        assert third.number == 0


def test_a_seat_of_another_run_is_an_error_that_names_it() -> None:
    with (
        seat(endpoint="", num_seats=1, pid=1),
        pytest.raises(PeerError, match=r"process 1:.*--hold-job"),
        seat(endpoint="", num_seats=1),
    ):
        pass


def test_the_next_agent_finds_the_run_of_one_that_was_killed(base: Path) -> None:
    record = RunRecord(run_id="r", run_dir="/d")
    with seat() as killed:
        killed.write_record(record)
    with seat() as successor:
        assert successor.record() == record
        successor.clear()
    assert list(base.iterdir()) == [] if base.exists() else True


def test_a_directory_of_somebody_else_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "holdfast").write_text("no directory")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr("holdfast.launcher.seats._MAX_SOCKET_PATH", 1000)
    with pytest.raises(UsageError, match="not a directory of this user"):
        runtime_directory()
