"""Training that was captured, thrown away and restored equals training that never stopped, bit for bit."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from holdfast.runtime.capture import TrainingState
from support.images import catalog_of, differences, everything, save_image


class Net(nn.Module):
    """Convolution in channels_last, BatchNorm, dropout, an embedding tied to the output, a frozen part."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 8)
        self.conv = nn.Conv2d(2, 3, 3, padding=1).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm2d(3)
        self.mix = nn.Linear(48, 8)
        self.drop = nn.Dropout(0.3)
        self.out = nn.Linear(8, 7, bias=False)
        self.out.weight = self.embed.weight
        self.frozen = nn.Linear(8, 8).requires_grad_(False)

    def forward(self, tokens: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        seen = self.drop(self.norm(self.conv(image))).flatten(1)
        return self.out(torch.tanh(self.frozen(self.embed(tokens) + self.mix(seen))))


Build = Callable[[nn.Module], list[torch.optim.Optimizer]]


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def _one(kind: type[torch.optim.Optimizer], **options: Any) -> Build:
    return lambda model: [kind(_trained(model), **options)]


def _muon(model: nn.Module) -> list[torch.optim.Optimizer]:
    flat = [p for p in _trained(model) if p.dim() == 2]
    rest = [p for p in _trained(model) if p.dim() != 2]
    return [torch.optim.Muon(flat, lr=0.02), torch.optim.AdamW(rest, lr=0.01)]


def _groups(model: nn.Module) -> list[torch.optim.Optimizer]:
    decay = [p for p in _trained(model) if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    return [torch.optim.AdamW([{"params": decay, "weight_decay": 0.3}, {"params": rest, "lr": 3e-3}], lr=1e-2)]


OPTIMIZERS: dict[str, Build] = {
    "adamw": _one(torch.optim.AdamW, lr=1e-2, foreach=False),
    "adamw-foreach": _one(torch.optim.AdamW, lr=1e-2, foreach=True),
    "adamw-fused": _one(torch.optim.AdamW, lr=1e-2, fused=True),
    "adamw-amsgrad": _one(torch.optim.AdamW, lr=1e-2, amsgrad=True),
    "adamw-groups": _groups,
    "sgd": _one(torch.optim.SGD, lr=1e-2),
    "sgd-momentum": _one(torch.optim.SGD, lr=1e-2, momentum=0.9, nesterov=True),
    "muon": _muon,
    "adagrad": _one(torch.optim.Adagrad, lr=1e-2, lr_decay=0.1),
    "adadelta": _one(torch.optim.Adadelta),
    "adamax": _one(torch.optim.Adamax),
    "adafactor": _one(torch.optim.Adafactor, lr=1e-2),
    "asgd": _one(torch.optim.ASGD, lr=1e-2, t0=1.0),
    "nadam": _one(torch.optim.NAdam),
    "radam": _one(torch.optim.RAdam),
    "rmsprop": _one(torch.optim.RMSprop, centered=True, momentum=0.5),
    "rprop": _one(torch.optim.Rprop),
    "lbfgs": _one(torch.optim.LBFGS, lr=0.1, max_iter=3, history_size=2),
}


def seed(value: int) -> None:
    torch.manual_seed(value)
    np.random.seed(value)
    random.seed(value)


def train(model: nn.Module, optimizers: list[torch.optim.Optimizer], schedulers: list[Any], steps: int) -> None:
    for _ in range(steps):
        tokens = torch.randint(0, 7, (4,))
        image = torch.randn(4, 2, 4, 4) * random.random() + float(np.random.rand())
        target = torch.randint(0, 7, (4,))

        def closure(tokens: torch.Tensor = tokens, image: torch.Tensor = image, target: torch.Tensor = target) -> Any:
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(tokens, image), target)
            loss.backward()
            return loss

        if isinstance(optimizers[0], torch.optim.LBFGS):
            optimizers[0].step(closure)
        else:
            closure()
            for optimizer in optimizers:
                optimizer.step()
        for scheduler in schedulers:
            scheduler.step()


def build(kind: str) -> tuple[nn.Module, list[torch.optim.Optimizer], list[Any], TrainingState]:
    model = Net()
    if kind == "lbfgs":  # torch's LBFGS cannot flatten gradients in channels_last
        model.conv.to(memory_format=torch.contiguous_format)
    optimizers = OPTIMIZERS[kind](model)
    schedulers = [torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5) for optimizer in optimizers]
    state = TrainingState(
        model=model,
        optimizer=optimizers,
        extra={f"scheduler{i}": scheduler for i, scheduler in enumerate(schedulers)},
    )
    return model, optimizers, schedulers, state


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_resumed_training_equals_undisturbed_training(kind: str) -> None:
    seed(1)
    model, optimizers, schedulers, state = build(kind)
    train(model, optimizers, schedulers, 3)
    image = save_image(state, 3)
    at_save = everything([model], optimizers)
    train(model, optimizers, schedulers, 3)
    undisturbed = everything([model], optimizers)

    seed(2)
    model, optimizers, schedulers, state = build(kind)
    assert differences(everything([model], optimizers), at_save), "a fresh model must differ, or this shows nothing"
    assert state.restore(catalog_of([image])) == 3
    assert differences(everything([model], optimizers), at_save) == []
    train(model, optimizers, schedulers, 3)

    assert differences(everything([model], optimizers), undisturbed) == []


