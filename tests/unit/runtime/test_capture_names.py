"""Names equal those of torch's state dict helpers, which are only ever called on copies."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

from holdfast.errors import StateError
from holdfast.runtime.capture import TrainingState
from support.images import catalog_of, save_image


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("scratch", torch.zeros(4), persistent=False)
        self.register_buffer("kept", torch.arange(4.0))
        self.nothing = None
        self.register_parameter("absent", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.lin(x)) + self.kept


class Counting(nn.Module):
    """Has state that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, Any] = {"count": 3, "max": torch.tensor([1.0, 2.0])}

    def get_extra_state(self) -> dict[str, Any]:
        return self.seen

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.seen = state


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight
        self.again = self.blocks[0]
        self.counting = Counting()
        self.free = nn.Parameter(torch.ones(()))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x) * self.free


def plain() -> nn.Module:
    return Model()


def compiled() -> nn.Module:
    return torch.compile(Model(), backend="eager")


def compiled_blocks() -> nn.Module:
    model = Model()
    model.blocks[1] = torch.compile(model.blocks[1], backend="eager")
    model.blocks[0].compile(backend="eager")
    return model


def checkpointed_blocks() -> nn.Module:
    model = Model()
    model.blocks[0] = checkpoint_wrapper(model.blocks[0])
    model.blocks[1] = torch.compile(checkpoint_wrapper(model.blocks[1]), backend="eager")
    return model


def checkpointed_compiled_blocks() -> nn.Module:
    """The order in which torch's own names keep ``_orig_mod``."""
    model = Model()
    model.blocks[1] = checkpoint_wrapper(torch.compile(model.blocks[1], backend="eager"))
    return model


def data_parallel() -> nn.Module:
    return nn.parallel.DistributedDataParallel(checkpointed_blocks())


def compiled_data_parallel() -> nn.Module:
    return torch.compile(nn.parallel.DistributedDataParallel(Model()), backend="eager")


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "build",
    [
        plain,
        compiled,
        compiled_blocks,
        checkpointed_blocks,
        checkpointed_compiled_blocks,
        data_parallel,
        compiled_data_parallel,
    ],
)
@pytest.mark.usefixtures("process_group")
def test_names_equal_torchs(build: Callable[[], nn.Module]) -> None:
    model = build()
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.dim())
    other = build()  # torch's helper steps a fresh optimizer
    other_optimizer = torch.optim.AdamW(p for p in other.parameters() if p.dim())
    expected_model = get_model_state_dict(other)
    expected = get_optimizer_state_dict(other, other_optimizer)

    state = TrainingState(model=model, optimizer=optimizer)
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    names = {entry.name for entry in state.entries()}
    objects = state.objects(0)

    extra_states = {name for name in objects if name.endswith("_extra_state")}
    assert {*state.names, *extra_states} == {f"model.{name}" for name in expected_model}
    assert {name for name in names if name.startswith("optimizer.")} == {
        f"optimizer.state.{fqn}.{key}" for fqn, of_fqn in expected["state"].items() for key in of_fqn
    }
    assert [fqn for group in state._parts[0].params for fqn in group] == [
        fqn for group in expected["param_groups"] for fqn in group["params"]
    ]


def test_tied_tensors_are_stored_once_and_found_under_every_name() -> None:
    state = TrainingState(model=Model())

    names = [entry.name for entry in state.entries()]

    assert len(names) == len(set(names))
    assert "model.embed.weight" in names
    assert "model.head.weight" not in names
    assert state.names["model.head.weight"] == "model.embed.weight"
    assert state.names["model.again.lin.bias"] == "model.blocks.0.lin.bias"


@pytest.mark.parametrize(("before", "now"), [("ab", "ba"), ("b", "ab"), ("ba", "cab"), ("ab", "b")])
def test_a_tie_that_has_other_names_is_restored_all_the_same(before: str, now: str) -> None:
    class Tied(nn.Module):
        def __init__(self, names: str) -> None:
            super().__init__()
            tied = nn.Parameter(torch.zeros(3))
            for name in names:
                self.register_parameter(name, tied)

    saved = Tied(before)
    saved.b.data.fill_(5)
    optimizer = torch.optim.SGD(saved.parameters(), lr=0.1, momentum=0.9)
    saved.b.grad = torch.ones(3)
    optimizer.step()
    image = save_image(TrainingState(model=saved, optimizer=optimizer), 1)

    fresh = Tied(now)
    fresh_optimizer = torch.optim.SGD(fresh.parameters(), lr=0.1, momentum=0.9)
    TrainingState(model=fresh, optimizer=fresh_optimizer).restore(catalog_of([image]))

    assert torch.equal(fresh.b, saved.b)
    assert torch.equal(fresh_optimizer.state[fresh.b]["momentum_buffer"], torch.ones(3))


def test_extra_state_of_modules_is_kept_with_its_tensors() -> None:
    model = Model()
    model.counting.seen = {"count": 9, "max": torch.tensor([4.0, 5.0]), "none": torch.empty(0, 3)}
    image = save_image(TrainingState(model=model), 1)
    fresh = Model()

    TrainingState(model=fresh).restore(catalog_of([image]))

    assert fresh.counting.seen["count"] == 9
    assert torch.equal(fresh.counting.seen["max"], torch.tensor([4.0, 5.0]))
    assert fresh.counting.seen["none"].shape == (0, 3)


def test_models_in_a_sequence_must_have_disjoint_names() -> None:
    with pytest.raises(StateError, match=r"two tensors of the models are named weight; .* mapping"):
        TrainingState(model=[nn.Linear(2, 2), nn.Linear(2, 2)])


def test_a_mapping_prefixes_names_with_its_keys() -> None:
    state = TrainingState(model={"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
    assert {entry.name for entry in state.entries()} == {"model.a.weight", "model.b.weight"}


def test_keys_that_make_one_name_of_two_are_refused() -> None:
    inner = nn.ModuleDict({"b": nn.Linear(2, 2)})
    with pytest.raises(StateError, match=r"a\.b\.weight"):
        TrainingState(model={"a": inner, "a.b": nn.Linear(2, 2)})


@pytest.mark.usefixtures("process_group")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("use_orig_params", [True, False])
def test_fsdp1_has_the_names_of_the_model_inside(use_orig_params: bool) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    inside = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 2, bias=False))
    expected = list(inside.state_dict())
    inside[2] = FullyShardedDataParallel(inside[2], device_id=torch.device("cpu"), use_orig_params=use_orig_params)
    model = FullyShardedDataParallel(inside, device_id=torch.device("cpu"), use_orig_params=use_orig_params)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 2)).sum().backward()
    optimizer.step()
    state = TrainingState(model=model, optimizer=optimizer)
    assert set(state.names) == {f"model.{name}" for name in expected}
    shapes = {entry.name: entry.shape for entry in state.entries()}
    assert shapes["model.0.weight"] == shapes["optimizer.state.0.weight.exp_avg"] == (3, 2)
    assert shapes["optimizer.state.2.weight.step"] == ()
