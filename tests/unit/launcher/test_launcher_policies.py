"""The launcher's pure parts beside membership: restart budget, ranks, session book, timeline, seats' names."""

from __future__ import annotations

from typing import Literal

import msgspec
import pytest

from holdfast.checkpoint.version import GenerationId
from holdfast.launcher.arguments import HoldOptions
from holdfast.launcher.budget import RestartBudget
from holdfast.launcher.events import AnyEvent, Recovery
from holdfast.launcher.ranks import node_ranks, places
from holdfast.launcher.recoveries import RecoveryBook
from holdfast.launcher.run import Ending, exit_code
from holdfast.launcher.seats import Tenant, job_key
from holdfast.launcher.sessions import SessionBook
from holdfast.launcher.timeline import Timeline, describe_failure
from holdfast.launcher.wire import Failure, NodeInfo, Phase, Plan, Report, SessionState, Verdict, WorkerState
from holdfast.snapshot.messages import RestoreChosen, SessionPhase

GENERATION = GenerationId(incarnation=1, nonce="0123abcd", generation=2)


def failure(code: int = 1, message: str = "ValueError: x", step: int = 5) -> Failure:
    return Failure(
        host="h", global_rank=1, local_rank=1, pid=9, exit_code=code, message=message, step=step, time_s=100.0
    )


def node(name: str, *, workers: int = 2, role: str = "default", rank: int | None = None) -> NodeInfo:
    return NodeInfo(node_id=name, job="j", host=name, pid=1, role=role, num_workers=workers, rank_hint=rank)


# --- restart budget


def test_max_restarts_is_the_total_of_the_job() -> None:
    budget = RestartBudget(max_restarts=2, no_progress=3)
    assert [budget.failed(failure()).restart for _ in range(3)] == [True, True, False]
    assert budget.used == 2


def test_without_max_restarts_there_is_none_before_a_complete_version() -> None:
    budget = RestartBudget(max_restarts=None, no_progress=3)
    assert not budget.failed(failure(-9)).restart


def test_restarts_are_unlimited_while_progress_is_made() -> None:
    budget = RestartBudget(max_restarts=None, no_progress=3)
    for step in range(100):
        budget.progressed(step)
        assert budget.failed(failure(step=step)).restart


def test_the_same_exception_at_the_same_step_twice_stops_the_job() -> None:
    budget = RestartBudget(max_restarts=None, no_progress=3)
    budget.progressed(4)
    assert budget.failed(failure()).restart
    decision = budget.failed(failure())
    assert not decision.restart
    assert "step 5" in decision.reason


@pytest.mark.parametrize("other", [failure(message="KeyError: 'x'"), failure(step=6), failure(code=3)])
def test_another_exception_or_step_is_another_failure(other: Failure) -> None:
    budget = RestartBudget(max_restarts=None, no_progress=3)
    budget.progressed(4)
    assert budget.failed(failure()).restart
    assert budget.failed(other).restart


@pytest.mark.parametrize("again", [failure(-9, ""), failure(0, "in state T for 14 s")])
def test_kills_from_outside_and_hangs_are_never_the_same_failure(again: Failure) -> None:
    budget = RestartBudget(max_restarts=None, no_progress=3)
    budget.progressed(4)
    assert [budget.failed(again).restart for _ in range(4)] == [True, True, True, False]


def test_progress_means_a_larger_step_than_ever() -> None:
    budget = RestartBudget(max_restarts=None, no_progress=2)
    budget.progressed(10)
    assert budget.failed(failure(-9)).restart
    budget.progressed(10)
    budget.progressed(7)
    assert budget.failed(failure(-9)).restart
    assert not budget.failed(failure(-9)).restart


# --- ranks


def test_survivors_keep_their_node_rank_and_newcomers_take_the_vacant_one() -> None:
    nodes = [node("a"), node("c"), node("new")]
    assert node_ranks(nodes, {"a": 0, "b": 1, "c": 2}) == {"a": 0, "c": 2, "new": 1}


def test_a_smaller_world_has_no_gap() -> None:
    ranks = node_ranks([node("a"), node("d")], {"a": 0, "b": 1, "c": 2, "d": 3})
    assert ranks == {"a": 0, "d": 1}


