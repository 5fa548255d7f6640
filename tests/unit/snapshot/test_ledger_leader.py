"""The leader's ledger: grants, completeness, persists and the interval, report by report."""

from __future__ import annotations

import dataclasses

import msgspec

from holdfast.checkpoint.version import GenerationId
from holdfast.snapshot import leader
from holdfast.snapshot.interval import WINDOW, AutoInterval
from holdfast.snapshot.leader import LeaderConfig, LeaderLedger
from holdfast.snapshot.persists import (
    ATTEMPTS_OF_FINAL,
    ATTEMPTS_OF_MANDATORY,
    CommitPersist,
    OrderPersist,
    PersistQueue,
    PersistSettled,
    pause_s,
)
from holdfast.snapshot.reports import Agreed, Final, Held, NodeState, Pin, RankState, Request

G = GenerationId(incarnation=1, nonce="00000abc", generation=1)


def made(*, nodes=(0,), **more):
    config = LeaderConfig(generation=G, epoch=1, nodes=nodes, num_ranks=len(nodes), start_step=0, snapshot_every=1)
    machine = LeaderLedger(dataclasses.replace(config, **more))
    assert [one.orders.resync for one in machine.start()] == [True] * len(nodes)
    return machine


def report(step=0, *, node=0, slots=6, free=None, clean=(), granted=(), missed=(), entered=True, rank=None, **more):
    held = [Held(step=one, state="clean", wait_s=0.5, step_s=1.0) for one in clean]
    held += [Held(step=one, state="granted") for one in granted] + [Held(step=one, state="missed") for one in missed]
    state = NodeState(
        generation=G,
        node_rank=node,
        epoch=1,
        leader_epoch=1,
        num_slots=slots,
        free=slots - len(held) if free is None else free,
        held=tuple(held),
        complete=None,
        pinned=(),
        ranks=(rank or RankState(global_rank=node, step=step, entered=entered),),
    )
    return leader.ReportReceived(state=msgspec.structs.replace(state, **more))


def of(kind, instructions):
    return [one for one in instructions if isinstance(one, kind)]


def orders(instructions):
    return of(leader.SendOrders, instructions)[-1].orders


def test_nothing_is_granted_before_every_node_has_answered_and_every_rank_has_entered():
    machine = made(nodes=(0, 1))
    assert machine.handle(report(node=0)) == []
    out = machine.handle(report(node=1, entered=False))
    assert (orders(out).grants, orders(out).running) == ((), False)
    out = machine.handle(report(node=1))
    assert (orders(out).grants, orders(out).running) == ((1, 2, 3), True)


def test_grants_reach_as_far_as_the_node_with_least_room():
    machine = made(nodes=(0, 1))
    machine.handle(report(node=0))
    assert orders(machine.handle(report(node=1, slots=2))).grants == (1, 2)


def test_slots_promised_and_not_yet_reported_count_as_taken():
    machine = made()
    assert orders(machine.handle(report(slots=2))).grants == (1, 2)
    assert machine.handle(report(1, slots=2)) == []


def test_fewer_than_two_slots_mean_no_grants():
    assert orders(made().handle(report(slots=1))).grants == ()


def test_a_version_is_complete_when_it_is_clean_on_every_node():
    machine = made(nodes=(0, 1))
    machine.handle(report(node=0))
    machine.handle(report(node=1))
    assert of(leader.VersionCompleted, machine.handle(report(1, node=0, clean=(1,)))) == []
    out = machine.handle(report(1, node=1, clean=(1,)))
    assert [one.version for one in of(leader.VersionCompleted, out)] == [G.at(1)]
    assert orders(out).complete == 1
    assert machine.complete == G.at(1)


def test_a_generation_that_goes_on_from_memory_has_its_first_version_at_once():
    machine = made(start_step=20, snapshot_every=10, parent=G.at(20))
    assert orders(machine.handle(report(20))).grants == (21,)
    assert orders(machine.handle(report(21, missed=(21,)))).grants == (23,)  # a miss: another one, a little later
    machine.handle(report(23, clean=(23,)))
    assert orders(machine.handle(report(27, clean=(23,)))).grants == (30,)


