"""The shell of the leader: what it sends, with a node's daemon played by the test."""

from __future__ import annotations

import re
import select
import threading
import time
from pathlib import Path

import msgspec
import pytest

from holdfast.checkpoint.version import GenerationId
from holdfast.snapshot import survey
from holdfast.snapshot.lanes import Lanes
from holdfast.snapshot.leading import Leading
from holdfast.snapshot.messages import (
    AnyMessage,
    AskNode,
    Inventory,
    LeaderOrders,
    LeaderRestore,
    NodeReport,
    Notice,
    PersistEnded,
    PersistFailedMessage,
    PersistOrder,
    PersistPart,
    RanksOpened,
    Restore,
    StartGeneration,
)
from holdfast.snapshot.persists import PersistSettled
from holdfast.snapshot.records import CleanImage, Member, Parentage, SessionConfig
from holdfast.snapshot.reports import Final, Held, NodeState, Pin, RankState
from holdfast.snapshot.telling import outcome

OLD = GenerationId(incarnation=1, nonce="00000abc", generation=1)
NOW = GenerationId(incarnation=1, nonce="00000abc", generation=2)


class Told:
    """A leader whose daemon was restarted in `NOW`, and what it has sent."""

    def __init__(self, checkpoint_dir: str | None, *, chosen: bool = True) -> None:
        self.sent: list[AnyMessage] = []
        member = Member(node_rank=0, daemon="tcp://127.0.0.1:1", first_global_rank=0, num_ranks=1)
        start = StartGeneration(generation=NOW, run_id="run", members=(member,), node_rank=0, leader=0, fresh=False)
        config = SessionConfig(
            ranks=(0,),
            checkpoint_dir=checkpoint_dir,
            snapshot_every=1,
            persist_every_steps=None,
            persist_every_s=None,
            keep="",
            resume="auto",
            has_init_from=False,
        )
        self.lanes = Lanes()
        self.leading = Leading(
            start, 1, self.lanes, send=lambda _, message: self.sent.append(message), to_agent=self.sent.append
        )
        self.config = config
        if not chosen:
            return
        restore = Restore(tier="memory", version=OLD.at(5), step=5)
        self.leading.resume(LeaderRestore(generation=NOW, restore=restore, history=None, config=config), config)

    def of(self, kind: type) -> list[AnyMessage]:
        return [message for message in self.sent if isinstance(message, kind)]

    def inventory(self, *pins: Pin) -> None:
        image = CleanImage(version=OLD.at(4), global_rank=0, world_size=1, path="s", offset=4096, size_bytes=1)
        parents = (
            Parentage(generation=OLD, parent=None, step=0),
            Parentage(generation=NOW, parent=OLD.at(5), step=5),
        )
        images = (image, msgspec.structs.replace(image, version=OLD.at(5)))
        self.leading.receive(
            Inventory(
                generation=NOW, node_rank=0, clean=images, parents=parents, history=None, newest_step=5, pinned=pins
            )
        )

    def report(self, step: int, **more: object) -> None:
        rank = RankState(global_rank=0, step=step, entered=True)
        state = NodeState(
            generation=NOW,
            node_rank=0,
            epoch=1,
            leader_epoch=1,
            num_slots=6,
            free=5,
            held=(),
            complete=None,
            pinned=(),
            ranks=(rank,),
        )
        self.leading.receive(NodeReport(state=msgspec.structs.replace(state, **more)))

    def order(self, number: int) -> PersistOrder:
        """The order to persist with that number, counted from 1; waits for the lane that clears the way for it."""
        while len(self.of(PersistOrder)) < number:
            assert select.select([self.lanes.wakeup], [], [], 10.0)[0], "nothing was ordered"
            self.lanes.deliver()
        order = self.of(PersistOrder)[number - 1]
        assert isinstance(order, PersistOrder)
        return order


def test_a_successor_asks_what_nodes_hold_and_goes_on_with_what_was_being_persisted() -> None:
    told = Told("/nowhere/c")
    told.leading.tick(1000.0)
    assert told.of(AskNode)
    told.report(5)
    assert told.of(LeaderOrders) == []
    told.inventory(Pin(version=OLD.at(4), mandatory=True, tag="best"))
    told.report(5)
    assert told.of(LeaderOrders)[-1].orders.pinned == (Pin(version=OLD.at(4), mandatory=True, tag="best"),)
    told.lanes.close(5.0)


def test_orders_of_one_moment_never_overtake_those_of_the_next() -> None:
    told = Told(None)
    told.inventory()
    told.report(5)
    end = RankState(global_rank=0, step=6, entered=True, final=Final(step=6, persist=True))
    told.report(6, held=(Held(step=6, state="clean"),), ranks=(end,))
    [ended] = told.of(PersistEnded)
    assert ended.error == "node 0: no checkpoint_dir"
    assert told.of(LeaderOrders)[-1].orders.pinned == ()


