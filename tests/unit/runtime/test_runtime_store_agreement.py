"""Agreed steps through a store: threads stand for ranks, a barrier in each step for the collectives of training."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import timedelta

import msgspec
import pytest
import torch.distributed as dist

from holdfast.checkpoint.saving import Ranks
from holdfast.errors import PeerError, PeerTimeout
from holdfast.runtime.store_agreement import StoreAgreement
from holdfast.snapshot.reports import Agreed, RankState, Request

PATIENCE = timedelta(seconds=120)
Body = Callable[[int, int, StoreAgreement], None]
"""Of a step: rank, completed steps, what it may ask."""


Performed = list[list[tuple[int, Agreed]]]


def train(
    world: int, until: int, body: Body, *, together: bool = True, performed: Performed | None = None
) -> Performed:
    """Steps of `world` ranks up to a stop; what each rank performed, and when. `body` may look at `performed`."""
    by_rank = [[] for _ in range(world)] if performed is None else performed
    store = dist.HashStore()
    barrier = threading.Barrier(world)

    def rank(number: int) -> list[tuple[int, Agreed]]:
        performed = by_rank[number]
        with closing(StoreAgreement(Ranks(number, world, store), "session", timeout=PATIENCE)) as agreement:
            agreement.expect(until)
            for step in range(until):
                body(number, step, agreement)
                if together:
                    barrier.wait(PATIENCE.total_seconds())
                agreed = agreement.boundary(step + 1)
                if agreed is not None:
                    performed.append((step + 1, agreed))
                    if agreed.kind == "stop":
                        break
        return performed

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(rank, range(world)))


@pytest.mark.parametrize("together", [True, False], ids=["collectives", "free"])
@pytest.mark.parametrize("seed", range(4))
def test_what_one_rank_asks_for_all_do_at_the_same_step(seed: int, together: bool) -> None:
    chance = random.Random(seed)
    world, asking = 4, chance.randrange(4)
    pauses = [chance.choice([0.0005, 0.001, 0.004]) for _ in range(world)]

    def body(rank: int, step: int, agreement: StoreAgreement) -> None:
        time.sleep(pauses[rank])  # the length of a step
        if rank == asking and step == 20:
            agreement.request("save", persist=True, tag="best", metrics={"loss": 1.5})
        if rank == (asking + 1) % world and step == 60:
            agreement.request("stop", persist=False, metrics={})

    performed = train(world, 5000, body, together=together)
    assert performed[1:] == performed[:-1]
    kinds = [agreed.kind for _, agreed in performed[0]]
    assert kinds in (["save", "stop"], ["stop"])  # where the stop came before the save was agreed, one step is both
    assert performed[0][0][1].tag == "best"
    assert performed[0][0][1].metrics == {"loss": 1.5}
    assert performed[0][0][0] > 20
    assert performed[0][-1][0] < 5000


def test_requests_before_the_agreed_step_are_one() -> None:
    def body(rank: int, step: int, agreement: StoreAgreement) -> None:
        time.sleep(0.001)
        if step == 5:
            agreement.request("save", persist=True, tag=None, metrics={f"of{rank}": 1.0})
        if performed[rank] and step == performed[rank][0][0] + 300:
            agreement.request("stop", persist=True, metrics={})

    performed: Performed = [[], [], []]
    train(3, 5000, body, performed=performed)
    assert performed[1:] == performed[:-1]
    (_, save), (_, stop) = performed[0]
    assert (save.kind, stop.kind) == ("save", "stop")
    assert save.metrics == {"of0": 1.0, "of1": 1.0, "of2": 1.0}
    assert len(save.requests) == len(stop.requests) == 3


def test_what_is_asked_for_at_the_end_of_the_loop_holds_nobody_up() -> None:
    def body(rank: int, step: int, agreement: StoreAgreement) -> None:
        if rank == 1 and step >= 8:
            agreement.request("save", persist=True, metrics={})

    performed = train(2, 10, body)
    assert performed[0] == performed[1]


def test_nothing_is_performed_where_nobody_asks() -> None:
    assert train(2, 300, lambda rank, step, agreement: None) == [[], []]


def go_on_alone(agreement: StoreAgreement) -> None:
    """Steps of one rank, while another never reaches a boundary."""
    deadline = time.monotonic() + PATIENCE.total_seconds()
    for step in range(1, 1_000_000):
        assert agreement.boundary(step) is None
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_rank_that_does_not_come_is_a_timeout() -> None:
    store = dist.HashStore()
    first = StoreAgreement(Ranks(0, 2, store), "session", timeout=timedelta(seconds=0.2))
    second = StoreAgreement(Ranks(1, 2, store), "session", timeout=timedelta(seconds=0.2))
    with closing(first), closing(second):
        first.request("stop", persist=False, metrics={})
        with pytest.raises(PeerTimeout, match="neither confirmed nor given up"):
            go_on_alone(first)


class Broken(dist.Store):
    """A store whose host is gone."""

    def add(self, key: str, amount: int) -> int:
        raise RuntimeError("Connection reset by peer")

    def clone(self) -> Broken:
        return self


def test_a_store_that_is_gone_stops_requests_and_not_training(caplog: pytest.LogCaptureFixture) -> None:
    with closing(StoreAgreement(Ranks(0, 2, Broken()), "session", timeout=PATIENCE)) as agreement:
        with pytest.raises(PeerError, match="does not answer: Connection reset"):
            agreement.request("stop", persist=False, metrics={})
        assert agreement.boundary(1) is None
        deadline = time.monotonic() + PATIENCE.total_seconds()
        while "learns of no further saves" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.005)
    assert "learns of no further saves" in caplog.text


class Mortal:
    """A store that is lost when something is set. Not one of torch's, so that it is not cloned."""

    def __init__(self, lost_when: Callable[[str, bytes], bool]) -> None:
        self._store = dist.HashStore()
        self._lost_when = lost_when
        self._is_lost = False

    def set(self, key: str, value: bytes) -> None:
        self._answering().set(key, value)
        self._is_lost = self._lost_when(key, value)

    def get(self, key: str) -> bytes:
        return bytes(self._answering().get(key))

    def add(self, key: str, amount: int) -> int:
        return int(self._answering().add(key, amount))

    def check(self, keys: list[str]) -> bool:
        return bool(self._answering().check(keys))

    def _answering(self) -> dist.Store:
        if self._is_lost:
            raise RuntimeError("Connection reset by peer")
        return self._store


