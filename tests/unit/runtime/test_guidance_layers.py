"""Layers by name through wrappers, states in outputs of any form, checkpointed blocks."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import checkpoint

from holdfast.errors import UsageError
from holdfast.runtime.guidance import LateToEarly
from holdfast.runtime.guidance_layers import find_layer, state_of, width_of
from support.guidance_models import Block, Model, expected, gradients, loss_of, student, teacher, tokens

STATE = torch.zeros(2, 3, 4)
OTHER = torch.ones(2, 3, 4)
Pair = namedtuple("Pair", "state cache")


@dataclass(frozen=True)
class Frozen:
    last_hidden_state: Tensor
    cache: str = "kept"


class ModelOutput(OrderedDict[str, Any]):
    """As Hugging Face's: a mapping whose entries are attributes as well."""


@pytest.mark.parametrize(
    "output",
    [
        STATE,
        (STATE, "cache"),
        [STATE, "cache"],
        Pair(STATE, "cache"),
        {"last_hidden_state": STATE, "cache": "kept"},
        ModelOutput(hidden_states=STATE, cache="kept"),
        {"hidden_states": (OTHER, STATE)},
        Frozen(STATE),
        (Frozen(STATE), "cache"),
    ],
    ids=lambda output: type(output).__name__,
)
def test_the_state_is_found_and_replaced_in_any_form_of_output(output: Any) -> None:
    found, rebuild = state_of(output, layer="x")
    assert found is STATE
    changed = rebuild(OTHER)
    assert type(changed) is type(output)
    assert state_of(changed, layer="x")[0] is OTHER
    assert state_of(output, layer="x")[0] is STATE  # the module's own output is not touched
    assert ("kept" in str(changed)) == ("kept" in str(output))
    assert ("cache" in str(changed)) == ("cache" in str(output))


@pytest.mark.parametrize(
    "output",
    [None, "x", torch.zeros(3), torch.zeros(2, 3, 4, 5), torch.zeros(2, 3).long(), {"a": STATE}, (None,), ()],
    ids=str,
)
def test_what_is_no_hidden_state_is_refused(output: Any) -> None:
    with pytest.raises(UsageError, match="not a hidden state per token"):
        state_of(output, layer="x")


def test_logits_are_read_from_outputs_with_logits() -> None:
    found, rebuild = state_of(ModelOutput(loss=torch.zeros(()), logits=STATE), layer="", logits=True)
    assert found is STATE
    assert rebuild(OTHER)["logits"] is OTHER


def test_names_lead_through_wrappers_and_count_from_the_end() -> None:
    model = student()
    blocks = list(model.blocks)
    assert find_layer(model, "blocks.-1", argument="layer") is blocks[2]
    assert find_layer(model, "blocks.-3.up", argument="layer") is blocks[0].up
    assert find_layer(model, "", argument="layer") is model
    model.blocks[0] = checkpoint_wrapper(blocks[0])
    model.blocks[1] = torch.compile(blocks[1], backend="eager")
    assert find_layer(model, "blocks.0", argument="layer") is model.blocks[0]
    assert find_layer(model, "blocks.0.up", argument="layer") is blocks[0].up
    assert find_layer(model, "blocks.1.up", argument="layer") is blocks[1].up
    whole = torch.compile(model, backend="eager")
    assert find_layer(whole, "blocks.2", argument="layer") is blocks[2]
    with pytest.raises(UsageError, match=r"near matches: blocks\.1\.up"):
        find_layer(model, "blocks.1.upp", argument="layer")


def test_widths_are_read_off_layers() -> None:
    model = student()
    named = {name: width_of(find_layer(model, name, argument="layer")) for name in ("blocks.0", "norm", "head", "drop")}
    assert named == {"blocks.0": 10, "norm": 10, "head": 11, "drop": None}


class Checkpointed(Model):
    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.drop(self.embed(tokens).cumsum(1))
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return self.head(self.norm(x))


@pytest.mark.parametrize("attached", [False, True], ids=["loss", "attached"])
@pytest.mark.parametrize("how", ["called", "wrapped", "inner"])
def test_checkpointed_blocks_give_the_same_gradient(how: str, attached: bool) -> None:
    model = student()
    reference = expected(2)
    if how == "called":
        model.__class__ = Checkpointed
    else:
        model.blocks[1] = checkpoint_wrapper(model.blocks[1])
    layer = "blocks.1.down" if how == "inner" else "blocks.1"
    if how == "inner":
        plain = student()
        guide = LateToEarly(plain, teacher(), layer=layer, teacher_layer="norm", stop_step=4)
        guide(loss_of(plain, tokens(2)), 2).backward()
        reference = gradients(plain)
    guide = LateToEarly(model, teacher(), layer=layer, teacher_layer="norm", stop_step=4)
    for _ in range(2):  # nothing of the first backward's recomputation is left for the second
        model.zero_grad()
        if attached:
            guide.attach(step=2)
        loss = loss_of(model, tokens(2))
        (loss if attached else guide(loss, 2)).backward()
        torch.testing.assert_close(gradients(model), reference, rtol=1e-9, atol=1e-14)


def test_a_layer_that_returns_a_tuple_is_guided_in_both_forms() -> None:
    class Tupled(Block):
        def forward(self, x: Tensor) -> tuple[Tensor, None]:
            return super().forward(x), None

    class First(nn.Module):
        def __init__(self, block: Block) -> None:
            super().__init__()
            self.block = block

        def forward(self, x: Tensor) -> Tensor:
            return self.block(x)[0]

    for attached in (False, True):
        model = student()
        model.blocks[1].__class__ = Tupled
        model.blocks[1] = First(model.blocks[1])
        guide = LateToEarly(model, teacher(), layer="blocks.1.block", teacher_layer="norm", stop_step=4)
        if attached:
            guide.attach(step=0)
        loss = loss_of(model, tokens())
        (loss if attached else guide(loss, 0)).backward()
        found = {name.replace(".block.", "."): tensor for name, tensor in gradients(model).items()}
        torch.testing.assert_close(found, expected(), rtol=1e-9, atol=1e-14)


def test_a_layer_that_is_replaced_between_two_steps_is_guided_in_its_new_place() -> None:
    model = student()
    guide = LateToEarly(model, teacher(), layer="blocks.1", teacher_layer="norm", stop_step=4)
    guide(loss_of(model, tokens(0)), 0)
    old, new = model.blocks[1], Block(10).double()
    new.load_state_dict(old.state_dict())
    model.blocks[1] = new
    guide(loss_of(model, tokens(1)), 1).backward()
    torch.testing.assert_close(gradients(model), expected(1), rtol=1e-9, atol=1e-14)
    assert not old._forward_hooks
