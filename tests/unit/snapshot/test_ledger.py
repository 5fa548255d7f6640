"""The node's ledger, event by event. What happens when events come in any order is `test_ledger_simulation`'s."""

from __future__ import annotations

import pytest

from holdfast.checkpoint.version import GenerationId
from holdfast.snapshot import ledger
from holdfast.snapshot.ledger import Header, NodeLedger
from holdfast.snapshot.reports import Agreed, NodeState, Orders, Pin, Request, SlotRef


def generation(number):
    return GenerationId(incarnation=1, nonce="00000abc", generation=number)


G1, G2 = generation(1), generation(2)


def started(*, now=G1, ranks=(0, 1), headers=(), slots=3, machine=None):
    """A ledger whose generation has begun, with slots, and nothing decided."""
    machine = machine or NodeLedger(epoch=1)
    machine.handle(ledger.GenerationStarted(generation=now, node_rank=0, local_ranks=ranks, headers=tuple(headers)))
    machine.handle(ledger.PoolReady(pool=1, num_slots=slots))
    return machine


def header(slot, version, *, local=0, clean=True, alive=False):
    return Header(
        slot=SlotRef(1, slot), local_rank=local, version=version, global_rank=local, clean=clean, writer_alive=alive
    )


def orders(*grants, now=G1, epoch=1, complete=None, **more):
    return ledger.OrdersReceived(
        orders=Orders(generation=now, leader_epoch=epoch, grants=grants, complete=complete, running=True, **more)
    )


def commit(machine, step, *ranks, now=G1):
    out = []
    for rank in ranks:
        out += machine.handle(ledger.RankCommitted(version=now.at(step), global_rank=rank, wait_s=0.25, step_s=2.0))
    return out


def of(kind, instructions):
    return [one for one in instructions if isinstance(one, kind)]


def report(instructions) -> NodeState:
    return of(ledger.SendReport, instructions)[-1].state


def states(instructions):
    return {one.step: one.state for one in report(instructions).held}


def test_a_grant_takes_a_free_slot_and_is_published():
    machine = started()
    out = machine.handle(orders(5))
    [published] = of(ledger.PublishGrant, out)
    assert published.version == G1.at(5)
    assert (report(out).free, states(out)) == (2, {5: "granted"})


def test_orders_that_come_again_grant_nothing_twice():
    machine = started()
    machine.handle(orders(5))
    assert of(ledger.PublishGrant, machine.handle(orders(5))) == []


def test_a_version_is_clean_when_all_local_ranks_are_and_its_waits_are_the_largest():
    machine = started()
    machine.handle(orders(5))
    assert states(commit(machine, 5, 0)) == {5: "granted"}
    out = commit(machine, 5, 1)
    assert states(out) == {5: "clean"}
    assert (report(out).held[0].wait_s, report(out).held[0].step_s) == (0.25, 2.0)


def test_the_complete_version_stays_until_a_newer_one_is_named_complete():
    machine = started(slots=2)
    machine.handle(orders(5))
    commit(machine, 5, 0, 1)
    machine.handle(orders(6, complete=5))
    out = commit(machine, 6, 0, 1)
    assert states(out) == {5: "clean", 6: "clean"}
    out = machine.handle(orders(complete=6))
    assert [one.version.step for one in of(ledger.Completed, out)] == [6]
    assert (states(out), report(out).free) == ({6: "clean"}, 1)
    assert [one.version for one in of(ledger.WithdrawGrant, out)] == [G1.at(5)]


def test_an_abandoned_slot_is_quarantined_until_its_writers_have_let_go():
    machine = started()
    machine.handle(orders(5))
    machine.handle(ledger.RankStepped(generation=G1, global_rank=0, step=5))
    machine.handle(ledger.RankMissed(version=G1.at(5), global_rank=1))
    out = machine.handle(orders())
    assert of(ledger.WithdrawGrant, out)
    assert isinstance(out[-1], ledger.ReadRanks)
    assert report(out).free == 2
    assert machine.watched == {0}
    assert report(commit(machine, 5, 0)).free == 3