def test_the_restored_step_is_granted_where_a_further_loss_could_take_what_the_generation_started_from():
    machine = made(start_step=20, snapshot_every=10, parent=G.at(20), exposed=True)
    assert orders(machine.handle(report(20))).grants == (20,)
    done = orders(machine.handle(report(20, clean=(20,))))
    assert (done.complete, done.grants) == (20, ())
    assert orders(machine.handle(report(27, clean=(20,)))).grants == (30,)


def test_who_did_not_wait_for_the_grant_of_the_restored_step_gets_the_next_one_and_no_longer_lead():
    machine = made(start_step=20, snapshot_every=10, parent=G.at(20), exposed=True)
    machine.handle(report(20))
    assert orders(machine.handle(report(21, missed=(20,)))).grants == (22,)
    assert machine.lead == 1
    assert machine.handle(report(21, missed=(20,), granted=(22,))) == []


def test_a_missed_version_is_abandoned_and_grants_move_further_ahead():
    machine = made()
    machine.handle(report())
    out = machine.handle(report(4, missed=(1,), granted=(2, 3)))
    assert 1 not in orders(out).grants
    assert (machine.counters.missed, machine.lead) == (1, 2)
    assert min(step for step in orders(out).grants if step > 3) == 6


def test_the_lead_shrinks_after_many_versions_without_a_miss():
    machine = made()
    machine.handle(report())
    machine.lead = 4
    for step in range(1, 200):
        if step in machine.outstanding:
            machine.handle(report(step, clean=(step,)))
        else:
            machine.handle(report(step))
    assert machine.lead < 4


def test_older_versions_that_never_became_clean_are_superseded():
    machine = made()
    machine.handle(report())
    out = machine.handle(report(3, granted=(1,), clean=(2,)))
    assert 1 not in orders(out).grants
    assert machine.counters.superseded == 1


def test_the_last_free_slot_is_kept_for_a_must_step():
    machine = made(persist_every_steps=10)
    out = machine.handle(report(6, slots=2, free=1))
    assert machine.outstanding == set()
    assert orders(out).grants == ()
    machine.handle(report(7, slots=2, free=1))
    assert machine.outstanding == {10}


def test_nothing_is_granted_beyond_the_last_step():
    machine = made()
    rank = RankState(global_rank=0, step=8, entered=True, until=9)
    assert orders(machine.handle(report(rank=rank))).grants == (9,)


def test_the_final_step_is_granted_where_workers_wait_and_later_grants_are_taken_back_for_it():
    machine = made(snapshot_every=2)
    assert orders(machine.handle(report(1, slots=2, free=1))).grants == (2,)
    machine.handle(report(2, slots=2, clean=(2,), free=1))
    assert machine.outstanding == {4}
    ended = RankState(global_rank=0, step=3, entered=True, final=Final(step=3, persist=True))
    assert orders(machine.handle(report(rank=ended, slots=2, clean=(2,), granted=(4,)))).grants == ()
    machine.handle(report(rank=ended, slots=2, clean=(2,), free=1))
    assert machine.outstanding == {3}


def test_a_new_leader_ends_the_taking_back_of_grants_that_its_predecessor_began():
    """Node 0 has been told that 10 is taken back for the agreed step 6; node 1 has not, and gives 10 its last slot."""
    machine = made(nodes=(0, 1), persist_every_steps=5)
    stop = Agreed(number=2, step=6, confirmed=True, kind="stop", requests=("n0-1",))
    there = [RankState(global_rank=rank, step=6, entered=True, acknowledged=2, until=10) for rank in (0, 1)]
    machine.handle(report(node=0, rank=there[0], slots=2, clean=(5, 6), agreed=stop))
    out = machine.handle(report(node=1, rank=there[1], slots=2, clean=(5,), granted=(10,), agreed=stop))
    assert (orders(out).complete, orders(out).grants) == (5, (6,))
    machine.handle(report(node=1, rank=there[1], slots=2, clean=(5,), granted=(6,), agreed=stop))
    assert machine.outstanding == {6}
    out = machine.handle(report(node=1, rank=there[1], slots=2, clean=(5, 6), agreed=stop))
    assert orders(out).complete == 6


