"""Slots with double headers, the node's record, and what a successor finds."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.checkpoint.version import GenerationId
from holdfast.errors import CorruptError, StorageError
from holdfast.snapshot.arena import (
    EMPTY_HEADER,
    SLOT_HEADER_BYTES,
    Arena,
    NodeState,
    Slot,
    SlotState,
    pack_slot_header,
    read_header_of,
    read_slot_header,
    round_capacity,
)

GENERATION = GenerationId(incarnation=1, nonce="00000000", generation=4)
DIGEST = bytes(range(16))


@pytest.fixture
def arena(tmp_path: Path) -> Iterator[Arena]:
    made = Arena.open(tmp_path / "arena")
    yield made
    made.remove()


@pytest.fixture
def slot(arena: Arena) -> Iterator[Slot]:
    assert arena.reserve(0, (0,), 1, 1 << 16) == 1
    opened = Slot.open(arena.slot_path(0, 0, 0))
    yield opened
    opened.close()


def test_a_slot_goes_from_free_to_filling_to_clean(slot: Slot) -> None:
    assert slot.read_header() == EMPTY_HEADER
    slot.begin(GENERATION.at(7), 3, 8)
    filling = slot.read_header()
    assert (filling.state, filling.version, filling.pid) == (SlotState.FILLING, GENERATION.at(7), os.getpid())
    slot.image[:5] = b"bytes"
    slot.finish(5, DIGEST)
    clean, _ = read_header_of(slot.path)
    assert (clean.state, clean.size_bytes, clean.header_digest) == (SlotState.CLEAN, 5, DIGEST)
    assert (clean.global_rank, clean.world_size, clean.version) == (3, 8, GENERATION.at(7))
    slot.clear()
    assert slot.read_header().state is SlotState.FREE
    assert slot.read_header().version is None


def test_the_image_starts_at_a_page_of_the_file(slot: Slot) -> None:
    slot.image[:4] = b"here"
    with slot.path.open("rb") as file:
        assert os.pread(file.fileno(), 4, SLOT_HEADER_BYTES) == b"here"
    assert slot.capacity_bytes == 1 << 16


def test_prefaulting_leaves_the_bytes_as_they_are(slot: Slot) -> None:
    slot.image[-4:] = b"last"
    slot.prefault()
    assert bytes(slot.image[-4:]) == b"last"


@given(cut=st.integers(0, 120), later=st.booleans())
def test_a_torn_header_write_leaves_the_header_before_it(cut: int, later: bool) -> None:
    before = replace(EMPTY_HEADER, sequence=4, state=SlotState.CLEAN, version=GENERATION.at(7), size_bytes=99)
    after = replace(before, sequence=5, state=SlotState.FILLING, version=GENERATION.at(8 + later))
    page = bytearray(SLOT_HEADER_BYTES)
    first, second = pack_slot_header(before), pack_slot_header(after)
    page[: len(first)] = first
    page[2048 : 2048 + len(second)] = pack_slot_header(replace(before, sequence=3))
    assert read_slot_header(page) == before
    page[2048 : 2048 + min(cut, len(second))] = second[:cut]
    expected = after if cut >= len(second) else before
    got = read_slot_header(page)
    assert got in (before, after)
    if cut >= len(second) or second[cut:] != pack_slot_header(replace(before, sequence=3))[cut:]:
        assert got == expected


def test_a_file_too_short_for_a_slot_is_refused(tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(b"abc")
    with pytest.raises(CorruptError, match="no slot"):
        Slot.open(tmp_path / "short")


def test_a_successor_finds_slots_and_the_record(arena: Arena, slot: Slot) -> None:
    slot.begin(GENERATION.at(7), 0, 1)
    slot.finish(8, DIGEST)
    arena.save_state(NodeState(run_id="r", pool=0, num_slots=1, capacity_bytes=1 << 16))
    successor = Arena.open(arena.directory)
    assert successor.state.run_id == "r"
    [found] = successor.scan()
    assert (found.pool, found.local_rank, found.index, found.capacity_bytes) == (0, 0, 0, 1 << 16)
    assert found.header.version == GENERATION.at(7)


def test_a_damaged_record_counts_as_none(arena: Arena) -> None:
    arena.save_state(NodeState(run_id="r"))
    path = arena.directory / "node.state"
    path.write_bytes(path.read_bytes()[:-1] + b"\x07")
    assert Arena.open(arena.directory).state == NodeState()


def test_files_and_directory_are_private(arena: Arena, slot: Slot) -> None:
    arena.save_state(NodeState())
    assert stat.S_IMODE(arena.directory.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in arena.directory.iterdir()} == {0o600}


def test_a_directory_open_to_others_is_refused(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir(mode=0o755)
    with pytest.raises(StorageError, match="private"):
        Arena.open(tmp_path / "open")


def test_reserving_again_keeps_what_lies_in_the_slots(arena: Arena, slot: Slot) -> None:
    slot.begin(GENERATION.at(7), 0, 1)
    assert arena.reserve(0, (0, 1), 3, 1 << 16) == 3
    assert len(arena.scan()) == 6
    assert slot.read_header().version == GENERATION.at(7)
    assert os.stat(slot.path).st_blocks * 512 >= 1 << 16


def test_a_slot_that_could_not_be_reserved_leaves_nothing_and_takes_nothing_from_others(
    arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[tuple[int, ...]] = []
    monkeypatch.setattr("os.posix_fallocate", lambda *arguments: taken.append(arguments))
    assert arena.reserve(0, (0,), 2, 1 << 62) == 0
    assert taken == []
    assert arena.scan() == []
    assert list(arena.directory.glob("making-*")) == []


def test_removal_leaves_nothing_even_while_a_slot_is_mapped(arena: Arena, slot: Slot) -> None:
    arena.remove()
    assert not arena.directory.exists()
    slot.image[:2] = b"ok"


def test_capacity_has_room_for_a_slightly_larger_layout() -> None:
    for size in (1, 1 << 20, (1 << 30) + 1):
        assert size < round_capacity(size) <= size * 201 // 200 + (4 << 20)


def test_a_full_shared_memory_costs_the_daemon_no_more_than_what_a_successor_would_know(tmp_path, monkeypatch):
    arena = Arena.open(tmp_path / "arena")
    arena.save_state(NodeState(run_id="before"))

    def full(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", full)
        arena.save_state(NodeState(run_id="now"))
    assert arena.state.run_id == "now"
    assert sorted(path.name for path in arena.directory.iterdir()) == ["control", "node.state"]
    assert Arena.open(tmp_path / "arena").state.run_id == "before"


def test_a_slot_file_that_was_cut_short_counts_as_empty():
    assert read_slot_header(b"") == read_slot_header(bytes(2050)) == EMPTY_HEADER
