"""Each mistake is one clear line, before training where it can be seen then."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from holdfast.errors import HoldfastError, MismatchError, UsageError
from holdfast.runtime.guidance import LateToEarly
from support.guidance_models import Model, loss_of, student, teacher, tokens


class Attention(nn.Module):
    """A layer whose output is no hidden state."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"weights": x}


class Odd(Model):
    """Has layers that cannot be guided: never run, no hidden state, changed in place."""

    def __init__(self) -> None:
        super().__init__(10, 2)
        self.attention = Attention()
        self.identity = nn.Identity()
        self.unused = nn.Linear(10, 10)
        self.double()

    def forward(self, tokens: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        x = self.identity(self.embed(tokens) * 1)
        x += 1
        self.attention(x)
        return self.head(self.norm(self.blocks[0](x)))


DEFAULTS: dict[str, Any] = {"layer": "blocks.0", "teacher_layer": "norm", "stop_step": 10}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": "block.0"}, r"layer='block.0' is no module of Model; near matches: blocks.0"),
        ({"layer": "blocks.-4"}, r"near matches: blocks"),
        ({"teacher_layer": "nrom"}, r"teacher_layer='nrom' is no module of Model; near matches: norm"),
        ({"layer": None}, "give layer: the name of a layer"),
        ({"teacher_layer": None}, "give teacher_layer"),
        ({"stop_step": 0}, "stop_step=0: .* must be 1 or more"),
        ({"weight": -1}, "weight=-1 must be"),
        ({"schedule": "cosine"}, "schedule='cosine' is unknown"),
        ({"objective": "mse"}, "objective='mse' is unknown: use 'cosine' or 'logits'"),
        ({"match": "cca"}, "match='cca' cannot be used here"),
        ({"side": "left"}, "side='left' is unknown"),
        ({"match": "learned", "layer": "drop"}, r"give widths=\(student, teacher\)"),
        ({"match": "learned", "objective": "logits"}, "match='learned' cannot be used here"),
        ({"mask": "atention_mask"}, "mask='atention_mask' is no argument of the forward of Model"),
        ({"teacher_weights": "/nowhere"}, "there are no weights at '/nowhere'"),
        ({"tokenizer": {"a": 0, "b": 1}, "teacher_tokenizer": {"a": 1, "b": 0}}, "another tokenizer"),
        ({"tokenizer": 3}, "a int is no tokenizer"),
    ],
)
def test_a_mistake_is_one_line_when_the_guide_is_made(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        LateToEarly(student(), teacher(), **{**DEFAULTS, **options})
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 250


def test_teachers_that_cannot_be_are_refused() -> None:
    model = student()
    cases = [
        (teacher().train(), "the teacher is in training mode .* call teacher.eval()"),
        (model.eval(), "shares parameters with the model"),
        (3, "teacher is a int: give a module"),
        (lambda: 3, "returned a int, not a module"),
        ("/nowhere", "is no Hugging Face folder"),
    ]
    for other, message in cases:
        with pytest.raises(UsageError, match=message):
            LateToEarly(model, other, **DEFAULTS)


def test_no_hook_stays_behind_after_a_mistake() -> None:
    model, other = student(), teacher()
    with pytest.raises(UsageError):
        LateToEarly(model, other, **{**DEFAULTS, "match": "cca"})
    assert not model._forward_pre_hooks
    assert not model.blocks[0]._forward_hooks
    other(tokens())


def test_a_teacher_that_goes_into_training_mode_later_is_refused() -> None:
    model, other = student(), teacher()
    LateToEarly(model, other, **DEFAULTS)
    other.train()
    with pytest.raises(UsageError, match="in training mode"):
        model(tokens())


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("attention", "the output of layer 'attention' is dict, not a hidden state"),
        ("unused", "there were 0 since the last call"),
        ("identity", "changes the output of layer 'identity' in place: use guide.attach"),
    ],
)
def test_a_layer_that_cannot_be_guided_is_one_line(layer: str, message: str) -> None:
    model = Odd()
    guide = LateToEarly(model, teacher(), **{**DEFAULTS, "layer": layer})
    with pytest.raises(UsageError, match=message):
        guide(model(tokens()).sum(), 0)


def test_token_numbers_are_no_hidden_state() -> None:
    model = nn.Sequential(OrderedDict(ids=nn.Identity(), rest=student()))
    LateToEarly(model, teacher(), **{**DEFAULTS, "layer": "ids"})
    with pytest.raises(UsageError, match=r"the output of layer 'ids' is int64\[4, 6\], not a hidden state"):
        model(tokens())


def test_a_teacher_layer_that_does_not_run_is_named() -> None:
    other = teacher()
    other.unused = nn.Linear(6, 6)
    model = student()
    LateToEarly(model, other.eval(), **{**DEFAULTS, "teacher_layer": "unused"})
    with pytest.raises(UsageError, match="teacher_layer='unused' did not run"):
        model(tokens())


