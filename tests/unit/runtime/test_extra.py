"""Objects in `extra`: generators, schedulers, per-rank state and what happens to it when the world changes."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from holdfast.errors import StateError
from holdfast.runtime.capture import PerRank, TrainingState
from support.images import catalog_of, save_image


class Sampler:
    """A data order with an index and a tensor."""

    def __init__(self, position: int) -> None:
        self.position = position
        self.order = torch.arange(position, position + 3)

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position, "order": self.order}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]
        self.order = state["order"]


def state_of(global_rank: int, world_size: int, extra: dict[str, object]) -> TrainingState:
    torch.manual_seed(0)
    return TrainingState(model=nn.Linear(4, 4), extra=extra, ranks=tuple(range(world_size)), global_rank=global_rank)


def images_of(world_size: int, make: Any) -> list[bytes]:
    return [
        save_image(state_of(rank, world_size, make(rank)), 1, global_rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]


@pytest.mark.parametrize(
    ("make", "draw"),
    [
        (lambda seed: torch.Generator().manual_seed(seed), lambda g: torch.rand(3, generator=g).tolist()),
        (lambda seed: np.random.default_rng(seed), lambda g: g.random(3).tolist()),
        (lambda seed: np.random.RandomState(seed), lambda g: g.rand(3).tolist()),
        (lambda seed: random.Random(seed), lambda g: [g.random(), g.gauss(0, 1)]),
    ],
)
def test_generators_go_on_where_they_were(make: Any, draw: Any) -> None:
    generator = make(1)
    draw(generator)
    image = save_image(state_of(0, 1, {"g": generator}), 1)
    expected = draw(generator)
    other = make(2)
    state_of(0, 1, {"g": other}).restore(catalog_of([image]))
    assert draw(other) == expected


def test_per_rank_state_returns_to_its_rank() -> None:
    images = images_of(2, lambda rank: {"s": PerRank(Sampler(10 + rank))})
    for rank in (0, 1):
        sampler = Sampler(0)
        state_of(rank, 2, {"s": PerRank(sampler)}).restore(catalog_of(images))
        assert sampler.position == 10 + rank
        assert sampler.order.tolist() == [10 + rank, 11 + rank, 12 + rank]


def test_per_rank_state_without_on_resize_refuses_another_world() -> None:
    images = images_of(2, lambda rank: {"s": PerRank(Sampler(rank))})
    with pytest.raises(
        StateError, match=r"extra\.s is per rank and was saved by 2 ranks, there are 3 now; .*on_resize"
    ):
        state_of(0, 3, {"s": PerRank(Sampler(0))}).restore(catalog_of(images))


@pytest.mark.parametrize(("old", "new"), [(2, 1), (1, 2), (2, 3)])
def test_on_resize_gets_all_old_states_the_new_rank_and_the_new_world(old: int, new: int) -> None:
    images = images_of(old, lambda rank: {"s": PerRank(Sampler(10 * rank))})
    for rank in range(new):
        calls: list[tuple[list[int], int, int]] = []

        def on_resize(states: Sequence[Any], rank: int, world: int, calls: Any = calls) -> dict[str, Any]:
            calls.append(([state["order"][0].item() for state in states], rank, world))
            return {"position": 77, "order": torch.zeros(3)}

        sampler = Sampler(0)
        state_of(rank, new, {"s": PerRank(sampler, on_resize=on_resize)}).restore(catalog_of(images))
        assert calls == [([10 * r for r in range(old)], rank, new)]
        assert sampler.position == 77


def test_after_a_resize_a_rank_takes_the_generators_of_old_rank_modulo_world() -> None:
    drawn = {}
    images = []
    for rank in (0, 1):
        state = state_of(rank, 2, {})
        torch.manual_seed(100 + rank)
        images.append(save_image(state, 1, global_rank=rank, world_size=2))
        drawn[rank] = torch.rand(2).tolist()
    for rank in (0, 1, 2):
        state_of(rank, 3, {}).restore(catalog_of(images))
        assert torch.rand(2).tolist() == drawn[rank % 2]


def test_per_rank_buffers_follow_the_same_rule() -> None:
    def build(rank: int, world: int, value: float) -> tuple[nn.Module, TrainingState]:
        model = nn.BatchNorm1d(2)
        model.running_mean.fill_(value)
        return model, TrainingState(model=model, ranks=tuple(range(world)), global_rank=rank)

    images = [save_image(build(r, 2, 5.0 + r)[1], 1, global_rank=r, world_size=2) for r in (0, 1)]
    for rank, expected in ((0, 5.0), (1, 6.0), (2, 5.0)):
        model, state = build(rank, 3, 0.0)
        state.restore(catalog_of(images))
        assert model.running_mean.eq(expected).all()
    single = save_image(build(0, 1, 9.0)[1], 1)
    for rank in (0, 1):
        model, state = build(rank, 2, 0.0)
        state.restore(catalog_of([single]))
        assert model.running_mean.eq(9.0).all()


def _schedulers(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    lr = torch.optim.lr_scheduler
    return {
        "lambda": lr.LambdaLR(optimizer, lambda epoch: 0.9**epoch),
        "multistep": lr.MultiStepLR(optimizer, [2, 4]),
        "one-cycle": lr.OneCycleLR(optimizer, 0.1, total_steps=20),
        "plateau": lr.ReduceLROnPlateau(optimizer),
        "cosine": lr.CosineAnnealingWarmRestarts(optimizer, 5),
        "sequential": lr.SequentialLR(optimizer, [lr.ConstantLR(optimizer), lr.ExponentialLR(optimizer, 0.9)], [3]),
    }


@pytest.mark.parametrize("kind", ["lambda", "multistep", "one-cycle", "plateau", "cosine", "sequential"])
@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*:UserWarning", "ignore:.*epoch parameter.*:UserWarning")
def test_schedulers_of_torch_go_on_where_they_were(kind: str) -> None:
    def fresh() -> tuple[torch.optim.Optimizer, Any, TrainingState]:
        model = nn.Linear(2, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        scheduler = _schedulers(optimizer)[kind]
        state = TrainingState(model=model, optimizer=optimizer, extra={"scheduler": scheduler})
        return optimizer, scheduler, state

    def rates(optimizer: torch.optim.Optimizer, scheduler: Any, count: int) -> list[float]:
        found = []
        for _ in range(count):
            optimizer.step()
            scheduler.step(1.0) if kind == "plateau" else scheduler.step()
            found.append(optimizer.param_groups[0]["lr"])
        return found

    optimizer, scheduler, state = fresh()
    rates(optimizer, scheduler, 3)
    image = save_image(state, 3)
    expected = rates(optimizer, scheduler, 4)
    optimizer, scheduler, state = fresh()
    state.restore(catalog_of([image]))
    assert rates(optimizer, scheduler, 4) == expected


def test_an_object_that_hands_out_new_tensors_keeps_the_list_of_entries() -> None:
    class Fresh:
        value = 0.0

        def state_dict(self) -> dict[str, Any]:
            return {"t": torch.full((2,), self.value)}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.value = state["t"][0].item()

    fresh = Fresh()
    state = state_of(0, 1, {"fresh": fresh})
    lists = []
    for value in (1.0, 2.0, 3.0):
        fresh.value = value
        lists.append(state.entries())
        assert next(e for e in lists[-1] if e.name == "extra.fresh.t").tensor.eq(value).all()
    assert lists[1] is lists[0]
    assert lists[2] is lists[0]
    image = save_image(state, 1)
    fresh.value = 9.0
    state.restore(catalog_of([image]))
    assert fresh.value == 3.0


def test_a_module_in_extra_is_loaded_in_place() -> None:
    average = nn.Linear(3, 3)
    state = state_of(0, 1, {"average": average})
    image = save_image(state, 1)
    saved = average.weight.detach().clone()
    nn.init.zeros_(average.weight)
    state.restore(catalog_of([image]))
    assert torch.equal(average.weight, saved)
