"""What an agent sees of its own workers: real processes, and a control page."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from holdfast.checkpoint.version import GenerationId
from holdfast.launcher.watching import NodeWatch, family_cpu_s, read_process
from holdfast.snapshot.control import ControlPage, Phase


def test_what_a_worker_has_started_counts_as_its_work() -> None:
    work = "import time\nwhile time.process_time() < 0.6: pass"

    def cpu_s_of_others() -> float:
        family, own = family_cpu_s(os.getpid()), read_process(os.getpid())
        assert own is not None
        return family - own.cpu_s

    before = cpu_s_of_others()
    deadline = time.monotonic() + 60
    with subprocess.Popen([sys.executable, "-c", f"{work}\ninput()"], stdin=subprocess.PIPE) as child:
        while cpu_s_of_others() - before < 0.5:
            assert child.poll() is None
            assert time.monotonic() < deadline, "the work of a process that lives is not seen"
            time.sleep(0.01)
        child.communicate(b"\n", timeout=60)
    assert cpu_s_of_others() - before >= 0.5, "nothing is lost when it ends"


def test_nobody_waits_for_the_stacks_of_a_process_that_is_stopped(tmp_path: Path) -> None:
    generation = GenerationId(incarnation=1, nonce="7f3a9c02", generation=1)
    with subprocess.Popen(["sleep", "600"]) as child, ControlPage.create(tmp_path / "control") as page:
        page.rank(0).enter(generation, child.pid)
        watch = NodeWatch(tmp_path, tmp_path)
        watch.begin(generation, 4)
        pids = {0: child.pid}
        try:
            child.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, child.pid, os.WSTOPPED | os.WNOWAIT)
            assert [(pulse.global_rank, pulse.state, pulse.stuck_s) for pulse in watch.look(pids, 0.0)] == [(4, "T", 0)]
            watch.dump(1, pids, 7.0)
            assert [pulse.dump for pulse in watch.look(pids, 7.5)] == [0], "others may be about to answer"
            (pulse,) = watch.look(pids, 8.0)
            assert (pulse.dump, pulse.stuck_s) == (1, 8.0)
            assert "out of reach (state T)" in pulse.frame
            assert (tmp_path / "stacks" / f"{generation}-dump-1-rank-00004.txt").read_text().startswith("state T")
            child.send_signal(signal.SIGCONT)
            os.waitid(os.P_PID, child.pid, os.WCONTINUED | os.WNOWAIT)
            assert [pulse.stuck_s for pulse in watch.look(pids, 20.0)] == [0.0]
            watch.dump(2, pids, 20.0)
            assert [pulse.dump for pulse in watch.look(pids, 22.5)] == [1], "it may still answer"
            assert [pulse.dump for pulse in watch.look(pids, 23.0)] == [2]
        finally:
            watch.close()
            child.kill()


def test_a_worker_outside_a_session_is_seen_and_nobody_waits_for_its_stacks(tmp_path: Path) -> None:
    generation = GenerationId(incarnation=1, nonce="7f3a9c02", generation=1)
    with subprocess.Popen(["sleep", "600"]) as child:
        watch = NodeWatch(tmp_path / "no arena", tmp_path)
        watch.begin(generation, 4)
        pids = {0: child.pid}
        try:
            (pulse,) = watch.look(pids, 1.0)
            assert (pulse.global_rank, pulse.entered, pulse.phase, pulse.silent_s) == (4, False, Phase.NONE, 0)
            watch.dump(1, pids, 2.0)
            assert [pulse.dump for pulse in watch.look(pids, 2.5)] == [0], "others may be about to answer"
            (pulse,) = watch.look(pids, 3.0)
            assert (pulse.dump, pulse.silent_s) == (1, 2.0)
            assert pulse.frame == f"its stacks come with a Session (state {pulse.state})"
            assert (tmp_path / "stacks" / f"{generation}-dump-1-rank-00004.txt").read_text().startswith("state ")
            with ControlPage.create(tmp_path / "control") as page:
                page.rank(0).enter(generation, child.pid)
                other = NodeWatch(tmp_path, tmp_path)
                other.begin(generation, 4)
                assert [pulse.entered for pulse in other.look(pids, 4.0)] == [True]
                other.begin(GenerationId(incarnation=1, nonce="7f3a9c02", generation=2), 4)
                assert [pulse.entered for pulse in other.look(pids, 4.5)] == [False], "what an older one left behind"
                other.close()
        finally:
            watch.close()
            child.kill()


def test_work_of_what_a_worker_outside_a_session_has_started_is_read_now_and_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []

    def family(pid: int) -> float:
        read.append(pid)
        return float(len(read))

    monkeypatch.setattr("holdfast.launcher.watching.family_cpu_s", family)
    watch = NodeWatch(tmp_path, tmp_path)
    watch.begin(GenerationId(incarnation=1, nonce="7f3a9c02", generation=1), 0)
    seen = [watch.look({0: os.getpid()}, now / 2)[0].cpu_s for now in range(50)]
    assert seen == [1.0] * 20 + [2.0] * 20 + [3.0] * 10
