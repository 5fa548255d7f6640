"""Hangs and stragglers from simulated pulses: who is named, and what is restarted."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest

from holdfast.checkpoint.version import GenerationId
from holdfast.launcher.hangs import HangLimits, HangWatch, Hung, Instruction, OrderDump, Resumed, Suspected
from holdfast.launcher.limits import Limits
from holdfast.launcher.member import Member, SendReport
from holdfast.launcher.stacks import describe, digest, parse_stacks
from holdfast.launcher.stragglers import StragglerLimits, StragglerWatch
from holdfast.launcher.wire import NodeInfo, Place, Plan, Pulse
from holdfast.launcher.wire import Phase as PlanPhase
from holdfast.snapshot.control import Phase

DUMP = """\
Thread 0x00007f11 (most recent call first):
  File "/usr/lib/python3.11/selectors.py", line 415 in select
  File "/site/holdfast/snapshot/client.py", line {line} in _run
  File "/usr/lib/python3.11/threading.py", line 982 in run
  File "/usr/lib/python3.11/threading.py", line 1045 in _bootstrap_inner
  File "/usr/lib/python3.11/threading.py", line 1002 in _bootstrap

Current thread 0x00007f22 (most recent call first):
  File "/v/lib/python3.11/site-packages/torch/distributed/distributed_c10d.py", line 2810 in all_reduce
  File "/home/u/train.py", line {own} in step
  File "/home/u/train.py", line 90 in <module>
