"""The membership machines when nodes are lost and networks fall apart: who goes on, and that nobody else does."""

from __future__ import annotations

import pytest

from holdfast.checkpoint.version import GenerationId
from holdfast.launcher.limits import Limits
from holdfast.launcher.wire import AgentMessage, Plan
from support.membership_jobs import (
    LOST_S,
    by_rank,
    calm,
    goes_on,
    kinds,
    leading_node,
    running,
    split_before_news,
    with_sessions,
)
from support.membership_simulation import Simulation, memory_of

# --- losses


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


def test_a_job_that_was_stopped_begins_again_where_nothing_is_remembered() -> None:
    """As after a total loss: the incarnation's number repeats, its nonce does not."""
    simulation = calm(3, limits=Limits(min_nodes=1, max_nodes=3, last_call_s=3), endpoints=2)
    simulation.gone = {1, 2}
    goes_on(simulation, 1, 10)
    simulation.fail_worker(simulation.agents[0])
    simulation.run(3)
    (before,) = simulation.whole_generations()
    simulation.ask_stop(0)
    simulation.run(2)
    assert kinds(simulation) == ["stopped"]
    simulation.gone = {0}
    for node in (1, 2):
        simulation.boot(node)
    goes_on(simulation, 2, 10)
    (after,) = simulation.whole_generations()
    assert (after.incarnation, after.nonce == before.nonce) == (before.incarnation, False)


# --- splits


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
    simulation.run_until(lambda: len(claims.generations) == 2, 10)
    winners = claims.newest()
    assert winners is not None
    assert len(winners.members) == 3  # the larger side tries first
    winner = next(agent.node for agent in simulation.agents.values() if agent.leads and agent.node in ranks[2:])
    simulation.lose(winner)
    goes_on(simulation, 2, 12)
    assert set(by_rank(simulation)) == set(ranks[2:]) - {winner}
    simulation.run(20)
    assert simulation.world() == [2]  # the losing side, larger than nothing, has not overtaken


def test_two_sides_that_would_name_one_successor_differently_do_not_both_claim_it() -> None:
    """A spare on one side remembers a later incarnation, so that side names what comes next by a number above it."""
    simulation = running(4, smallest=1, claims=True)
    assert simulation.claims is not None
    simulation.boot(4, memory_of(GenerationId(incarnation=7, nonce="0" * 8, generation=3), nodes=1))
    simulation.run(3)
    ranks = by_rank(simulation)
    simulation.split(ranks[:2], [*ranks[2:], 4])
    simulation.run(15)
    assert len(simulation.claims.generations) == 2
    assert len(simulation.whole_generations()) == 1


def test_who_dies_while_it_claims_has_claimed_and_the_members_that_it_lists_go_on() -> None:
    simulation = running(5, smallest=1, claims=True)
    ranks = by_rank(simulation)
    simulation.split(ranks[:2], ranks[2:])
    simulation.chaos.restart_after_s = (1000, 1000)
    simulation.dies_claiming = set(ranks[2:])  # whoever of them leads
    simulation.run_until(lambda: len(simulation.dies_claiming) == 2, 10)
    simulation.dies_claiming = set()
    goes_on(simulation, 2, 12)
    assert simulation.claims is not None
    assert set(by_rank(simulation)) < set(ranks[2:])
    assert simulation.claims.generations == ["1-1", "1-3"]
    simulation.run(20)
    assert simulation.world() == [2]


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


def one_of_four_runs_behind_a_cable_and_new_agents_found_an_incarnation() -> Simulation:
    simulation = running(4, smallest=1, claims=True, endpoints=2)
    simulation.split([0], [1, 2, 3])
    simulation.chaos.restart_after_s = (0.2, 0.2)
    for node in (1, 2, 3):
        simulation.crash(simulation.agents[node])
    goes_on(simulation, 1, 8)
    assert by_rank(simulation) == [0]
    return simulation


def test_a_generation_that_still_runs_elsewhere_reads_of_a_new_incarnation_before_that_starts() -> None:
    simulation = one_of_four_runs_behind_a_cable_and_new_agents_found_an_incarnation()
    goes_on(simulation, 3, 30)
    assert simulation.whole_generations()[0].incarnation == 2


def test_what_follows_an_incarnation_that_never_ran_gives_others_as_long_to_read_of_it() -> None:
    """A founder loses a node just after its claim; the next generation is no reason to start before others yield."""
    simulation = one_of_four_runs_behind_a_cable_and_new_agents_found_an_incarnation()
    assert simulation.claims is not None
    claims = simulation.claims
    claimed = simulation.run_until(lambda: "2-1" in claims.generations, 30)
    simulation = one_of_four_runs_behind_a_cable_and_new_agents_found_an_incarnation()
    simulation.run(claimed - 1.7)  # the node is missed only after the claim
    lost = next(agent for agent in simulation.agents.values() if agent.node and not agent.leads)
    simulation.crash(lost, forever=True)
    goes_on(simulation, 2, 30)
    (after,) = simulation.whole_generations()
    assert (after.incarnation, after.generation) == (2, 2)


