"""The membership machines: rules one by one, then under simulation, then with mutants that it must catch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from membership_simulation import Chaos, Simulation

from holdfast.launcher import leader, member
from holdfast.launcher.budget import RestartBudget
from holdfast.launcher.leader import Leader, Limits
from holdfast.launcher.member import Member
from holdfast.launcher.wire import NodeInfo, Phase, Plan, Rejected, Report, StopRequest

CALM = Chaos(until_s=0.0)
SETTLE_S = 30.0


def calm(nodes: int, **settings: object) -> Simulation:
    return Simulation(1, nodes=nodes, chaos=CALM, **settings)  # type: ignore[arg-type]


def restart_counts(simulation: Simulation) -> set[int]:
    return {a.workers.plan.restart_count for a in simulation.agents.values() if a.workers is not None}


def test_all_nodes_start_the_same_first_generation() -> None:
    simulation = calm(3)
    simulation.run(5)
    assert len(simulation.whole_generations()) == 1
    assert simulation.started == [simulation.started[0]] * 3
    assert simulation.started[0].generation == 1


def test_a_failure_on_one_node_restarts_all_with_one_restart_count() -> None:
    simulation = calm(3)
    simulation.run(5)
    simulation.fail_worker(simulation.agents[2])
    simulation.run(3)
    assert [g.generation for g in simulation.started] == [1, 1, 1, 2, 2, 2]
    assert restart_counts(simulation) == {1}


def test_static_node_ranks_are_kept_whatever_the_order_of_joining() -> None:
    for seed in range(20):
        simulation = Simulation(seed, nodes=4, chaos=CALM, node_ranks_given=True).run(5)
        plan = next(iter(simulation.plans.values()))
        assert [place.host for place in plan.places] == ["host0", "host1", "host2", "host3"]


def test_a_silent_node_shrinks_the_world_and_its_return_grows_it_again() -> None:
    limits = Limits(min_nodes=2, max_nodes=3, last_call_s=1)
    simulation = calm(3, limits=limits)
    simulation.run(5)
    simulation.agents[1].paused_until = simulation.now + 10
    simulation.run(5)
    whole = simulation.whole_generations()
    assert [len(simulation.plans[g].places) for g in whole] == [2]
    simulation.run(15)
    whole = simulation.whole_generations()
    assert [len(simulation.plans[g].places) for g in whole] == [3]


def test_survivors_keep_their_node_ranks() -> None:
    simulation = calm(3)
    simulation.run(5)
    (first,) = simulation.whole_generations()
    before = {place.node_id: place.node_rank for place in simulation.plans[first].places}
    victim = next(node_id for node_id, rank in before.items() if rank == 1)
    agent = next(a for a in simulation.agents.values() if a.node_id == victim)
    if agent.node == 0:  # the leader has to live here
        agent = simulation.agents[2]
    simulation._crash(agent)
    simulation.run(12)
    (last,) = simulation.whole_generations()
    after = {place.node_id: place.node_rank for place in simulation.plans[last].places}
    assert len(after) == 3
    assert all(after[node_id] == rank for node_id, rank in before.items() if node_id in after)


def test_below_the_minimum_the_job_waits_for_the_node_to_return() -> None:
    simulation = calm(2)
    simulation.run(5)
    agent = simulation.agents[1]
    del simulation.agents[1]
    simulation.run(20)
    assert simulation.whole_generations() == []
    assert simulation.agents[0].left is None
    simulation._boot(agent.node)
    simulation.run(3)
    assert len(simulation.whole_generations()) == 1


def test_below_the_minimum_the_job_ends_after_the_join_timeout() -> None:
    simulation = calm(2, limits=Limits(min_nodes=2, max_nodes=2, join_timeout_s=10))
    simulation.run(5)
    del simulation.agents[1]
    simulation.run(20)
    assert [agent.left.kind for agent in simulation.ended if agent.left] == ["stopped"]


def test_exhausted_restarts_end_the_job_on_all_nodes() -> None:
    simulation = calm(3, max_restarts=1)
    simulation.run(5)
    for _ in range(2):
        simulation.fail_worker(simulation.agents[1])
        simulation.run(5)
    assert simulation.agents == {}
    assert [agent.left.kind for agent in simulation.ended if agent.left] == ["failed"] * 3


def test_the_job_is_done_only_when_all_nodes_are() -> None:
    simulation = calm(2)
    simulation.run(5)
    simulation.finish_workers()
    simulation.run(3)
    assert simulation.agents == {}
    assert [agent.left.kind for agent in simulation.ended if agent.left] == ["done", "done"]


def test_a_stop_without_a_session_ends_all_nodes_at_once() -> None:
    simulation = calm(2)
    simulation.run(5)
    agent = simulation.agents[1]
    simulation._do(agent, agent.member.asked_to_stop(StopRequest(signal=15), simulation.now))
    simulation.run(3)
    assert [agent.left.kind for agent in simulation.ended if agent.left] == ["stopped", "stopped"]


def test_a_second_request_to_stop_leaves_workers_no_grace() -> None:
    simulation = calm(2, limits=Limits(min_nodes=2, max_nodes=2, grace_s=600))
    simulation.run(5)
    simulation.stubborn = True
    agent = simulation.agents[1]
    for urgent in (False, True):
        assert len(simulation.agents) == 2
        request = StopRequest(signal=15, urgent=urgent)
        simulation._do(agent, agent.member.asked_to_stop(request, simulation.now))
        simulation.run(5)
    assert [other.left.grace_s for other in simulation.ended if other.left] == [0.0, 0.0]


def test_workers_that_not_even_sigkill_ends_fail_the_job() -> None:
    simulation = calm(2, limits=Limits(min_nodes=2, max_nodes=2, stop_timeout_s=5.0))
    simulation.run(5)
    simulation.stubborn = True
    simulation.fail_worker(simulation.agents[1])
    simulation.run(10)
    plan = simulation.agents[1].member.plan
    assert plan is not None
    assert plan.verdict is not None
    assert plan.verdict.kind == "failed"
    assert "SIGKILL" in plan.verdict.reason


def test_an_agent_that_restarts_before_it_was_missed_joins_as_a_new_member() -> None:
    simulation = Simulation(3, nodes=2, chaos=CALM, node_ranks_given=True).run(5)
    simulation._crash(simulation.agents[1])
    simulation.chaos.restart_after_s = (0.1, 0.1)
    simulation.run(15)
    assert len(simulation.whole_generations()) == 1
    assert len({generation.generation for generation in simulation.started}) >= 2


def test_a_node_rank_that_lives_is_not_given_away() -> None:
    limits = Limits(min_nodes=2, max_nodes=2)
    budget = RestartBudget(max_restarts=0, no_progress=3)
    machine = Leader(leader_id="l", job="", nonce="00000000", run_id="r", limits=limits, budget=budget, now=0.0)
    nodes = {
        name: NodeInfo(node_id=name, job="", host=name, pid=1, role="default", num_workers=1, rank_hint=1)
        for name in ("first", "second")
    }
    turned_away: dict[float, str] = {}
    for tick in range(100):
        for name, node in nodes.items():
            for instruction in machine.reported(Report(node=node, sequence=tick), tick / 10):
                if isinstance(instruction, leader.TurnAway):
                    assert instruction.node_id == "second", name
                    turned_away.setdefault(tick / 10, instruction.reason)
    assert min(turned_away) >= limits.dead_after_s  # until then the first one might just not have been missed
    assert "node rank 1 is taken" in turned_away[max(turned_away)]


def test_a_node_that_is_turned_away_leaves_although_it_hears_the_leader() -> None:
    node = NodeInfo(node_id="n", job="", host="h", pid=1, role="default", num_workers=1)
    machine = Member(node=node, limits=Limits(), now=0.0)
    machine.planned(Plan(leader_id="l", sequence=1, phase=Phase.GATHER), 0.1)
    left = [i for i in machine.rejected(Rejected(reason="no room"), 0.2) if isinstance(i, member.Leave)]
    assert [leave.verdict.reason for leave in left] == ["no room"]


def test_a_second_leader_counts_on() -> None:
    simulation = calm(2)
    simulation.run(5)
    simulation.fail_worker(simulation.agents[1])
    simulation.run(3)
    simulation.chaos.restart_after_s = (0.1, 0.1)
    simulation._crash(simulation.agents[0])
    simulation.run(10)
    (whole,) = simulation.whole_generations()
    assert whole.incarnation == 2


def test_limits_that_would_kill_living_nodes_are_refused() -> None:
    with pytest.raises(ValueError, match="dead between beats"):
        Limits(heartbeat_s=2.0, dead_after_s=1.0)


@pytest.mark.parametrize("block", range(10))
def test_any_schedule_of_faults_ends_in_one_running_generation(block: int) -> None:
    _check_all(range(block * 12, block * 12 + 12))


def _check_all(seeds: range) -> None:
    for seed in seeds:
        _check(seed)


def _check(seed: int) -> None:
    nodes = 2 + seed % 4
    limits = Limits(min_nodes=max(1, nodes - seed % 3), max_nodes=nodes, last_call_s=2, join_timeout_s=600)
    chaos = Chaos(until_s=25.0, loss=0.15 * (seed % 3), worker_failures_per_s=0.1)
    static = seed % 5 == 0 and limits.min_nodes == limits.max_nodes
    simulation = Simulation(seed, nodes=nodes, limits=limits, chaos=chaos, node_ranks_given=static)
    simulation.run(chaos.until_s)
    simulation.settle(SETTLE_S)


def _never_wait_for_the_end(machine: Leader, now: float) -> None:
    machine._run.stop_sequence = -1 if machine._run.stop_sequence == 0 else machine._run.stop_sequence
    machine._phase = Phase.GATHER if machine._run.verdict is None else Phase.STOP


def _start_over_the_living(machine: Member, plan: object) -> None:
    place = next((p for p in plan.places if p.node_id == machine.report.node.node_id), None)
    if plan.phase is Phase.RUN and place is not None and machine.report.generation != plan.generation:
        machine._start(plan, place)


MUTANTS: dict[str, tuple[type, str, Callable[..., object]]] = {
    "the next generation does not wait for the end of the last": (Leader, "_advance_stop", _never_wait_for_the_end),
    "workers start beside old ones": (Member, "_follow", _start_over_the_living),
    "every plan counts, however old": (Member, "_counts", lambda machine, plan: True),
    "a lost node is never noticed": (Leader, "_lost", lambda machine, node_id, now: None),
    "a lost leader is never noticed": (
        Member,
        "ticked",
        lambda machine, now: machine._advance(now),
    ),
    "a failure is not heeded": (Leader, "_worker_failed", lambda machine, failure, now: None),
    "an incarnation repeats": (
        Leader,
        "_found_incarnation",
        lambda machine, chosen: (setattr(machine, "_incarnation", 1), setattr(machine, "_first_number", 1)),
    ),
    "the plan is sent once": (Leader, "_publish", lambda machine, now: _publish_once(machine)),
    "reports are not repeated": (Member, "_advance", lambda machine, now: _report_once(machine, now)),
}


def _publish_once(machine: Leader) -> None:
    plan = machine._plan()
    if machine._sent is None or leader._differ(machine._sent, plan):
        machine._renew_plan()
        machine._out.append(leader.Broadcast(machine._sent))


_advance = Member._advance


def _report_once(machine: Member, now: float) -> list[member.Instruction]:
    if not machine._dirty:
        machine._next_beat = now + 1e9
    return _advance(machine, now)


@pytest.mark.parametrize("name", MUTANTS)
def test_the_simulation_catches_the_mutant(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, attribute, replacement = MUTANTS[name]
    monkeypatch.setattr(owner, attribute, replacement)
    with pytest.raises(AssertionError):  # Violation, Stuck, or an assertion of the machine's own
        _check_all(range(60))


def test_the_machines_know_no_clock() -> None:
    for module in (leader, member):
        assert not {"time", "threading", "socket", "zmq"} & set(vars(module))
