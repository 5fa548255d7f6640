"""Comparing two states of unequal width: matching widths, the value per token, the mean over tokens that count.

All of it is computed in float32 (float64 where a state is), whatever dtype the model runs in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.errors import UsageError

Side = Literal["teacher", "student"]
Pair = tuple[Tensor, Tensor]
Match = Callable[[Tensor, Tensor], Pair]
"""Takes the student's and the teacher's states ``[..., width]`` and gives both at one width."""

_SEED = 0x4C4554
"""Of learned projections: every rank and every run begins with the same one, and no global generator is touched."""


def interpolation_matrix(width: int, new_width: int, *, like: Tensor) -> Tensor:
    """The linear map ``[width, new_width]`` that `LinearMatch` applies."""
    eye = torch.eye(width, dtype=like.dtype, device=like.device)
    return F.interpolate(eye[None], size=new_width, mode="linear", align_corners=False)[0]


class LinearMatch:
    """1-D linear interpolation over the hidden dimension, without parameters (LET's own form).

    Sample positions are half-pixel centres, ``align_corners=False``: element i of the new width reads position
    ``(i + 0.5) * width / new_width - 0.5``, clamped to the ends. The paper does not say which it uses.

    Args:
        side: whose states are resized to the other's width.
    """

    def __init__(self, side: Side) -> None:
        self.side = side

    def __call__(self, student: Tensor, teacher: Tensor) -> Pair:
        if student.shape[-1] == teacher.shape[-1]:
            return student, teacher
        if self.side == "teacher":
            rows = teacher.reshape(1, -1, teacher.shape[-1])
            resized = F.interpolate(rows, size=student.shape[-1], mode="linear", align_corners=False)
            return student, resized.view(*teacher.shape[:-1], student.shape[-1])
        # A product with the map's matrix: the backward of interpolate adds atomically on CUDA and is not repeatable.
        return student @ interpolation_matrix(student.shape[-1], teacher.shape[-1], like=student), teacher


class LearnedMatch(nn.Module):
    """A linear projection, trained with the model.

    Args:
        student_width: of the student's states.
        teacher_width: of the teacher's states.
        side: whose states are projected. "student" (as in REPA) keeps the target fixed.
    """

    def __init__(self, student_width: int, teacher_width: int, side: Side) -> None:
        super().__init__()
        self.side = side
        self.widths = (student_width, teacher_width)
        wide = (student_width, teacher_width) if side == "student" else (teacher_width, student_width)
        generator = torch.Generator().manual_seed(_SEED)
        weight = torch.randn((wide[1], wide[0]), generator=generator) / wide[0] ** 0.5
        self.weight = nn.Parameter(weight)

    def forward(self, student: Tensor, teacher: Tensor) -> Pair:
        """Project one of the two states ``[..., width]``."""
        found = (student.shape[-1], teacher.shape[-1])
        if found != self.widths:
            raise UsageError(
                f"the projection was made for widths {self.widths} (student, teacher), the layers give {found}: "
                f"give widths={found}"
            )
        weight = self.weight.to(student.dtype)
        if self.side == "student":
            return F.linear(student, weight), teacher
        return student, F.linear(teacher, weight)


def same_width(student: Tensor, teacher: Tensor) -> Pair:
    """The match for equal widths; `value_per_token` refuses others."""
    return student, teacher


def negative_cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """Minus the cosine per token: LET's L_proj before the mean."""
    return -F.cosine_similarity(student, teacher, dim=-1, eps=1e-8)


def divergence(temperature: float) -> Callable[[Tensor, Tensor], Tensor]:
    """KL(teacher || student) per token between softened distributions, times T^2 (SALT, RKD, Hinton et al. 2015).

    Args:
        temperature: T; both logits are divided by it.
    """
    if not temperature > 0:
        raise UsageError(f"temperature={temperature!r} must be positive")

    def per_token(student: Tensor, teacher: Tensor) -> Tensor:
        ours = F.log_softmax(student / temperature, dim=-1)
        theirs = F.log_softmax(teacher / temperature, dim=-1)
        return F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1) * temperature**2

    return per_token


def mean_value(
    student: Tensor,
    teacher: Tensor,
    *,
    match: Match,
    value: Callable[[Tensor, Tensor], Tensor],
    mask: Tensor | None,
    num_tokens: float | Tensor | None,
) -> Tensor:
    """The mean over tokens of `value`, a scalar with a gradient to `student` and to the match's parameters.

    Args:
        student: ``[..., width]``.
        teacher: ``[..., other width]``, the same tokens.
        match: brings both to one width.
        value: per token.
        mask: ``[...]``; tokens where it is zero or False do not count, whatever stands there (NaN too).
        num_tokens: what the sum is divided by; None: the tokens that count here.

    Raises:
        UsageError: the two do not have the same tokens, the mask has another shape, or widths differ after matching.
    """
    tokens = student.shape[:-1]
    if teacher.shape[:-1] != tokens:
        raise UsageError(
            f"the student's states are {list(student.shape)}, the teacher's {list(teacher.shape)}: "
            "both must see the same tokens"
        )
    if mask is not None:
        if mask.shape != tokens:
            raise UsageError(f"the mask is {list(mask.shape)}, the tokens are {list(tokens)}: one entry per token")
        mask = mask.to(student.device) != 0
        student, teacher = (x.masked_fill(~mask[..., None], 0) for x in (student, teacher))
    wide = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    with torch.autocast(student.device.type, enabled=False):
        ours, theirs = match(student.to(wide), teacher.to(wide))
        if ours.shape != theirs.shape:
            raise UsageError(
                f"the widths cannot be compared: the student's states are {ours.shape[-1]} wide, the teacher's "
                f"{theirs.shape[-1]}: use match='linear' or match='learned'"
            )
        values = value(ours, theirs)
        if mask is None:
            return values.sum() / (values.numel() if num_tokens is None else num_tokens)
        counted = mask.sum().clamp(min=1) if num_tokens is None else num_tokens
        return (values * mask).sum() / counted
