"""Widths that become equal, and the mean over tokens that count, against plain Python."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.errors import UsageError
from holdfast.runtime.guidance_matching import (
    LearnedMatch,
    LinearMatch,
    divergence,
    interpolation_matrix,
    mean_value,
    negative_cosine,
    same_width,
)
from support.guidance_models import reference_cosine, resized


def pair(ours: int = 10, theirs: int = 6, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return (
        torch.randn(2, 3, ours, generator=generator, dtype=dtype),
        torch.randn(2, 3, theirs, generator=generator, dtype=dtype),
    )


def value(student: torch.Tensor, teacher: torch.Tensor, **options: object) -> torch.Tensor:
    return mean_value(
        student, teacher, **{"match": LinearMatch("teacher"), "value": negative_cosine, "mask": None,
                             "num_tokens": None, **options}
    )  # fmt: skip


@settings(deadline=None, max_examples=50)
@given(width=st.integers(1, 20), new_width=st.integers(1, 20), seed=st.integers(0, 1000))
def test_both_sides_interpolate_at_half_pixel_centres(width: int, new_width: int, seed: int) -> None:
    row = torch.randn(width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    other = torch.zeros(new_width, dtype=torch.float64)
    expected = torch.tensor(resized(row.tolist(), new_width), dtype=torch.float64)
    torch.testing.assert_close(LinearMatch("teacher")(other[None], row[None])[1][0], expected)
    torch.testing.assert_close(LinearMatch("student")(row[None], other[None])[0][0], expected)


def test_the_interpolation_matrix_keeps_constants() -> None:
    matrix = interpolation_matrix(6, 10, like=torch.zeros(1, dtype=torch.float64))
    torch.testing.assert_close(matrix.sum(0), torch.ones(10, dtype=torch.float64))


@pytest.mark.parametrize("side", ["teacher", "student"])
@pytest.mark.parametrize("widths", [(10, 6), (6, 10), (7, 7)])
def test_the_mean_equals_a_reference_in_python(side: str, widths: tuple[int, int]) -> None:
    ours, theirs = pair(*widths)
    found = value(ours, theirs, match=LinearMatch(side))
    assert found.item() == pytest.approx(-reference_cosine(ours, theirs, side=side), rel=1e-12)


def test_masked_tokens_do_not_count_whatever_stands_there() -> None:
    ours, theirs = pair()
    mask = torch.tensor([[1, 0, 1], [0, 1, 1]])
    expected = -reference_cosine(ours, theirs, mask)
    ours[0, 1] = float("nan")
    theirs[1, 0] = float("inf")
    ours.requires_grad_()
    found = value(ours, theirs, mask=mask)
    found.backward()
    assert found.item() == pytest.approx(expected, rel=1e-12)
    assert ours.grad.isfinite().all()
    assert (ours.grad[mask == 0] == 0).all()
    assert (ours.grad[mask == 1] != 0).any(-1).all()


def test_no_token_that_counts_gives_zero() -> None:
    assert value(*pair(), mask=torch.zeros(2, 3, dtype=torch.bool)).item() == 0


def test_a_given_number_of_tokens_divides_the_sum() -> None:
    ours, theirs = pair()
    mask = torch.tensor([[1, 0, 1], [0, 1, 1]])
    whole = value(ours, theirs, mask=mask)
    torch.testing.assert_close(value(ours, theirs, mask=mask, num_tokens=8), whole / 2)
    torch.testing.assert_close(value(ours, theirs, num_tokens=12), value(ours, theirs) / 2)


@pytest.mark.parametrize("side", ["teacher", "student"])
def test_low_precision_states_are_compared_in_float32(side: str) -> None:
    ours, theirs = pair(dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = value(ours, theirs, match=LinearMatch(side))
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(-reference_cosine(ours.double(), theirs.double(), side=side), rel=1e-5)


def test_the_divergence_is_that_of_the_definition() -> None:
    ours, theirs = pair(5, 5)
    found = value(ours, theirs, match=same_width, value=divergence(2.0))
    expected = 0.0
    for a, b in zip(ours.flatten(0, 1).tolist(), theirs.flatten(0, 1).tolist(), strict=True):
        p = [math.exp(x / 2) / sum(math.exp(y / 2) for y in b) for x in b]
        q = [math.exp(x / 2) / sum(math.exp(y / 2) for y in a) for x in a]
        expected += 4 * sum(x * math.log(x / y) for x, y in zip(p, q, strict=True)) / 6
    assert found.item() == pytest.approx(expected, rel=1e-10)


def test_a_learned_projection_starts_the_same_everywhere_and_draws_no_global_number() -> None:
    before = torch.get_rng_state()
    first, second = LearnedMatch(10, 6, "student"), LearnedMatch(10, 6, "student")
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.weight, second.weight)
    assert [tuple(x.shape) for x in first(*pair())] == [(2, 3, 6), (2, 3, 6)]
    assert [tuple(x.shape) for x in LearnedMatch(10, 6, "teacher")(*pair())] == [(2, 3, 10), (2, 3, 10)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"match": same_width}, "10 wide, the teacher's 6"),
        ({"mask": torch.ones(3, 2)}, r"the mask is \[3, 2\], the tokens are \[2, 3\]"),
        ({"match": LearnedMatch(8, 6, "student")}, r"give widths=\(10, 6\)"),
    ],
)
def test_what_cannot_be_compared_is_one_clear_line(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        value(*pair(), **options)
    assert "\n" not in str(caught.value)


def test_other_tokens_are_refused() -> None:
    ours, theirs = pair()
    with pytest.raises(UsageError, match="both must see the same tokens"):
        value(ours, theirs[:, :2])


@pytest.mark.parametrize("temperature", [0, -1, float("nan")])
def test_a_temperature_that_cannot_be_is_refused(temperature: float) -> None:
    with pytest.raises(UsageError, match="must be positive"):
        divergence(temperature)
