"""What a worker reads from its environment about the nodes of the job, and how Sessions are named among ranks."""

from __future__ import annotations

import pytest

from holdfast.environment import DAEMON, NODES, WorkerEnvironment, worker_environment
from holdfast.errors import UsageError
from holdfast.runtime.huddle import session_name


def environment(**more: str) -> WorkerEnvironment:
    base = {
        DAEMON: "ipc://x",
        "HOLDFAST_ARENA": "/dev/shm/x",
        "HOLDFAST_RUN_DIR": "/run",
        "HOLDFAST_RUN_ID": "r",
        "HOLDFAST_GENERATION": "i01-0123abcd-g0001",
        "RANK": "4",
        "LOCAL_RANK": "0",
        "GROUP_RANK": "1",
        "WORLD_SIZE": "6",
        "LOCAL_WORLD_SIZE": "2",
    }
    found = worker_environment(base | more)
    assert found is not None
    return found


def test_nodes_have_as_many_ranks_as_the_launcher_says() -> None:
    found = environment(**{NODES: "3,1,2"})
    assert [found.node_of(rank) for rank in range(6)] == [0, 0, 0, 1, 2, 2]
    assert found.variables()[NODES] == "3,1,2"


def test_nodes_are_alike_where_nothing_is_said() -> None:
    found = environment()
    assert [found.node_of(rank) for rank in range(6)] == [0, 0, 1, 1, 2, 2]
    assert NODES not in found.variables()


@pytest.mark.parametrize("text", ["3,1", "3,,3", "6,0", "all"])
def test_counts_that_cannot_be_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match=NODES):
        environment(**{NODES: text})


def test_sessions_are_counted_for_each_set_of_ranks() -> None:
    """A rank that took part in more Sessions than another still meets it under the same name."""
    both, mine = (9001, 9002), (9001,)
    first = session_name(both)
    session_name(mine)
    session_name(mine)
    assert session_name(both) == first.removesuffix("/1") + "/2"