def test_a_store_that_goes_is_an_error_of_who_waits_at_a_proposed_step() -> None:
    def has_acknowledged(key: str, value: bytes) -> bool:
        return key.endswith("rank/0") and msgspec.json.decode(value, type=RankState).acknowledged > 0

    store = Mortal(has_acknowledged)
    first = StoreAgreement(Ranks(0, 2, store), "session", timeout=PATIENCE)
    second = StoreAgreement(Ranks(1, 2, store), "session", timeout=PATIENCE)
    with closing(first), closing(second):
        first.request("stop", persist=False, metrics={})
        with pytest.raises(PeerError, match="does not answer"):
            go_on_alone(first)


def test_a_rank_that_has_not_trained_yet_stands_at_the_restored_step() -> None:
    store = dist.HashStore()
    with closing(StoreAgreement(Ranks(1, 2, store), "session", first_step=50, timeout=PATIENCE)) as agreement:
        agreement.request("stop", persist=False, metrics={})
        published = msgspec.json.decode(store.get("session/rank/1"), type=RankState)
    assert published.step == 50


@pytest.fixture
def by_hand(monkeypatch: pytest.MonkeyPatch) -> Callable[[], tuple[StoreAgreement, StoreAgreement, dist.Store]]:
    """Makes two ranks whose threads do not run: a test looks in their place. What is not in the store is an error."""
    monkeypatch.setattr(threading.Thread, "start", lambda thread: None)

    def make() -> tuple[StoreAgreement, StoreAgreement, dist.Store]:
        store = dist.HashStore()
        ranks = [StoreAgreement(Ranks(rank, 2, store), "session") for rank in range(2)]
        for one in (store, *(rank._store for rank in ranks)):
            one.set_timeout(timedelta(seconds=0.05))
        return ranks[0], ranks[1], store

    return make


Made = Callable[[], tuple[StoreAgreement, StoreAgreement, dist.Store]]


def test_requests_and_ranks_that_are_not_in_the_store_yet_are_looked_for_again(by_hand: Made) -> None:
    first, second, store = by_hand()
    store.add("session/count", 1)  # who asks is about to write what for
    assert first._look()
    request = Request(id="1", kind="save", persist=True, tag=None, metrics={})
    store.set("session/request/1", msgspec.json.encode(request))
    assert first._look()
    assert not store.check(["session/agreed"])
    assert second._look()
    assert first._look()
    assert store.check(["session/agreed"])


@pytest.mark.parametrize("until", [1, 2])
def test_no_step_beyond_the_end_of_the_loop_is_proposed(by_hand: Made, until: int) -> None:
    first, second, store = by_hand()
    second.expect(until)
    first.request("save", persist=True, metrics={})
    assert second._look()
    assert first._look()
    assert store.check(["session/agreed"]) == (until == 2)


def test_ranks_look_often_until_they_have_reached_the_agreed_step(by_hand: Made) -> None:
    first, second, _ = by_hand()

    def look() -> list[bool]:
        return [one._look() for one in (second, first, second)]

    assert look() == [False] * 3
    first.request("save", persist=True, metrics={})
    look()
    assert [one.boundary(1) for one in (first, second)] == [None, None]
    look()
    assert look() == [True] * 3
    performed = [one.boundary(2) for one in (first, second)]
    assert performed[0] == performed[1]
    assert performed[0] is not None
    assert (performed[0].step, performed[0].requests) == (2, ("1",))
    look()
    assert look() == [False] * 3
