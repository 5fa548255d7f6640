"""The leader's part in protecting versions, where memory is short."""

from __future__ import annotations

from typing import Any

from holdfast.checkpoint.version import GenerationId
from holdfast.snapshot.protection import ParityLowered, Protection
from holdfast.snapshot.reports import NodeState

GENERATION = GenerationId(incarnation=1, nonce="7f3a9c02", generation=4)
OLD = GenerationId(incarnation=1, nonce="7f3a9c02", generation=3).at(5)
V = GENERATION.at(7)


def state(node: int, *, parity: bool | None = True, **changes: Any) -> NodeState:
    return NodeState(
        generation=GENERATION, node_rank=node, epoch=1, leader_epoch=1, num_slots=6, free=1, held=(), complete=7,
        pinned=(), ranks=(), parity=parity, **changes,
    )  # fmt: skip


def test_the_node_with_the_least_room_says_how_many_parities_all_groups_have() -> None:
    protection = Protection(coded=True, parent=OLD, protected=OLD)
    reports = [state(0), state(1, parity=False, most_parity=2), state(2, parity=False, most_parity=1), state(3)]
    assert protection.lower(reports) == [ParityLowered(num_parity=1)]
    assert protection.advance(reports, V, 6) == []
    assert (protection.current, protection.protected) == (None, OLD)  # nothing is given up
    assert protection.lower(reports) == []  # once
    followed = [state(node, lowered=1) for node in range(3)]
    protection.advance([*followed, state(3)], V, 6)
    assert protection.current is None  # one still has the groups of before
    protection.advance([*followed, state(3, lowered=1)], V, 6)
    assert protection.current == V


def test_without_room_for_one_parity_there_is_none() -> None:
    protection = Protection(coded=True, parent=OLD, protected=OLD)
    reports = [state(0), state(1, parity=False, most_parity=1), state(2, parity=False)]
    assert protection.lower(reports) == []
    protection.advance(reports, V, 6)
    assert (protection.current, protection.protected) == (None, None)


def test_room_that_ends_after_a_lowering_ends_parity_too() -> None:
    protection = Protection(coded=True, parent=OLD, protected=OLD)
    protection.lower([state(0), state(1, parity=False, most_parity=1)])
    reports = [state(0, lowered=1), state(1, parity=False, lowered=1)]
    assert protection.lower(reports) == []
    protection.advance(reports, V, 6)
    assert (protection.current, protection.protected) == (None, None)
