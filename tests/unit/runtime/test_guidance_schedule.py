"""lambda as a function of the step."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.errors import UsageError
from holdfast.runtime.guidance_schedule import Schedule


def test_lambda_falls_linearly_to_zero_at_stop_step() -> None:
    schedule = Schedule(weight=0.1, stop_step=8)
    assert schedule.at(0) == 0.1
    assert schedule.at(4) == 0.05
    assert schedule.at(7) == pytest.approx(0.1 / 8)
    assert schedule.at(7) > 0
    assert schedule.at(8) == 0.0
    assert schedule.at(9) == 0.0


@given(stop=st.integers(1, 10**9), step=st.integers(0, 2 * 10**9), weight=st.floats(0, 100))
def test_lambda_is_never_negative_and_ends_exactly_at_stop_step(stop: int, step: int, weight: float) -> None:
    schedule = Schedule(weight=weight, stop_step=stop)
    assert 0 <= schedule.at(step) <= weight
    assert schedule.over(step) == (weight == 0 or step >= stop)
    if schedule.over(step):
        assert schedule.at(step) == 0


def test_a_constant_and_a_given_schedule_end_at_stop_step_too() -> None:
    constant = Schedule(weight=0.5, stop_step=3, kind="constant")
    assert [constant.at(step) for step in range(4)] == [0.5, 0.5, 0.5, 0.0]
    given_one = Schedule(weight=0.5, stop_step=3, kind=lambda step: step / 2)
    assert [given_one.at(step) for step in range(4)] == [0.0, 0.25, 0.5, 0.0]


@pytest.mark.parametrize("stop_step", [0, -1, 1.5, True])
def test_a_stop_step_that_cannot_be_is_refused(stop_step: object) -> None:
    with pytest.raises(UsageError, match="must be 1 or more"):
        Schedule(weight=0.1, stop_step=stop_step)


@pytest.mark.parametrize("weight", [-0.1, float("nan"), float("inf")])
def test_a_weight_that_cannot_be_is_refused(weight: float) -> None:
    with pytest.raises(UsageError, match="must be 0 or a positive number"):
        Schedule(weight=weight, stop_step=3)


def test_an_unknown_schedule_and_a_negative_step_are_refused() -> None:
    with pytest.raises(UsageError, match="'cosine' is unknown"):
        Schedule(weight=0.1, stop_step=3, kind="cosine")
    with pytest.raises(UsageError, match="counted from 0"):
        Schedule(weight=0.1, stop_step=3).at(-1)
