"""What guidance adds, against references that involve no hook; and where it must add nothing at all."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from holdfast.runtime.guidance import LateToEarly
from support.guidance_models import (
    Model,
    gradients,
    loss_of,
    reference_cosine,
    states,
    student,
    teacher,
    tokens,
)


def guided(
    model: nn.Module, other: nn.Module | Callable[[], nn.Module] | None = None, **options: object
) -> LateToEarly:
    return LateToEarly(
        model,
        teacher() if other is None else other,
        **{"layer": "blocks.0", "teacher_layer": "norm", "weight": 0.3, "stop_step": 10, **options},
    )


def by_hand(
    step: int, *, weight: float = 0.3, stop: int = 10, mask: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients with the term written out: states by calling the parts, widths by a matrix made in Python."""
    model, other, chunk = student(), teacher(), tokens(step)
    ours = states(model, chunk, 1)
    with torch.no_grad():
        theirs = states(other, chunk, 2, norm=True)
    matrix = torch.zeros(6, 10, dtype=torch.float64)
    for i in range(10):
        position = min(max((i + 0.5) * 0.6 - 0.5, 0.0), 5.0)
        low = min(int(position), 4)
        matrix[low, i] += 1 - (position - low)
        matrix[low + 1, i] += position - low
    theirs = theirs @ matrix
    cosine = (ours * theirs).sum(-1) / ours.square().sum(-1).sqrt() / theirs.square().sum(-1).sqrt()
    kept = torch.ones_like(cosine) if mask is None else mask.double()
    term = -(cosine * kept).sum() / kept.sum()
    loss = loss_of(model, chunk) + weight * max(0.0, (stop - step) / stop) * term
    loss.backward()
    return loss.detach(), gradients(model)


@pytest.mark.parametrize("step", [0, 4, 9])
def test_loss_and_gradient_equal_a_reference_in_float64(step: int) -> None:
    model = student()
    guide = guided(model)
    loss = guide(loss_of(model, tokens(step)), step)
    loss.backward()
    expected, expected_gradients = by_hand(step)
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradients(model), expected_gradients, rtol=1e-10, atol=1e-14)
    cosine = reference_cosine(states(student(), tokens(step), 1), states(teacher(), tokens(step), 2, norm=True))
    assert guide.metrics()["cosine"] == pytest.approx(cosine, rel=1e-12)
    assert guide.metrics()["lambda"] == pytest.approx(0.3 * (10 - step) / 10, rel=1e-15)


