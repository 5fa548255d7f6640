"""What is not worth beginning within a grace period."""

from __future__ import annotations

import pytest

from holdfast.checkpoint.version import GenerationId
from holdfast.snapshot.ending import too_slow
from holdfast.snapshot.messages import PersistEnded

VERSION = GenerationId(incarnation=1, nonce="7f3a9c02", generation=1).at(5)


def ended(seconds: float, *, path: str | None = "/c/step-5") -> PersistEnded:
    return PersistEnded(version=VERSION, path=path, error=None if path else "full", seconds=seconds)


@pytest.mark.parametrize(
    ("before", "grace_s", "expected"),
    [
        ([], 30, None),
        ([ended(20)], 30, None),
        ([ended(40)], 30, 40),
        ([ended(40), ended(20)], 30, None),
        ([ended(40), ended(1, path=None)], 30, 40),
        ([ended(40)], 0, None),
    ],
    ids=["unknown", "fits", "too slow", "newest counts", "failures do not count", "no limit"],
)
def test_a_persist_that_takes_longer_than_the_grace_is_left_out(
    before: list[PersistEnded], grace_s: float, expected: float | None
) -> None:
    assert too_slow(before, grace_s) == expected
