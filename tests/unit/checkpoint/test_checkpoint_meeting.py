"""Ranks meet through a tree in the store: errors and missing ranks are named to everybody."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from holdfast.checkpoint import meeting
from holdfast.checkpoint.meeting import Meeting, Ranks
from holdfast.errors import CorruptError, PeerTimeout

WORLD = 12


@pytest.fixture(autouse=True)
def _narrow_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "FANOUT", 2)  # twelve ranks make four levels


def _together(act: Callable[[Meeting, int], Any], timeout_s: float = 120.0) -> list[Any]:
    store = dist.HashStore()

    def one(rank: int) -> Any:
        try:
            limit = timedelta(seconds=timeout_s)
            return act(Meeting(Ranks(rank, WORLD, store), "here", what="the test", timeout=limit), rank)
        except Exception as error:  # noqa: BLE001  # the test looks at it
            return error

    with ThreadPoolExecutor(WORLD) as pool:
        return list(pool.map(one, range(WORLD)))


def test_all_ranks_hear_all_round_after_round() -> None:
    def act(meeting: Meeting, rank: int) -> list[list[bytes]]:
        return [meeting.gather(f"{rank}.{turn}".encode()) for turn in range(3)]

    expected = [[f"{rank}.{turn}".encode() for rank in range(WORLD)] for turn in range(3)]
    assert _together(act) == [expected] * WORLD


def test_what_ranks_say_is_joined_on_the_way_up() -> None:
    joined: list[int] = []

    def join(said: Sequence[bytes]) -> bytes:
        joined.append(len(said))
        return b" ".join(said)

    def act(meeting: Meeting, rank: int) -> list[bytes] | None:
        said = meeting.collect(f"{rank}".encode(), join=join)
        if said is None:
            meeting.wait()
        else:
            meeting.announce()
        return said

    first, *others = _together(act)
    assert len(first) == 1
    assert sorted(first[0].split(), key=int) == [f"{rank}".encode() for rank in range(WORLD)]
    assert others == [None] * (WORLD - 1)
    assert sorted(joined) == [2, 3, 3, 3, 3, 3], "no rank joins more than its children's and its own"


def test_error_of_joining_is_everybodys() -> None:
    def join(said: Sequence[bytes]) -> bytes:
        raise CorruptError("two things")

    def act(meeting: Meeting, rank: int) -> None:
        if meeting.collect(f"{rank}".encode(), join=join if rank == 5 else None) is None:
            meeting.wait()

    for rank, error in enumerate(_together(act)):
        assert isinstance(error, CorruptError)
        assert str(error) == ("two things" if rank == 5 else "rank 5: two things")


@pytest.mark.parametrize("failing", [0, 1, 11])
@pytest.mark.parametrize("rounds", [0, 1])
def test_all_ranks_raise_what_one_met_and_say_which_it_was(failing: int, rounds: int) -> None:
    def act(meeting: Meeting, rank: int) -> None:
        for _ in range(rounds):
            meeting.gather(b"")
        if rank == failing:
            error = CorruptError("block 7 is wrong")
            meeting.fail(error)
            raise error
        meeting.gather(b"")

    for rank, error in enumerate(_together(act)):
        assert isinstance(error, CorruptError)
        assert str(error) == ("block 7 is wrong" if rank == failing else f"rank {failing}: block 7 is wrong")


@pytest.mark.parametrize("missing", [3, 11])
def test_a_missing_rank_deep_in_the_tree_is_named_to_all(missing: int) -> None:
    def act(meeting: Meeting, rank: int) -> Any:
        return None if rank == missing else meeting.gather(b"")

    errors = _together(act, timeout_s=3.0)
    for rank, error in enumerate(errors):
        if rank != missing:
            assert isinstance(error, PeerTimeout), error
            assert f"rank {missing} did not come" in str(error)
