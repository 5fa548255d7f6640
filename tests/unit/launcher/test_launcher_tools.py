"""`holdfast doctor`, `status` and `report`: what they find, and their exit codes."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from holdfast.checkpoint.version import GenerationId
from holdfast.errors import PeerError, UsageError
from holdfast.launcher import cli, health, report, status
from holdfast.launcher.events import EventLog, GenerationStarted, HangEvent, Noticed, Recovery, RunEnded, RunStarted
from holdfast.launcher.notices import GpuErrors, HealthCheck, NoticeFile, ask_gpus
from holdfast.launcher.seats import RunRecord, Seat, Tenant

GENERATION = GenerationId(incarnation=1, nonce="7f3a9c02", generation=2)


def recorded(run_dir: Path, *, outcome: str | None) -> None:
    """The log of a run with one recovery."""
    with EventLog(run_dir, "h") as log:
        log.write(RunStarted(run_id="abc", command="train.py", arguments=("--lr", "1"), nproc=2, job="j"), 1000.0)
        for number in (1, 2):
            log.enter(0, f"i01-7f3a9c02-g000{number}")
            log.write(
                GenerationStarted(members=("h",), world_size=2, restart_count=number - 1, store="", pids=(1, 2)), 1001.0
            )
        log.write(HangEvent(change="hung", text="rank 1 stands still", global_rank=1, step=7), 1005.0)
        phases = {"stopped": 0.1, "agreed": 0.2, "first_step": 0.5}
        log.write(
            Recovery(cause="rank 1 hangs", restart_count=1, tier="memory", step=7, steps_lost=1, phases=phases), 1006.0
        )
        if outcome is not None:
            log.write(RunEnded(outcome=outcome, exit_code=0, reason="all workers ended"), 1010.0)


def test_a_report_sums_up_recoveries_and_losses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorded(tmp_path, outcome="done")
    assert cli.main(["report", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["outcome"], found["seconds"], found["generations"], found["hangs"]) == ("done", 10.0, 2, 1)
    assert (found["steps_lost"], found["recovery_seconds"]) == (1, 0.5)
    assert found["recoveries"][0]["cause"] == "rank 1 hangs"
    assert cli.main(["report", str(tmp_path)]) == 0
    assert "rank 1 hangs" in capsys.readouterr().out


def test_a_report_adds_up_what_checksums_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorded(tmp_path, outcome="done")
    for host in ("g", "i"):
        with EventLog(tmp_path, host) as log:
            for count in (1, 3):
                log.write(Noticed(severity="warning", text=f"block {count}", about="damage", count=count), 1007.0)
    assert cli.main(["report", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["found"] == {"damage": 6}
    assert cli.main(["report", str(tmp_path)]) == 0
    assert "6 damage" in capsys.readouterr().out


def test_a_report_of_a_failed_run_is_a_problem_and_of_no_run_a_wrong_usage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["report", str(tmp_path)]) == 2
    recorded(tmp_path, outcome="failed")
    assert cli.main(["report", str(tmp_path)]) == 1
    assert cli.main(["report"]) == 2
    assert "usage" in capsys.readouterr().err


def test_a_run_without_an_end_runs_until_it_was_silent_for_a_day(tmp_path: Path) -> None:
    recorded(tmp_path, outcome=None)
    events = report.read_events(tmp_path)
    assert report.summarise(events, now=1100.0).outcome == "running"
    assert report.summarise(events, now=1100.0).seconds == 100
    assert report.summarise(events, now=1e6).outcome == "unknown"
    with pytest.raises(UsageError, match="empty"):
        report.summarise([], now=0.0)


def test_a_second_launch_of_a_run_has_its_own_end(tmp_path: Path) -> None:
    recorded(tmp_path, outcome="stopped")
    with EventLog(tmp_path, "h") as log:
        log.write(RunStarted(run_id="abc", command="train.py", arguments=(), nproc=2, job="j"), 2000.0)
    assert report.summarise(report.read_events(tmp_path), now=2001.0).outcome == "running"


# --- doctor


def test_the_doctor_prints_every_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--json", "--directory", str(tmp_path)]) == 0
    found = {entry["check"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert {"versions", "disk", "memory", "shm", "cgroup", "files", "clock", "kernel", "erasure"} <= found.keys()
    assert all(entry["status"] in ("ok", "warn") for entry in found.values())


def test_an_endpoint_that_does_not_answer_is_a_problem(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{server.getsockname()[1]}"
        assert health.reach(endpoint).status == "fail"
        server.listen()
        assert health.reach(endpoint).status == "ok"
    assert health.reach("nowhere").status == "fail"
    assert cli.main(["doctor", "--endpoint", "127.0.0.1:1"]) == 1
    assert "does not answer" in capsys.readouterr().out


def test_small_file_systems_are_told_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert health.disk(tmp_path / "not" / "yet").status == "ok"
    usage = health.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(health.shutil, "disk_usage", lambda path: usage._replace(free=1 << 20))
    assert health.disk(tmp_path).status == "fail"
    shm = os.statvfs_result((4096, 4096, 16384, 16384, 16384, 0, 0, 0, 0, 255))
    monkeypatch.setattr(health.os, "statvfs", lambda path: shm)
    found = health.shared_memory()
    assert found.status == "warn"
    assert "emptyDir" in found.text


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("0, NVIDIA H200, 0, No, No", "ok"),
        ("0, NVIDIA H200, 0, 0, 0", "ok"),
        ("1, NVIDIA L4, [N/A], [N/A], [N/A]", "ok"),
        ("3, NVIDIA H200, 2, No, No", "fail"),
        ("3, NVIDIA H200, 0, Yes, No", "fail"),
    ],
)
def test_memory_errors_of_gpus_are_problems(line: str, expected: str) -> None:
    assert health.parse_gpu_line(line).status == expected


def test_the_worst_finding_decides() -> None:
    found = [health.Finding(check="a", status=each, text="") for each in ("ok", "fail", "warn")]
    assert health.worst(found) == "fail"
    assert health.worst([]) == "ok"


# --- status


@pytest.fixture
def short() -> Iterator[Path]:
    """A directory whose sockets would fit: pytest's own has a long name."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        yield Path(name)


