"""The control page: one writer per word, generations fenced by the words themselves."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from holdfast.checkpoint.version import GenerationId
from holdfast.errors import CorruptError
from holdfast.snapshot.control import RING, AgreedEntry, ControlPage, Phase, generation_word

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
        page.publish_grant(7, 0)
        page.publish_grant(9, 254)
        word = generation_word(ONE)
        assert other.grant(word, 7) == 0
        assert other.grant(word, 9) == 254
        assert other.grant(word, 8) is None
        assert other.granted_through == 9


def test_a_grant_of_another_generation_is_no_grant(page: ControlPage) -> None:
    page.publish_grant(7, 1)
    assert page.grant(generation_word(TWO), 7) is None
    page.start_generation(TWO)
    assert page.grant(generation_word(ONE), 7) is None
    assert page.grant(generation_word(TWO), 7) is None


def test_a_withdrawn_grant_is_gone_and_the_others_stay(page: ControlPage) -> None:
    page.publish_grant(7, 1)
    page.publish_grant(8, 2)
    page.withdraw_grant(7)
    assert page.grant(generation_word(ONE), 7) is None
    assert page.grant(generation_word(ONE), 8) == 2


def test_the_ring_holds_the_newest_grants(page: ControlPage) -> None:
    for step in range(1, 3 * RING):
        page.publish_grant(step, step % 6)
    newest = 3 * RING - 1
    assert page.grant(generation_word(ONE), newest) == newest % 6
    assert page.grant(generation_word(ONE), newest - RING + 1) is not None
    assert page.grant(generation_word(ONE), newest - RING) is None


def test_no_grant_counts_between_generations(page: ControlPage) -> None:
    page.publish_grant(7, 1)
    page.end_generation()
    assert page.generation == 0
    assert page.grant(generation_word(ONE), 7) is None


def test_agreed_steps_are_read_whole_and_their_sequence_tells_of_changes(page: ControlPage) -> None:
    entries = (AgreedEntry(1, 30, True, "save"), AgreedEntry(2, 33, False, "stop"))
    before = page.agreed_sequence
    page.publish_agreed(entries)
    assert page.agreed() == entries
    assert page.agreed_sequence != before


def test_a_half_written_table_of_agreed_steps_reads_as_empty_until_the_successor_writes_it(page: ControlPage) -> None:
    page.publish_agreed((AgreedEntry(1, 30, True, "save"),))
    page._words[5] |= 1  # the writer died in between
    assert page.agreed() == ()
    page.publish_agreed((AgreedEntry(1, 30, True, "save"),))
    assert len(page.agreed()) == 1


def test_a_successor_finds_the_page_as_it_was(page: ControlPage) -> None:
    page.publish_grant(7, 1)
    with ControlPage.create(page.path) as successor:
        epoch = successor.new_epoch()
        assert page.daemon_epoch == epoch
        assert successor.grant(generation_word(ONE), 7) == 1


def test_a_worker_takes_its_seat_and_publishes(page: ControlPage) -> None:
    mine, other = page.rank(0), page.rank(1)
    mine.enter(ONE, pid=4321)
    assert (mine.pid, mine.step, mine.generation) == (4321, -1, generation_word(ONE))
    mine.step = 12
    mine.beat()
    mine.beat()
    mine.acknowledge(3, 40)
    mine.reached(Phase.FIRST_STEP, 12)
    with ControlPage.open(page.path) as reader:
        seen = reader.rank(0)
        assert (seen.step, seen.beats, seen.acknowledged) == (12, 2, (3, 40))
        assert (seen.phase, seen.phase_step) == (Phase.FIRST_STEP, 12)
    assert (other.pid, other.beats) == (0, 0)


def test_a_new_worker_in_the_seat_starts_from_nothing(page: ControlPage) -> None:
    page.rank(0).enter(ONE, pid=1)
    page.rank(0).step = 12
    page.rank(0).enter(TWO, pid=2)
    assert page.rank(0).step == -1
    assert page.rank(0).acknowledged == (0, 0)


def test_a_file_that_is_no_control_page_is_refused(tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(b"x")
    (tmp_path / "wrong").write_bytes(bytes(1 << 16))
    for name in ("short", "wrong"):
        with pytest.raises(CorruptError):
            ControlPage.open(tmp_path / name)