def test_a_complete_multiple_of_persist_every_is_pinned_with_the_orders_that_name_it_complete():
    machine = made(persist_every_steps=2)
    machine.handle(report(1))
    out = machine.handle(report(2, clean=(2,)))
    assert [one.version for one in of(OrderPersist, out)] == [G.at(2)]
    assert (orders(out).complete, [pin.version for pin in orders(out).pinned]) == (2, [G.at(2)])


def test_a_final_step_that_is_complete_already_is_persisted_when_the_loops_have_ended():
    machine = made()
    machine.handle(report(1))
    assert of(OrderPersist, machine.handle(report(2, clean=(2,)))) == []
    ended = RankState(global_rank=0, step=2, entered=True, final=Final(step=2, persist=True))
    out = machine.handle(report(rank=ended, clean=(2,)))
    assert [one.version for one in of(OrderPersist, out)] == [G.at(2)]


def test_a_persist_that_is_due_by_time_takes_the_newest_complete_version():
    machine = made()
    machine.handle(report(1))
    machine.handle(report(2, clean=(2,)))
    out = machine.handle(leader.PersistDue())
    assert [one.version for one in of(OrderPersist, out)] == [G.at(2)]


def test_an_agreed_save_carries_its_tag_and_metrics_to_the_persist():
    machine = made()
    request = Request(id="n0-1", kind="save", tag="best", metrics={"loss": 1.0})
    machine.handle(report(1, requests=(request,)))
    step = machine.agreement.current.step
    rank = RankState(global_rank=0, step=step - 1, entered=True, acknowledged=1)
    machine.handle(report(rank=rank, requests=(request,)))
    assert machine.agreement.due == step
    rank = msgspec.structs.replace(rank, step=step)
    machine.handle(report(rank=rank, requests=(request,)))
    out = machine.handle(report(rank=rank, requests=(request,), clean=(step,)))
    [order] = of(OrderPersist, out)
    assert (order.version.step, order.tag, order.metrics) == (step, "best", {"loss": 1.0})


def test_a_report_to_another_epoch_is_answered_by_a_question():
    machine = made()
    [question] = machine.handle(report(leader_epoch=0))
    assert question.orders.resync


def test_a_restarted_leader_takes_over_from_the_reports_and_waits_for_all_of_them():
    machine = made(nodes=(0, 1))
    pin = Pin(version=G.at(4), tag="best", mandatory=True)
    assert machine.handle(report(6, node=0, clean=(4, 5), granted=(7,), complete=5, pinned=(pin,))) == []
    out = machine.handle(report(6, node=1, clean=(4, 5), granted=(8,), complete=4))
    assert orders(out).complete == 5
    assert {7, 8} <= set(orders(out).grants)
    assert [one.tag for one in of(OrderPersist, out)] == ["best"]
    assert orders(out).pinned == (pin,)


def test_a_node_that_asks_gets_orders_although_nothing_has_changed():
    machine = made()
    machine.handle(report())
    assert machine.handle(report(granted=(1, 2, 3))) == []
    assert orders(machine.handle(report(granted=(1, 2, 3), ask=True))).grants == (1, 2, 3)


def test_skipped_steps_are_counted():
    machine = made()
    machine.handle(report(0, slots=2, free=0))
    machine.handle(report(3, slots=2, free=0))
    assert machine.counters.skipped == 3


# --- the interval


