"""When slots are made, of which size and for whom."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from holdfast.snapshot import room as room_module
from holdfast.snapshot.arena import SLOT_HEADER_BYTES, Arena, round_capacity
from holdfast.snapshot.limits import Limit
from holdfast.snapshot.messages import Notice, SlotsReady
from holdfast.snapshot.room import Room

MB = 1 << 20
_names = itertools.count()


class LaterLanes:
    """Lanes whose jobs run when the test says so."""

    def __init__(self) -> None:
        self.jobs: list[tuple[Callable[[], object], Callable[[object], None]]] = []

    def submit(self, lane: str, job: Callable[[], object], done: Callable[[object], None]) -> None:
        self.jobs.append((job, done))

    def run(self) -> None:
        while self.jobs:
            job, done = self.jobs.pop(0)
            try:
                result = job()
            except OSError as error:
                result = error
            done(result)


class Made:
    """A room, and what it said."""

    def __init__(self, directory: Path) -> None:
        self.arena, self.lanes = Arena.open(directory), LaterLanes()
        self.announced: dict[int, SlotsReady] = {}
        self.notices: list[Notice] = []
        self.ready: list[tuple[int, int]] = []
        self.room = Room(
            self.arena,
            self.lanes,  # type: ignore[arg-type]
            announce=self.announced.__setitem__,
            notice=self.notices.append,
            unused=list,
            ready=lambda pool, num_slots: self.ready.append((pool, num_slots)),
        )


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Made]:
    one = Made(tmp_path / f"arena-{next(_names)}")
    yield one
    one.arena.control.close()
    one.arena.remove()


def pools(made: Made) -> set[int]:
    return {found.pool for found in made.arena.scan()}


def test_slots_are_made_for_the_ranks_of_the_session_once_all_have_said_what_they_need(made: Made) -> None:
    made.room.start((0, 2))
    made.room.need(0, MB)
    assert made.lanes.jobs == []
    made.room.need(1, 100 * MB)  # not in the Session
    made.room.need(2, 3 * MB)
    made.lanes.run()
    assert {found.local_rank for found in made.arena.scan()} == {0, 2}
    assert {found.capacity_bytes for found in made.arena.scan()} == {round_capacity(3 * MB)}
    for local_rank in (0, 2):
        made.room.mapped(local_rank, 0)
    assert made.ready == [(0, 6)]


def test_ranks_that_grow_one_after_another_get_one_new_pool(made: Made) -> None:
    made.room.start((0, 1))
    for local_rank in (0, 1):
        made.room.need(local_rank, MB)
    made.lanes.run()
    assert made.room.need(0, 9 * MB)
    made.room.need(1, 9 * MB)
    assert len(made.lanes.jobs) == 1
    made.lanes.run()
    assert pools(made) == {0, 1}
    assert made.announced[1].capacity_bytes == round_capacity(9 * MB)


def test_a_rank_that_grows_further_while_slots_are_made_gets_larger_ones(made: Made) -> None:
    made.room.start((0, 1))
    for local_rank in (0, 1):
        made.room.need(local_rank, MB)
    made.room.need(1, 9 * MB)
    made.lanes.run()
    assert made.announced[0].capacity_bytes == made.announced[1].capacity_bytes == round_capacity(9 * MB)


def test_memory_that_ends_in_the_middle_leaves_no_file_and_says_so(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = itertools.count()

    def full(descriptor: int, offset: int, length: int) -> None:
        if next(calls) >= 3:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    made.room.start((0, 1))
    for local_rank in (0, 1):
        made.room.need(local_rank, MB)
    made.lanes.run()
    assert list(made.arena.directory.glob("*slot-*")) == []
    assert made.announced[0].paths == ()
    assert "no snapshots in memory" in made.notices[-1].text


def test_slots_leave_room_for_two_generations_of_parity_or_parity_is_given_up(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    room_bytes = [0]
    monkeypatch.setattr(room_module, "least_limit", lambda *_, **__: Limit(room_bytes[0], "a test"))
    capacity = round_capacity(MB)
    made.room.parity_shares = ((1, 0.5),)  # m / k of 2+1: two generations take as much as a slot
    made.room.start((0,))
    for slots_of_room, expected, fits in ((7, 6, True), (6, 5, True), (2, 2, False)):
        room_bytes[0] = slots_of_room * (capacity + SLOT_HEADER_BYTES)
        plan = made.room._affordable(capacity, 0)
        assert (plan.num_slots, made.room.parity_fits) == (expected, fits)
    assert "nothing in memory survives the loss of a node" in plan.line


def test_where_two_slots_do_not_fit_beside_the_parity_there_is_less_of_it_before_there_is_none(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    room_bytes = [0]
    monkeypatch.setattr(room_module, "least_limit", lambda *_, **__: Limit(room_bytes[0], "a test"))
    capacity = round_capacity(MB)
    made.room.start((0,))
    made.room.parity_shares = ((2, 1.0), (1, 1 / 3))  # 2+2, and 3+1: two generations take 2 slots, or two thirds
    found = []
    for slots_of_room in (5, 4, 3, 2):
        room_bytes[0] = slots_of_room * (capacity + SLOT_HEADER_BYTES)
        plan = made.room._affordable(capacity, 0)
        found.append((plan.num_slots, made.room.most_parity, made.room.parity_fits))
        if slots_of_room == 3:
            assert "2 slots beside 1 parities of a group; 2 have no room" in plan.line
    assert found == [(3, 2, True), (2, 2, True), (2, 1, False), (2, 0, False)]
    made.room.parity_shares = ((1, 1 / 3),)  # the leader has lowered it for all
    room_bytes[0] = 3 * (capacity + SLOT_HEADER_BYTES)
    made.room._affordable(capacity, 0)
    assert made.room.parity_fits