def test_a_withdrawn_grant_frees_its_slot_when_no_rank_has_come_to_its_step():
    machine = started()
    machine.handle(orders(5))
    machine.handle(orders())
    for rank in (0, 1):
        out = machine.handle(ledger.RankRead(generation=G1, global_rank=rank, step=4, headers=()))
    assert report(out).free == 3


def test_a_rank_at_the_very_step_of_a_withdrawn_grant_may_have_taken_it():
    machine = started(ranks=(0,))
    machine.handle(orders(5))
    machine.handle(orders())
    machine.handle(ledger.RankRead(generation=G1, global_rank=0, step=5, headers=()))
    assert machine.watched == {0}
    machine.handle(ledger.RankRead(generation=G1, global_rank=0, step=6, headers=()))
    assert machine.watched == frozenset()


@pytest.mark.parametrize("event", ["newer", "died"])
def test_a_writer_lets_go_by_a_newer_commit_or_by_its_death(event):
    machine = started(ranks=(0,))
    machine.handle(orders(5, 6))
    machine.handle(orders(6))
    assert machine.watched == {0}
    if event == "newer":
        commit(machine, 6, 0)
    else:
        machine.handle(ledger.WriterDied(generation=G1, global_rank=0))
    assert machine.watched == frozenset()


def test_a_lost_doorbell_is_made_good_by_the_header():
    machine = started(ranks=(0,))
    machine.handle(orders(5, 6))
    clean = header(0, G1.at(5))
    out = machine.handle(ledger.RankRead(generation=G1, global_rank=0, step=7, headers=(clean,)))
    assert states(out) == {5: "clean", 6: "missed"}


def test_a_pinned_version_stays_until_its_pin_goes():
    machine = started(slots=3)
    pin = Pin(version=G1.at(5))
    machine.handle(orders(5))
    commit(machine, 5, 0, 1)
    machine.handle(orders(6, complete=5, pinned=(pin,)))
    commit(machine, 6, 0, 1)
    out = machine.handle(orders(complete=6, pinned=(pin,)))
    assert set(states(out)) == {5, 6}
    assert len(machine.slots_of(G1.at(5))) == 2
    out = machine.handle(orders(complete=6))
    assert [one.version for one in of(ledger.StopPersist, out)] == [G1.at(5)]
    assert set(states(out)) == {6}


def test_grants_wait_while_the_arena_grows_and_slots_of_the_former_pool_are_dropped():
    machine = started(ranks=(0,))
    machine.handle(ledger.PoolPaused())
    out = machine.handle(orders(5))
    assert (of(ledger.PublishGrant, out), report(out).num_slots) == ([], 0)
    out = machine.handle(ledger.PoolReady(pool=2, num_slots=2))
    assert [one.slot for one in of(ledger.PublishGrant, out)] == [SlotRef(2, 0)]
    assert len(of(ledger.DropSlot, out)) == 3


def test_a_grant_without_a_slot_is_missed_once_a_rank_has_passed_its_step():
    machine = started(ranks=(0,))
    machine.handle(ledger.PoolPaused())
    machine.handle(orders(5))
    out = machine.handle(ledger.RankStepped(generation=G1, global_rank=0, step=6))
    assert states(out) == {5: "missed"}


def test_a_new_generation_keeps_old_images_and_refuses_the_orders_of_the_former_one():
    machine = started()
    machine.handle(orders(5))
    headers = [header(0, G1.at(5)), header(0, G1.at(5), local=1)]
    out = machine.handle(
        ledger.GenerationStarted(generation=G2, node_rank=0, local_ranks=(0, 1), headers=tuple(headers))
    )
    assert of(ledger.ClearGrants, out)
    assert of(ledger.SendInventory, out)
    assert {image.version for image in machine.clean()} == {G1.at(5)}
    assert machine.handle(orders(6)) == []


def test_old_images_go_when_all_ranks_have_entered_and_the_parent_when_a_version_is_complete():
    headers = [header(0, G1.at(4)), header(1, G1.at(5))]
    machine = started(now=G2, ranks=(0,), headers=headers)
    machine.handle(ledger.RestoreDecided(generation=G2, parent=G1.at(5), step=5))
    assert {image.version.step for image in machine.clean()} == {4, 5}
    machine.handle(orders(6, now=G2))
    assert {image.version.step for image in machine.clean()} == {5}
    commit(machine, 6, 0, now=G2)
    assert {image.version.step for image in machine.clean()} == {5, 6}
    machine.handle(orders(now=G2, complete=6))
    assert {image.version for image in machine.clean()} == {G2.at(6)}