"""


@dataclass
class Rank:
    """What a simulated worker does; changed by the test as time passes."""

    phase: Phase = Phase.FIRST_STEP
    entered: bool = True
    step: int = 20
    steps_done: int = 20
    inner_beats: int = 3
    beat: float = 0.0
    step_s: float = 1.0
    lead_s: float = 0.2
    exempt: bool = False
    state: str = "S"
    stuck_since: float | None = None
    cpu_per_s: float = 0.0
    cpu_until: float = float("inf")
    io_per_s: float = 0.0
    switches_per_s: float = 0.0
    stack: Callable[[int], str] = lambda number: "same"
    answers: bool = True
    dump: int = 0

    def pulse(self, rank: int, now: float) -> Pulse:
        return Pulse(
            global_rank=rank,
            local_rank=rank,
            pid=1000 + rank,
            phase=int(self.phase),
            entered=self.entered,
            step=self.step,
            steps_done=self.steps_done,
            inner_beats=self.inner_beats,
            silent_s=now - self.beat,
            beat_s=self.beat,
            exempt=self.exempt,
            step_s=self.step_s,
            lead_s=self.lead_s,
            state=self.state,
            stuck_s=0.0 if self.stuck_since is None else now - self.stuck_since,
            cpu_s=self.cpu_per_s * min(now, self.cpu_until),
            io_bytes=int(self.io_per_s * now),
            switches=int(self.switches_per_s * now),
            dump=self.dump,
            stack=self.stack(self.dump),
            frame=f"in train.py:{rank}",
        )


@dataclass
class Job:
    """Ranks, a watch, and the time; every half second the watch sees all ranks."""

    ranks: list[Rank]
    limits: HangLimits = field(default_factory=HangLimits)
    now: float = 0.0

    def __post_init__(self) -> None:
        self.watch = HangWatch(self.limits)
        self.watch.began(len(self.ranks))
        self.seen: list[tuple[float, Instruction]] = []

    def run(self, seconds: float, working: tuple[int, ...] = ()) -> list[Instruction]:
        """Let time pass; ranks in `working` give signs of life. What the watch said meanwhile."""
        begun = len(self.seen)
        end = self.now + seconds
        while self.now < end:
            self.now += 0.5
            for rank in working:
                self.ranks[rank].beat = self.now
            self.watch.observed("host", tuple(rank.pulse(i, self.now) for i, rank in enumerate(self.ranks)))
            for instruction in self.watch.ticked(self.now):
                self.seen.append((self.now, instruction))
                if isinstance(instruction, OrderDump):
                    for rank in self.ranks:
                        rank.dump = instruction.number if rank.answers else rank.dump
        return [instruction for _, instruction in self.seen[begun:]]

    def first(self, kind: type[Instruction]) -> tuple[float, Instruction] | None:
        return next(((at, found) for at, found in self.seen if isinstance(found, kind)), None)


@pytest.fixture
def job() -> Job:
    return Job([Rank(), Rank(), Rank()])


def outside(**changes: Any) -> Rank:
    """A rank that has not entered a Session; it works."""
    usual = {"phase": Phase.NONE, "entered": False, "step": -1, "steps_done": 0, "inner_beats": 0, "cpu_per_s": 0.5}
    return Rank(**(usual | {"step_s": 0.0, "lead_s": 0.0} | changes))


def opening(**changes: Any) -> Rank:
    """A rank that waits for the others to enter the Session."""
    return outside(entered=True, cpu_per_s=0.0, **changes)


STOPPED = {"state": "T", "stuck_since": 0.0, "cpu_per_s": 0.0}


def test_a_job_that_beats_is_left_alone_and_one_rank_is_enough(job: Job) -> None:
    assert job.run(1000, working=(1,)) == []


def test_the_rank_that_stopped_first_is_named_past_a_minute(job: Job) -> None:
    job.ranks[0].step, job.ranks[2].beat, job.ranks[1].beat = 21, 0.4, 0.2
    job.run(59)
    assert job.seen == []
    job.run(5)
    found = job.first(Suspected)
    assert found is not None
    assert found[0] <= 63
    assert found[1].first.global_rank == 1, "the lowest step, then the oldest sign of life"
    assert "in train.py:1" in found[1].text


def test_a_rank_that_got_less_far_into_the_step_stopped_first_though_it_beat_last(job: Job) -> None:
    job.ranks[2].inner_beats, job.ranks[2].beat = 1, 0.4
    job.run(65)
    found = job.first(Suspected)
    assert found is not None
    assert found[1].first.global_rank == 2


def test_slow_steps_raise_the_limit() -> None:
    job = Job([Rank(step_s=20.0), Rank(step_s=20.0)])
    assert job.run(199) == []
    assert job.run(10) != []


def test_two_equal_dumps_of_an_idle_job_end_it(job: Job) -> None:
    job.run(120)
    found = job.first(Hung)
    assert found is not None
    assert 90 <= found[0] <= 96
    assert "idle" in found[1].text


@pytest.mark.parametrize(
    "change",
    [
        lambda rank: setattr(rank, "cpu_per_s", 0.05),
        lambda rank: setattr(rank, "io_per_s", 1e6),
        lambda rank: setattr(rank, "switches_per_s", 1.0),
        lambda rank: setattr(rank, "stack", str),
        lambda rank: setattr(rank, "answers", False),
    ],
    ids=["cpu", "io", "switches", "stacks", "no answer"],
)
def test_one_rank_at_work_keeps_a_silent_job_alive_until_the_hang_timeout(
    job: Job, change: Callable[[Rank], None]
) -> None:
    change(job.ranks[2])
    job.run(595)
    assert job.first(Hung) is None
    assert job.first(Suspected) is not None
    job.run(20)
    found = job.first(Hung)
    assert found is not None
    assert found[0] >= 600


def test_a_short_hang_timeout_needs_no_minute() -> None:
    job = Job([Rank(cpu_per_s=1.0, step_s=0.2), Rank(step=19, step_s=0.2)], HangLimits(hang_timeout_s=5.0))
    job.run(5)
    job.run(5)
    found = job.first(Hung)
    assert found is not None
    assert 5 <= found[0] <= 7
    assert found[1].first.global_rank == 1


def test_a_hang_timeout_below_ten_steps_is_raised_to_them() -> None:
    job = Job([Rank(step_s=3.0)], HangLimits(hang_timeout_s=5.0))
    job.run(29)
    assert job.first(Hung) is None


@pytest.mark.parametrize(("answers", "within_s"), [(True, 10.5), (False, 12.5)])
@pytest.mark.parametrize("state", ["T", "D"])
def test_a_rank_that_stands_still_is_restarted_at_once(job: Job, state: str, answers: bool, within_s: float) -> None:
    job.ranks[1].state, job.ranks[1].stuck_since, job.ranks[1].answers = state, 0.0, answers
    job.run(16, working=(0, 2))
    found, told = job.first(Hung), job.first(Suspected)
    assert found is not None
    assert told is not None
    assert 10 <= told[0] <= found[0] <= within_s, "it has 10 s, and the stacks are there by then"
    assert found[1].first.global_rank == 1
    assert f"state {state}" in found[1].text


def test_a_rank_that_stands_still_for_less_than_ten_seconds_is_no_news(job: Job) -> None:
    job.ranks[1].state, job.ranks[1].stuck_since = "D", 0.0
    job.run(9.5, working=(0, 2))
    job.ranks[1].stuck_since = None
    job.run(600, working=(0, 1, 2))
    assert [found for _, found in job.seen] == [OrderDump(1)]
    job.ranks[1].stuck_since = job.now
    job.run(20, working=(0, 2))
    assert [type(found) for _, found in job.seen[1:]] == [OrderDump, Suspected, Hung]


def test_the_first_two_steps_have_ten_minutes(job: Job) -> None:
    job.ranks[0].steps_done = 1
    assert job.run(599) == []
    assert job.run(10) != []


@pytest.mark.parametrize("phase", [Phase.OPENED, Phase.CLOSED])
def test_without_an_open_session_on_every_rank_there_is_a_warning_but_no_restart(job: Job, phase: Phase) -> None:
    job.ranks[1].phase = phase
    job.run(2000)
    assert job.first(Suspected) is not None
    assert job.first(Hung) is None


@pytest.mark.parametrize(
    ("state", "phase", "ends"),
    [("T", Phase.OPENED, True), ("T", Phase.CLOSED, False), ("D", Phase.OPENED, False), ("D", Phase.NONE, False)],
)
def test_a_rank_that_is_stopped_while_sessions_open_is_ended_one_that_waits_for_storage_is_not(
    job: Job, state: str, phase: Phase, ends: bool
) -> None:
    for rank in job.ranks:
        rank.phase = phase
    job.ranks[1].state, job.ranks[1].stuck_since = state, 0.0
    job.run(30)
    assert job.first(Suspected) is not None
    assert (job.first(Hung) is not None) == ends


# --- before, beside and after a Session


@pytest.mark.parametrize(
    "others",
    [(opening(), outside()), (opening(), opening()), (outside(phase=Phase.RESTORED, entered=True), outside())],
    ids=["one has entered", "all others have", "one is in its first step"],
)
def test_a_rank_that_is_stopped_before_it_enters_the_session_of_the_others_is_ended(others: tuple[Rank, ...]) -> None:
    job = Job([*(dataclasses.replace(rank) for rank in others), outside(**STOPPED)])
    job.run(15)
    told, found = job.first(Suspected), job.first(Hung)
    assert told is not None
    assert found is not None
    assert 10 <= told[0] <= found[0] <= 12.5
    assert found[1].first.global_rank == 2
    assert "left alone" not in told[1].text


@pytest.mark.parametrize(
    "others",
    [
        (outside(), outside()),
        (Rank(), Rank()),
        (opening(), Rank(phase=Phase.CLOSED)),
        (opening(), outside(state="Z")),
        (Rank(phase=Phase.WAITING), opening()),
    ],
    ids=["no session", "steps were made without it", "one has left", "one has ended", "one waits at an agreed step"],
)
def test_a_stopped_rank_outside_a_session_is_told_of_and_left_alone_where_work_would_be_lost(
    others: tuple[Rank, ...],
) -> None:
    job = Job([*(dataclasses.replace(rank) for rank in others), outside(**STOPPED)])
    job.run(15, working=(0,))
    found = job.first(Suspected)
    assert found is not None
    assert 10 <= found[0] <= 12.5
    assert "rank 2 (host, pid 1002) has been in state T for 10 s; it is left alone: end it, or kill -CONT 1002" in (
        found[1].text
    )
    job.run(700, working=(0,))
    assert job.first(Hung) is None


def test_a_rank_in_a_debugger_or_asleep_in_the_kernel_before_its_session_is_not_ended() -> None:
    for state, since in (("t", None), ("D", 0.0)):
        job = Job([opening(), opening(), outside(state=state, stuck_since=since)])
        job.run(700)
        assert job.first(Hung) is None, state


@pytest.mark.parametrize(
    ("phases", "ends"),
    [
        ((Phase.FIRST_STEP, Phase.FIRST_STEP), True),
        ((Phase.CLOSED, Phase.FIRST_STEP), True),
        ((Phase.WAITING, Phase.WAITING), True),
        ((Phase.CLOSED, Phase.CLOSED), False),
        ((Phase.NONE, Phase.FIRST_STEP), False),
    ],
    ids=["in the middle", "by an exception", "at an agreed step", "after the session", "a session of some ranks"],
)
def test_after_a_generation_that_ended_within_a_session_every_rank_is_about_to_enter_one(
    phases: tuple[Phase, Phase], ends: bool
) -> None:
    job = Job([Rank(phase=phase) for phase in phases])
    job.run(1, working=(0, 1))
    for _ in range(2):  # one that ends on the way teaches nothing else
        job.watch.began(2)
        job.ranks[:] = [outside(beat=job.now), outside(beat=job.now)]
        job.run(1)
    job.ranks[1] = outside(**(STOPPED | {"stuck_since": job.now}), beat=job.now)
    job.run(15)
    assert (job.first(Hung) is not None) == ends
    job.ranks[1] = outside(beat=job.now)
    job.watch.began(2)
    job.seen.clear()
    job.run(640)
    assert (job.first(Suspected) is not None) == ends, "it has ten minutes until it opens one"
    job.run(700)
    assert job.first(Hung) is None, "it may be slow"


def test_a_script_without_a_session_is_silent_only_where_no_rank_works() -> None:
    job = Job([outside(cpu_per_s=0.02, cpu_until=900.0), outside(cpu_per_s=0.0), outside(cpu_per_s=0.0)])
    assert job.run(1465) == []
    job.run(50)
    found = job.first(Suspected)
    assert found is not None
    assert "no rank has used CPU or done I/O for 60" in found[1].text
    assert found[1].first.global_rank == 1, "it stopped long before"
    job.run(700)
    assert job.first(Hung) is None
    job.ranks[2].io_per_s = 1e5
    assert [type(found) for found in job.run(60)][-1] is Resumed


def test_idleness_of_an_older_generation_does_not_count() -> None:
    job = Job([outside(cpu_per_s=0.0)])
    job.run(400)
    job.watch.began(1)
    assert job.run(590) == []


def test_a_rank_that_hangs_before_the_session_of_the_others_is_named_after_ten_minutes() -> None:
    job = Job([opening(beat=5.0), outside(beat=7.0), opening(beat=6.0)])
    assert job.run(600) == []
    job.run(20)
    found = job.first(Suspected)
    assert found is not None
    assert found[1].first.global_rank == 1
    assert "rank 1 (host, pid 1001) stopped first, before its Session: in train.py:1" in found[1].text
    job.run(700)
    assert job.first(Hung) is None, "it may be slow"


def test_ranks_that_have_no_part_in_the_session_are_not_named_for_its_silence() -> None:
    job = Job([Rank(), outside(), Rank(step=19)])
    job.run(620)
    found = job.first(Suspected)
    assert found is not None
    assert found[1].first.global_rank == 2
    job.run(700)
    assert job.first(Hung) is None


def test_a_rank_that_ended_without_leaving_its_session_is_named() -> None:
    job = Job([Rank(), Rank(step=19, state="Z")])
    job.run(70)
    found = job.first(Suspected)
    assert found is not None
    assert found[1].first.global_rank == 1


@pytest.mark.parametrize("others", [Rank(phase=Phase.CLOSED), Rank(phase=Phase.CLOSED, state="Z")])
def test_work_after_the_session_is_left_in_peace(others: Rank) -> None:
    job = Job([Rank(phase=Phase.CLOSED, cpu_per_s=0.5), dataclasses.replace(others)])
    assert job.run(700) == []
    job.ranks[0].cpu_per_s = 0.0
    assert job.run(565) == []
    job.run(50)
    found = job.first(Suspected)
    assert found is not None
    assert "no rank has used CPU" in found[1].text
    assert (found[1].first.global_rank == 0) or others.state != "Z"
    job.run(700)
    assert job.first(Hung) is None


def test_a_section_is_exempt_and_counts_again_after_its_limit(job: Job) -> None:
    job.ranks[0].exempt = True
    assert job.run(2000) == []
    job.ranks[0].exempt = False
    job.run(70)
    assert job.first(Suspected) is not None


def test_a_job_that_goes_on_is_cleared_and_suspected_anew(job: Job) -> None:
    job.run(70)
    assert [type(found) for found in job.run(1, working=(0,))] == [Resumed]
    job.run(70)
    assert sum(isinstance(found, Suspected) for _, found in job.seen) == 2
    assert job.first(Hung) is None, "dumps of two suspicions are not compared"


def test_nothing_is_said_before_every_rank_was_seen_nor_after_the_end() -> None:
    job = Job([Rank()])
    job.watch.began(2)
    assert job.run(1000) == []
    job.watch.began(1)
    job.watch.ended()
    assert job.run(1000) == []


def test_steps_of_an_older_generation_do_not_count() -> None:
    job = Job([Rank(step_s=100.0)])
    job.run(1)
    job.watch.began(1)
    job.ranks[0].step_s = 0.1
    job.run(1)
    assert job.watch.limit_s == 60


def test_a_hang_timeout_must_be_positive() -> None:
    with pytest.raises(ValueError, match="0"):
        HangLimits(hang_timeout_s=0)


# --- stacks


def test_stacks_show_the_users_own_call_and_the_innermost() -> None:
    threads = parse_stacks(DUMP.format(line=5, own=88))
    assert [thread.is_ours for thread in threads] == [True, False]
    assert describe(threads) == "in train.py:88 in step (now distributed_c10d.py:2810 in all_reduce)"
    assert describe(()) == "without Python frames"


def test_threads_of_holdfast_make_no_difference_and_the_users_do() -> None:
    usual = digest(parse_stacks(DUMP.format(line=5, own=88)))
    assert digest(parse_stacks(DUMP.format(line=6, own=88))) == usual
    assert digest(parse_stacks(DUMP.format(line=5, own=89))) != usual


# --- stragglers


def watch_for(seconds: float, *pulses: Callable[[int], Pulse]) -> list[str]:
    watch = StragglerWatch(StragglerLimits())
    watch.began(len(pulses))
    texts = []
    for tick in range(int(seconds * 2)):
        watch.observed(tuple(pulse(tick) for pulse in pulses))
        texts += [found.text for found in watch.ticked(tick / 2)]
    return texts


def rank(number: int, *, step_s: float = 1.0, lead_s: float = 0.2, slow_until: int = 10**9) -> Callable[[int], Pulse]:
    def pulse(tick: int) -> Pulse:
        usual = Rank(step=tick, steps_done=tick, step_s=1.0, lead_s=0.2).pulse(number, tick / 2)
        return msgspec.structs.replace(usual, step_s=step_s, lead_s=lead_s) if tick < slow_until else usual

    return pulse


def test_a_rank_with_a_long_lead_is_named_once_though_all_steps_take_the_same() -> None:
    texts = watch_for(100, rank(0), rank(1, lead_s=0.6), rank(2))
    assert len(texts) == 1
    assert "rank 1 is slower" in texts[0]
    assert "400 ms" in texts[0]


def test_a_rank_whose_own_steps_take_longer_is_named() -> None:
    assert "rank 2" in watch_for(100, rank(0), rank(1), rank(2, step_s=1.5))[0]


def test_short_or_small_differences_are_not_told_and_recovery_is() -> None:
    assert watch_for(100, rank(0), rank(1, lead_s=0.3), rank(2)) == []
    assert watch_for(100, rank(0), rank(1, lead_s=0.9, slow_until=40), rank(2)) == []
    texts = watch_for(100, rank(0), rank(1, lead_s=0.9, slow_until=100), rank(2))
    assert ["slower" in text for text in texts] == [True, False]


# --- the seam to membership


def test_pulses_go_out_with_the_next_report_and_not_into_the_next_generation() -> None:
    node = NodeInfo(node_id="a", job="", host="h", pid=1, role="default", num_workers=1)
    member = Member(node=node, limits=Limits(), now=0.0)
    place = Place(
        node_id="a",
        node_rank=0,
        host="h",
        daemon="",
        role="default",
        num_ranks=1,
        first_global_rank=0,
        first_role_rank=0,
        role_world_size=1,
    )

    def plan(sequence: int, number: int) -> Plan:
        generation = GenerationId(incarnation=1, nonce="7f3a9c02", generation=number)
        run = PlanPhase.RUN
        return Plan(leader_id="a", sequence=sequence, phase=run, generation=generation, places=(place,), ballot=number)

    member.planned(plan(1, 1), 0.0)
    member.ticked(1.0)
    member.pulses((Rank().pulse(0, 1.0),))
    assert member.ticked(1.1) == []
    (sent,) = member.ticked(2.0)
    assert isinstance(sent, SendReport)
    assert len(sent.report.pulses) == 1
    member.gone(plan(1, 1).generation, 2.1)
    member.planned(plan(2, 2), 2.2)
    assert member.report.pulses == ()
