"""How units are read: in the order of each file, files side by side, and noticed soon."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from threading import Event, Lock

import pytest

from holdfast.checkpoint import handing, meeting, source
from holdfast.checkpoint.handing import Handing, Post
from holdfast.checkpoint.source import FileSource
from holdfast.checkpoint.wants import Unit
from holdfast.errors import CorruptError, PeerError

_LIMIT = timedelta(seconds=120)


def _handing(read: Callable[[Unit], None], taken: list[Unit]) -> Handing:
    def read_into(unit: Unit, memory: memoryview) -> memoryview:
        read(unit)
        return memory[:8]

    return Handing(
        0,
        None,
        read=read_into,
        will_read=lambda unit: None,
        take=lambda unit, data: taken.append(unit),
        check=lambda: None,
        timeout=_LIMIT,
    )


def _units(count: int, image: int = 0) -> list[Unit]:
    return [Unit(image, number, number + 1, 0, (0,)) for number in range(count)]


def test_a_file_is_read_in_order_and_by_one_thread_at_a_time() -> None:
    begun: list[int] = []
    reading = Lock()

    def read(unit: Unit) -> None:
        assert reading.acquire(blocking=False), unit
        begun.append(unit.first)
        time.sleep(0.002)  # others could begin now
        reading.release()

    taken: list[Unit] = []
    _handing(read, taken).run(reversed(_units(19)))
    assert begun == list(range(19))
    assert sorted(taken) == _units(19)


def test_files_are_read_side_by_side() -> None:
    both = [Event(), Event()]

    def read(unit: Unit) -> None:
        both[unit.image].set()
        assert both[1 - unit.image].wait(_LIMIT.total_seconds())

    _handing(read, []).run([*_units(1, image=0), *_units(1, image=1)])


def test_one_that_cannot_be_read_ends_it_and_what_waits_is_not_read() -> None:
    begun: list[int] = []

    def read(unit: Unit) -> None:
        begun.append(unit.first)
        if unit.first == 3:
            raise CorruptError("block 3")

    taken: list[Unit] = []
    with pytest.raises(CorruptError, match="block 3"):
        _handing(read, taken).run(_units(100))
    assert begun == list(range(len(begun)))
    assert 3 < len(begun) <= 3 + handing._AHEAD
    assert set(taken) <= {unit for unit in _units(100) if unit.first != 3}


@pytest.mark.parametrize("count", [3, 40])
def test_the_system_is_told_what_comes_in_order_and_only_so_far_ahead(count: int) -> None:
    told: list[int] = []
    told_before: list[int] = []

    def read(unit: Unit, memory: memoryview) -> memoryview:
        told_before.append(len(told))  # units of one image are never read two at once
        return memory[:8]

    Handing(
        0,
        None,
        read=read,
        will_read=lambda unit: told.append(unit.first),
        take=lambda unit, data: None,
        check=lambda: None,
        timeout=_LIMIT,
    ).run(_units(count))
    assert told == list(range(1, count)), "each once, in order; the first is read at once"
    assert told_before == [min(number + handing._HINTED, count - 1) for number in range(count)]


@pytest.fixture
def posts() -> Iterator[tuple[Post, Post]]:
    found = Post(0, "127.0.0.1", "a"), Post(1, "127.0.0.1", "b")
    for post in found:
        post.know([other.endpoint for other in found])
    yield found
    for post in found:
        post.close()


def test_who_waits_for_others_looks_whether_they_failed_and_asks_only_so_far_ahead(posts: tuple[Post, Post]) -> None:
    looked: list[None] = []

    def check() -> None:
        looked.append(None)
        if len(looked) == 3:
            raise PeerError("rank 1 has failed")

    def read(unit: Unit, memory: memoryview) -> memoryview:
        raise AssertionError

    handed = Handing(
        0,
        posts[0],
        read=read,
        will_read=lambda unit: None,
        take=lambda unit, data: None,
        check=check,
        timeout=_LIMIT,
    )
    with pytest.raises(PeerError, match="rank 1 has failed"):
        handed.run([Unit(0, number, number + 1, 1, (0, 1)) for number in range(40)])
    asked = []
    while (came := posts[1].receive(60_000 if len(asked) < handing._AHEAD else 10)) is not None:
        asked.append((came[0].kind, came[0].first))
    assert asked == [("ask", number) for number in range(handing._AHEAD)]


_MB = 1 << 20


@pytest.mark.parametrize(
    ("read_ahead", "told"),
    [(128 << 10, [(1, 5), (5, 6), (10, 12), (19, 20), (0, 1)]), (4 * _MB, [(19, 20), (0, 1)])],
)
def test_the_system_is_told_what_comes_unless_it_reads_as_far_ahead_anyway(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_ahead: int, told: list[tuple[int, int]]
) -> None:
    ranges: list[tuple[int, int]] = []
    monkeypatch.setattr(source, "_read_ahead_bytes", lambda device: read_ahead)
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, start, length, advice: ranges.append((start, length)))
    (tmp_path / "f").write_bytes(b"x")
    file = FileSource(tmp_path / "f", offset=4096)
    for start, end in ((1, 5), (5, 6), (10, 12), (19, 20), (0, 1)):
        file.will_read(start * _MB, (end - start) * _MB)
    file.close()
    assert all(length <= read_ahead for _, length in ranges)
    told_bytes = [at for start, end in told for at in range(start * _MB, end * _MB, 1024)]
    assert [at - 4096 for start, length in ranges for at in range(start, start + length, 1024)] == told_bytes


def test_how_far_a_system_reads_ahead_is_known_or_zero() -> None:
    assert source._read_ahead_bytes(os.makedev(4095, 77)) == 0
    assert source._read_ahead_bytes(Path(__file__).stat().st_dev) >= 0


@pytest.mark.parametrize(
    ("num_waiting", "of", "shortest", "longest"),
    [(2, 1, 0.0002, 0.1), (16, 16, 0.0004, 0.1), (16, 10_000, 0.002, 0.1), (10_000, 1, 0.002, 2.0)],
)
def test_what_comes_is_noticed_within_a_sixteenth_of_the_time_it_took(
    monkeypatch: pytest.MonkeyPatch, num_waiting: int, of: int, shortest: float, longest: float
) -> None:
    now = 1000.0

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(time, "monotonic", lambda: now)
    monkeypatch.setattr(time, "sleep", sleep)
    looked = [now - 1000 for _ in meeting.polls(timedelta(seconds=60), num_waiting, of=of)]
    assert looked[0] == 0
    assert looked[-1] == pytest.approx(60)
    gaps = [b - a for a, b in pairwise(looked)]
    assert all(gap <= min(max(shortest, at / 16), longest) + 1e-9 for at, gap in zip(looked, gaps, strict=False))
    assert all(gap >= shortest - 1e-9 for gap in gaps[:-1])
    assert len(looked) < (800 if longest < 1 else 200)