def test_a_slot_that_a_living_process_of_an_older_generation_writes_is_not_granted():
    headers = [header(0, G1.at(5), clean=False, alive=True)]
    machine = started(now=G2, ranks=(0,), headers=headers, slots=2)
    out = machine.handle(orders(6, 7, now=G2))
    assert [one.slot for one in of(ledger.PublishGrant, out)] == [SlotRef(1, 1)]
    out = machine.handle(ledger.WriterDied(generation=G1, global_rank=0))
    assert [one.slot for one in of(ledger.PublishGrant, out)] == [SlotRef(1, 0)]


def test_a_commit_of_an_older_generation_does_not_count():
    machine = started(now=G2, ranks=(0,))
    machine.handle(orders(6, now=G2))
    assert commit(machine, 6, 0, now=G1) == []


def test_persists_above_the_restored_step_are_stopped_before_workers_start():
    machine = started()
    pins = (Pin(version=G1.at(5)), Pin(version=G1.at(6)))
    machine.handle(orders(5, 6))
    commit(machine, 5, 0, 1)
    commit(machine, 6, 0, 1)
    machine.handle(orders(complete=6, pinned=pins))
    headers = [header(slot, G1.at(step), local=local) for slot, step in ((0, 5), (1, 6)) for local in (0, 1)]
    started(now=G2, headers=headers, machine=machine)
    assert machine.pinned == pins
    out = machine.handle(ledger.RestoreDecided(generation=G2, parent=G1.at(5), step=5))
    assert [one.version for one in of(ledger.StopPersist, out)] == [G1.at(6)]
    assert machine.pinned == pins[:1]


def test_a_restarted_daemon_takes_grants_from_the_page_and_clean_slots_from_headers():
    machine = NodeLedger(epoch=2)
    machine.handle(
        ledger.Adopted(
            generation=G1,
            node_rank=0,
            local_ranks=(0,),
            parent=None,
            headers=(header(0, G1.at(5)), header(1, G1.at(3)), header(2, G1.at(6), clean=False, alive=True)),
            published=tuple(
                ledger.Published(slot=SlotRef(1, slot), step=step) for slot, step in ((0, 5), (1, 7), (2, 6))
            ),
            agreed=None,
        )
    )
    out = machine.handle(ledger.PoolReady(pool=1, num_slots=4))
    assert states(out) == {5: "clean", 6: "granted", 7: "granted"}
    assert report(out).free == 1
    assert {image.version for image in machine.clean()} == {G1.at(5)}


def test_a_resync_is_answered_and_orders_of_an_older_leader_are_refused_from_then_on():
    machine = started()
    asked = ledger.OrdersReceived(orders=Orders(generation=G1, leader_epoch=7, resync=True))
    out = machine.handle(asked)
    assert (report(out).leader_epoch, report(out).ask) == (7, True)
    assert machine.handle(orders(5, epoch=6)) == []
    assert of(ledger.PublishGrant, machine.handle(orders(5, epoch=7)))


def test_a_request_is_repeated_until_a_complete_version_answers_it():
    machine = started(ranks=(0,))
    request = Request(id="n0-1", kind="stop")
    out = machine.handle(ledger.Requested(request=request))
    assert of(ledger.StoreRequests, out)
    assert report(out).requests == (request,)
    step = Agreed(number=1, step=5, confirmed=True, kind="stop", requests=("n0-1",))
    machine.handle(orders(5, agreed=step))
    out = machine.handle(ledger.LeaderConnected())
    assert report(out).requests == (request,)
    commit(machine, 5, 0)
    out = machine.handle(orders(complete=5, agreed=step))
    assert report(out).requests == ()
    assert of(ledger.StoreRequests, out) == [ledger.StoreRequests(requests=())]


def test_a_request_outlives_its_generation():
    machine = started(ranks=(0,))
    machine.handle(ledger.Requested(request=Request(id="n0-1", kind="stop")))
    started(now=G2, machine=machine)
    assert len(report(machine.handle(ledger.LeaderConnected())).requests) == 1


