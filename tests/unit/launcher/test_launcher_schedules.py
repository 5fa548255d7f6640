"""The membership machines under any schedule of faults, and mutants of them, each of which is noticed.

`test_twenty_thousand_schedules_of_faults` is a campaign: `pytest -m campaign tests/unit/launcher`.
"""

from __future__ import annotations

import msgspec
import pytest
import test_launcher_losses as losses
import test_launcher_membership as one_leader

from holdfast.checkpoint.version import GenerationId
from holdfast.launcher import leader, leader_forming, leader_orders, leader_state, member, quorum
from holdfast.launcher.claims import ClaimStore, _name
from holdfast.launcher.election import Election
from holdfast.launcher.leader import Leader
from holdfast.launcher.limits import Limits
from holdfast.launcher.member import Member
from holdfast.launcher.membership import Membership
from holdfast.launcher.wire import Phase, Plan, Standing
from support.membership_jobs import by_rank
from support.membership_simulation import Chaos, Simulation

SETTLE_S = 60.0


def any_schedule(seed: int, nodes: int | None = None) -> Simulation:
    claims = seed % 4 == 1
    nodes = nodes or 3 + seed % 5 if seed % 8 else 2
    largest = nodes - (seed % 3 == 2 and nodes > 3)
    smallest = max(1, largest - seed % 3)
    # Without a claim store, fresh agents cannot know of a generation that shrank to half or less and does not call them
    # within the last call: because a cable is cut, or its agent is suspended. Of two nodes both may go on in any case.
    may_split = claims or (largest == nodes and 2 * smallest > nodes)
    may_be_deaf = may_split or nodes == 2
    limits = Limits(
        min_nodes=smallest,
        max_nodes=largest,
        last_call_s=2 if may_be_deaf else 8,
        join_timeout_s=20,
        grow_s=(0.5, 30.0)[seed % 2],
    )
    chaos = Chaos(
        until_s=20.0,
        longest_pause_s=6.0 if may_be_deaf else 1.5,
        loss=0.15 * (seed % 3),
        worker_failures=0.5 / nodes,
        crashes=0.15 / nodes,
        splits=0.1 * (seed % 2) if may_split else 0.0,
        cuts=0.1 * (seed % 4 == 3) if may_split else 0.0,
        other_memories=0.3 if claims else 0.0,
        store_delay_s=1.0 if seed % 8 == 5 else 0.1,
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
_run_standing = Leader._run_standing
_form = Leader._form


def _standing_already(machine: Leader) -> Standing:
    return msgspec.structs.replace(_run_standing(machine), bases=())


def _fence_founders_only(machine: Leader, chosen: list, follows: Standing | None, now: float) -> None:
    _form(machine, chosen, follows, now)
    assert machine._run is not None
    machine._run.overtakes = machine._run.overtakes and follows is None


def _claim_one_name(store: ClaimStore, claim: Standing, after: GenerationId | None) -> bool:
    name = _name(claim.generation.incarnation, claim.generation.generation)
    return store._is_first(store._generations / name, claim)


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
    "what follows an incarnation that never ran is not fenced": (Leader, "_form", _fence_founders_only),
    "sides that name a successor differently both claim it": (ClaimStore, "create", _claim_one_name),
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
    "a proposal runs before those with a vote have accepted it": (
        Leader,
        "_has_accepted",
        lambda machine, node, run: True,
    ),
    "a proposal counts as a generation that ran": (Leader, "_run_standing", _standing_already),
    "a leader is bound by what it has given up": (Leader, "_known_to", lambda machine, report: report.standing),
    "a number is used again that a seat remembers": (
        Leader,
        "_newest_number",
        lambda machine: machine._standing.generation.generation,
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_the_simulation_catches_the_mutant(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, attribute, replacement = MUTANTS[name]
    monkeypatch.setattr(owner, attribute, replacement)
    with pytest.raises(AssertionError):  # Violation, Stuck, or an assertion of the machine's own
        _check_many()


def _check_many() -> None:
    losses.test_a_fresh_agent_at_the_first_endpoint_does_not_overtake_a_generation_that_it_cannot_hear()
    losses.test_a_generation_that_still_runs_elsewhere_reads_of_a_new_incarnation_before_that_starts()
    losses.test_what_follows_an_incarnation_that_never_ran_gives_others_as_long_to_read_of_it()
    losses.test_with_a_claim_store_only_one_of_two_nodes_goes_on()
    losses.test_two_sides_that_would_name_one_successor_differently_do_not_both_claim_it()
    losses.test_newcomers_do_not_go_on_with_a_proposal_that_the_voters_have_not_heard_of(maker_dies=True)
    losses.test_what_a_leader_has_given_up_does_not_bind_it()
    losses.test_a_generation_is_newer_than_all_that_its_nodes_remember()
    one_leader.test_a_member_starts_and_accepts_only_what_it_has_promised()
    one_leader.test_growth_ends_nobody_before_all_wait_at_the_agreed_step()
    one_leader.test_what_was_agreed_is_carried_out_though_the_newcomer_has_gone()
    one_leader.test_a_node_that_is_asked_to_leave_leaves_and_the_others_go_on(0, session=True)
    one_leader.test_a_node_stays_until_the_next_generation_has_protected_a_version_or_its_grace_ends()
    one_leader.test_notices_for_more_nodes_than_the_job_can_miss_stop_it(1)
    for seed in range(150):
        check(seed)
        check_split(seed)
