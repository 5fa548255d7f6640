"""The membership machines: rules one by one, then splits and losses, then any schedule of faults, then mutants."""

from __future__ import annotations

import pytest
from membership_simulation import CALM, Chaos, Simulation

from holdfast.launcher import election, leader, leader_forming, leader_orders, leader_state, member, membership, quorum
from holdfast.launcher.budget import RestartBudget
from holdfast.launcher.election import Election
from holdfast.launcher.leader import Leader
from holdfast.launcher.limits import Limits
from holdfast.launcher.member import Member
from holdfast.launcher.membership import Membership
from holdfast.launcher.wire import NodeInfo, Phase, Plan, Redirect, Rejected, Report, SessionState

SETTLE_S = 60.0
LOST_S = 5.0
"""A lost node is missed within 2.5 s, its leader's successor waits for one more, workers take a second to end."""


def calm(nodes: int, **settings: object) -> Simulation:
    return Simulation(1, nodes=nodes, chaos=Chaos(until_s=0.0), **settings)  # type: ignore[arg-type]


def running(nodes: int, *, smallest: int | None = None, largest: int | None = None, **settings: object) -> Simulation:
    """A job whose first generation runs."""
    limits = Limits(
        min_nodes=smallest if smallest is not None else nodes,
        max_nodes=largest or nodes,
        join_timeout_s=40,
        last_call_s=3,
        node_multiple=settings.pop("multiple", 1),  # type: ignore[arg-type]
        grow_s=settings.pop("grow_s", 600.0),  # type: ignore[arg-type]
    )
    simulation = calm(nodes, limits=limits, **settings)
    simulation.run_until(simulation.whole_generations, 10)
    return simulation


def restart_counts(simulation: Simulation) -> set[int]:
    return {a.workers.plan.restart_count for a in simulation.agents.values() if a.workers is not None}


def leading_node(simulation: Simulation) -> int:
    (node,) = [agent.node for agent in simulation.agents.values() if agent.leads]
    return node


def by_rank(simulation: Simulation) -> list[int]:
    """Nodes of the generation that runs, by node rank."""
    whole = simulation.whole_generations()
    assert len(whole) == 1, simulation.describe()
    hosts = {f"host{agent.node}": agent.node for agent in simulation.agents.values()}
    return [hosts[place.host] for place in simulation.plans[whole[0]].places]


def goes_on(simulation: Simulation, nodes: int, within_s: float) -> float:
    """Seconds until a generation of so many nodes runs."""
    return simulation.run_until(lambda: simulation.world() == [nodes], within_s)


# --- one leader, no faults of the network


def test_all_nodes_start_the_same_first_generation() -> None:
    simulation = running(3)
    simulation.run(5)
    assert simulation.started == [simulation.started[0]] * 3
    assert simulation.started[0].generation == 1


def test_a_failure_on_one_node_restarts_all_with_one_restart_count() -> None:
    simulation = running(3)
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
    simulation = running(3, smallest=2)
    simulation.agents[1].paused_until = simulation.now + 10
    goes_on(simulation, 2, LOST_S)
    goes_on(simulation, 3, 15)


def test_growth_waits_for_its_interval_and_for_an_agreed_step() -> None:
    simulation = running(4, smallest=2, grow_s=20.0)
    simulation.session = True
    simulation.chaos.restart_after_s = (8, 8)
    grown = 0.0
    for first in (True, False):
        simulation.crash(simulation.agents[3])
        goes_on(simulation, 3, LOST_S)
        goes_on(simulation, 4, 30)
        assert first or simulation.now - grown >= 20
        grown = simulation.now
    assert [note.kind for _, _, note in simulation.notes].count("asked_to_grow") == 2


def kinds(simulation: Simulation) -> list[str]:
    """How agents have left."""
    return [agent.left.kind for agent in simulation.ended if agent.left]


def test_growth_ends_nobody_before_all_wait_at_the_agreed_step() -> None:
    simulation = running(3, smallest=2, largest=4, grow_s=0.0)
    simulation.session, simulation.agreed_after_s = True, 50.0  # steps may be long
    simulation.fail_worker(simulation.agents[0])  # the generation after it has Sessions
    simulation.run(5)
    (before,) = simulation.whole_generations()
    simulation.boot(3)
    simulation.run(45)
    assert simulation.whole_generations() == [before]
    simulation.run(10)
    assert simulation.world() == [4]
    assert {leaves for _, _, leaves in simulation.asked_to_regroup} == {False}


