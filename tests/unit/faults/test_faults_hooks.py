"""Hooks that reach the inside of a step: they fire where they say, change nothing, and go away."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from holdfast.faults import HOOK_INSTANTS, Injector, RehearsedFault, When, parse_schedule
from holdfast.testing import install_hooks


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, seen: list[str]) -> None:
    loss = model(torch.ones(2, 3)).sum()
    seen.append("forward done")
    loss.backward()
    seen.append("backward done")
    optimizer.step()
    seen.append("update done")


def build() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("when", "reached"),
    [
        (When.FORWARD, []),
        (When.LOSS, []),
        (When.BACKWARD, ["forward done"]),
        (When.OPTIMIZER, ["forward done", "backward done"]),
        (When.UPDATED, ["forward done", "backward done"]),
    ],
)
def test_each_instant_is_where_it_says(when: When, reached: list[str]) -> None:
    model, optimizer = build()
    before = model[0].weight.detach().clone()
    injector = Injector(parse_schedule(f"raise:rank=0,step=4,when={when}"), None, rank=0)
    seen: list[str] = []
    hooks = install_hooks(injector, models=[model], optimizers=[optimizer], step=lambda: 4)
    with hooks, pytest.raises(RehearsedFault):
        train_step(model, optimizer, seen)
    assert seen == reached
    assert torch.equal(model[0].weight, before) is (when is not When.UPDATED)


def test_hooks_that_do_not_fire_change_no_bit() -> None:
    results = []
    for schedule in ("", ";".join(f"raise:rank=0,step=99,when={when}" for when in HOOK_INSTANTS)):
        model, optimizer = build()
        injector = Injector(parse_schedule(schedule), None, rank=0)
        with install_hooks(injector, models=[model], optimizers=[optimizer], step=lambda: 4):
            train_step(model, optimizer, [])
        results.append([parameter.detach().clone() for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_nothing_is_installed_without_a_fault_and_nothing_stays_after() -> None:
    model, optimizer = build()
    with install_hooks(Injector([], None, rank=0), models=[model], optimizers=[optimizer], step=lambda: 0):
        assert not any(module._forward_hooks for module in model.modules())
    wanted = ";".join(f"raise:rank=0,step=99,when={when}" for when in HOOK_INSTANTS)
    with install_hooks(
        Injector(parse_schedule(wanted), None, rank=0), models=[model], optimizers=[optimizer], step=lambda: 0
    ):
        assert any(module._forward_hooks for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