def test_a_one_way_cable_ends_in_one_generation() -> None:
    for cut in ((0, 1), (1, 0), (2, 1)):
        simulation = running(4, smallest=2, grow_s=1.0)
        simulation.cuts = {cut}
        simulation.run(15)
        assert len(simulation.whole_generations()) == 1
        simulation.heal()
        goes_on(simulation, 4, 15)


def test_a_generation_is_newer_than_all_that_its_nodes_remember() -> None:
    """The stated exception: both of two nodes went on. A new agent of one then joins the other, which is behind."""
    simulation = running(2, smallest=1, grow_s=0.0)
    low, high = by_rank(simulation)
    simulation.split([low], [high])
    simulation.run_until(lambda: simulation.world() == [1, 1], 8)
    simulation.fail_worker(simulation.agents[high])
    simulation.run(3)
    remembered = max(simulation.whole_generations(), key=lambda generation: generation.generation)
    simulation.chaos.restart_after_s = (0.2, 0.2)
    simulation.crash(simulation.agents[high])
    simulation.heal()
    goes_on(simulation, 2, 8)
    (after,) = simulation.whole_generations()
    assert leading_node(simulation) == low
    assert (after.nonce, after.generation > remembered.generation) == (remembered.nonce, True)


# --- proposals that not all have heard of


def three_with_three_newcomers() -> tuple[Simulation, list[int]]:
    """Three nodes, and three that wait for an agreed step which does not come. The nodes by rank."""
    simulation = with_sessions(running(3, smallest=1, largest=6, grow_s=0.0))
    simulation.agreed_after_s = 1000.0
    for node in (3, 4, 5):
        simulation.boot(node)
    simulation.run(3)
    assert simulation.world() == [3]
    return simulation, by_rank(simulation)


@pytest.mark.parametrize("maker_dies", [False, True])
def test_newcomers_do_not_go_on_with_a_proposal_that_the_voters_have_not_heard_of(maker_dies: bool) -> None:
    """They are more than half of what is proposed; those who have not heard of it are more than half of what ran."""
    simulation, (maker, voter, lost) = three_with_three_newcomers()
    split_before_news(simulation, [voter], [maker, 3, 4, 5], [voter, lost])
    simulation.split([maker, voter, 3, 4, 5], [lost])
    simulation.run_until(lambda: simulation.sides[maker] != simulation.sides[voter], LOST_S)
    if maker_dies:
        simulation.run(0.02)  # its proposal has reached the newcomers
        simulation.lose(maker)
    goes_on(simulation, 2, 2 * LOST_S)
    assert set(by_rank(simulation)) == {voter, lost}
    simulation.run(10)
    assert set(by_rank(simulation)) == {voter, lost}
    simulation.agreed_after_s = 0.1
    simulation.heal()
    simulation.run_until(lambda: len(simulation.world()) == 1 and simulation.world()[0] >= 5 - maker_dies, 20)


def test_a_proposal_that_only_nodes_without_a_place_have_heard_of_is_not_followed() -> None:
    """Five of eight want to go on, four with a place. One is cut off before it hears of it, and joins the rest."""
    simulation = running(8, smallest=4, multiple=4)
    ranks = by_rank(simulation)
    upper = ranks[:3]
    simulation.split(upper, ranks[3:])
    split_before_news(simulation, [ranks[4]], [*upper, ranks[4]], [ranks[3], *ranks[5:]])
    goes_on(simulation, 4, 2 * LOST_S)
    assert set(by_rank(simulation)) == {*upper, ranks[4]}
    simulation.run(10)
    assert set(by_rank(simulation)) == {*upper, ranks[4]}


def test_what_a_leader_has_given_up_does_not_bind_it() -> None:
    """The newcomers, more than half of what it had proposed, are lost before the voter hears of it."""
    simulation, (maker, voter, lost) = three_with_three_newcomers()
    missed: list[Plan] = []

    def loses(sender: int, receiver: int, message: AgentMessage) -> bool:
        if receiver != voter or not isinstance(message, Plan) or message.proposed is None:
            return False
        missed.append(message)
        return True

    simulation.loses = loses
    simulation.split([maker, voter, 3, 4, 5], [lost])
    simulation.run_until(lambda: missed, LOST_S)
    simulation.lose(3, 4, 5)
    simulation.run(3)
    simulation.loses = lambda sender, receiver, message: False
    goes_on(simulation, 2, LOST_S)
    assert by_rank(simulation) == [maker, voter]


def test_a_voter_that_is_lost_before_it_knew_of_the_next_generation_leaves_nobody_waiting_for_ever() -> None:
    """The vote of the fifth of eight was needed, though it has no place; four are too few to go on."""
    simulation = running(8, smallest=4, multiple=4, supervised=False)
    lost: list[int] = []

    def loses(sender: int, receiver: int, message: AgentMessage) -> bool:
        proposed = message.proposed if isinstance(message, Plan) else None
        if proposed is None or simulation.agents[receiver].node_id in proposed.members:
            return False
        simulation.lose(receiver)
        lost.append(receiver)
        return True

    simulation.loses = loses
    simulation.lose(*by_rank(simulation)[:3])
    simulation.run(30)
    assert len(lost) == 1
    assert (simulation.whole_generations(), kinds(simulation)) == ([], [])
    simulation.run(30)
    assert kinds(simulation) == ["stopped"] * 4