def test_what_was_agreed_is_carried_out_though_the_newcomer_has_gone() -> None:
    """Workers wait at the agreed step: nobody but the leader lets them go on."""
    simulation = running(3, smallest=2, largest=4, grow_s=0.0)
    simulation.session, simulation.agreed_after_s = True, 5.0
    simulation.fail_worker(simulation.agents[0])
    simulation.run(5)
    simulation.boot(3)
    simulation.run_until(lambda: simulation.asked_to_regroup, 3)
    simulation.lose(3)
    (before,) = simulation.whole_generations()
    simulation.run(10)
    (after,) = simulation.whole_generations()
    assert after.generation > before.generation
    assert simulation.world() == [3]


def test_a_script_that_is_about_to_end_is_not_restarted_to_grow() -> None:
    simulation = running(3, smallest=2, largest=4, grow_s=0.0)
    for agent in list(simulation.agents.values()):
        simulation._tell_session(agent, SessionState(opened=2, closed=1))
    (before,) = simulation.whole_generations()
    simulation.boot(3)
    simulation.run(10)
    assert simulation.whole_generations() == [before]


def test_a_stop_while_the_world_is_about_to_grow_ends_the_job_at_the_agreed_step() -> None:
    simulation = running(3, smallest=2, largest=4, grow_s=0.0, supervised=False)
    simulation.session, simulation.agreed_after_s = True, 5.0
    simulation.fail_worker(simulation.agents[0])
    simulation.run(5)
    simulation.boot(3)
    simulation.run_until(lambda: simulation.asked_to_regroup, 3)
    simulation.ask_stop(1)
    simulation.run(4)
    assert kinds(simulation) == []
    simulation.run(6)
    assert kinds(simulation) == ["stopped"] * 4


def with_sessions(simulation: Simulation) -> Simulation:
    """Restarted, now with Sessions."""
    simulation.session = True
    simulation.fail_worker(next(iter(simulation.agents.values())))
    simulation.run(5)
    assert len(simulation.whole_generations()) == 1
    return simulation


@pytest.mark.parametrize("rank", range(3))
@pytest.mark.parametrize("session", [False, True])
def test_a_node_that_is_asked_to_leave_leaves_and_the_others_go_on(rank: int, session: bool) -> None:
    """The leader's too: it hands over while no workers run, so nobody loses it."""
    simulation = running(3, smallest=2, supervised=False)
    if session:
        with_sessions(simulation)
    node = by_rank(simulation)[rank]
    simulation.ask_drain(node)
    goes_on(simulation, 2, 4)
    assert bool(simulation.asked_to_regroup) == session
    assert all(leaves for _, _, leaves in simulation.asked_to_regroup)
    (generation,) = simulation.whole_generations()
    simulation.run(3 if session else 1)
    assert kinds(simulation) == ["drained"]
    simulation.run(20)
    assert simulation.whole_generations() == [generation]
    assert simulation.lost_leaders == 0


def test_a_late_word_about_the_former_leader_makes_nobody_lead() -> None:
    """Its heir had still sent it to those that asked, when it did not lead yet."""
    simulation = with_sessions(running(3, smallest=2, supervised=False))
    simulation.protects = False  # it stays for a while
    node = leading_node(simulation)
    agent = simulation.agents[node]
    simulation.ask_drain(node)
    simulation.run_until(lambda: not agent.leads and agent.membership.plan, 4)
    plan = agent.membership.plan
    assert plan is not None
    simulation._do(
        agent, agent.membership.heard(Redirect(sender=plan.leader_id, address=agent.address), simulation.now)
    )
    assert not agent.leads


def test_a_spare_takes_the_place_of_a_node_that_leaves() -> None:
    simulation = with_sessions(running(4, smallest=3, largest=3, supervised=False))
    node = by_rank(simulation)[1]
    simulation.ask_drain(node)
    simulation.run_until(lambda: simulation.world() == [3] and node not in by_rank(simulation), 5)
    simulation.run(3)
    assert kinds(simulation) == ["drained"]


def test_a_spare_that_is_asked_to_leave_goes_and_nobody_is_restarted() -> None:
    simulation = with_sessions(running(4, smallest=3, largest=3, supervised=False))
    (spare,) = set(range(4)) - set(by_rank(simulation))
    before = simulation.whole_generations()
    simulation.ask_drain(spare)
    simulation.run(3)
    assert kinds(simulation) == ["drained"]
    assert simulation.whole_generations() == before