def test_auto_keeps_the_largest_wait_under_one_percent_of_the_step_time():
    auto = AutoInterval(0)
    changes = [auto.completed(0.02 if n == 3 else 0.001, 1.0) for n in range(WINDOW)]
    assert changes[:-1] == [None] * (WINDOW - 1)
    assert changes[-1] == (0.02, 1.0)
    assert auto.every == 3
    assert 0.02 / auto.every < 0.01 <= 0.02 / (auto.every - 1)


def test_auto_goes_back_to_one_when_waits_vanish_and_a_fixed_interval_stays():
    auto, fixed = AutoInterval(0), AutoInterval(7)
    auto.every = 5
    for _ in range(WINDOW):
        auto.completed(0.0, 1.0)
        fixed.completed(0.5, 1.0)
    assert (auto.every, fixed.every) == (1, 7)


# --- the persist queue


def pins(queue):
    return [pin.version.step for pin in queue.pins]


def offer(queue, step, **more):
    return queue.offer(Pin(version=G.at(step), **more))


def settled(instructions):
    return [(one.version.step, one.outcome) for one in of(PersistSettled, instructions)]


def test_one_persist_at_a_time_and_only_the_newest_waits():
    queue = PersistQueue((0,), attempt=0)
    assert of(OrderPersist, offer(queue, 10))
    assert offer(queue, 20) == []
    assert settled(offer(queue, 30)) == [(20, "dropped")]
    assert (pins(queue), queue.dropped) == ([10, 30], 1)


def test_mandatory_ones_are_never_dropped():
    queue = PersistQueue((0,), attempt=0)
    offer(queue, 10)
    offer(queue, 20, mandatory=True)
    offer(queue, 30)
    assert pins(queue) == [10, 20, 30]
    assert settled(queue.squeeze(2, G.at(40))) == [(30, "dropped")]


def test_the_root_is_written_when_every_part_is_and_then_the_next_begins():
    queue = PersistQueue((0, 1), attempt=0)
    [order] = offer(queue, 10)
    offer(queue, 20)
    assert queue.part_ended(order.version, order.attempt, 0, None) == []
    assert queue.part_ended(order.version, order.attempt, 0, None) == []
    [commit] = queue.part_ended(order.version, order.attempt, 1, None)
    assert isinstance(commit, CommitPersist)
    out = queue.commit_ended(order.version, order.attempt, None)
    assert settled(out) == [(10, "persisted")]
    assert [one.version.step for one in of(OrderPersist, out)] == [20]
    assert offer(queue, 10) == []


def test_a_tag_that_comes_when_the_version_is_in_storage_is_given_to_it():
    queue = PersistQueue((0,), attempt=0)
    [order] = offer(queue, 10)
    [commit] = queue.part_ended(order.version, order.attempt, 0, None)
    assert settled(queue.commit_ended(order.version, commit.attempt, None)) == [(10, "persisted")]
    [again] = offer(queue, 10, mandatory=True, tag="best")
    [commit] = queue.part_ended(again.version, again.attempt, 0, None)
    assert (commit.version, commit.tag) == (G.at(10), "best")
    [done] = queue.commit_ended(again.version, commit.attempt, None)
    assert (done.outcome, done.tag) == ("persisted", "best")
    assert offer(queue, 10, mandatory=True, tag="best") == []
    assert offer(queue, 10, mandatory=True) == []


def test_a_tag_that_comes_while_the_root_is_written_is_told_of_when_it_is_there():
    queue = PersistQueue((0,), attempt=0)
    [order] = offer(queue, 10)
    [commit] = queue.part_ended(order.version, order.attempt, 0, None)
    assert offer(queue, 10, mandatory=True, tag="best") == []
    [again] = queue.commit_ended(order.version, commit.attempt, None)
    assert isinstance(again, OrderPersist)
    [commit] = queue.part_ended(again.version, again.attempt, 0, None)
    [done] = queue.commit_ended(again.version, commit.attempt, None)
    assert (commit.tag, done.outcome, done.tag) == ("best", "persisted", "best")