def test_status_shows_a_job_that_runs_and_one_that_lost_its_launcher(
    short: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(short))
    assert cli.main(["status"]) == 0
    assert "no job" in capsys.readouterr().out
    assert not (short / "holdfast").exists(), "a look changes nothing"
    with Seat("one", Tenant(pid=os.getpid(), endpoint=""), num_seats=1) as seat:
        seat.write_record(RunRecord(run_id="abc", run_dir="/runs/one", generation=GENERATION))
        assert cli.main(["status", "--json"]) == 0
        (job,) = json.loads(capsys.readouterr().out)
        assert (job["job"], job["state"], job["agent"]) == ("one", "running", os.getpid())
        assert job["generation"] == str(GENERATION)
    assert cli.main(["status", "one"]) == 1, "its launcher has gone"
    assert "lingering" in capsys.readouterr().out
    assert cli.main(["status", "other"]) == 1
    assert status.find_jobs()[0].agent == 0


def test_the_lock_of_a_living_agent_is_only_looked_at(tmp_path: Path) -> None:
    lock = tmp_path / "agent.lock"
    lock.write_text('{"pid": 7, "endpoint": ""}')
    with lock.open() as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        assert status._holder(lock) == 7
        with pytest.raises(BlockingIOError), lock.open() as other:
            fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)
    assert status._holder(lock) == 0


# --- what an agent hears of its host


def test_a_notice_file_is_told_once(tmp_path: Path) -> None:
    notice = NoticeFile(tmp_path / "notice")
    assert not notice.arrived(0.0)
    (tmp_path / "notice").touch()
    assert not notice.arrived(0.1), "it is looked for twice a second"
    assert notice.arrived(1.0)
    assert not notice.arrived(9.0)
    assert not NoticeFile(None).arrived(0.0)
    assert not NoticeFile(tmp_path / ("n" * 300)).arrived(0.0), "a place where nothing can be is no reason to fail"


