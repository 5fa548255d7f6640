"""Lanes: jobs run elsewhere and in order, their results arrive in the event loop."""

from __future__ import annotations

import select
import threading
import time
from collections.abc import Iterator

import pytest

from holdfast.errors import StorageError
from holdfast.snapshot.lanes import Lanes


@pytest.fixture
def lanes() -> Iterator[Lanes]:
    made = Lanes()
    yield made
    made.close(5.0)


def _deliver(lanes: Lanes, results: list[object], number: int) -> None:
    while len(results) < number:
        assert select.select([lanes.wakeup], [], [], 120.0)[0], "nothing was delivered"
        lanes.deliver()


def test_results_come_in_order_to_the_thread_that_delivers(lanes: Lanes) -> None:
    results: list[object] = []
    threads: set[str] = set()
    for number in range(20):
        lanes.submit(
            "count",
            lambda number=number: (number, threading.current_thread().name),
            lambda result: (results.append(result), threads.add(threading.current_thread().name)),
        )
    assert lanes.busy("count")
    _deliver(lanes, results, 20)
    assert results == [(number, "holdfast-count") for number in range(20)]
    assert threads == {threading.current_thread().name}
    assert not lanes.busy("count")


def test_what_a_job_raised_is_its_result_and_the_lane_goes_on(lanes: Lanes) -> None:
    results: list[object] = []
    error = RuntimeError("boom")

    def fail() -> None:
        raise error

    lanes.submit("work", fail, results.append)
    lanes.submit("work", lambda: "next", results.append)
    _deliver(lanes, results, 2)
    assert results == [error, "next"]


def test_a_job_that_is_stuck_does_not_stop_another_lane(lanes: Lanes) -> None:
    gate = threading.Event()
    results: list[object] = []
    lanes.submit("stuck", lambda: gate.wait(120), results.append)
    lanes.submit("free", lambda: "done", results.append)
    _deliver(lanes, results, 1)
    assert results == ["done"]
    gate.set()
    _deliver(lanes, results, 2)


def test_a_job_past_its_limit_is_given_up_and_the_lane_goes_on_without_it(lanes: Lanes) -> None:
    gate, running = threading.Event(), threading.Event()
    results: list[object] = []

    def hang() -> str:
        running.set()
        gate.wait(120)
        return "too late"

    lanes.submit("storage", hang, results.append, limit_s=60.0)
    lanes.submit("storage", lambda: "next", results.append)
    assert running.wait(120)
    lanes.expire(time.monotonic() + 30)
    assert results == []
    lanes.expire(time.monotonic() + 61)
    [error] = results
    assert isinstance(error, StorageError)
    _deliver(lanes, results, 2)
    assert results[1] == "next"
    assert not lanes.busy("storage")
    gate.set()
    lanes.submit("storage", lambda: "one more", results.append)
    _deliver(lanes, results, 3)
    assert results[2] == "one more"  # and what came too late is nobody's


def test_a_job_whose_asker_is_gone_has_only_so_long(lanes: Lanes) -> None:
    gate, running = threading.Event(), threading.Event()
    results: list[object] = []
    lanes.submit("storage", lambda: (running.set(), gate.wait(120)), results.append)
    assert running.wait(120)
    lanes.expire(time.monotonic() + 1e6)
    assert results == []
    lanes.hurry("storage", 15.0)
    lanes.expire(time.monotonic() + 16)
    assert [type(one) for one in results] == [StorageError]
    gate.set()