def test_a_failed_part_fails_the_attempt_and_a_mandatory_one_is_tried_again():
    queue = PersistQueue((0,), attempt=0)
    [order] = offer(queue, 10, mandatory=True)
    for _ in range(ATTEMPTS_OF_MANDATORY - 1):
        [order] = queue.part_ended(order.version, order.attempt, 0, "disk full")
        assert isinstance(order, OrderPersist)
    out = queue.part_ended(order.version, order.attempt, 0, "disk full")
    assert settled(out) == [(10, "failed")]
    assert not out[0].final
    assert (queue.failed, pins(queue)) == (1, [])


def test_the_final_step_is_tried_for_minutes_after_pauses_with_the_reason_of_the_last_failure():
    queue = PersistQueue((0,), attempt=0)
    [order] = offer(queue, 10, mandatory=True)
    offer(queue, 10, mandatory=True, final=True)
    pauses = []
    for tries in range(2, ATTEMPTS_OF_FINAL + 1):
        [order] = queue.part_ended(order.version, order.attempt, 0, "the storage is away")
        assert (order.tries, order.problem) == (tries, "node 0: the storage is away")
        pauses.append(pause_s(tries))
    assert pauses[:5] == [0.0, 0.0, 1.0, 2.0, 4.0]
    assert 540 < sum(pauses) < 660
    out = queue.part_ended(order.version, order.attempt, 0, "the storage is away")
    assert settled(out) == [(10, "failed")]
    assert out[0].final


def test_answers_of_an_older_attempt_are_ignored():
    queue = PersistQueue((0,), attempt=0)
    [first] = offer(queue, 10, mandatory=True)
    queue.part_ended(first.version, first.attempt, 0, "gone")
    assert queue.part_ended(first.version, first.attempt, 0, None) == []


def test_a_reconnected_node_gets_its_order_again_until_its_part_is_there():
    queue = PersistQueue((0, 1), attempt=0)
    [order] = offer(queue, 10)
    assert [one.nodes for one in of(OrderPersist, queue.node_reconnected(1))] == [(1,)]
    queue.part_ended(order.version, order.attempt, 1, None)
    assert queue.node_reconnected(1) == []


def test_a_node_without_a_rank_of_the_session_is_asked_for_no_slot_and_no_image():
    machine = made(nodes=(0, 1), num_ranks=1)
    machine.handle(report(node=1, slots=0, free=0, ranks=()))
    assert orders(machine.handle(report(node=0))).grants == (1, 2, 3)
    out = machine.handle(report(1, node=0, clean=(1,), granted=(2, 3)))
    assert [one.version.step for one in of(leader.VersionCompleted, out)] == [1]


def test_the_metrics_of_a_step_go_into_its_periodic_checkpoint():
    machine = made(nodes=(0, 1), persist_every_steps=2)
    for node in (0, 1):
        machine.handle(report(node=node))
    held = [Held(step=2, state="clean", metrics={"loss": float(node), f"of-{node}": 1.0}) for node in (0, 1)]
    machine.handle(report(2, node=0, held=(held[0],)))
    out = machine.handle(report(2, node=1, held=(held[1],)))
    [order] = of(OrderPersist, out)
    assert order.metrics == {"loss": 0.0, "of-0": 1.0, "of-1": 1.0}


def test_a_tagged_save_that_falls_on_a_step_which_is_being_persisted_keeps_its_tag():
    machine = made(persist_every_steps=2)
    machine.handle(report())
    end = RankState(global_rank=0, step=2, entered=True, final=Final(step=2, persist=True))
    [order] = of(OrderPersist, machine.handle(report(2, clean=(2,), rank=end)))
    assert order.tag is None
    request = Request(id="r", kind="save", tag="best", metrics={"loss": 1.0})
    machine.handle(report(2, clean=(2,), rank=end, requests=(request,)))
    out = machine.handle(leader.PartEnded(version=G.at(2), attempt=order.attempt, node_rank=0))
    [commit] = of(CommitPersist, out)
    assert (commit.tag, commit.metrics) == ("best", {"loss": 1.0})
