"""Nodes that this one does not reach are named; those that answer are not."""

from __future__ import annotations

import select
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from holdfast.launcher.health import Finding
from holdfast.launcher.notices import HealthCheck
from holdfast.launcher.reach import MOST_NODES, WITHIN_S, Reach
from holdfast.launcher.wire import Phase, Place, Plan


@pytest.fixture
def listener() -> Iterator[str]:
    """host:port of somebody who answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def nobody() -> Iterator[str]:
    """host:port where nobody answers: the port is taken by one who does not listen."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{taken.getsockname()[1]}"


def place(rank: int, address: str, daemon: str = "") -> Place:
    return Place(
        node_id=f"n{rank}",
        node_rank=rank,
        host=f"host{rank}",
        daemon=daemon,
        role="default",
        num_ranks=1,
        first_global_rank=rank,
        first_role_rank=rank,
        role_world_size=1,
        address=address,
    )


def plan(*places: Place) -> Plan:
    return Plan(leader_id="n0", sequence=1, phase=Phase.RUN, places=places)


def settle(reach: Reach) -> None:
    """Until the system has an answer for each connection that was begun, which on a busy machine takes a moment."""
    for connection in reach._open:
        poller = select.poll()
        poller.register(connection, select.POLLOUT)
        assert poller.poll(120_000)


def look(reach: Reach, *places: Place) -> list[str]:
    """What is found of the others by the time that they have."""
    reach.begin(plan(*places), places[0], 0.0)
    settle(reach)
    early = reach.look(WITHIN_S - 0.1)
    assert reach._open == {} or all(finding.status == "fail" for finding in early)
    return [finding.text for finding in [*early, *reach.look(WITHIN_S)]]


def test_who_does_not_answer_is_named_with_the_port_and_who_answers_is_not(listener: str, nobody: str) -> None:
    reach = Reach()
    assert look(reach, place(0, nobody), place(1, listener, f"tcp://{listener}")) == []
    (text,) = look(reach, place(0, listener), place(1, listener, f"tcp://{nobody}"), place(2, listener))
    assert text.startswith(f"host1 does not answer this node at {nobody}")
    (text,) = look(reach, place(0, listener), place(1, "255.255.255.255:1"))
    assert text.startswith("host1 does not answer"), "which the system says at once"
    assert reach._open == {}


def test_who_is_silent_is_named_when_its_time_is_over_and_not_before() -> None:
    reach = Reach()
    with socket.create_server(("127.0.0.1", 0), backlog=0) as server, socket.create_connection(server.getsockname()):
        silent = f"127.0.0.1:{server.getsockname()[1]}"  # it takes nobody else: as behind a wall, there is no answer
        reach.begin(plan(place(0, ""), place(1, silent)), place(0, ""), 0.0)
        assert reach.look(WITHIN_S - 0.1) == []
        assert [finding.text[:5] for finding in reach.look(WITHIN_S)] == ["host1"]
        assert reach.look(WITHIN_S + 1) == []


def test_names_and_odd_addresses_are_left_out_and_every_node_is_looked_at_by_others(listener: str, nobody: str) -> None:
    reach = Reach()
    assert look(reach, place(0, ""), place(1, "host:1"), place(2, "", "tcp://x"), place(3, "", "nonsense")) == []
    nodes = [place(0, listener), *(place(rank, listener) for rank in range(1, MOST_NODES + 1)), place(17, nobody)]
    assert look(reach, *nodes) == []
    reach.begin(plan(*nodes), nodes[2], 0.0)
    settle(reach)
    assert [finding.text[:6] for finding in reach.look(WITHIN_S)] == ["host17"]


def test_it_is_told_once_for_each_node_and_not_at_all_where_checks_are_off(nobody: str, tmp_path: Path) -> None:
    for level, told in (("warn", 1), ("off", 0)):
        events: list[Finding] = []
        check = HealthCheck(level, (tmp_path,), events.append)  # type: ignore[arg-type]  # it has the fields of one
        for start in (0.0, 10.0):
            check.generation_begins(plan(place(0, ""), place(1, nobody)), place(0, ""), start)
            check.look(start + WITHIN_S)
        check.close()
        assert [event.check for event in events] == ["reach"] * told