def test_capturing_at_every_step_changes_nothing_in_training() -> None:
    seed(3)
    model, optimizers, schedulers, _ = build("adamw")
    train(model, optimizers, schedulers, 4)
    alone = everything([model], optimizers)

    seed(3)
    model, optimizers, schedulers, state = build("adamw")
    for step in range(4):
        train(model, optimizers, schedulers, 1)
        state.entries()
        state.objects(step)

    assert differences(everything([model], optimizers), alone) == []


def test_capturing_fresh_optimizers_neither_steps_nor_draws() -> None:
    seed(4)
    model, optimizers, _, state = build("adamw")
    before = everything([model], optimizers)

    state.entries()
    state.objects(0)

    assert differences(everything([model], optimizers), before) == []
    assert not optimizers[0].state


def test_restoring_over_a_further_trained_state_takes_it_back() -> None:
    seed(5)
    model, optimizers, schedulers, state = build("adamw")
    train(model, optimizers, schedulers, 2)
    image = save_image(state, 2)
    at_save = everything([model], optimizers)
    train(model, optimizers, schedulers, 2)

    state.restore(catalog_of([image]))

    assert differences(everything([model], optimizers), at_save) == []


def test_restoring_a_state_from_before_the_first_step_removes_optimizer_state() -> None:
    seed(6)
    model, optimizers, schedulers, state = build("adamw")
    image = save_image(state, 0)
    train(model, optimizers, schedulers, 2)
    assert optimizers[0].state

    assert state.restore(catalog_of([image])) == 0

    assert not optimizers[0].state


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))

    def forward(self, x: torch.Tensor, chosen: int) -> torch.Tensor:
        return self.experts[chosen](x)


def test_an_expert_first_routed_after_the_resume_trains_as_if_undisturbed() -> None:
    def fresh() -> tuple[nn.Module, torch.optim.Optimizer, TrainingState]:
        model = Experts()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        return model, optimizer, TrainingState(model=model, optimizer=optimizer)

    def route(model: nn.Module, optimizer: torch.optim.Optimizer, experts: list[int]) -> None:
        for chosen in experts:
            optimizer.zero_grad()
            model(torch.randn(2, 3), chosen).square().sum().backward()
            optimizer.step()

    seed(7)
    model, optimizer, state = fresh()
    route(model, optimizer, [0, 1, 0])
    image = save_image(state, 3)
    route(model, optimizer, [2, 1])
    undisturbed = everything([model], [optimizer])

    seed(8)
    model, optimizer, state = fresh()
    route(model, optimizer, [2])  # state that the save does not have
    state.restore(catalog_of([image]))
    assert model.experts[2].weight not in optimizer.state
    route(model, optimizer, [2, 1])

    assert differences(everything([model], [optimizer]), undisturbed) == []