def test_findings_are_events_when_they_change_and_strict_keeps_an_unfit_host_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    findings = [
        health.Finding(check="disk", status="fail", text="full"),
        health.Finding(check="shm", status="ok", text=""),
    ]
    monkeypatch.setattr(health, "quick_checks", lambda directories: list(findings))
    monkeypatch.setattr(health, "has_gpus", lambda: False)
    events: list[object] = []
    check = HealthCheck("warn", (tmp_path,), events.append)
    check.before_the_first_generation()
    check.after_a_failure(0.0)
    assert [(event.check, event.status) for event in events] == [("disk", "fail")]
    findings[0] = health.Finding(check="disk", status="ok", text="room")
    check.after_a_failure(0.0)
    assert [event.status for event in events] == ["fail", "ok"]
    findings[0] = health.Finding(check="disk", status="fail", text="full")
    with pytest.raises(PeerError, match="full"):
        HealthCheck("strict", (), events.append).before_the_first_generation()
    HealthCheck("off", (), events.append).before_the_first_generation()
    assert len(events) == 3


def test_a_full_disk_beside_one_with_room_is_told_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    findings = [health.Finding(check="disk", status=status, text=status) for status in ("ok", "fail")]  # type: ignore[arg-type]  # both are literals
    monkeypatch.setattr(health, "quick_checks", lambda directories: list(findings))
    events: list[object] = []
    check = HealthCheck("warn", (), events.append)
    for now in range(3):
        check.after_a_failure(float(now))
    assert len(events) == 1
    assert capsys.readouterr().err.count("health: fail") == 1


def test_gpus_are_asked_in_a_process_of_their_own() -> None:
    text = '[{"check": "gpu", "status": "fail", "text": "GPU 1 multiplies wrongly"}]'
    assert ask_gpus(("printf", "%s", text))[0].status == "fail"
    assert ask_gpus(("false",))[0].status == "warn"
    assert ask_gpus(("printf", "nonsense"))[0].status == "warn"


def wait_for(errors: GpuErrors) -> list[health.Finding]:
    """What is found by the time that the driver has answered."""
    if errors._process is not None:
        errors._process.wait(120)
    return errors.look(1.0)


def test_memory_errors_of_gpus_are_asked_for_and_not_waited_for() -> None:
    errors = GpuErrors(("printf", "0, H, 0, 0, 0\\n1, H, 3, 0, 0\\n"))
    assert errors.look(0.0) == []
    errors.ask(0.0)
    errors.ask(0.5)
    assert [finding.status for finding in wait_for(errors)] == ["ok", "fail"]
    assert errors.look(2.0) == []
    for command in (("false",), ("no-such-program",)):
        errors = GpuErrors(command)
        errors.ask(0.0)
        assert wait_for(errors) == []
    errors = GpuErrors(("sleep", "600"))
    errors.ask(0.0)
    assert errors.look(health.SMI_S - 1) == []
    assert errors._process is not None
    assert errors.look(health.SMI_S) == []
    assert errors._process is None, "it was ended"


@pytest.mark.parametrize("level", ["warn", "strict"])
def test_a_host_that_is_unfit_after_a_failure_leaves_where_that_is_strict(
    monkeypatch: pytest.MonkeyPatch, level: str
) -> None:
    findings = [health.Finding(check="disk", status="ok", text="")]
    monkeypatch.setattr(health, "quick_checks", lambda directories: list(findings))
    monkeypatch.setattr(health, "has_gpus", lambda: False)
    events: list[object] = []
    driver = GpuErrors(("printf", "0, H, 7, 0, 0\\n"))
    check = HealthCheck(level, (), events.append, driver)
    check.before_the_first_generation()
    assert not check.look(0.0)
    check.after_a_failure(0.0)
    assert driver._process is not None
    driver._process.wait(120)
    assert [check.look(1.0), check.look(2.0)] == [level == "strict", False], "once is enough"
    assert [event.check for event in events] == ["gpu"]
    findings[0] = health.Finding(check="disk", status="fail", text="full")
    check = HealthCheck(level, (), events.append)
    check.after_a_failure(3.0)
    assert check.look(3.0) == (level == "strict")