def test_a_node_stays_until_the_next_generation_has_protected_a_version_or_its_grace_ends() -> None:
    simulation = with_sessions(running(3, smallest=2, supervised=False))
    simulation.protects = False
    node = by_rank(simulation)[2]
    simulation.ask_drain(node)
    goes_on(simulation, 2, 4)
    simulation.run(20)
    assert kinds(simulation) == []
    simulation.run(10)
    assert kinds(simulation) == ["drained"]
    assert simulation.world() == [2]


def test_who_is_asked_twice_leaves_at_once() -> None:
    simulation = with_sessions(running(3, smallest=2, supervised=False))
    simulation.agreed_after_s = 100.0
    node = by_rank(simulation)[2]
    simulation.ask_drain(node)
    simulation.run(5)
    assert simulation.world() == [3]
    simulation.ask_drain(node, urgent=True)
    goes_on(simulation, 2, 4)
    simulation.run(2)
    assert kinds(simulation) == ["drained"]


@pytest.mark.parametrize("nodes", [1, 3])
def test_notices_for_more_nodes_than_the_job_can_miss_stop_it(nodes: int) -> None:
    simulation = with_sessions(running(3, smallest=3 if nodes == 1 else 1, supervised=False))
    for node in range(nodes):
        simulation.ask_drain(node)
        simulation.run(0.05)
    simulation.run(60)
    assert set(kinds(simulation)) == {"stopped"}
    assert len(kinds(simulation)) == 3


@pytest.mark.parametrize("rank", range(3))
def test_a_node_whose_workers_outlive_sigkill_leaves_with_an_error_and_the_others_go_on(rank: int) -> None:
    simulation = running(3, smallest=2, supervised=False)
    node = by_rank(simulation)[rank]
    simulation.stuck = {node}
    simulation.fail_worker(simulation.agents[by_rank(simulation)[1]])
    goes_on(simulation, 2, 12)
    assert kinds(simulation) == ["failed"]
    assert node not in by_rank(simulation)


def test_the_world_shrinks_to_a_multiple() -> None:
    simulation = running(4, smallest=2, multiple=2)
    rank_3 = by_rank(simulation)[3]
    simulation.lose(rank_3)
    goes_on(simulation, 2, LOST_S)
    assert len(simulation.agents) == 3  # one waits


def test_nodes_beyond_the_largest_world_wait_and_step_in() -> None:
    simulation = running(4, smallest=3, largest=3)
    before = by_rank(simulation)
    spare = next(node for node in range(4) if node not in before)
    simulation.lose(before[1])
    goes_on(simulation, 3, LOST_S)
    assert by_rank(simulation) == [before[0], spare, before[2]]  # in the vacant place


def test_survivors_keep_their_node_ranks() -> None:
    simulation = running(3)
    before = by_rank(simulation)
    simulation.chaos.restart_after_s = (4, 4)
    simulation.crash(simulation.agents[before[1]])
    simulation.run(1)
    goes_on(simulation, 3, 12)
    assert by_rank(simulation) == before


def test_below_the_minimum_the_job_waits_for_the_node_to_return() -> None:
    simulation = running(2)
    del simulation.agents[1]
    simulation.run(20)
    assert simulation.whole_generations() == []
    assert simulation.agents[0].left is None
    simulation.boot(1)
    goes_on(simulation, 2, 3)


def test_below_the_minimum_the_job_ends_after_the_join_timeout() -> None:
    simulation = running(2, supervised=False)
    simulation.lose(1)
    simulation.run(60)
    assert [agent.left.kind for agent in simulation.ended if agent.left] == ["stopped"]


def test_exhausted_restarts_end_the_job_on_all_nodes() -> None:
    simulation = running(3, max_restarts=1)
    for _ in range(2):
        simulation.fail_worker(simulation.agents[1])
        simulation.run(5)
    assert simulation.agents == {}
    assert [agent.left.kind for agent in simulation.ended if agent.left] == ["failed"] * 3


def test_losing_nodes_uses_up_no_restarts() -> None:
    simulation = running(4, smallest=1, max_restarts=1)
    for left in (3, 2):
        simulation.lose(by_rank(simulation)[-1])
        goes_on(simulation, left, LOST_S)
    simulation.fail_worker(simulation.agents[by_rank(simulation)[0]])
    simulation.run(3)
    assert simulation.world() == [2]
    assert restart_counts(simulation) == {3}


