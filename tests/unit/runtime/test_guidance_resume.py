"""Guidance through a Session under plain python: resuming bit for bit, and what a checkpoint holds of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import holdfast
from holdfast.checkpoint.commit import newest_step, open_checkpoint
from holdfast.errors import MismatchError
from holdfast.runtime.guidance import LateToEarly
from support.guidance_models import loss_of, student, teacher, tokens

STOP, STEPS = 6, 9


def train(
    folder: Path, until: int, *, match: str = "linear", attached: bool = False, seed: int = 2
) -> list[torch.Tensor]:
    """Train from what `folder` holds; gives all weights and optimizer state."""
    model = student(torch.float32, dropout=0.2)
    guide = LateToEarly(
        model, teacher(torch.float32, seed=seed), layer="blocks.1", teacher_layer="norm", weight=0.5, stop_step=STOP,
        match=match,
    )  # fmt: skip
    optimizer = torch.optim.AdamW([*model.parameters(), *guide.parameters()], lr=0.01)
    torch.manual_seed(11)
    session = holdfast.Session(
        model=[model, guide.learned], optimizer=optimizer, extra={"guide": guide}, checkpoint_dir=folder
    )
    with session:
        for step in session.steps(until=until):
            if attached:
                guide.attach(step=step)
            loss = loss_of(model, tokens(step))
            (loss if attached else guide(loss, step)).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert guide.active == (until <= STOP)
    kept = [*model.parameters(), *guide.parameters()]
    return [*kept, *(optimizer.state[p][key] for p in kept for key in sorted(optimizer.state[p]))]


@pytest.mark.parametrize("attached", [False, True], ids=["loss", "attached"])
@pytest.mark.parametrize("match", ["linear", "learned"])
@pytest.mark.parametrize("cut", [3, STOP, STOP + 1])
def test_a_resumed_run_equals_the_undisturbed_one_bit_for_bit(
    tmp_path: Path, cut: int, match: str, attached: bool
) -> None:
    undisturbed = train(tmp_path / "a", STEPS, match=match, attached=attached)
    train(tmp_path / "b", cut, match=match, attached=attached)
    resumed = train(tmp_path / "b", STEPS, match=match, attached=attached)
    assert len(undisturbed) == len(resumed)
    assert all(torch.equal(a, b) for a, b in zip(undisturbed, resumed, strict=True))


def test_resuming_with_another_teacher_is_an_error(tmp_path: Path) -> None:
    train(tmp_path, 3)
    with pytest.raises(MismatchError, match="give the same teacher"):
        train(tmp_path, STEPS, seed=3)


def test_no_weight_of_the_teacher_is_in_a_checkpoint(tmp_path: Path) -> None:
    train(tmp_path, 3, match="learned")
    with open_checkpoint(newest_step(tmp_path).path) as catalog:
        weights = {name.removeprefix("model.") for name in catalog.tensors if name.startswith("model.")}
        assert not any(name.startswith("extra.") for name in catalog.tensors)
    assert weights == {*student().state_dict(), "late_to_early.weight"}
