"""Ending workers: by signal, by SIGKILL after the grace, and what is done about those that outlive even that."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs

from holdfast.checkpoint.version import GenerationId
from holdfast.errors import UsageError
from holdfast.launcher.console import say
from holdfast.launcher.processes import Child, Guard, groups_in_use
from holdfast.launcher.signals import SignalPipe, parse_signals
from holdfast.launcher.standby import Standby
from holdfast.launcher.watching import family_cpu_s, read_process
from holdfast.launcher.wire import Phase, Place, Plan
from holdfast.launcher.workers import SURVIVED_S, WorkerExit, WorkerGroup, WorkerSpec, message_of

PLACE = Place(
    node_id="n",
    node_rank=0,
    host="h",
    daemon="",
    role="default",
    num_ranks=2,
    first_global_rank=0,
    first_role_rank=0,
    role_world_size=2,
)
PLAN = Plan(
    leader_id="n",
    sequence=1,
    phase=Phase.RUN,
    generation=GenerationId(incarnation=1, nonce="00000001", generation=1),
    places=(PLACE,),
    store="127.0.0.1:1",
)


@pytest.fixture
def group(tmp_path: Path) -> Iterator[WorkerGroup]:
    """Two workers that sleep."""
    spec = WorkerSpec(
        command="sleep",
        arguments=("600",),
        num_workers=2,
        role="default",
        run_id="r",
        max_restarts=0,
        virtual_local_rank=False,
        signals_to_handle="SIGTERM",
        log_prefix=None,
        logs_specs=DefaultLogsSpecs(log_dir=str(tmp_path)),
        numa_options=None,
    )
    with Guard() as guard:
        made = WorkerGroup(spec, PLAN, PLACE, guard=guard, extra_variables={}, inherited={"PATH": "/usr/bin:/bin"})
        made.start()
        children = dict(made._children)
        yield made
        for child in children.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            if child._process is not None:
                child._process.wait()


def test_workers_that_outlive_sigkill_are_named_after_a_while_and_then_let_be(
    group: WorkerGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    pids = group.pids()
    sent: list[tuple[int, int]] = []
    monkeypatch.setattr(Child, "signal_group", lambda child, number: sent.append((child.pid, number)))  # state D
    group.begin_stop(signal.SIGTERM, 30.0, now=100.0)
    assert not group.tick(129.0)
    assert group.survivors(129.0 + SURVIVED_S) == {}  # the grace of the script is no part of it
    assert not group.tick(130.0)
    assert {number for _, number in sent} == {signal.SIGTERM, signal.SIGKILL}
    assert group.survivors(130.0 + SURVIVED_S - 0.1) == {}
    assert group.survivors(130.0 + SURVIVED_S) == pids
    group.abandon()
    assert group.tick(200.0)
    assert group.descriptors() == {}
    group.finish_logs(5.0)


def test_workers_that_end_by_sigkill_are_no_survivors(group: WorkerGroup) -> None:
    pidfds = list(group.descriptors().values())
    group.begin_stop(signal.SIGKILL, 0.0, now=100.0)
    group.tick(100.0)
    for pidfd in pidfds:
        poller = select.poll()
        poller.register(pidfd, select.POLLIN)
        assert poller.poll(120_000), "a worker did not end"
    assert len(group.collect()) == 2
    assert group.survivors(100.0 + SURVIVED_S) == {}
    assert group.tick(101.0)
    group.finish_logs(5.0)


@pytest.mark.parametrize("left", ["", '{"message": {"mess', "[1, 2]", '{"message": {}}', "\xff" * 10])
def test_an_error_file_that_was_cut_short_is_none(group: WorkerGroup, left: str) -> None:
    Path(group.error_files[0]).write_bytes(left.encode("latin-1"))
    found = group.failure(WorkerExit(local_rank=0, pid=group.pids()[0], exit_code=3))
    assert (found.exitcode, found.error_file, message_of(found)) == (3, "<N/A>", "")


def test_a_message_fits_between_agents(group: WorkerGroup) -> None:
    message = {"message": "caf\udce9 " + "x" * (2 << 20), "extraInfo": {"timestamp": "1"}}
    Path(group.error_files[0]).write_text(json.dumps({"message": message}))
    text = message_of(group.failure(WorkerExit(local_rank=0, pid=group.pids()[0], exit_code=3)))
    assert text.startswith("caf? xxx")
    assert len(text.encode()) < 2000


def test_logs_end_though_nobody_reads_them(group: WorkerGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    group.finish_logs(1.0)
    say("nobody hears this")


def test_a_process_whose_name_is_no_text_is_seen() -> None:
    own = Path("/proc/self/comm")
    before = own.read_bytes()
    own.write_bytes(b"train \xe8\xae")  # a name that the kernel cut in the middle of a character
    try:
        assert read_process(os.getpid()) is not None
        assert os.getpgrp() in groups_in_use(frozenset({os.getpgrp()}))
        assert family_cpu_s(os.getpid()) > 0
    finally:
        own.write_bytes(before.rstrip(b"\n"))


def test_a_standby_whose_files_cannot_be_written_is_none(tmp_path: Path) -> None:
    with Guard() as guard:
        away = tmp_path / "away"
        standby = Standby(sys.executable, guard=guard, names=away / "names", log=away / "log", user_path="/")
        standby.warm_up({})
        change = standby.changed()
        assert change is not None
        assert not change.ready
        assert "cannot be started" in change.text
        standby.close()


def test_a_hangup_that_nohup_ignores_stays_ignored_and_the_end_of_children_does_not() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGCHLD)}
    try:
        for number in before:
            signal.signal(number, signal.SIG_IGN)
        with SignalPipe((signal.SIGHUP, signal.SIGTERM)) as pipe:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGTERM)
            assert pipe.drain() == [signal.SIGTERM]
            assert signal.getsignal(signal.SIGCHLD) is signal.SIG_DFL
        assert [signal.getsignal(number) for number in before] == [signal.SIG_IGN, signal.SIG_IGN]
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with SignalPipe((signal.SIGHUP,)) as pipe:
            os.kill(os.getpid(), signal.SIGHUP)
            assert pipe.drain() == [signal.SIGHUP]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize("name", ["SIGKILL", "SIGSTOP", "SIGCHLD", "SIGNONE"])
def test_signals_that_nobody_can_handle_are_a_mistake(name: str) -> None:
    with pytest.raises(UsageError, match=name):
        parse_signals(f"SIGTERM,{name}")