def test_given_node_ranks_decide() -> None:
    nodes = [node("x", rank=1), node("y", rank=0)]
    assert node_ranks(nodes, {"x": 0, "y": 1}) == {"y": 0, "x": 1}


def test_global_and_role_ranks_follow_node_ranks_with_uneven_nodes() -> None:
    nodes = [node("a", workers=3), node("b", workers=1, role="reader"), node("c", workers=2)]
    found = places(nodes, {"a": 1, "b": 0, "c": 2}, {"a": "tcp://a"})
    assert [(p.host, p.first_global_rank, p.num_ranks) for p in found] == [("b", 0, 1), ("a", 1, 3), ("c", 4, 2)]
    assert [(p.first_role_rank, p.role_world_size) for p in found] == [(0, 1), (0, 5), (3, 5)]
    assert [p.daemon for p in found] == ["", "tcp://a", ""]


# --- sessions and timeline


def phase(name: str, rank: int, seconds: float, generation: GenerationId = GENERATION) -> SessionPhase:
    return SessionPhase(generation=generation, global_rank=rank, phase=name, step=0, seconds=seconds)


def test_the_session_book_counts_ranks_once_and_keeps_the_last_time() -> None:
    book = SessionBook()
    book.begin(GENERATION)
    assert book.reached(phase("opened", 0, 5.0))
    assert not book.reached(phase("opened", 0, 6.0))
    assert book.reached(phase("opened", 1, 4.0))
    assert (book.state.opened, book.state.opened_s) == (2, 5.0)


def test_what_an_older_generation_says_is_not_counted() -> None:
    book = SessionBook()
    book.begin(GENERATION)
    older = GenerationId(incarnation=1, nonce="0123abcd", generation=1)
    assert not book.reached(phase("opened", 0, 5.0, older))
    assert not book.chosen(RestoreChosen(generation=older, tier="memory", version=None, step=1, steps_lost=0))


def recovery(had_session: bool) -> tuple[Timeline, Report]:
    cause = describe_failure(failure(-9, ""))
    timeline = Timeline(cause, 100.0, had_session=had_session)
    timeline.stopped(100.2)
    ranks = places([node("a")], {"a": 0}, {})
    plan = Plan(
        leader_id="a", sequence=3, phase=Phase.RUN, generation=GENERATION, restart_count=1, places=ranks, store="h:1"
    )
    timeline.agreed(plan, 100.3)
    report = Report(
        node=node("a"), sequence=9, generation=GENERATION, state=WorkerState.RUNNING, alive=True, started_s=100.5
    )
    return timeline, report


def test_a_recovery_is_told_in_one_line_when_all_ranks_have_finished_a_step() -> None:
    timeline, report = recovery(had_session=True)
    timeline.observe(report)
    assert timeline.line() is None
    state = SessionState(
        opened=2, restored=2, first_step=2, opened_s=101.0, restored_s=101.2, first_step_s=101.9, tier="memory",
        step=37, steps_lost=1,
    )  # fmt: skip
    half = msgspec.structs.replace(state, first_step=1)
    timeline.observe(msgspec.structs.replace(report, session=half))
    assert timeline.line() is None
    timeline.observe(msgspec.structs.replace(report, session=state))
    assert timeline.line() == (
        "generation 2 resumed from memory at step 37: 1 step lost, 1.9 s since rank 1 was killed (SIGKILL)"
    )
    assert timeline.line() is None
    event = timeline.event()
    assert event.phases == {
        "stopped": 0.2, "agreed": 0.3, "started": 0.5, "opened": 1.0, "restored": 1.2, "first_step": 1.9,
    }  # fmt: skip
    assert (event.tier, event.step, event.steps_lost, event.restart_count) == ("memory", 37, 1, 1)


def test_a_recovery_from_storage_says_why_memory_could_not_give_the_state() -> None:
    timeline, report = recovery(had_session=True)
    state = SessionState(opened=2, restored=2, first_step=2, tier="storage", step=30, reason="too many nodes are gone")
    timeline.observe(msgspec.structs.replace(report, session=state))
    line = timeline.line()
    assert line is not None
    assert line.endswith("(too many nodes are gone)")
    assert timeline.event().reason == "too many nodes are gone"


