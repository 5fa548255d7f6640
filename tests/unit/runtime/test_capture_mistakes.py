"""What cannot be captured or restored is one clear line, before anything was touched."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from holdfast.checkpoint.flat import FlatRange
from holdfast.checkpoint.fsdp1 import FlatPart
from holdfast.errors import HoldfastError, MismatchError, StateError
from holdfast.runtime.book import EntryBook
from holdfast.runtime.capture import PerRank, TrainingState
from holdfast.runtime.holdings import Holders
from holdfast.runtime.optimizer_state import OptimizerPart
from support.images import catalog_of, save_image


def one_line(error: pytest.ExceptionInfo[HoldfastError]) -> bool:
    return "\n" not in str(error.value)


def test_an_optimizer_over_a_foreign_parameter_names_its_group_and_shape() -> None:
    model = nn.Linear(2, 2)
    foreign = nn.Parameter(torch.zeros(5, 7))
    optimizer = torch.optim.SGD([{"params": model.parameters()}, {"params": [foreign]}], lr=0.1)
    with pytest.raises(StateError, match=r"optimizer: parameter 0 of group 1, of shape \(5, 7\), belongs") as error:
        TrainingState(model=model, optimizer=optimizer)
    assert one_line(error)


def test_one_parameter_in_two_optimizers_of_a_sequence_is_refused() -> None:
    model = nn.Linear(2, 2)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for _ in range(2)]
    with pytest.raises(StateError, match="own weight; use a mapping"):
        TrainingState(model=model, optimizer=optimizers)
    TrainingState(model=model, optimizer={"a": optimizers[0], "b": optimizers[1]})


@pytest.mark.parametrize("value", [{"rows": torch.zeros(2)}, [torch.zeros(2)], (torch.zeros(2), 1)])
def test_nested_state_of_an_optimizer_over_flat_parameters_is_refused(value: Any) -> None:
    flat = nn.Parameter(torch.zeros(6))
    optimizer = torch.optim.SGD([flat], lr=0.1)
    optimizer.state[flat] = {"step": 3, "history": value}
    part = FlatPart(((nn.Linear(2, 3), "weight"),), flat, FlatRange(flat.detach(), (3, 2), 0), 0, 6)
    optimizers = OptimizerPart("optimizer", (optimizer,), {id(flat): "weight"}, {id(flat): [("weight", part)]})
    with pytest.raises(StateError, match=r"state\.weight\.history is a (dict|list|tuple); .*\(FSDP2\)") as error:
        optimizers.read(EntryBook(Holders((0,), 0)))
    assert one_line(error)


@pytest.mark.parametrize("model", [torch.zeros(2), {"a": 3}, ["x"], None, [], {}])
def test_a_model_that_is_no_module_is_refused(model: Any) -> None:
    with pytest.raises(StateError, match=r"not a torch\.nn\.Module|model is empty"):
        TrainingState(model=model)


def test_an_optimizer_that_is_none_of_torchs_is_refused() -> None:
    optimizer: Any = {"a": "sgd"}
    with pytest.raises(StateError, match=r"optimizer\.a is a str, not a torch\.optim\.Optimizer"):
        TrainingState(model=nn.Linear(1, 1), optimizer=optimizer)


@pytest.mark.parametrize("value", [3, None, object(), {"a": 1}, torch.optim.SGD])
def test_an_extra_without_state_dict_is_refused_by_its_key(value: object) -> None:
    with pytest.raises(StateError, match=r"extra\['thing'\]"):
        TrainingState(model=nn.Linear(1, 1), extra={"thing": value})
    with pytest.raises(StateError, match=r"extra\['thing'\]"):
        TrainingState(model=nn.Linear(1, 1), extra={"thing": PerRank(value)})


class Holding:
    def __init__(self, value: object) -> None:
        self.value = value

    def state_dict(self) -> dict[str, object]:
        return {"inner": [self.value]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["inner"][0]


def test_an_object_without_a_codec_is_named_by_its_key_path() -> None:
    state = TrainingState(model=nn.Linear(1, 1), extra={"thing": Holding(object())})
    with pytest.raises(StateError, match=r"extra\.thing\[0\]\.inner\[0\].*register_codec"):
        state.objects(0)


def test_tensors_without_plain_bytes_are_refused_by_name() -> None:
    for tensor, word in (
        (torch.zeros(2, 2).to_sparse(), "sparse"),
        (torch.zeros(2, device="meta"), "meta device"),
        (_quantized(), "quantized"),
    ):
        model = nn.Linear(1, 1)
        model.register_buffer("odd", tensor)
        with pytest.raises(StateError, match=f"model.odd .*{word}"):
            TrainingState(model=model)


def _quantized() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch is about to drop these tensors
        return torch.quantize_per_tensor(torch.zeros(2), 1.0, 0, torch.qint8)


def test_a_lazy_module_is_refused() -> None:
    with pytest.raises(StateError, match=r"0\.weight is not initialised yet"):
        TrainingState(model=nn.Sequential(nn.LazyLinear(3)))


class _Direct:
    def __init__(self, value: torch.Tensor) -> None:
        self.value = value

    def state_dict(self) -> list[torch.Tensor]:
        return [self.value]

    def load_state_dict(self, state: list[torch.Tensor]) -> None:
        self.value = state[0]


def test_extra_keys_that_make_one_name_of_two_are_refused() -> None:
    extra = {"a": Holding(torch.zeros(1)), "a.inner": _Direct(torch.zeros(1))}
    with pytest.raises(StateError, match=r"extra\.a\.inner\.0"):
        TrainingState(model=nn.Linear(1, 1), extra=extra)


def saved(model: nn.Module, **options: Any) -> bytes:
    return save_image(TrainingState(model=model, **options), 5)


def test_a_checkpoint_of_another_model_lists_what_differs_and_touches_nothing() -> None:
    image = saved(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)))
    model = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 1), nn.Linear(1, 1))
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(MismatchError) as error:
        TrainingState(model=model).restore(catalog_of([image]))
    text = str(error.value)
    assert "missing there: model.2.weight, model.2.bias" in text
    assert "model.0.weight has shape (4, 2) here and (3, 2) there" in text
    assert one_line(error)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_names_that_only_the_checkpoint_has_are_unknown_here() -> None:
    image = saved(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), extra={"x": Holding(1)})
    with pytest.raises(MismatchError, match=r"unknown here: model\.1\.bias, model\.1\.weight, extra\.x"):
        TrainingState(model=nn.Sequential(nn.Linear(2, 2))).restore(catalog_of([image]))


def test_another_dtype_is_a_mismatch() -> None:
    image = saved(nn.Linear(2, 2, dtype=torch.float64))
    with pytest.raises(MismatchError, match=r"model\.weight is float32 here and float64 there"):
        TrainingState(model=nn.Linear(2, 2)).restore(catalog_of([image]))


def test_other_parameter_groups_are_a_mismatch() -> None:
    model = nn.Linear(2, 2)
    image = saved(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    split = torch.optim.SGD([{"params": [model.weight]}, {"params": [model.bias]}], lr=0.1)
    with pytest.raises(MismatchError, match=r"groups of \[1, 1\] here, of \[2\] there"):
        TrainingState(model=model, optimizer=split).restore(catalog_of([image]))


def test_a_missing_extra_is_a_mismatch() -> None:
    image = saved(nn.Linear(2, 2))
    with pytest.raises(MismatchError, match=r"missing there: extra\.x"):
        TrainingState(model=nn.Linear(2, 2), extra={"x": Holding(1)}).restore(catalog_of([image]))


def test_an_optimizer_that_the_checkpoint_lacks_is_a_mismatch() -> None:
    model = nn.Linear(2, 2)
    image = saved(model)
    with pytest.raises(MismatchError, match=r"missing there: optimizer\.state"):
        TrainingState(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=1.0)).restore(catalog_of([image]))