def test_a_session_over_some_ranks_of_a_node_is_complete_with_their_images():
    machine = started(ranks=(4, 5, 6))
    machine.handle(ledger.RestoreDecided(generation=G1, parent=None, step=0, session_ranks=(1, 4, 6)))
    machine.handle(orders(5))
    assert {rank.global_rank for rank in report(machine.handle(ledger.LeaderConnected())).ranks} == {4, 6}
    assert states(commit(machine, 5, 4)) == {5: "granted"}
    assert states(commit(machine, 5, 6)) == {5: "clean"}
    assert [(image.global_rank, image.local_rank) for image in machine.slots_of(G1.at(5))] == [(4, 0), (6, 2)]


def test_a_restarted_daemon_counts_the_ranks_of_the_session_only():
    machine = NodeLedger(epoch=2)
    machine.handle(
        ledger.Adopted(
            generation=G1,
            node_rank=0,
            local_ranks=(0, 1),
            parent=None,
            headers=(header(0, G1.at(5), local=1),),
            published=(ledger.Published(slot=SlotRef(1, 0), step=5),),
            agreed=None,
            session_ranks=(1,),
        )
    )
    out = machine.handle(ledger.PoolReady(pool=1, num_slots=2))
    assert states(out) == {5: "clean"}
    assert [image.local_rank for image in machine.clean()] == [1]


def test_events_of_one_moment_make_one_report():
    machine = started(ranks=(0,))
    machine.handle(orders(5))
    out = machine.handle(
        ledger.RankStepped(generation=G1, global_rank=0, step=5),
        ledger.RankCommitted(version=G1.at(5), global_rank=0),
    )
    [sent] = of(ledger.SendReport, out)
    assert (sent.state.ranks[0].step, sent.state.held[0].state) == (5, "clean")


def test_a_choice_that_is_heard_again_stops_no_persist_of_the_new_generation():
    machine = started(ranks=(0,))
    machine.handle(orders(5))
    commit(machine, 5, 0)
    machine.handle(orders(complete=5, pinned=(Pin(version=G1.at(5)),)))
    out = machine.handle(ledger.RestoreDecided(generation=G1, parent=None, step=0))
    assert of(ledger.StopPersist, out) == []
    assert len(machine.pinned) == 1


def test_pins_are_recorded_and_a_restarted_daemon_keeps_the_pinned_images():
    machine = started(ranks=(0,))
    machine.handle(orders(5))
    commit(machine, 5, 0)
    pin = Pin(version=G1.at(4), mandatory=True, tag="best")
    out = machine.handle(orders(6, complete=5, pinned=(pin,)))
    assert of(ledger.StorePins, out) == [ledger.StorePins(pinned=(pin,))]
    assert of(ledger.StorePins, machine.handle(orders(6, complete=5, pinned=()))) == [ledger.StorePins(pinned=())]
    successor = NodeLedger(epoch=2)
    old = header(0, G1.at(4))
    successor.handle(
        ledger.Adopted(
            generation=G2,
            node_rank=0,
            local_ranks=(0,),
            parent=None,
            headers=(old,),
            published=(),
            agreed=None,
            pinned=(pin,),
        )
    )
    out = successor.handle(ledger.PoolReady(pool=1, num_slots=2))
    assert (successor.pinned, report(out).pinned) == ((pin,), (pin,))
    successor.handle(orders(7, now=G2, pinned=(pin,)))
    assert [image.version for image in successor.clean()] == [G1.at(4)]


def test_metrics_of_the_ranks_are_reported_with_their_version_the_smallest_rank_first():
    machine = started()
    machine.handle(orders(5))
    for rank, metrics in ((0, {"loss": 1.0}), (1, {"loss": 2.0, "other": 3.0})):
        out = machine.handle(ledger.RankCommitted(version=G1.at(5), global_rank=rank, metrics=metrics))
    assert report(out).held[0].metrics == {"loss": 1.0, "other": 3.0}


def test_nothing_new_means_no_report():
    machine = started()
    machine.handle(orders(5))
    assert machine.handle(orders(5)) == []
