"""The list of entries is the same object while nothing changed, and another one as soon as something did."""

from __future__ import annotations

from collections import deque
from typing import Any

import pytest
import torch
from torch import nn

from holdfast.runtime.capture import TensorEntry, Timing, TrainingState
from support.images import catalog_of, save_image


def entry(state: TrainingState, name: str) -> TensorEntry:
    return next(entry for entry in state.entries() if entry.name == name)


def stepped(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


@pytest.fixture
def model() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))


@pytest.fixture
def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters())


@pytest.fixture
def state(model: nn.Module, optimizer: torch.optim.Optimizer) -> TrainingState:
    return TrainingState(model=model, optimizer=optimizer)


def test_the_same_list_is_returned_while_training_only_updates_in_place(
    state: TrainingState, model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    stepped(model, optimizer)
    first = state.entries()
    for _ in range(3):
        model(torch.randn(4, 3)).sum().backward()
        stepped(model, optimizer)
        assert state.entries() is first


def test_entries_share_memory_with_the_live_tensors(state: TrainingState, model: nn.Module) -> None:
    with torch.no_grad():
        model[0].weight.fill_(7)
    assert entry(state, "model.0.weight").tensor.eq(7).all()


def test_optimizer_state_created_by_the_first_step_is_noticed(
    state: TrainingState, model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    before = state.entries()
    stepped(model, optimizer)
    after = state.entries()
    assert after is not before
    assert len(after) == len(before) + 3 * 4
    kept = {entry.name: entry for entry in before}
    assert all(kept[entry.name] is entry for entry in after if entry.name in kept)


def test_a_replaced_state_tensor_is_noticed_and_the_others_keep_their_entries(
    state: TrainingState, model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    stepped(model, optimizer)
    before = {entry.name: entry for entry in state.entries()}
    replaced = torch.full((3, 3), 9.0)
    optimizer.state[model[0].weight]["exp_avg"] = replaced
    after = {entry.name: entry for entry in state.entries()}
    name = "optimizer.state.0.weight.exp_avg"
    assert after[name].tensor.data_ptr() == replaced.data_ptr()
    assert [key for key in before if after[key] is not before[key]] == [name]


def test_removed_optimizer_state_is_noticed(
    state: TrainingState, model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    stepped(model, optimizer)
    state.entries()
    del optimizer.state[model[0].weight]["exp_avg_sq"]
    assert "optimizer.state.0.weight.exp_avg_sq" not in {entry.name for entry in state.entries()}


def test_a_parameter_whose_data_was_swapped_is_noticed(state: TrainingState, model: nn.Module) -> None:
    before = state.entries()
    model[0].weight.data = torch.full((3, 3), 5.0)
    assert state.entries() is not before
    assert entry(state, "model.0.weight").tensor.eq(5).all()


def test_a_parameter_that_was_replaced_is_noticed(model: nn.Module) -> None:
    state = TrainingState(model=model)
    state.entries()
    model[0].bias = nn.Parameter(torch.full((3,), 4.0))
    assert entry(state, "model.0.bias").tensor.eq(4).all()


def test_a_resized_buffer_is_noticed(state: TrainingState, model: nn.Module) -> None:
    state.entries()
    model[1].running_mean = torch.zeros(5)
    assert entry(state, "model.1.running_mean").shape == (5,)


def test_new_and_removed_buffers_and_modules_are_noticed(state: TrainingState, model: nn.Module) -> None:
    state.entries()
    model[0].register_buffer("extra", torch.zeros(2))
    assert entry(state, "model.0.extra").timing is Timing.BOUNDARY
    del model[0].extra
    model.append(nn.BatchNorm1d(2, affine=False))
    names = {entry.name for entry in state.entries()}
    assert "model.0.extra" not in names
    assert "model.2.running_var" in names


def test_a_buffer_that_forward_replaces_gets_a_steady_copy(model: nn.Module) -> None:
    model.register_buffer("average", torch.zeros(3))
    state = TrainingState(model=model)
    lists: list[Any] = []
    for value in range(1, 6):
        model.average = model.average * 0 + value
        lists.append(state.entries())
        assert entry(state, "model.average").tensor.eq(value).all()
    assert all(later is lists[0] for later in lists)


def test_a_copied_buffer_is_restored_into_the_live_one(model: nn.Module) -> None:
    model.register_buffer("average", torch.zeros(3))
    state = TrainingState(model=model)
    model.average = model.average + 1
    state.entries()
    model.average = model.average + 1
    image = save_image(state, 1)
    model.average = torch.zeros(3)

    state.restore(catalog_of([image]))

    assert model.average.eq(2).all()


def test_parameters_added_to_the_optimizer_later_are_noticed(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    state = TrainingState(model=model, optimizer=optimizer)
    assert entry(state, "model.1.weight").timing is Timing.BOUNDARY
    optimizer.add_param_group({"params": list(model[1].parameters())})
    assert entry(state, "model.1.weight").timing is Timing.OVERLAP


def test_nested_state_that_changes_inside_a_list_is_noticed(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    history: deque[torch.Tensor] = deque([torch.zeros(2)])
    optimizer.state[model[0].weight] = {"history": history, "count": 1}
    state = TrainingState(model=model, optimizer=optimizer)
    before = state.entries()
    assert state.entries() is before
    optimizer.state[model[0].weight]["count"] = 2
    assert state.entries() is before
    history.append(torch.ones(2))
    names = [entry.name for entry in state.entries()]
    assert "optimizer.state.0.weight.history.1" in names
    image = save_image(state, 1)
    optimizer.state.clear()
    state.restore(catalog_of([image]))
    restored = optimizer.state[model[0].weight]
    assert restored["count"] == 2
    assert [t.tolist() for t in restored["history"]] == [[0, 0], [1, 1]]


def test_state_under_keys_that_are_no_parameters_is_kept(model: nn.Module) -> None:
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.state["global"] = {"count": 3, "norm": torch.tensor(2.5)}
    state = TrainingState(model=model, optimizer=optimizer)
    state.entries()
    optimizer.state["global"]["count"] = 4
    image = save_image(state, 1)
    optimizer.state.clear()
    state.restore(catalog_of([image]))
    assert optimizer.state["global"]["count"] == 4
    assert optimizer.state["global"]["norm"].item() == 2.5


def test_tensors_without_elements_are_restored_too() -> None:
    model = nn.Module()
    model.none = nn.Parameter(torch.empty(0, 2))
    model.some = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW(model.parameters())
    stepped(model, optimizer)
    state = TrainingState(model=model, optimizer=optimizer)
    image = save_image(state, 1)
    optimizer.state.clear()
    state.restore(catalog_of([image]))
    assert optimizer.state[model.none]["exp_avg"].shape == (0, 2)
    stepped(model, optimizer)


def test_timing_follows_who_may_change_a_tensor(model: nn.Module) -> None:
    frozen = nn.Linear(2, 2).requires_grad_(False)
    average = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    stepped(model, optimizer)
    state = TrainingState(model={"m": model, "frozen": frozen, "average": average}, optimizer=optimizer)
    timing = {entry.name: entry.timing for entry in state.entries()}
    assert timing["model.m.0.weight"] is Timing.OVERLAP
    assert timing["optimizer.state.m.0.weight.step"] is Timing.OVERLAP
    assert timing["model.m.1.running_mean"] is Timing.BOUNDARY
    assert timing["model.average.weight"] is Timing.BOUNDARY
    assert timing["model.frozen.weight"] is Timing.FROZEN


def test_buffers_are_per_rank_and_weights_shared_where_there_are_several_ranks(model: nn.Module) -> None:
    state = TrainingState(model=model, ranks=(0, 1, 2), global_rank=1)
    weight, mean = entry(state, "model.0.weight"), entry(state, "model.1.running_mean")
    assert (weight.holders, weight.rank) == ((0, 1, 2), None)
    assert (mean.holders, mean.rank) == ((1,), 1)


def test_pieces_are_found_once_and_follow_replaced_tensors(
    state: TrainingState, model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    stepped(model, optimizer)
    entries = state.entries()
    pieces = state.pieces(entries, node_of={0: 0})
    assert state.pieces(state.entries(), node_of={0: 0}) is pieces
    replaced = torch.full((3, 3), 9.0)
    optimizer.state[model[0].weight]["exp_avg"] = replaced
    again = state.pieces(state.entries(), node_of={0: 0})
    changed = [b for a, b in zip(pieces, again, strict=True) if a is not b]
    assert [one.piece.name for one in changed] == ["optimizer.state.0.weight.exp_avg"]
    assert changed[0].tensor.data_ptr() == replaced.data_ptr()


def test_every_byte_of_two_ranks_is_copied_by_one_of_them(model: nn.Module) -> None:
    seen: dict[str, int] = {}
    for global_rank in (0, 1):
        state = TrainingState(model=nn.Linear(40, 30), ranks=(0, 1), global_rank=global_rank)
        for one in state.pieces(state.entries(), node_of={0: 0, 1: 0}):
            assert tuple(one.tensor.shape) == one.piece.box.lengths
            seen[one.piece.name] = seen.get(one.piece.name, 0) + one.piece.box.volume
    assert seen == {"model.weight": 1200, "model.bias": 30}


def test_pieces_follow_the_nodes_that_were_given() -> None:
    state = TrainingState(model=nn.Linear(40, 30), ranks=(0, 1), global_rank=0)
    entries = state.entries()

    def volume(node_of: dict[int, int]) -> int:
        return sum(one.piece.box.volume for one in state.pieces(entries, node_of=node_of))

    assert volume({0: 0, 1: 0}) < 1230
    assert volume({0: 0, 1: 1}) == 1230, "alone on its node, a rank copies all that it holds"