def test_a_generation_goes_on_from_memory_where_its_storage_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    gate, asked = threading.Event(), threading.Event()

    def hang(directory: str | None, resume: str) -> tuple[()]:
        asked.set()
        assert gate.wait(120)
        return ()

    monkeypatch.setattr(survey, "stored_steps", hang)
    told = Told("/nowhere/c", chosen=False)
    told.inventory()
    told.leading.receive(RanksOpened(generation=NOW, node_rank=0, opened=((0, told.config),)))
    assert asked.wait(120)
    told.lanes.expire(time.monotonic() + 1)
    assert told.of(LeaderRestore) == []
    told.lanes.expire(time.monotonic() + 20)
    [chosen] = told.of(LeaderRestore)
    assert (chosen.restore.tier, chosen.restore.version) == ("memory", OLD.at(5))
    assert any("cannot be used, memory is all there is" in notice.text for notice in told.of(Notice))
    assert not told.lanes.busy("storage")
    gate.set()
    told.lanes.close(5.0)


def test_where_memory_does_not_do_a_storage_that_hangs_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    gate, asked = threading.Event(), threading.Semaphore(0)

    def hang(directory: str | None, resume: str) -> tuple[()]:
        asked.release()
        assert gate.wait(120)
        return ()

    monkeypatch.setattr(survey, "stored_steps", hang)
    monkeypatch.setattr(survey, "history_of", lambda directory: None)
    monkeypatch.setattr(survey, "_make_ready", lambda *rest: "h" * 32)
    told = Told("/nowhere/c", chosen=False)
    nothing = Inventory(generation=NOW, node_rank=0, clean=(), parents=(), history=None, newest_step=0)
    told.leading.receive(nothing)
    told.leading.receive(RanksOpened(generation=NOW, node_rank=0, opened=((0, told.config),)))
    assert asked.acquire(timeout=120)
    told.lanes.expire(time.monotonic() + 20)
    assert asked.acquire(timeout=120)  # it is asked again, by another thread
    told.lanes.expire(time.monotonic() + 1e6)
    assert told.of(LeaderRestore) == []
    gate.set()
    while not told.of(LeaderRestore):
        assert select.select([told.lanes.wakeup], [], [], 10.0)[0], "nothing was chosen"
        told.lanes.deliver()
    assert [chosen.restore.tier for chosen in told.of(LeaderRestore)] == ["none"]
    told.lanes.close(5.0)


def at_its_last_step(tmp_path: Path) -> Told:
    """A job that ends after step 6, which is to be persisted."""
    told = Told(str(tmp_path))
    told.inventory()
    told.report(5)
    end = RankState(global_rank=0, step=6, entered=True, final=Final(step=6, persist=True))
    told.report(6, held=(Held(step=6, state="clean"),), ranks=(end,))
    return told


def test_the_last_step_of_a_job_is_tried_again_after_a_pause_and_people_are_told(tmp_path: Path) -> None:
    told = at_its_last_step(tmp_path)
    for tries in (1, 2, 3):
        order = told.order(tries)
        told.leading.receive(
            PersistPart(version=order.version, node_rank=0, attempt=order.attempt, error="the storage is away")
        )
    [notice] = [notice for notice in told.of(Notice) if "is not in storage yet" in notice.text]
    assert "step 6" in notice.text
    assert "the storage is away" in notice.text
    now = time.monotonic()
    told.leading.tick(now)
    assert not told.lanes.busy("storage")
    told.leading.tick(now + 1.5)
    assert told.order(4).attempt > order.attempt
    assert told.of(PersistEnded) == []
    told.lanes.close(5.0)


def test_nothing_is_tried_again_once_the_job_ends(tmp_path: Path) -> None:
    told = at_its_last_step(tmp_path)
    for tries in (1, 2, 3):
        order = told.order(tries)
        told.leading.receive(PersistPart(version=order.version, node_rank=0, attempt=order.attempt, error="away"))
    told.leading.persisting.finishing = True
    told.leading.tick(time.monotonic() + 60)
    assert not told.lanes.busy("storage")
    told.lanes.close(5.0)


@pytest.mark.parametrize("final", [False, True])
def test_workers_are_told_whether_what_failed_was_tried_as_the_last_step(tmp_path: Path, final: bool) -> None:
    told = at_its_last_step(tmp_path)
    failed = PersistSettled(version=NOW.at(6), outcome="failed", reason="the storage is away", final=final)
    told.leading.persisting.settled(failed)
    [ended] = told.of(PersistEnded)
    assert isinstance(ended, PersistEnded)
    assert outcome(ended) == PersistFailedMessage(version=NOW.at(6), reason="the storage is away", final=final)
    told.lanes.close(5.0)


def slow(told: Told) -> list[str]:
    return [notice.text for notice in told.of(Notice) if "is being written for" in notice.text]


def test_a_write_that_hangs_is_told_of_long_before_it_is_given_up(tmp_path: Path) -> None:
    told = at_its_last_step(tmp_path)
    told.order(1)
    now = time.monotonic()
    told.leading.tick(now + 50)
    assert slow(told) == []
    told.leading.tick(now + 70)
    told.leading.tick(now + 80)
    [text] = slow(told)
    assert re.search(r"step 6 is not in storage yet: the part of node 0 is being written for 7\d s", text)
    told.lanes.close(5.0)


def test_a_write_that_takes_as_long_as_the_last_ones_is_no_news(tmp_path: Path) -> None:
    told = at_its_last_step(tmp_path)
    told.order(1)
    before = PersistEnded(version=NOW.at(3), path="step-00000003", error=None, seconds=100.0, tag=None)
    told.leading.persisting.ended.append(before)
    now = time.monotonic()
    told.leading.tick(now + 390)
    assert slow(told) == []
    told.leading.tick(now + 410)
    assert len(slow(told)) == 1
    told.lanes.close(5.0)