def test_without_a_session_the_line_comes_when_workers_have_started() -> None:
    timeline, report = recovery(had_session=False)
    timeline.observe(report)
    assert timeline.line() == "generation 2 started (restart 1), 0.5 s since rank 1 was killed (SIGKILL)"


@pytest.mark.parametrize(("tier", "told"), [("memory", True), ("storage", True), ("none", False), ("", False)])
def test_the_start_of_a_run_is_a_recovery_only_where_something_is_resumed(tier: str, told: bool) -> None:
    written: list[AnyEvent] = []
    book = RecoveryBook(written.append)
    ranks = places([node("a")], {"a": 0}, {})
    plan = Plan(leader_id="a", sequence=1, phase=Phase.RUN, generation=GENERATION, places=ranks, store="h:1")
    book.agreed(plan)
    state = SessionState(opened=2, restored=2, first_step=2, tier=tier, step=9)
    report = Report(
        node=node("a"), sequence=1, generation=GENERATION, state=WorkerState.RUNNING, alive=True, session=state
    )
    book.observe(report)
    book.close()
    assert [event.tier for event in written if isinstance(event, Recovery)] == ([tier] if told else [])


def test_an_agent_that_leads_from_a_loss_on_tells_of_the_recovery_and_not_only_of_the_start(
    capfd: pytest.CaptureFixture[str],
) -> None:
    book = RecoveryBook(lambda event: None)
    book.begin("the leader's node was lost", 100.0, had_session=True)
    ranks = places([node("a")], {"a": 0}, {})
    book.agreed(Plan(leader_id="a", sequence=1, phase=Phase.RUN, generation=GENERATION, places=ranks, store="h:1"))
    report = Report(
        node=node("a"), sequence=1, generation=GENERATION, state=WorkerState.RUNNING, alive=True, started_s=101.0
    )
    book.observe(report)
    assert capfd.readouterr().err == ""
    state = SessionState(opened=2, restored=2, first_step=2, tier="peers", step=9)
    book.observe(msgspec.structs.replace(report, session=state))
    assert "resumed from peers at step 9" in capfd.readouterr().err


def test_an_exception_is_told_with_its_message() -> None:
    assert describe_failure(failure()) == "rank 1 ended with exit code 1 (ValueError: x)"


# --- seats


def test_the_job_key_follows_the_rendezvous_id_or_else_the_arguments() -> None:
    def key(script: str = "a.py", rendezvous_id: str | None = None, arguments: tuple[str, ...] = ()) -> str:
        return job_key(None, script=script, rendezvous_id=rendezvous_id, arguments=arguments)

    assert key() == key()
    assert key() != key(arguments=("--lr", "1"))
    assert key() != key(script="b.py")
    assert key(rendezvous_id="x", arguments=("1",)) == key(rendezvous_id="x", arguments=("2",))
    assert job_key("my-job", script="a.py", rendezvous_id=None, arguments=()) == "my-job"
    odd = job_key("../x", script="a.py", rendezvous_id=None, arguments=())
    assert "/" not in odd


def test_only_agents_of_one_endpoint_are_neighbours() -> None:
    agent = Tenant(pid=1, endpoint="h:1")
    assert agent.is_neighbour(Tenant(pid=2, endpoint="h:1"))
    assert not agent.is_neighbour(Tenant(pid=2, endpoint="h:2"))
    assert not Tenant(pid=1, endpoint="").is_neighbour(Tenant(pid=2, endpoint=""))
    assert not Tenant(pid=1, endpoint="h:1", node_rank=0).is_neighbour(Tenant(pid=2, endpoint="h:1", node_rank=0))


# --- how a job ends


@pytest.mark.parametrize(
    ("kind", "requeue", "expected"),
    [("done", 75, 0), ("stopped", None, 1), ("stopped", 75, 75), ("failed", None, 1), ("failed", 75, 1)],
)
def test_only_a_job_that_is_done_ends_with_0(
    kind: Literal["done", "stopped", "failed"], requeue: int | None, expected: int
) -> None:
    ending = Ending(Verdict(kind=kind, reason=""), {}, None)
    assert exit_code(ending, HoldOptions(requeue_code=requeue)) == expected