def test_a_new_leader_counts_failures_on() -> None:
    simulation = running(3, smallest=2, max_restarts=1)
    simulation.fail_worker(simulation.agents[1])
    simulation.run(3)
    simulation.lose(leading_node(simulation))
    goes_on(simulation, 2, LOST_S)
    assert restart_counts(simulation) == {2}
    simulation.fail_worker(next(iter(simulation.agents.values())))
    simulation.run(5)
    assert [agent.left.kind for agent in simulation.ended if agent.left] == ["failed"] * 2


def test_the_job_is_done_only_when_all_nodes_are() -> None:
    simulation = running(2)
    simulation.finish_workers()
    simulation.run(3)
    assert simulation.agents == {}
    assert [agent.left.kind for agent in simulation.ended if agent.left] == ["done", "done"]


def test_a_stop_without_a_session_ends_all_nodes_at_once() -> None:
    simulation = running(2, supervised=False)
    simulation.ask_stop(1)
    simulation.run(3)
    assert [agent.left.kind for agent in simulation.ended if agent.left] == ["stopped", "stopped"]


def test_a_second_request_to_stop_leaves_workers_no_grace() -> None:
    simulation = calm(2, limits=Limits(min_nodes=2, max_nodes=2, grace_s=600), supervised=False)
    simulation.run(5)
    simulation.stubborn = True
    for urgent in (False, True):
        assert len(simulation.agents) == 2
        simulation.ask_stop(1, urgent=urgent)
        simulation.run(5)
    assert [other.left.grace_s for other in simulation.ended if other.left] == [0.0, 0.0]


def test_workers_that_not_even_sigkill_ends_fail_the_job() -> None:
    simulation = calm(2, limits=Limits(min_nodes=2, max_nodes=2, stop_timeout_s=5.0))
    simulation.run(5)
    simulation.stubborn = True
    simulation.fail_worker(simulation.agents[1])
    simulation.run(10)
    plan = simulation.agents[1].membership.plan
    assert plan is not None
    assert plan.verdict is not None
    assert plan.verdict.kind == "failed"
    assert "SIGKILL" in plan.verdict.reason


def test_an_agent_that_restarts_before_it_was_missed_joins_as_a_new_member() -> None:
    simulation = Simulation(3, nodes=2, chaos=Chaos(until_s=0.0), node_ranks_given=True).run(5)
    simulation.chaos.restart_after_s = (0.1, 0.1)
    simulation.crash(simulation.agents[1])
    simulation.run(15)
    assert len(simulation.whole_generations()) == 1
    assert len({generation.generation for generation in simulation.started}) >= 2


def node_info(name: str, rank_hint: int | None = None) -> NodeInfo:
    return NodeInfo(
        node_id=name, job="", host=name, pid=1, role="default", num_workers=1, rank_hint=rank_hint, address=name
    )


def machine_of(limits: Limits) -> Leader:
    budget = RestartBudget(max_restarts=0, no_progress=3)
    return Leader(node=node_info("l"), nonce="00000000", run_id="r", limits=limits, budget=budget, now=0.0)


def test_a_node_rank_that_lives_is_not_given_away() -> None:
    limits = Limits(min_nodes=2, max_nodes=2)
    machine = machine_of(limits)
    nodes = {name: node_info(name, rank_hint=1) for name in ("first", "second")}
    turned_away: dict[float, str] = {}
    for tick in range(100):
        for name, node in nodes.items():
            for instruction in machine.reported(Report(node=node, sequence=tick), tick / 10):
                if isinstance(instruction, leader_orders.TurnAway):
                    assert instruction.node_id == "second", name
                    turned_away.setdefault(tick / 10, instruction.reason)
    assert min(turned_away) >= limits.dead_after_s  # until then the first one might just not have been missed
    assert "node rank 1 is taken" in turned_away[max(turned_away)]


