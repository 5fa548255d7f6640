"""Who holds which plain tensors: no byte may be left to a rank that lacks it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from holdfast.checkpoint.boxes import Box, whole
from holdfast.checkpoint.ownership import Shard, own
from holdfast.checkpoint.share import outermost
from holdfast.runtime.book import _sample
from holdfast.runtime.holdings import Holders, Holding, Table

RANKS = (2, 3, 7)
WEIGHT = "model.a.weight"
STATE = "optimizer.state.a.weight.exp_avg"


def table(*names: str, shape: tuple[int, ...] = (900, 900), sample: str = "") -> Table:
    holding = Holding("plain", "float32", shape, sample)
    return Table(dict.fromkeys(names, holding), ("optimizer.params",), {"optimizer": [["a.weight"]]})


def holders_of(tables: list[Table], rank: int) -> Holders:
    return Holders.of_tables(tables, ranks=RANKS, global_rank=rank)


def test_names_of_the_opening_are_held_by_those_that_had_them() -> None:
    both, one = table(WEIGHT, "model.b"), table(WEIGHT)
    holders = holders_of([both, one, both], 7)
    assert holders.of(WEIGHT, None) == RANKS
    assert holders.of("model.b", None) == (2, 7)
    assert holders.uneven


def test_without_an_exchange_plain_tensors_are_on_all_ranks() -> None:
    assert Holders(RANKS, 3).of(WEIGHT, None) == RANKS


def test_state_that_appears_later_is_this_ranks_alone_until_all_holders_of_its_parameter_have_it() -> None:
    first, second = table(WEIGHT, "model.b"), table("model.b")
    holders = holders_of([first, first, second], 2)
    assert holders.of(STATE, WEIGHT) == (2,)
    grown, parameters = table(WEIGHT, "model.b", STATE), {STATE: WEIGHT}
    assert holders.prove(grown, {7: second}, parameters) is holders
    assert holders.prove(grown, {3: first}, parameters) is holders
    assert holders.has_open_names(grown)
    proven = holders.prove(grown, {3: grown}, parameters)
    assert proven.of(STATE, WEIGHT) == (2, 3)
    assert not proven.has_open_names(grown)


def test_one_name_with_two_shapes_is_a_tensor_of_each_rank_and_so_is_its_state() -> None:
    holders = holders_of([table(WEIGHT), table(WEIGHT, shape=(5, 5)), table(WEIGHT)], 3)
    assert holders.of(WEIGHT, None) is None
    assert holders.of(STATE, WEIGHT) is None
    assert holders.differing == (WEIGHT,)


def test_where_values_differ_equal_looking_neighbours_are_kept_apart_too() -> None:
    tables = [table(WEIGHT, sample=text) for text in "xyx"]
    zeros = Holding("plain", "float32", (5,), "zeros")
    for one in tables:
        one.tensors["model.a.bias"] = zeros
    holders = holders_of(tables, 2)
    assert holders.of("model.a.bias", None) is None


def test_saved_names_of_other_ranks_parts_are_known_and_others_are_not() -> None:
    holders = holders_of([table(WEIGHT), table("model.b"), table(WEIGHT)], 3)
    assert holders.knows(WEIGHT)
    assert holders.knows("optimizer.state.a.weight.exp_avg")
    assert holders.knows("optimizer.params")
    assert not holders.knows("model.c")
    assert not holders.knows("optimizer.state.c.exp_avg")


@given(
    having=st.sets(st.sampled_from(RANKS), min_size=1),
    informed=st.sets(st.sampled_from(RANKS)),
    names=st.integers(1, 4),
)
def test_whoever_knows_what_every_byte_of_late_state_is_in_some_image(
    having: set[int], informed: set[int], names: int
) -> None:
    """Ranks learn of each other at different times; at each of them a version may be made."""
    opening, late = table(WEIGHT), [f"{STATE}{i}" for i in range(names)]
    grown = table(WEIGHT, *late)
    parameters: dict[str, str | None] = dict.fromkeys(late, WEIGHT)
    covered: dict[str, set[int]] = {name: set() for name in late}
    for rank in having:
        holders = holders_of([opening] * 3, rank)
        if rank in informed:
            others = {other: grown if other in having else opening for other in RANKS if other != rank}
            holders = holders.prove(grown, others, parameters)
        shards = [
            Shard(name, "float32", (900, 900), (whole((900, 900)),), holders.of(name, WEIGHT) or (rank,))
            for name in late
        ]
        for piece in own(shards, global_rank=rank, node_of=lambda r: r // 3):
            if piece.job:
                start = piece.box.offsets[0]
                covered[piece.name].update(range(start, start + piece.box.lengths[0]))
    assert all(rows == set(range(900)) for rows in covered.values())


def test_checkpoint_keeps_a_tensor_once_where_one_rank_wrote_all_of_it_and_others_their_parts() -> None:
    box = whole((900, 900))
    halves = Box((0, 0), (450, 900)), Box((450, 0), (450, 900))
    for boxes in ([box, halves[1]], [halves[0], box, halves[1]]):
        assert outermost((900, 900), boxes) == [box]
    assert outermost((900, 900), list(halves)) == list(halves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.complex64, torch.float8_e4m3fn])
@pytest.mark.parametrize("shape", [(), (3,), (70, 90)])
def test_samples_of_values_tell_tensors_apart_and_agree_for_equal_ones(
    dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    zeros, ones = torch.zeros(shape).to(dtype), torch.ones(shape).to(dtype)
    assert _sample(zeros) == _sample(zeros.clone())
    assert _sample(zeros) != _sample(ones)
    if len(shape) == 2:
        last = zeros.clone()
        last[-1, -1] = 1
        assert _sample(last) != _sample(zeros)
        assert _sample(zeros.t()) == _sample(zeros.t().contiguous())
