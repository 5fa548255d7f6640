"""Seats: one living agent each, the lowest free one first, nothing left of a job that has ended."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path

import pytest
import zmq

from holdfast.errors import PeerError, UsageError
from holdfast.launcher import daemons, run
from holdfast.launcher.daemons import DaemonLink, Patience
from holdfast.launcher.seats import RunRecord, Seat, Tenant, private, runtime_directory


@pytest.fixture(autouse=True)
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Seats of these tests are in a directory of their own (a short one: sockets have short names)."""
    monkeypatch.setattr("holdfast.launcher.seats.runtime_directory", lambda: tmp_path)
    monkeypatch.setenv("HOLDFAST_ENCRYPT", "control")  # what a run sets for its processes ends with the test
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


def test_what_cannot_be_remembered_costs_nothing_else(base: Path) -> None:
    with seat() as held:
        held.write_record(RunRecord(run_id="r", run_dir="/d"))
        (held.directory / "run.json.new").mkdir()
        held.write_record(RunRecord(run_id="other", run_dir="/d"))
        assert held.record() == RunRecord(run_id="r", run_dir="/d")


def test_a_place_that_takes_no_seats_is_named(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (base / "file").touch()
    with pytest.raises(UsageError, match="XDG_RUNTIME_DIR"):
        private(base / "file" / "seats")
    monkeypatch.setattr("holdfast.launcher.seats.runtime_directory", lambda: base / "file")
    with pytest.raises(UsageError, match="cannot be used"):
        seat().__enter__()


SEVERAL = ["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:1"]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([*SEVERAL, "--hold-iface", "none99"], r"--hold-iface none99: no such interface \(this host has .*\blo\b"),
        (["--hold-iface", "none99"], "no such interface"),
        (["--signals-to-handle", "SIGKILL"], "SIGKILL"),
    ],
)
def test_a_mistake_takes_no_seat(base: Path, flags: list[str], expected: str) -> None:
    with pytest.raises(UsageError, match=expected):
        run.run([*flags, "--hold-run-dir", str(base / "run"), __file__])
    assert list(base.iterdir()) == []


def test_signals_are_heeded_before_there_is_anything_to_leave_behind(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    handlers: list[object] = []

    class Link:
        """Of a daemon that cannot be started."""

        adopted = False

        def __init__(self, *arguments: object, **more: object) -> None:
            handlers.extend(signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT))

        def start(self) -> None:
            raise PeerError("it cannot be started")

        def shut_down(self, *, persist: bool) -> None:
            pass

        def finish(self, timeout_s: float) -> None:
            pass

    monkeypatch.setattr(run, "DaemonLink", Link)
    with pytest.raises(PeerError, match="cannot be started"):
        run.run(["--hold-run-dir", str(base / "run"), __file__])
    assert len({*handlers, signal.SIG_DFL, signal.default_int_handler}) == 3, "one handler of ours"
    assert signal.getsignal(signal.SIGTERM) is before
    assert [path.name for path in base.iterdir()] == ["run"]


def test_a_daemon_that_cannot_be_started_again_is_gone_for_good(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_process(*arguments: object, **more: object) -> None:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    with zmq.Context() as context, seat() as held:
        link = DaemonLink(
            held, context, run_dir=base / "gone", address="127.0.0.1", linger_s=1.0, memory_limit_bytes=None
        )
        monkeypatch.setattr(daemons.subprocess, "Popen", no_process)
        assert not link.died(1.0)


def test_a_daemon_that_does_not_answer_is_killed_once_and_then_given_up() -> None:
    patience = Patience()
    assert patience.spent(1e9) == ""
    patience.asked(0.0)
    assert [patience.spent(now) for now in (29.9, 30.0, 30.1, 59.9)] == ["", "kill", "", ""]
    patience.asked(40.0, again=True)  # its successor is asked, which is silent too
    assert [patience.spent(now) for now in (69.9, 70.0, 1e9)] == ["", "give up", ""]
    patience.asked(100.0)
    patience.answered()
    assert patience.spent(1e9) == ""
    patience.asked(200.0)
    assert [patience.spent(now) for now in (230.0, 260.0, 1e9)] == ["kill", "give up", ""], "not even SIGKILL ends it"
    patience.asked(300.0)
    assert patience.spent(330.0) == "kill", "another generation is another question"
