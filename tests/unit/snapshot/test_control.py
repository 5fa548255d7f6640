"""The control page: one writer per word, generations fenced by the words themselves."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from holdfast.checkpoint.version import GenerationId
from holdfast.errors import CorruptError
from holdfast.snapshot.control import MAX_SLOTS, ControlPage, Phase, generation_word
from holdfast.snapshot.reports import Agreed

ONE = GenerationId(incarnation=1, nonce="7f3a9c02", generation=4)
TWO = GenerationId(incarnation=1, nonce="7f3a9c02", generation=5)


@pytest.fixture
def page(tmp_path: Path) -> Iterator[ControlPage]:
    with ControlPage.create(tmp_path / "control") as made:
        made.start_generation(ONE)
        yield made


def test_the_page_is_private_to_its_user(page: ControlPage) -> None:
    assert stat.S_IMODE(os.stat(page.path).st_mode) == 0o600


def test_a_grant_is_seen_through_another_mapping_of_the_page(page: ControlPage) -> None:
    with ControlPage.open(page.path) as other:
        page.publish_grant(0, 7)
        page.publish_grant(MAX_SLOTS - 1, 9)
        word = generation_word(ONE)
        assert other.grant(word, 7) == 0
        assert other.grant(word, 9) == MAX_SLOTS - 1
        assert other.grant(word, 8) is None


def test_a_grant_of_another_generation_is_no_grant(page: ControlPage) -> None:
    page.publish_grant(1, 7)
    assert page.grant(generation_word(TWO), 7) is None
    page.start_generation(TWO)
    assert page.grant(generation_word(ONE), 7) is None
    assert page.grant(generation_word(TWO), 7) is None


def test_a_new_grant_of_a_slot_replaces_the_old_one(page: ControlPage) -> None:
    page.publish_grant(1, 7)
    page.publish_grant(2, 8)
    page.publish_grant(1, 9)
    word = generation_word(ONE)
    assert [page.grant(word, step) for step in (7, 8, 9)] == [None, 2, 1]
    assert page.granted_before(word, 9) == [8]


def test_a_withdrawn_grant_is_gone_unless_the_slot_is_granted_again(page: ControlPage) -> None:
    page.publish_grant(1, 7)
    page.withdraw_grant(1, 6)
    assert page.grant(generation_word(ONE), 7) == 1
    page.withdraw_grant(1, 7)
    assert page.grant(generation_word(ONE), 7) is None


def test_grants_into_another_pool_are_void(page: ControlPage) -> None:
    page.publish_grant(1, 7)
    page.use_pool(page.pool)
    assert page.grant(generation_word(ONE), 7) == 1
    page.use_pool(page.pool + 1)
    assert page.grant(generation_word(ONE), 7) is None


def test_no_grant_counts_between_generations(page: ControlPage) -> None:
    page.publish_grant(1, 7)
    page.running = True
    page.end_generation()
    assert page.generation == 0
    assert not page.running
    assert page.grant(generation_word(ONE), 7) is None


AGREED = Agreed(number=3, step=40, confirmed=True, kind="stop", persist=False)


def test_the_agreed_step_is_read_whole_and_its_sequence_tells_of_changes(page: ControlPage) -> None:
    assert page.agreed() is None
    before = page.agreed_sequence
    page.publish_agreed(AGREED)
    assert page.agreed() == AGREED
    assert page.agreed_sequence != before
    page.publish_agreed(None)
    assert page.agreed() is None


def test_a_half_written_agreed_step_reads_as_none_until_the_successor_writes_it(page: ControlPage) -> None:
    page.publish_agreed(AGREED)
    page._words[6] |= 1  # the writer died in between
    assert page.agreed() is None
    page.publish_agreed(AGREED)
    assert page.agreed() == AGREED


def test_a_successor_finds_the_page_as_it_was(page: ControlPage) -> None:
    page.publish_grant(1, 7)
    with ControlPage.create(page.path) as successor:
        epoch = successor.new_epoch()
        assert page.daemon_epoch == epoch
        assert successor.grants() == [(1, 7)]


def test_a_worker_takes_its_seat_and_publishes(page: ControlPage) -> None:
    mine, other = page.rank(0), page.rank(1)
    mine.enter(ONE, pid=4321)
    assert (mine.pid, mine.step, mine.generation) == (4321, -1, generation_word(ONE))
    mine.step = 12
    mine.beat()
    mine.beat()
    mine.acknowledged = 3
    mine.reached(Phase.FIRST_STEP, 12)
    with ControlPage.open(page.path) as reader:
        seen = reader.rank(0)
        assert (seen.step, seen.beats, seen.acknowledged) == (12, 2, 3)
        assert (seen.phase, seen.phase_step) == (Phase.FIRST_STEP, 12)
    assert (other.pid, other.beats) == (0, 0)


def test_a_new_worker_in_the_seat_starts_from_nothing(page: ControlPage) -> None:
    page.rank(0).enter(ONE, pid=1)
    page.rank(0).step = 12
    page.rank(0).enter(TWO, pid=2)
    assert page.rank(0).step == -1
    assert page.rank(0).acknowledged == 0


def test_a_file_that_is_no_control_page_is_refused(tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(b"x")
    (tmp_path / "wrong").write_bytes(bytes(1 << 16))
    for name in ("short", "wrong"):
        with pytest.raises(CorruptError):
            ControlPage.open(tmp_path / name)
