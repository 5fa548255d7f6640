"""Agreed steps: the worker's half at a boundary, and the leader's half over what workers publish."""

from __future__ import annotations

import pytest

from holdfast.snapshot.agreement import Agreement, Decision, Situation, at_boundary
from holdfast.snapshot.reports import Agreed, Final, RankState, Request

SAVE = Request(id="n0-1", kind="save", tag="best", metrics={"loss": 1.5})
STOP = Request(id="n1-1", kind="stop")


def situation(*ranks, requests=(SAVE,), complete=None, lead=2, memory=True, room=True):
    return Situation(
        ranks=ranks,
        requests={request.id: request for request in requests},
        complete=complete,
        lead=lead,
        memory=memory,
        room_to_save=room,
    )


def rank(number, step, acknowledged=0, **more):
    return RankState(global_rank=number, step=step, entered=True, acknowledged=acknowledged, **more)


def agreed(step, *, number=3, confirmed=False):
    return Agreed(number=number, step=step, confirmed=confirmed, kind="save")


@pytest.mark.parametrize(
    ("step", "page", "acknowledged", "decision"),
    [
        (7, None, 0, Decision.GO_ON),
        (7, agreed(9), 2, Decision.ACKNOWLEDGE),
        (7, agreed(9), 3, Decision.GO_ON),
        (9, agreed(9), 3, Decision.WAIT),
        (9, agreed(9), 0, Decision.WAIT),
        (9, agreed(9, confirmed=True), 3, Decision.PERFORM),
        (10, agreed(9), 0, Decision.GO_ON),
    ],
)
def test_a_worker_acknowledges_before_waits_at_and_ignores_after_the_step(step, page, acknowledged, decision):
    assert at_boundary(step, page, acknowledged) is decision


def test_a_proposal_lies_ahead_of_the_newest_worker():
    machine = Agreement()
    machine.advance(situation(rank(0, 10), rank(1, 12)))
    assert machine.current is not None
    assert (machine.current.step, machine.current.confirmed, machine.current.tag) == (14, False, "best")


def test_it_is_confirmed_only_when_every_worker_has_acknowledged():
    machine = Agreement()
    machine.advance(situation(rank(0, 10), rank(1, 10)))
    machine.advance(situation(rank(0, 11, 1), rank(1, 11)))
    assert machine.due is None
    machine.advance(situation(rank(0, 11, 1), rank(1, 11, 1)))
    assert machine.due == 12


def test_a_worker_that_got_there_unacknowledged_causes_a_later_pick_further_ahead():
    machine = Agreement()
    machine.advance(situation(rank(0, 10), rank(1, 10)))
    machine.advance(situation(rank(0, 11, 1), rank(1, 12)))
    assert machine.current is not None
    assert (machine.current.number, machine.current.step, machine.current.confirmed) == (2, 16, False)


def test_a_worker_that_acknowledged_and_waits_does_not_cause_a_later_pick():
    machine = Agreement()
    machine.advance(situation(rank(0, 10), rank(1, 10)))
    machine.advance(situation(rank(0, 12, 1), rank(1, 11)))
    assert machine.current is not None
    assert machine.current.number == 1


def test_a_confirmed_step_never_changes():
    machine = Agreement()
    machine.advance(situation(rank(0, 10)))
    machine.advance(situation(rank(0, 11, 1)))
    before = machine.current
    machine.advance(situation(rank(0, 11, 1), requests=(SAVE, STOP)))
    assert machine.current == before


def test_calls_before_the_confirmation_are_one():
    machine = Agreement()
    machine.advance(situation(rank(0, 10)))
    second = Request(id="n0-2", kind="save", tag="other", metrics={"accuracy": 0.5})
    machine.advance(situation(rank(0, 11, 1), requests=(SAVE, second)))
    assert machine.current is not None
    assert machine.current.requests == ("n0-1", "n0-2")
    assert (machine.current.tag, machine.current.metrics) == ("best", {"loss": 1.5, "accuracy": 0.5})


def test_a_stop_follows_a_save_once_its_version_is_complete():
    machine = Agreement()
    machine.advance(situation(rank(0, 10)))
    machine.advance(situation(rank(0, 11, 1)))
    machine.advance(situation(rank(0, 12, 1), requests=(SAVE, STOP)))
    assert machine.due == 12
    machine.advance(situation(rank(0, 12, 1), requests=(SAVE, STOP), complete=12))
    assert machine.current is not None
    assert (machine.current.kind, machine.current.step, machine.current.requests) == ("stop", 14, ("n1-1",))


def test_saves_wait_while_the_persist_queue_is_full_and_stops_do_not():
    machine = Agreement()
    machine.advance(situation(rank(0, 10), room=False))
    assert machine.current is None
    machine.advance(situation(rank(0, 10), requests=(SAVE, STOP), room=False))
    assert machine.current is not None
    assert machine.current.kind == "stop"


def test_the_last_step_of_ended_loops_answers_all_requests():
    machine = Agreement()
    ended = Final(step=20, persist=True)
    machine.advance(situation(rank(0, 20, final=ended), rank(1, 20, final=ended), requests=(SAVE, STOP)))
    assert machine.due == 20
    number = machine.current.number if machine.current else 0
    machine.advance(situation(rank(0, 20, final=ended), rank(1, 20, final=ended), requests=(SAVE, STOP)))
    assert machine.current is not None
    assert machine.current.number == number


def test_no_proposal_beyond_the_last_step():
    machine = Agreement()
    machine.advance(situation(rank(0, 19, until=20)))
    assert machine.current is None
    machine.advance(situation(rank(0, 18, until=20), lead=5))
    assert machine.current is not None
    assert machine.current.step == 20


def test_a_new_leader_takes_over_the_newest_proposal_confirmed_where_anybody_saw_it_confirmed():
    machine = Agreement()
    machine.restore([agreed(8, number=2, confirmed=True), agreed(12), None, agreed(12, confirmed=True)])
    assert machine.current == agreed(12, confirmed=True)
