"""The membership machines under one leader: rules one by one, in a network without faults."""

from __future__ import annotations

import msgspec
import pytest

from holdfast.checkpoint.version import GenerationId
from holdfast.launcher import election, leader, leader_forming, leader_orders, leader_state, member, membership, quorum
from holdfast.launcher.budget import RestartBudget
from holdfast.launcher.leader import Leader
from holdfast.launcher.limits import Limits
from holdfast.launcher.member import Member
from holdfast.launcher.wire import Phase, Place, Plan, Redirect, Rejected, Report, SessionState, Standing
from support.membership_jobs import (
    LOST_S,
    by_rank,
    calm,
    goes_on,
    growing,
    kinds,
    leading_node,
    node_info,
    restart_counts,
    running,
    with_sessions,
)
from support.membership_simulation import CALM, Chaos, Simulation
from support.simulated_claims import Claims


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


def test_a_job_of_one_node_outlives_the_suspension_of_its_agent() -> None:
    """Ctrl-Z, or a machine that is moved: the workers have gone on, and nobody else could."""
    simulation = running(1)
    simulation.agents[0].paused_until = simulation.now + 30
    simulation.run(60)
    assert len(simulation.started) == 1
    assert simulation.world() == [1]


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


def test_growth_ends_nobody_before_all_wait_at_the_agreed_step() -> None:
    simulation = growing(agreed_after_s=50.0)  # steps may be long
    before = simulation.whole_generations()
    simulation.run(44)
    assert simulation.whole_generations() == before
    simulation.run(10)
    assert simulation.world() == [4]
    assert {leaves for _, _, leaves in simulation.asked_to_regroup} == {False}


def test_what_was_agreed_is_carried_out_though_the_newcomer_has_gone() -> None:
    """Workers wait at the agreed step: nobody but the leader lets them go on."""
    simulation = growing(agreed_after_s=5.0)
    simulation.lose(3)
    (before,) = simulation.whole_generations()
    simulation.run(10)
    (after,) = simulation.whole_generations()
    assert after.generation > before.generation
    assert simulation.world() == [3]


def test_a_new_leader_remembers_when_the_world_last_grew() -> None:
    simulation = running(3, smallest=2, largest=5, grow_s=60.0, endpoints=4)
    simulation.boot(3)
    goes_on(simulation, 4, 10)
    grown = simulation.now
    for leaders in range(2):
        simulation.lose(leading_node(simulation))
        goes_on(simulation, 3 - leaders, LOST_S)
    simulation.boot(4)  # who has never heard of a growth does not know when the last one was
    simulation.run(grown + 55 - simulation.now)
    assert simulation.world() == [2]
    goes_on(simulation, 3, 10)


def test_a_script_that_is_about_to_end_is_not_restarted_to_grow() -> None:
    simulation = running(3, smallest=2, largest=4, grow_s=0.0)
    for agent in list(simulation.agents.values()):
        simulation._tell_session(agent, SessionState(opened=2, closed=1))
    (before,) = simulation.whole_generations()
    simulation.boot(3)
    simulation.run(10)
    assert simulation.whole_generations() == [before]


def test_a_stop_while_the_world_is_about_to_grow_ends_the_job_at_the_agreed_step() -> None:
    simulation = growing(agreed_after_s=5.0, supervised=False)
    simulation.ask_stop(1)
    simulation.run(4)
    assert kinds(simulation) == []
    simulation.run(6)
    assert kinds(simulation) == ["stopped"] * 4


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


def machine_of(limits: Limits, *, claims: bool = False) -> Leader:
    budget = RestartBudget(max_restarts=0, no_progress=3)
    return Leader(
        node=node_info("l"), nonce="00000000", run_id="r", limits=limits, budget=budget, now=0.0, claims=claims
    )


def test_the_answer_to_a_claim_with_other_members_does_not_count() -> None:
    """A member was lost before the answer came: who goes on without it has not claimed that yet."""
    members = ("l", "a", "b")
    machine = machine_of(Limits(min_nodes=1, max_nodes=3), claims=True)
    generation = GenerationId(incarnation=1, nonce="0" * 8, generation=1)
    machine.claims_read(Standing(generation=generation, members=members, addresses=members), 0.0)

    def claims(names: tuple[str, ...], begin: int, end: int) -> list[Standing]:
        """What is claimed while these nodes report, ten times a second."""
        out: list[leader_orders.Instruction] = []
        for tick in range(begin, end):
            out += machine.ticked(tick / 10)
            for name in names:
                promise = {"promised": machine.plan.ballot, "promised_to": "l", "proof": machine.plan.proof}
                out += machine.reported(Report(node=node_info(name), sequence=tick, **promise), tick / 10)
        return [order.standing for order in out if isinstance(order, leader_orders.Claim)]

    whole = claims(members, 1, 10)[-1]
    smaller = claims(("l", "a"), 10, 40)[-1]
    assert (whole.generation, len(whole.members), len(smaller.members)) == (smaller.generation, 3, 2)
    late = machine.claim_ended(whole, won=True, now=4.0)
    assert not any(isinstance(order, leader_orders.HostStore) for order in late)
    assert any(isinstance(order, leader_orders.HostStore) for order in machine.claim_ended(smaller, won=True, now=4.1))


