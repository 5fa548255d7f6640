"""Which checkpoint a Session begins from, and how its ranks agree on it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from holdfast.checkpoint.commit import StepInfo
from holdfast.checkpoint.saving import Ranks
from holdfast.errors import PeerError, PeerTimeout, UsageError
from holdfast.runtime.huddle import Huddle
from holdfast.runtime.restoring import candidates, resume_path

HERE = Path("checkpoints")


def info(step: int, *, complete: bool = True, tag: str | None = None) -> StepInfo:
    return StepInfo(step=step, path=HERE / f"step-{step:08d}", complete=complete, tag=tag)


STEPS = [info(100), info(300, complete=False), info(200, tag="best"), info(250)]


def test_auto_takes_complete_ones_newest_first() -> None:
    assert [found.step for found in candidates(STEPS, "auto", HERE)] == [250, 200, 100]


@pytest.mark.parametrize(("resume", "expected"), [("never", []), ("step:100", [100]), ("path:best", [200])])
def test_others_take_one_or_none(resume: str, expected: list[int]) -> None:
    assert [found.step for found in candidates(STEPS, resume, HERE)] == expected


@pytest.mark.parametrize("step", [300, 7])
def test_step_that_is_not_complete_is_refused_with_those_that_are(step: int) -> None:
    with pytest.raises(UsageError, match="steps: 250, 200, 100"):
        candidates(STEPS, f"step:{step}", HERE)


def test_tag_goes_before_path_and_neither_is_an_error(tmp_path: Path) -> None:
    assert resume_path("path:best", STEPS, HERE) is None
    assert resume_path("step:100", STEPS, HERE) is None
    (tmp_path / "root").write_bytes(b"")
    assert resume_path(f"path:{tmp_path}", STEPS, HERE) == tmp_path
    with pytest.raises(UsageError, match="tags: best"):
        resume_path("path:worst", STEPS, HERE)


def in_threads(*bodies: Callable[[], object]) -> list[object]:
    """What each body returns or raises."""
    results: list[object] = [None] * len(bodies)

    def run(index: int) -> None:
        try:
            results[index] = bodies[index]()
        except Exception as error:  # noqa: BLE001  # the test looks at it
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(bodies))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return results


def huddles(count: int, *, timeout: timedelta = timedelta(seconds=120)) -> list[Huddle]:
    store = dist.HashStore()
    return [Huddle(Ranks(rank, count, store), "test", timeout=timeout) for rank in range(count)]


def test_ranks_hear_the_first_and_each_other() -> None:
    def body(huddle: Huddle, name: str) -> object:
        return huddle.from_first(lambda: f"chosen by {name}"), huddle.gather(name), huddle.from_first(lambda: name)

    found = in_threads(*(lambda h=h, n=n: body(h, n) for h, n in zip(huddles(3), "abc", strict=True)))
    assert found == [("chosen by a", ["a", "b", "c"], "a")] * 3


def test_failure_of_the_first_reaches_all() -> None:
    def fail() -> str:
        raise UsageError("no such step")

    first, second = huddles(2)
    found = in_threads(lambda: first.from_first(fail), lambda: second.from_first(str))
    assert isinstance(found[0], UsageError)
    assert isinstance(found[1], PeerError)
    assert "no such step" in str(found[1])


def test_missing_rank_is_named() -> None:
    first, _ = huddles(2, timeout=timedelta(milliseconds=20))
    with pytest.raises(PeerTimeout, match="rank 1 of the Session"):
        first.gather("here")


def test_lone_rank_needs_no_store() -> None:
    alone = Huddle(Ranks.alone(), "test")
    assert alone.from_first(lambda: "x") == "x"
    assert alone.gather("y") == ["y"]