def test_a_mask_of_the_forward_leaves_tokens_out() -> None:
    mask = torch.tensor([[1, 1, 1, 0, 0]] * 3 + [[1, 1, 1, 1, 1]])
    expected, expected_gradients = by_hand(2, mask=mask)
    for way in ("argument", "place", "function", "call"):
        model = student()
        guide = guided(model, mask=(lambda args, kwargs: mask) if way == "function" else "attention_mask")
        if way == "place":
            logits = model(tokens(2)[:, :-1], mask)
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens(2)[:, 1:].flatten())
        else:
            loss = loss_of(model, tokens(2), **({"attention_mask": mask} if way == "argument" else {}))
        loss = guide(loss, 2, mask=mask if way == "call" else None)
        loss.backward()
        torch.testing.assert_close(loss.detach(), expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(gradients(model), expected_gradients, rtol=1e-10, atol=1e-14)


def test_a_mask_of_another_form_says_who_sees_whom_and_leaves_no_token_out() -> None:
    model = student()
    guide = guided(model)
    guide(loss_of(model, tokens(2), attention_mask=torch.zeros(4, 1, 5, 5)), 2).backward()
    torch.testing.assert_close(gradients(model), by_hand(2)[1], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(("dtype", "relative"), [(torch.float64, 1e-12), (torch.float32, 1e-4), (torch.bfloat16, 0.05)])
def test_the_attached_form_injects_the_same_gradient(dtype: torch.dtype, relative: float) -> None:
    """Only the order in which a state's gradients are added up may differ."""
    found = []
    for attached in (False, True):
        model = student(dtype)
        guide = guided(model, teacher(dtype))
        if attached:
            guide.attach(step=3)
        loss = loss_of(model, tokens(3))
        (loss if attached else guide(loss, 3)).backward()
        found.append((gradients(model), guide.metrics()["cosine"], guide.metrics()["lambda"]))
    assert found[0][1:] == found[1][1:]
    torch.testing.assert_close(found[0][0], found[1][0], rtol=relative, atol=relative * 1e-2)


def test_scale_covers_accumulation_and_a_gradient_scaler() -> None:
    """Four micro-batches, a loss scale of 1024: the sum over equals one batch of all rows."""
    whole = student()
    guide = guided(whole)
    guide(loss_of(whole, tokens(5)), 5).backward()
    for attached in (False, True):
        model = student()
        guide = guided(model)
        if attached:
            guide.attach(step=lambda: 5, scale=lambda: torch.tensor(1024.0, dtype=torch.float64) / 4)
        for row in tokens(5):
            loss = loss_of(model, row[None])
            ((loss if attached else guide(loss, 5)) / 4 * 1024).backward()
        found = {name: gradient / 1024 for name, gradient in gradients(model).items()}
        torch.testing.assert_close(found, gradients(whole), rtol=1e-9, atol=1e-14)


def train(
    steps: int, guide_of: Callable[[Model], LateToEarly | None], *, dropout: float = 0.1, attached: bool = False
) -> tuple[Model, LateToEarly | None]:
    model = student(torch.float32, dropout=dropout)
    guide = guide_of(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    torch.manual_seed(7)
    for step in range(steps):
        if guide is not None and attached:
            guide.attach(step=step)
        loss = loss_of(model, tokens(step))
        if guide is not None and not attached:
            loss = guide(loss, step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, guide


def same_bits(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("attached", [False, True])
def test_weight_zero_is_no_guidance_bit_for_bit(attached: bool) -> None:
    plain, _ = train(4, lambda model: None)
    zero, guide = train(4, lambda model: guided(model, teacher(torch.float32), weight=0), attached=attached)
    assert same_bits(plain, zero)
    assert not guide.active
    changed, _ = train(4, lambda model: guided(model, teacher(torch.float32)), attached=attached)
    assert not same_bits(plain, changed)


@pytest.mark.parametrize("attached", [False, True])
def test_after_stop_step_the_step_function_is_the_plain_one_bit_for_bit(attached: bool) -> None:
    """From one state at `stop_step`, guided and plain training go the same way."""
    model, guide = train(3, lambda model: guided(model, teacher(torch.float32), stop_step=3), attached=attached)
    plain = copy.deepcopy(model) if not guide.active else None
    if plain is None:
        plain = student(torch.float32, dropout=0.1)
        plain.load_state_dict(model.state_dict())
    for which in (model, plain):
        optimizer = torch.optim.AdamW(which.parameters(), lr=0.01)
        torch.manual_seed(8)
        for step in range(3, 6):
            if which is model and attached:
                guide.attach(step=step)
            loss = loss_of(which, tokens(step))
            if which is model and not attached:
                assert guide(loss, step) is loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert same_bits(model, plain)
    assert not guide.active


def test_at_stop_step_the_teacher_is_freed_and_no_hook_stays() -> None:
    model = student()
    made: list[weakref.ref[nn.Module]] = []

    def make() -> nn.Module:
        module = teacher().train()
        made.append(weakref.ref(module))
        return module

    guide = guided(model, make, stop_step=2)
    identity = guide.state_dict()
    for step in range(3):
        assert made[0]() is not None
        loss = loss_of(model, tokens(step))
        assert (guide(loss, step) is loss) == (step == 2)
    assert made[0]() is None
    assert all(not part._forward_hooks and not part._forward_pre_hooks for part in model.modules())
    assert guide.metrics()["lambda"] == 0.0
    assert guide.state_dict() == identity


def test_guidance_draws_no_random_number_and_leaves_the_teacher_alone() -> None:
    model, other = student(dropout=0.2), teacher()
    before = copy.deepcopy(other.state_dict())
    random = torch.get_rng_state()
    guide = guided(model, other, match="learned")
    assert torch.equal(torch.get_rng_state(), random)
    torch.manual_seed(3)
    plain = loss_of(student(dropout=0.2), tokens())
    after_plain = torch.get_rng_state()
    torch.manual_seed(1)
    student(dropout=0.2)
    loss = loss_of(model, tokens())
    guide(loss, 0).backward()
    assert torch.equal(torch.get_rng_state(), after_plain)
    assert torch.equal(loss, plain)
    assert all(torch.equal(before[name], tensor) for name, tensor in other.state_dict().items())
    assert all(parameter.grad is None for parameter in other.parameters())


def test_forwards_without_gradients_pass_unseen() -> None:
    model = student()
    guide = guided(model)
    with torch.no_grad():
        loss_of(model, tokens(1))
    loss = loss_of(model, tokens())
    with torch.no_grad():
        loss_of(model, tokens(2))
    guide(loss, 0).backward()
    torch.testing.assert_close(gradients(model), by_hand(0)[1], rtol=1e-10, atol=1e-14)


def test_a_forward_that_failed_leaves_nothing_for_the_next_one() -> None:
    model = student()
    guide = guided(model)

    def fail(*_: object) -> None:
        raise MemoryError

    failing = model.blocks[0].register_forward_pre_hook(fail)
    with pytest.raises(MemoryError):
        loss_of(model, tokens(1))
    failing.remove()
    with torch.no_grad():
        loss_of(model, tokens(2))
    guide(loss_of(model, tokens()), 0).backward()
    torch.testing.assert_close(gradients(model), by_hand(0)[1], rtol=1e-10, atol=1e-14)


def test_the_teacher_stops_behind_its_layer() -> None:
    model, other = student(), teacher()
    ran: list[str] = []
    other.head.register_forward_hook(lambda *_: ran.append("head"))
    other.blocks[1].register_forward_hook(lambda *_: ran.append("block"))
    guided(model, other, teacher_layer="blocks.-1")
    loss_of(model, tokens())
    assert ran == ["block"]
    assert other(tokens()).shape[-1] == 11  # whoever else uses it gets all of it


@pytest.mark.parametrize(
    ("layer", "teacher_layer"), [("blocks.-1", "norm"), ("norm", "norm"), ("blocks.1", "blocks.0")]
)
def test_other_pairs_of_layers_can_be_compared(layer: str, teacher_layer: str) -> None:
    model, other = student(), teacher()
    guide = guided(model, other, layer=layer, teacher_layer=teacher_layer)
    guide(loss_of(model, tokens()), 0)
    ours = {"blocks.-1": states(model, tokens(), 3), "blocks.1": states(model, tokens(), 2)}
    ours["norm"] = model.norm(ours["blocks.-1"])
    theirs = {"norm": states(other, tokens(), 2, norm=True), "blocks.0": states(other, tokens(), 1)}
    expected = reference_cosine(ours[layer], theirs[teacher_layer])
    assert guide.metrics()["cosine"] == pytest.approx(expected, rel=1e-12)


def test_logits_can_be_distilled_with_the_same_schedule() -> None:
    model, other, chunk = student(), teacher(), tokens()
    guide = LateToEarly(model, other, objective="logits", weight=0.5, stop_step=4, schedule="constant")
    guide(loss_of(model, chunk), 3).backward()
    reference = student()
    with torch.no_grad():
        target = other(chunk[:, :-1]).softmax(-1)
    logits = reference(chunk[:, :-1])
    ratio = target.log() - (logits - logits.logsumexp(-1, keepdim=True))
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), chunk[:, 1:].flatten())
    (loss + 0.5 * (target * ratio).sum(-1).mean()).backward()
    torch.testing.assert_close(gradients(model), gradients(reference), rtol=1e-9, atol=1e-14)
    assert guide.metrics()["divergence"] == pytest.approx((target * ratio).sum(-1).mean().item(), rel=1e-9)


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_learned_projection_gets_its_gradient_in_both_forms(side: str) -> None:
    found = []
    for attached in (False, True):
        model = student()
        guide = guided(model, match="learned", side=side)
        if attached:
            guide.attach(step=1, scale=0.5)
        loss = loss_of(model, tokens(1))
        ((loss if attached else guide(loss, 1)) * 0.5).backward()
        (weight,) = guide.parameters()
        assert weight.grad.abs().sum() > 0
        found.append(gradients(model) | {"projection": weight.grad})
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-14)


def test_a_module_may_match_widths() -> None:
    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(6, dtype=torch.float64))

        def forward(self, ours: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
            return ours[..., :6] * self.scale, theirs

    model, other, cut = student(), teacher(), Cut()
    guide = guided(model, other, match=cut)
    guide(loss_of(model, tokens()), 0).backward()
    expected = reference_cosine(states(model, tokens(), 1)[..., :6], states(other, tokens(), 2, norm=True))
    assert guide.metrics()["cosine"] == pytest.approx(expected, rel=1e-12)
    assert list(guide.parameters()) == [cut.scale]
    assert cut.scale.grad is not None


def test_the_teacher_keeps_its_own_dtype_under_autocast() -> None:
    model, other = student(torch.float32), teacher(torch.float32)
    seen: list[torch.dtype] = []
    for module in (model.blocks[0].up, other.blocks[0].up):
        module.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    guide = guided(model, other)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = guide(loss_of(model, tokens()), 0)
    loss.backward()
    assert seen == [torch.float32, torch.bfloat16]  # the teacher runs first
    exact = reference_cosine(states(student(), tokens(), 1), states(teacher(), tokens(), 2, norm=True))
    assert guide.metrics()["cosine"] == pytest.approx(exact, abs=0.01)


def test_a_teacher_dtype_casts_it_and_keeps_its_identity() -> None:
    model = student(torch.float32)
    plain, cast = guided(model, teacher()), guided(student(), teacher(), teacher_dtype=torch.bfloat16)
    assert plain.state_dict()["teacher"] == cast.state_dict()["teacher"]
    assert next(cast._teacher.module.parameters()).dtype == torch.bfloat16


def test_the_share_of_the_teacher_is_a_part_of_the_step() -> None:
    model = student()
    guide = guided(model)
    assert guide.metrics()["teacher_share"] == 0.0
    for step in range(3):
        guide(loss_of(model, tokens(step)), step).backward()
    assert 0 < guide.metrics()["teacher_share"] < 1