def test_grad_scaler_resumes_with_its_scale_and_growth() -> None:
    def fresh() -> tuple[nn.Module, torch.optim.Optimizer, torch.amp.GradScaler, TrainingState]:
        model = nn.Linear(4, 4)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
        return model, optimizer, scaler, TrainingState(model=model, optimizer=optimizer, extra={"scaler": scaler})

    def run(model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            loss = model(torch.randn(2, 4)).square().mean() * (float("inf") if step == 4 else 1.0)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()

    seed(9)
    model, optimizer, scaler, state = fresh()
    run(model, optimizer, scaler, range(3))
    image = save_image(state, 3)
    run(model, optimizer, scaler, range(3, 6))
    undisturbed, scale = everything([model], [optimizer]), scaler.state_dict()

    seed(10)
    model, optimizer, scaler, state = fresh()
    state.restore(catalog_of([image]))
    run(model, optimizer, scaler, range(3, 6))

    assert differences(everything([model], [optimizer]), undisturbed) == []
    assert scaler.state_dict() == scale


def test_a_tensor_learning_rate_stays_the_same_tensor_and_takes_the_saved_value() -> None:
    def fresh() -> tuple[torch.Tensor, torch.optim.Optimizer, TrainingState]:
        model = nn.Linear(2, 2)
        lr = torch.tensor(0.5)
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, foreach=False)
        return lr, optimizer, TrainingState(model=model, optimizer=optimizer)

    lr, _, state = fresh()
    lr.fill_(0.25)
    image = save_image(state, 1)

    lr, optimizer, state = fresh()
    state.restore(catalog_of([image]))

    assert optimizer.param_groups[0]["lr"] is lr
    assert lr.item() == 0.25


def test_several_models_and_optimizers_resume_under_their_keys() -> None:
    def fresh() -> tuple[nn.ModuleDict, dict[str, torch.optim.Optimizer], TrainingState]:
        models = nn.ModuleDict({"g": nn.Linear(3, 3), "d": nn.Linear(3, 1), "ema": nn.Linear(3, 3)})
        optimizers: dict[str, torch.optim.Optimizer] = {
            "g": torch.optim.Adam(models["g"].parameters()),
            "d": torch.optim.SGD(models["d"].parameters(), lr=0.1, momentum=0.9),
        }
        return models, optimizers, TrainingState(model=dict(models.items()), optimizer=optimizers)

    seed(11)
    models, optimizers, state = fresh()
    models["d"](models["g"](torch.randn(2, 3))).sum().backward()
    for optimizer in optimizers.values():
        optimizer.step()
    image = save_image(state, 1)
    saved = everything([models], list(optimizers.values()))

    seed(12)
    models, optimizers, state = fresh()
    state.restore(catalog_of([image]))

    assert differences(everything([models], list(optimizers.values())), saved) == []
    assert {entry.name for entry in state.entries()} >= {
        "model.g.weight",
        "optimizer.g.state.g.weight.exp_avg",
        "optimizer.d.state.d.bias.momentum_buffer",
        "model.ema.bias",
    }


def test_rng_is_restored_again_on_request() -> None:
    seed(13)
    _, _, _, state = build("sgd")
    image = save_image(state, 0)
    expected = (torch.rand(3), np.random.rand(3), random.random())

    state.restore(catalog_of([image]))
    torch.rand(5)
    random.random()
    state.restore_rng()

    assert torch.equal(torch.rand(3), expected[0])
    assert (np.random.rand(3) == expected[1]).all()
    assert random.random() == expected[2]


def test_capturable_state_dtype_is_kept_for_half_precision_parameters() -> None:
    model = nn.Linear(2, 2, dtype=torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.state[model.weight] = {"step": torch.tensor(1.0), "exp_avg": torch.full((2, 2), 1 / 3)}
    state = TrainingState(model=model, optimizer=optimizer)
    image = save_image(state, 1)
    optimizer.state.clear()

    state.restore(catalog_of([image]))

    assert optimizer.state[model.weight]["exp_avg"].dtype is torch.float32
    assert torch.equal(optimizer.state[model.weight]["exp_avg"], torch.full((2, 2), 1 / 3))