def test_a_leader_that_ran_and_founds_goes_on_from_a_claim_of_its_own_of_whose_win_it_never_heard() -> None:
    """It lost a newcomer while the store was asked: a second founding would lose against the first one for ever."""
    limits = Limits(min_nodes=2, max_nodes=3, last_call_s=1.0, join_timeout_s=300.0)
    machine, store = machine_of(limits, claims=True), Claims()
    nonce = "0" * 8
    alive = {"l": Report(node=node_info("l"), sequence=0), "a": Report(node=node_info("a"), sequence=0)}
    answers = True
    clock = 0

    def run(seconds: float) -> None:
        """The nodes promise and report ten times a second, the store answers while it is to."""
        nonlocal clock
        for _ in range(int(10 * seconds)):
            clock += 1
            now = clock / 10
            orders = machine.ticked(now)
            for report in alive.values():
                plan = machine.plan
                fresh = {"promised": plan.ballot, "promised_to": "l", "leader_id": "l", "proof": plan.proof}
                fresh |= {"seen": plan.sequence, "sequence": clock}
                orders += machine.reported(msgspec.structs.replace(report, **fresh), now)
            for order in orders:
                if isinstance(order, leader_orders.Claim):
                    won = store.create(order.standing, order.after)
                    if answers:
                        orders += machine.claim_ended(order.standing, won=won, now=now)
                elif isinstance(order, leader_orders.ReadClaims):
                    orders += machine.claims_read(store.newest(), now)
                elif isinstance(order, leader_orders.HostStore):
                    orders += machine.stored(order.generation, "h:1", now)

    run(5)
    assert machine.plan.phase is Phase.RUN
    others = ("x", "y")
    newer = Standing(
        generation=GenerationId(incarnation=1, nonce=nonce, generation=7), members=others, addresses=others
    )
    assert store.create(newer, machine.plan.generation)
    alive["a"] = msgspec.structs.replace(alive["a"], standing=newer)
    run(1)
    alive["n"] = Report(node=node_info("n"), sequence=0)
    answers = False
    run(3)
    assert store.generations[-1] == "2-1"
    del alive["n"]
    run(4)
    answers = True
    alive["m"] = Report(node=node_info("m"), sequence=0)
    run(30)
    assert machine.plan.phase is Phase.RUN
    assert machine.plan.generation is not None
    assert (machine.plan.generation.incarnation, machine.plan.generation.generation) == (2, 2)


def test_a_leader_says_how_many_nodes_it_waits_for() -> None:
    machine = machine_of(Limits(min_nodes=3, max_nodes=3, last_call_s=5.0))
    told: list[tuple[float, str]] = []
    for tick in range(1, 200):
        now = tick / 10
        orders = machine.ticked(now)
        for name in ("l", "a") if now > 8 else ("l",):
            promise = {"promised": machine.plan.ballot, "promised_to": "l"}
            orders += machine.reported(Report(node=node_info(name), sequence=tick, **promise), now)
        told += [(now, o.text[:15]) for o in orders if isinstance(o, leader_orders.Note) and o.kind == "waiting"]
    assert told == [(5.0, "1 of at least 3"), (8.1, "2 of at least 3")]


def test_a_node_that_no_leader_answers_says_so_once() -> None:
    machine = Member(node=node_info("n"), limits=Limits(last_call_s=5.0, join_timeout_s=60.0), now=0.0)
    told = [tick / 10 for tick in range(300) if member.SeeksOn() in machine.ticked(tick / 10)]
    assert told == [5.0]
    machine.planned(Plan(leader_id="l", sequence=1, phase=Phase.GATHER), 30.0)
    told = [tick / 10 for tick in range(300, 500) if member.SeeksOn() in machine.ticked(tick / 10)]
    assert len(told) == 1, "the leader is lost, and another one does not come"
    assert 37 <= told[0] <= 38


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


def test_a_member_starts_and_accepts_only_what_it_has_promised() -> None:
    machine = Member(node=node_info("n"), limits=Limits(max_nodes=2), now=0.0)
    machine.planned(Plan(leader_id="new", sequence=1, phase=Phase.GATHER, ballot=5), 0.1)
    assert (machine.report.promised, machine.report.promised_to) == (5, "new")
    machine.led_away(0.2)
    generation = GenerationId(incarnation=1, nonce="0" * 8, generation=4)
    late = Standing(generation=generation, members=("old", "n"), addresses=("old", "n"))
    machine.planned(Plan(leader_id="old", sequence=1, phase=Phase.GATHER, ballot=4, proposed=late), 0.3)
    assert machine.report.standing is None
    assert not starts(machine.planned(run_of("old", 4, generation), 0.4))
    assert machine.report.standing == late  # but it stands: all are told so by who follows it
    after = msgspec.structs.replace(generation, generation=6)
    assert starts(machine.planned(run_of("new", 6, after), 0.5))


def run_of(leader_id: str, ballot: int, generation: GenerationId) -> Plan:
    """A generation of the leader's node and of `n`."""
    places = tuple(
        Place(
            node_id=name,
            node_rank=rank,
            host=name,
            daemon="",
            role="default",
            num_ranks=1,
            first_global_rank=rank,
            first_role_rank=rank,
            role_world_size=2,
            address=name,
        )
        for rank, name in enumerate(("old", "n"))
    )
    return Plan(
        leader_id=leader_id,
        sequence=2,
        phase=Phase.RUN,
        ballot=ballot,
        generation=generation,
        newest=generation,
        places=places,
    )


def starts(instructions: list[member.Instruction]) -> bool:
    return any(isinstance(instruction, member.StartWorkers) for instruction in instructions)


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


def test_the_machines_know_no_clock() -> None:
    for module in (leader, leader_forming, leader_state, member, membership, election, quorum):
        assert not {"time", "threading", "socket", "zmq"} & set(vars(module))