def test_widths_that_differ_without_a_match_are_named() -> None:
    model = student()
    guide = LateToEarly(model, teacher(), **{**DEFAULTS, "match": None})
    with pytest.raises(UsageError, match="10 wide, the teacher's 6: use match='linear' or match='learned'"):
        guide(loss_of(model, tokens()), 0)


def test_other_vocabularies_cannot_be_distilled() -> None:
    model, other = student(), teacher()
    other.head = nn.Linear(6, 12).double().eval()
    guide = LateToEarly(model, other, objective="logits", stop_step=10)
    with pytest.raises(UsageError, match=r"cannot be compared: .* 11 wide, the teacher's 12"):
        guide(loss_of(model, tokens()), 0)


def test_two_forwards_for_one_call_are_an_error_and_clear_forgets_one() -> None:
    model = student()
    guide = LateToEarly(model, teacher(), **DEFAULTS)
    loss_of(model, tokens())
    loss = loss_of(model, tokens(1))
    with pytest.raises(UsageError, match="there were 2 since the last call"):
        guide(loss, 0)
    loss_of(model, tokens())
    guide.clear()
    guide(loss_of(model, tokens(1)), 0).backward()


def test_the_two_forms_do_not_mix() -> None:
    model = student()
    guide = LateToEarly(model, teacher(), **DEFAULTS)
    guide.attach(step=0)
    with pytest.raises(UsageError, match="leave out guide"):
        guide(loss_of(model, tokens()), 0)


def test_going_back_before_stop_step_is_an_error() -> None:
    model = student()
    guide = LateToEarly(model, teacher(), **DEFAULTS)
    guide(loss_of(model, tokens()), 10)
    with pytest.raises(UsageError, match="guidance has ended; step=3 is before stop_step=10"):
        guide(loss_of(model, tokens()), 3)
    with pytest.raises(UsageError, match="guidance has ended; step=3 is before stop_step=10"):
        guide.attach(step=3)
    guide.attach(step=11)


def test_an_attached_layer_that_does_not_run_is_one_line() -> None:
    model = Odd()
    guide = LateToEarly(model, teacher(), **{**DEFAULTS, "layer": "unused"})
    with torch.no_grad():
        model(tokens())
    guide.attach(step=0)
    with pytest.raises(UsageError, match="layer 'unused' did not run in this forward, so nothing is guided"):
        model(tokens())
    with torch.no_grad():
        model(tokens())


def test_a_backward_that_leaves_out_a_learned_projection_is_one_line() -> None:
    """As zero-bubble schedules do: first the gradient of a stage's input, then those of its own weights."""
    part = student().blocks
    model = nn.Sequential(part[0], part[1])
    state = torch.randn(4, 5, 10, dtype=torch.float64, requires_grad=True)
    for match in ("learned", "linear"):
        guide = LateToEarly(
            model, teacher(), layer="0", teacher_layer="norm", stop_step=9, match=match, widths=(10, 6),
            teacher_inputs=lambda args, kwargs: ((tokens()[:, :5],), {}),
        )  # fmt: skip
        guide.attach(step=0)
        model(state).sum().backward()
        torch.autograd.grad(model(state).sum(), [state])
        if match == "linear":
            model(state)
            return
        with pytest.raises(UsageError, match="gave the learned parameters of `match` no gradient"):
            model(state)
        guide.close()


def test_a_named_mask_has_one_entry_per_token() -> None:
    class Weighed(Model):
        def forward(self, tokens: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            return super().forward(tokens)

    model, other = student(), teacher()
    model.__class__ = other.__class__ = Weighed
    guide = LateToEarly(model, other, **{**DEFAULTS, "mask": "weights"})
    loss = model(tokens(), torch.ones(4, 1)).sum()
    with pytest.raises(UsageError, match=r"the mask is \[4, 1\], the tokens are \[4, 6\]"):
        guide(loss, 0)


def test_a_reentrant_checkpoint_is_named() -> None:
    class Reentrant(Model):
        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            x = self.embed(tokens)
            return self.head(self.norm(checkpoint(self.blocks[0], x, use_reentrant=True)))

    model = Reentrant(10, 1).double()
    LateToEarly(model, teacher(), **DEFAULTS)
    with pytest.raises(UsageError, match="give use_reentrant=False"):
        model(tokens())


def test_another_teacher_at_a_resume_is_an_error_and_another_setting_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    first = LateToEarly(student(), teacher(), **DEFAULTS)
    same = LateToEarly(student(), copy.deepcopy(teacher()), **{**DEFAULTS, "weight": 0.2})
    other = LateToEarly(student(), teacher(seed=3), **DEFAULTS)
    same.load_state_dict(first.state_dict())
    assert "guidance goes on with weight=0.2, it was 0.1" in caplog.text
    with pytest.raises(MismatchError, match="give the same teacher") as caught:
        other.load_state_dict(first.state_dict())
    assert isinstance(caught.value, HoldfastError)


def test_a_step_is_a_whole_number() -> None:
    model = student()
    guide = LateToEarly(model, teacher(), **DEFAULTS)
    with pytest.raises(TypeError):
        guide(loss_of(model, tokens()), 0.5)