def test_a_node_that_is_turned_away_leaves_although_it_hears_the_leader() -> None:
    machine = Member(node=node_info("n"), limits=Limits(), now=0.0)
    machine.planned(Plan(leader_id="l", sequence=1, phase=Phase.GATHER), 0.1)
    left = [i for i in machine.rejected(Rejected(reason="no room"), 0.2) if isinstance(i, member.Leave)]
    assert [leave.verdict.reason for leave in left] == ["no room"]


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ({"heartbeat_s": 2.0, "dead_after_s": 1.0}, "dead between beats"),
        ({"min_nodes": 3, "max_nodes": 2}, "0 < MIN <= MAX"),
        ({"min_nodes": 3, "max_nodes": 3, "node_multiple": 2}, "contains no such number"),
    ],
)
def test_limits_that_cannot_work_are_refused(numbers: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Limits(**numbers)  # type: ignore[arg-type]


# --- losses and splits


@pytest.mark.parametrize("endpoints", [1, 2])
def test_the_loss_of_the_leader_costs_seconds(endpoints: int) -> None:
    for nodes in (3, 5, 9):
        simulation = running(nodes, smallest=2, endpoints=endpoints)
        simulation.lose(leading_node(simulation))
        assert goes_on(simulation, nodes - 1, LOST_S) > 1.5
        assert len({agent.membership.plan.leader_id for agent in simulation.agents.values()}) == 1  # type: ignore[union-attr]


def test_the_loss_of_the_leader_and_of_its_heir_costs_seconds() -> None:
    simulation = running(7, smallest=2)
    first, second = by_rank(simulation)[:2]
    assert first == leading_node(simulation)
    simulation.lose(first, second)
    goes_on(simulation, 5, LOST_S + 1.5)


def test_a_node_that_comes_back_at_the_endpoint_of_a_lost_host_is_called_and_joins() -> None:
    simulation = running(3, smallest=2)
    simulation.chaos.restart_after_s = (20, 20)
    simulation.crash(simulation.agents[0])  # the only endpoint
    goes_on(simulation, 2, LOST_S)
    (before,) = simulation.whole_generations()
    goes_on(simulation, 3, 25)
    (after,) = simulation.whole_generations()
    assert (before.incarnation, before.nonce) == (after.incarnation, after.nonce)


def test_a_newcomer_finds_the_job_at_a_later_endpoint() -> None:
    simulation = running(3, smallest=2, largest=4, endpoints=2)
    simulation.lose(0)
    goes_on(simulation, 2, LOST_S)
    simulation.boot(3)
    goes_on(simulation, 3, 10)


@pytest.mark.parametrize("claims", [False, True])
def test_four_nodes_minus_three(claims: bool) -> None:
    """One of four may go on only where a claim store says that no other side does."""
    simulation = running(4, smallest=1, claims=claims, supervised=False)
    last = by_rank(simulation)[2]
    simulation.lose(*(node for node in range(4) if node != last))
    if claims:
        goes_on(simulation, 1, 12)
        return
    simulation.run(30)
    assert simulation.whole_generations() == []
    assert not simulation.agents[last].left
    simulation.run(30)
    assert [agent.left.kind for agent in simulation.ended if agent.left] == ["stopped"]  # the requeue code


@pytest.mark.parametrize("lost_rank", [0, 1])
def test_the_survivor_of_two_nodes_goes_on(lost_rank: int) -> None:
    simulation = running(2, smallest=1)
    simulation.lose(by_rank(simulation)[lost_rank])
    goes_on(simulation, 1, LOST_S)
    (whole,) = simulation.whole_generations()
    assert whole.generation == 2 + (lost_rank == 0)  # the lower node takes n+1, the other n+2


def test_two_nodes_whose_cable_was_cut_meet_again() -> None:
    """The stated exception: both go on. When they meet, the one with the lower number joins the other."""
    simulation = running(2, smallest=1, grow_s=0.0)
    low, high = by_rank(simulation)
    simulation.split([low], [high])
    simulation.run_until(lambda: simulation.world() == [1, 1], 8)
    assert {g.generation for g in simulation.whole_generations()} == {2, 3}
    simulation.heal()
    goes_on(simulation, 2, 8)
    assert leading_node(simulation) == high


def test_with_a_claim_store_only_one_of_two_nodes_goes_on() -> None:
    simulation = running(2, smallest=1, claims=True)
    simulation.split([0], [1])
    goes_on(simulation, 1, 15)
    simulation.run(15)
    assert simulation.world() == [1]


def test_half_goes_on_only_with_the_lowest_node() -> None:
    simulation = running(4, smallest=2)
    ranks = by_rank(simulation)
    simulation.split(ranks[:2], ranks[2:])
    goes_on(simulation, 2, LOST_S)
    assert set(by_rank(simulation)) == set(ranks[:2])
    simulation.run(20)
    assert simulation.world() == [2]


@pytest.mark.parametrize("alone", range(4))
def test_three_and_one_part_and_meet_again(alone: int) -> None:
    simulation = running(4, smallest=2, grow_s=1.0)
    victim = by_rank(simulation)[alone]
    simulation.split([node for node in range(4) if node != victim], [victim])
    goes_on(simulation, 3, LOST_S + 1)
    assert victim not in by_rank(simulation)
    simulation.heal()
    goes_on(simulation, 4, 8)


def test_a_claim_whose_winner_dies_at_once_can_be_followed_by_its_other_members_only() -> None:
    simulation = running(5, smallest=1, claims=True)
    ranks = by_rank(simulation)
    simulation.split(ranks[:2], ranks[2:])
    assert simulation.claims is not None
    claims = simulation.claims
    simulation.run_until(lambda: len(claims.records) == 2, 10)
    winners = claims.newest()
    assert winners is not None
    assert len(winners.members) == 3  # the larger side tries first
    winner = next(agent.node for agent in simulation.agents.values() if agent.leads and agent.node in ranks[2:])
    simulation.lose(winner)
    goes_on(simulation, 2, 12)
    assert set(by_rank(simulation)) == set(ranks[2:]) - {winner}
    simulation.run(20)
    assert simulation.world() == [2]  # the losing side, larger than nothing, has not overtaken


def test_an_agreed_stop_outlives_the_leader_that_was_asked() -> None:
    simulation = running(3, smallest=2, supervised=False)
    asked = next(node for node in simulation.agents if node != leading_node(simulation))
    old = simulation.agents[leading_node(simulation)]
    old.paused_until = simulation.now + 1000  # it never hears of the request
    simulation.ask_stop(asked)
    simulation.lose(old.node)
    simulation.run(LOST_S + 5)
    assert [agent.left.kind for agent in simulation.ended if agent.left] == ["stopped", "stopped"]


def test_one_old_node_with_three_newcomers_founds_a_new_incarnation_after_the_last_call() -> None:
    simulation = running(4)
    old = by_rank(simulation)[1]
    (before,) = simulation.whole_generations()
    simulation.chaos.restart_after_s = (0.5, 1.0)
    lost = simulation.now
    for node in [node for node in range(4) if node != old]:
        simulation.crash(simulation.agents[node])
    goes_on(simulation, 4, 15)
    assert simulation.now - lost > simulation.limits.last_call_s
    (after,) = simulation.whole_generations()
    assert (after.incarnation, after.nonce != before.nonce) == (2, True)


def test_a_restarted_agent_has_no_second_vote() -> None:
    """Two of five, one of them restarted twice: they are no majority, however often it votes."""
    simulation = running(5, smallest=1)
    ranks = by_rank(simulation)
    simulation.split(ranks[:3], ranks[3:])
    simulation.chaos.restart_after_s = (0.2, 0.2)
    for _ in range(2):
        simulation.crash(simulation.agents[ranks[4]])
        simulation.run(3)
    goes_on(simulation, 3, 10)
    simulation.run(10)
    assert set(by_rank(simulation)) == set(ranks[:3])


def test_a_later_endpoint_founds_only_with_more_than_half_of_the_nodes() -> None:
    for others, founded in (([1, 2], False), ([1, 2, 3], True)):
        limits = Limits(min_nodes=1, max_nodes=4, join_timeout_s=300, last_call_s=3)
        simulation = calm(4, limits=limits, endpoints=2)
        simulation.gone = set(range(4)) - set(others)
        simulation.run(30)
        assert bool(simulation.whole_generations()) == founded


def test_a_fresh_agent_at_the_first_endpoint_does_not_overtake_a_generation_that_it_cannot_hear() -> None:
    """It had a place in a larger generation: the others may be alive behind a cut cable."""
    simulation = running(4, smallest=1, grow_s=1.0)
    simulation.split([0], [1, 2, 3])
    simulation.chaos.restart_after_s = (0.2, 0.2)
    simulation.crash(simulation.agents[0])
    goes_on(simulation, 3, 8)
    simulation.run(20)
    assert simulation.world() == [3]
    simulation.heal()
    goes_on(simulation, 4, 8)


def test_a_generation_that_still_runs_elsewhere_reads_of_a_new_incarnation_before_that_starts() -> None:
    simulation = running(4, smallest=1, claims=True, endpoints=2)
    simulation.split([0], [1, 2, 3])
    simulation.chaos.restart_after_s = (0.2, 0.2)
    for node in (1, 2, 3):
        simulation.crash(simulation.agents[node])
    goes_on(simulation, 1, 8)
    assert by_rank(simulation) == [0]
    goes_on(simulation, 3, 30)
    assert simulation.whole_generations()[0].incarnation == 2


def test_a_one_way_cable_ends_in_one_generation() -> None:
    for cut in ((0, 1), (1, 0), (2, 1)):
        simulation = running(4, smallest=2, grow_s=1.0)
        simulation.cuts = {cut}
        simulation.run(15)
        assert len(simulation.whole_generations()) == 1
        simulation.heal()
        goes_on(simulation, 4, 15)


# --- any schedule


def any_schedule(seed: int, nodes: int | None = None) -> Simulation:
    claims = seed % 4 == 1
    nodes = nodes or 3 + seed % 5 if seed % 8 else 2
    largest = nodes - (seed % 3 == 2 and nodes > 3)
    limits = Limits(
        min_nodes=max(1, largest - seed % 3),
        max_nodes=largest,
        last_call_s=2,
        join_timeout_s=20,
        grow_s=(0.5, 30.0)[seed % 2],
    )
    # Without a claim store, fresh agents cannot know of a generation that shrank to less than half behind a cut cable.
    may_split = claims or (largest == nodes and 2 * limits.min_nodes > nodes)
    chaos = Chaos(
        until_s=20.0,
        loss=0.15 * (seed % 3),
        worker_failures=0.5 / nodes,
        crashes=0.15 / nodes,
        splits=0.1 * (seed % 2) if may_split else 0.0,
        cuts=0.1 * (seed % 4 == 3) if may_split else 0.0,
    )
    static = seed % 5 == 0 and limits.min_nodes == nodes
    simulation = Simulation(
        seed, nodes=nodes, endpoints=1 + seed % 2, limits=limits, chaos=chaos, claims=claims, node_ranks_given=static
    )
    if seed % 6 >= 4:
        chaos.drains = 0.3 / nodes
        simulation.session = seed % 6 == 5
    return simulation


def check(seed: int, nodes: int | None = None) -> Simulation:
    simulation = any_schedule(seed, nodes).run(20.0)
    simulation.settle(SETTLE_S)
    return simulation


def check_split(seed: int) -> None:
    """A network that fell apart and stays so: the side that may go on does, within bounded time."""
    nodes = 3 + seed % 7
    limits = Limits(min_nodes=1, max_nodes=nodes, last_call_s=2, join_timeout_s=300)
    simulation = Simulation(seed, nodes=nodes, limits=limits, chaos=Chaos(until_s=0.0), endpoints=1 + seed % 3)
    simulation.run_until(simulation.whole_generations, 10)
    dice = simulation.random
    simulation.sides = {node: dice.randrange(2 + seed % 2) for node in range(nodes)}
    if seed % 3 == 0:
        simulation.lose(dice.randrange(nodes))
    side = simulation.side_that_may_go_on()
    simulation.run(6)
    if side is None:
        assert simulation.whole_generations() == []
    else:
        assert set(by_rank(simulation)) == side


@pytest.mark.parametrize("block", range(6))
def test_any_schedule_of_faults_ends_in_one_running_generation(block: int) -> None:
    for seed in range(block * 30, block * 30 + 30):
        check(seed)


def test_a_voter_that_is_lost_before_it_knew_of_the_next_generation_leaves_nobody_waiting_for_ever() -> None:
    check(5495)


def test_large_jobs_survive_any_schedule_of_faults() -> None:
    for seed, nodes in ((2, 24), (3, 64)):
        check(seed, nodes)


def test_the_side_that_may_go_on_does() -> None:
    for seed in range(60):
        check_split(seed)


@pytest.mark.campaign
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("block", range(40))
def test_twenty_thousand_schedules_of_faults(block: int) -> None:
    for seed in range(block * 500, block * 500 + 500):
        check(seed, 8 + seed % 57 if seed % 100 == 7 else None)
        if seed % 5 == 0:
            check_split(seed)


# --- mutants


def _start_over_the_living(machine: Member, plan: Plan) -> None:
    place = next((p for p in plan.places if p.node_id == machine.report.node.node_id), None)
    if plan.phase is Phase.RUN and place is not None and machine.report.generation != plan.generation:
        machine._start(plan, place)


def _publish_once(machine: Leader, now: float) -> None:
    plan = machine._plan()
    if machine._sent is None or leader_state._differ(machine._sent, plan):
        machine._renew_plan()
        machine._out.append(leader_orders.Broadcast(machine._sent))


_advance = Member._advance


def _report_once(machine: Member, now: float) -> list[member.Instruction]:
    if not machine._dirty:
        machine._next_beat = now + 1e9
    return _advance(machine, now)


def _any_side(standing: object, present: object, limits: Limits, *, store: bool) -> bool:
    return True


def _half_is_enough(standing: quorum.Standing, present: set[str], limits: Limits, *, store: bool) -> bool:
    votes = sum(name in present for name in standing.members)
    return votes > 0 if store or limits.max_nodes <= 2 else 2 * votes >= len(standing.members)


def _number_repeats(machine: Leader, chosen: list) -> int:
    machine._incarnation = 1
    return 1


def _forget(machine: Leader, now: float) -> None:
    machine._ballot = max(machine._ballot, 1)


_everybody = Membership._everybody
_regroup = Leader._regroup

MUTANTS: dict[str, tuple[object, str, object]] = {
    "workers start beside old ones": (Member, "_follow", _start_over_the_living),
    "a lost node is never noticed": (Leader, "_lost", lambda machine, node_id, now: None),
    "a lost leader is never noticed": (Member, "ticked", lambda machine, now: machine._advance(now)),
    "a failure is not heeded": (Leader, "_worker_failed", lambda machine, failure, now: None),
    "an incarnation repeats": (Leader, "_found_incarnation", _number_repeats),
    "the plan is sent once": (Leader, "_publish", _publish_once),
    "reports are not repeated": (Member, "_advance", _report_once),
    "any side may go on": (leader_forming, "may_follow", _any_side),
    "exactly half may go on without the lowest node": (leader_forming, "may_follow", _half_is_enough),
    "a new leader knows nothing of the generation before": (Leader, "_learn", _forget),
    "nobody takes over from a lost leader": (
        Election,
        "should_lead",
        lambda machine, own, *, since, lost, endpoint, now: endpoint == 0,
    ),
    "a leader never yields": (Membership, "_yield", lambda machine, plan, now: None),
    "a leader calls nobody": (
        Membership,
        "_everybody",
        lambda machine, now: [] if machine.leader is not None else _everybody(machine, now),
    ),
    "a claim that was lost is used": (
        Leader,
        "_claim_lost",
        lambda machine, run, now: (
            setattr(machine, "_phase", leader_state.FORMING),
            machine._out.append(leader_orders.HostStore(run.generation)),
        ),
    ),
    "a promise is given twice": (Member, "_is_promised", lambda machine, plan: True),
    "a fresh agent founds an incarnation whatever it remembers": (
        leader_forming,
        "founders_needed",
        lambda limits, *, endpoint, remembered, store: limits.min_nodes,
    ),
    "a claimed incarnation is not fenced": (leader, "FENCE_S", 0.0),
    "a generation ends before its workers wait at the agreed step": (
        Leader,
        "_regroup",
        lambda machine, current, now: machine._begin_stop(now, cause="at once"),
    ),
    "workers wait for a newcomer that has gone": (
        Leader,
        "_regroup",
        lambda machine, current, now: machine._may_grow(now) and _regroup(machine, current, now),
    ),
    "a node that leaves gets a place again": (Leader, "_is_leaving", lambda machine, node: False),
    "a leader that leaves names no other": (Leader, "_resign", lambda machine, candidates: None),
    "a node that leaves is never released": (Leader, "_released", lambda machine: ()),
    "a node leaves before a version is protected without it": (
        Leader,
        "_released",
        lambda machine: tuple(n for n in machine._leaving_ids() if machine._run and n not in machine._run.ids),
    ),
    "notices for all drain one after the other": (Leader, "_too_few_would_stay", lambda machine: False),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_the_simulation_catches_the_mutant(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, attribute, replacement = MUTANTS[name]
    monkeypatch.setattr(owner, attribute, replacement)
    with pytest.raises(AssertionError):  # Violation, Stuck, or an assertion of the machine's own
        _check_many()


def _check_many() -> None:
    test_a_fresh_agent_at_the_first_endpoint_does_not_overtake_a_generation_that_it_cannot_hear()
    test_a_generation_that_still_runs_elsewhere_reads_of_a_new_incarnation_before_that_starts()
    test_with_a_claim_store_only_one_of_two_nodes_goes_on()
    test_growth_ends_nobody_before_all_wait_at_the_agreed_step()
    test_what_was_agreed_is_carried_out_though_the_newcomer_has_gone()
    test_a_node_that_is_asked_to_leave_leaves_and_the_others_go_on(0, session=True)
    test_a_node_stays_until_the_next_generation_has_protected_a_version_or_its_grace_ends()
    test_notices_for_more_nodes_than_the_job_can_miss_stop_it(1)
    for seed in range(150):
        check(seed)
        check_split(seed)


def test_the_machines_know_no_clock() -> None:
    for module in (leader, leader_forming, leader_state, member, membership, election, quorum):
        assert not {"time", "threading", "socket", "zmq"} & set(vars(module))
