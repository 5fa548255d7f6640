"""The thread that makes parity: how it is stopped between generations."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from holdfast.checkpoint.version import GenerationId
from holdfast.erasure.groups import Group
from holdfast.errors import HoldfastError
from holdfast.snapshot import exchanging
from holdfast.snapshot.arena import Arena
from holdfast.snapshot.coding import Chunk
from holdfast.snapshot.exchange_events import ExchangeEvent, ExchangeStarted
from holdfast.snapshot.exchanging import ExchangeThread, Outside, StuckThread
from holdfast.snapshot.keys import JobKeys
from holdfast.snapshot.parity import ParityStore
from holdfast.snapshot.shelf import Shelf

STARTED = ExchangeStarted(
    generation=GenerationId(incarnation=1, nonce="7f3a9c02", generation=4),
    node_rank=0,
    group=Group((0,), 1, 0),
    world_size=1,
    finished=(),
)


class Thread(ExchangeThread):
    """One whose machine can be held up."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], arena: Arena) -> None:
        outside = Outside(
            send=lambda order: None,
            reserve=lambda order: None,
            done=lambda version: None,
            made=lambda message: None,
            failed=lambda version, reason: None,
        )
        super().__init__(context, JobKeys(), ParityStore(arena), Shelf(arena.directory), outside)
        self.go = threading.Event()
        self.handled: list[ExchangeEvent] = []

    def _handle(self, event: ExchangeEvent) -> None:
        assert self.go.wait(120)
        self.handled.append(event)
        super()._handle(event)


@pytest.fixture
def thread(tmp_path: Path) -> Iterator[Thread]:
    context = zmq.Context()
    arena = Arena.open(tmp_path / "arena")
    made = Thread(context, arena)
    made.start()
    yield made
    made.go.set()
    made.close(10.0)
    arena.remove()
    context.term()


def test_a_thread_that_cannot_be_fenced_ends_the_process_instead_of_the_message(
    thread: Thread, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchanging, "_FENCE_S", 0.01)
    with pytest.raises(StuckThread, match="did not stop"):
        thread.fence(STARTED)
    assert not issubclass(StuckThread, HoldfastError), "the event loop goes on after those"


def test_a_chunk_is_let_go_of_before_the_next_one_is_looked_at(thread: Thread) -> None:
    given: list[weakref.ref[memoryview]] = []

    class Client:
        def receive(self) -> tuple[int, memoryview] | None:
            assert [one() for one in given] == [None] * len(given)
            if len(given) == 3:
                return None
            data = memoryview(bytes(8))
            given.append(weakref.ref(data))
            return len(given), data

    client: Any = Client()
    version = STARTED.generation.at(7)
    asked = {(client, number): (version, Chunk(0, number, 0)) for number in (1, 2, 3)}
    member = exchanging._Member("", [], asked)
    thread._take(0, member, client)
    assert member.asked == {}


def test_a_generation_whose_groups_are_formed_waits_for_nobody(thread: Thread) -> None:
    thread.begin(STARTED)
    assert thread.handled == []
    thread.go.set()
    thread.fence(STARTED)
    assert [type(event) for event in thread.handled] == [ExchangeStarted] * 2
