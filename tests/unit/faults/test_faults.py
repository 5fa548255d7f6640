"""Schedules of rehearsed failures: parsing, what is due when, and firing once per run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.errors import UsageError
from holdfast.faults import (
    NODE_KINDS,
    RECORD_NAME,
    Fault,
    Injector,
    Kind,
    RehearsedFault,
    When,
    flip_bit,
    format_schedule,
    parse_schedule,
    read_fired,
)
from holdfast.testing import Faults


def test_a_schedule_lists_its_faults_in_order() -> None:
    first, second = parse_schedule("kill:rank=1,step=20,when=copy;raise:rank=0,step=31")
    assert first == Fault(kind=Kind.KILL, rank=1, step=20, when=When.COPY)
    assert second == Fault(kind=Kind.RAISE, rank=0, step=31)


def test_spaces_and_a_last_semicolon_do_not_matter() -> None:
    assert parse_schedule(" kill: rank=1, step=2 ; ") == parse_schedule("kill:rank=1,step=2")
    assert parse_schedule("") == ()


def test_kinds_of_a_node_default_to_node_0_and_corrupt_to_commit() -> None:
    agent, corrupt = parse_schedule("kill-agent:step=4;corrupt:rank=0,step=3")
    assert (agent.node, agent.rank) == (0, None)
    assert corrupt.when is When.COMMIT


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("explode:rank=1,step=2", "unknown kind 'explode'"),
        ("kill:rank=1", "needs step="),
        ("kill:step=3", "needs rank="),
        ("kill:rank=-1,step=3", "needs rank="),
        ("kill:rank=one,step=3", "is not a number"),
        ("kill:rank=1,step=3,when=lunch", "is not one of begin"),
        ("kill:rank=1,step=3,colour=red", "is no key=value"),
        ("kill:rank=1,step=3,step=4", "given twice"),
        ("kill:rank=1,step", "is no key=value"),
        ("kill:node=0,step=3", "takes rank="),
        ("kill-daemon:rank=0,step=3", "takes node="),
        ("kill-daemon:node=0,step=3,when=copy", "takes no when="),
        ("exit:rank=0,step=3,code=300", "0 to 255"),
        ("kill:rank=0,step=3,seconds=2", "seconds= belongs to"),
        ("slow:rank=0,step=3,seconds=-2", "must be positive"),
        ("slow:rank=0,step=3,seconds=nan", "must be positive"),
        ("slow:rank=0,step=3,steps=0", "must be positive"),
        ("corrupt:rank=0,step=3,when=copy", "when=commit"),
        ("kill:rank=0,step=-3", "not be negative"),
    ],
)
def test_a_bad_entry_is_one_clear_line(text: str, expected: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_schedule(text)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@st.composite
def faults(draw: st.DrawFn) -> Fault:
    kind = draw(st.sampled_from(list(Kind)))
    number = st.integers(0, 99)
    place = {"node" if kind in NODE_KINDS else "rank": draw(number)}
    when = When.BEGIN if kind in NODE_KINDS else draw(st.sampled_from(list(When)))
    return Fault(
        kind=kind,
        when=When.COMMIT if kind is Kind.CORRUPT else when,
        step=draw(number),
        code=draw(st.integers(0, 255)) if kind is Kind.EXIT else 1,
        seconds=draw(st.floats(0.001, 1e6)) if kind in (Kind.SLOW, Kind.PYHANG) else None,
        steps=draw(st.integers(1, 9)) if kind is Kind.SLOW else 1,
        generation=draw(st.none() | number),
        **place,
    )


@given(st.lists(faults()))
def test_every_schedule_survives_its_own_text(schedule: list[Fault]) -> None:
    assert list(parse_schedule(format_schedule(schedule))) == schedule


def test_a_fault_fires_once_at_the_first_instant_from_its_step_on(tmp_path: Path) -> None:
    injector = Injector(parse_schedule("raise:rank=1,step=5,when=forward"), tmp_path, rank=1)
    injector.at(When.FORWARD, 4)
    injector.at(When.BACKWARD, 6)
    with pytest.raises(RehearsedFault, match="rank 1 at step 7"):
        injector.at(When.FORWARD, 7)
    injector.at(When.FORWARD, 8)
    assert [(fired.index, fired.step, fired.pid) for fired in read_fired(tmp_path)] == [(0, 7, os.getpid())]


def test_other_ranks_and_other_generations_are_left_alone(tmp_path: Path) -> None:
    schedule = parse_schedule("raise:rank=1,step=0;raise:rank=0,step=0,generation=3")
    Injector(schedule, tmp_path, rank=0, generation=1).at(When.BEGIN, 9)
    assert read_fired(tmp_path) == ()
    with pytest.raises(RehearsedFault):
        Injector(schedule, tmp_path, rank=0, generation=3).at(When.BEGIN, 9)


def test_a_restarted_worker_does_not_meet_a_fired_fault_again(tmp_path: Path) -> None:
    schedule = parse_schedule("raise:rank=0,step=1;raise:rank=0,step=2")
    with pytest.raises(RehearsedFault):
        Injector(schedule, tmp_path, rank=0).at(When.BEGIN, 1)
    successor = Injector(schedule, tmp_path, rank=0)
    successor.at(When.BEGIN, 1)
    with pytest.raises(RehearsedFault):
        successor.at(When.BEGIN, 2)
    assert not Injector(schedule, tmp_path, rank=0).wants(*When)


def test_the_record_is_there_before_a_killed_process_is_gone(tmp_path: Path) -> None:
    script = (
        "import pathlib, sys\nfrom holdfast.faults import *\n"
        "Injector(parse_schedule('kill:rank=0,step=3'), pathlib.Path(sys.argv[1]), rank=0).at('begin', 3)\n"
    )
    process = subprocess.run([sys.executable, "-c", script, tmp_path], check=False, timeout=240)
    assert process.returncode == -signal.SIGKILL
    assert [fired.fault for fired in read_fired(tmp_path)] == ["kill:step=3,rank=0"]


def test_exit_ends_the_process_with_the_code_given(tmp_path: Path) -> None:
    script = (
        "from holdfast.faults import *\n"
        "Injector(parse_schedule('exit:rank=0,step=0,code=7'), None, rank=0).at('begin', 0)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False, timeout=240).returncode == 7


def test_a_line_torn_by_a_crash_is_left_out(tmp_path: Path) -> None:
    with pytest.raises(RehearsedFault):
        Injector(parse_schedule("raise:rank=0,step=1"), tmp_path, rank=0).at(When.BEGIN, 1)
    with (tmp_path / RECORD_NAME).open("ab") as record:
        record.write(b'{"index":1,"fa')
    assert len(read_fired(tmp_path)) == 1


def test_a_slow_rank_is_slow_for_so_many_steps_and_recorded_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    monkeypatch.setattr("holdfast.faults.time.sleep", slept.append)
    injector = Injector(parse_schedule("slow:rank=0,step=2,seconds=0.5,steps=3"), tmp_path, rank=0)
    for step in range(10):
        injector.at(When.BEGIN, step)
    assert slept == [0.5, 0.5, 0.5]
    assert len(read_fired(tmp_path)) == 1


def test_corrupt_flips_one_bit_of_the_data_and_waits_for_a_buffer(tmp_path: Path) -> None:
    injector = Injector(parse_schedule("corrupt:rank=0,step=2"), tmp_path, rank=0)
    image = bytearray(10_000)
    injector.at(When.COMMIT, 2)
    assert read_fired(tmp_path) == ()
    injector.at(When.COMMIT, 3, buffer=memoryview(image))
    assert sum(value.bit_count() for value in image) == 1
    assert not any(image[:4096])


def test_a_bit_flipped_twice_is_the_old_one() -> None:
    image = bytearray(b"holdfast")
    flip_bit(memoryview(image))
    assert image != b"holdfast"
    flip_bit(memoryview(image))
    assert image == b"holdfast"


def test_the_agent_gets_its_own_faults_and_workers_never_do(tmp_path: Path) -> None:
    schedule = parse_schedule("kill-daemon:node=1,step=4;kill:rank=1,step=1")
    agent = Injector(schedule, tmp_path, node=1)
    agent.at(When.BEGIN, 9)
    assert agent.node_fault(3) is None
    fault = agent.node_fault(5)
    assert fault is not None
    assert fault.kind is Kind.KILL_DAEMON
    assert agent.node_fault(6) is None
    assert Injector(schedule, tmp_path, node=1).node_fault(6) is None


def test_hooks_are_wanted_only_while_a_fault_names_their_instant(tmp_path: Path) -> None:
    injector = Injector(parse_schedule("raise:rank=0,step=1,when=backward"), tmp_path, rank=0)
    assert injector.wants(When.FORWARD, When.BACKWARD)
    assert not injector.wants(When.FORWARD)
    with pytest.raises(RehearsedFault):
        injector.at(When.BACKWARD, 1)
    assert not injector.wants(When.BACKWARD)


def test_faults_know_whether_all_of_them_fired(tmp_path: Path) -> None:
    faults = Faults("raise:rank=0,step=1;raise:rank=1,step=1")
    assert faults.environment() == {"HOLDFAST_FAULTS": "raise:step=1,rank=0;raise:step=1,rank=1"}
    for rank in range(2):
        assert not faults.all_fired(tmp_path)
        with pytest.raises(RehearsedFault):
            Injector(faults.schedule, tmp_path, rank=rank).at(When.BEGIN, 1)
    assert faults.all_fired(tmp_path)
