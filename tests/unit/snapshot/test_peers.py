"""What a daemon serves of its slots to readers on other nodes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from holdfast.checkpoint.version import GenerationId
from holdfast.snapshot.arena import SLOT_HEADER_BYTES, Arena, Slot
from holdfast.snapshot.messages import RangeData, ReadRange, decode
from holdfast.snapshot.peers import RANGE_BYTES, serve_range

VERSION = GenerationId(incarnation=1, nonce="7f3a9c02", generation=4).at(7)


@pytest.fixture
def slot(tmp_path: Path) -> Iterator[Slot]:
    arena = Arena.open(tmp_path / "arena")
    arena.reserve(0, (0,), 1, 1 << 16)
    opened = Slot.open(arena.slot_path(0, 0, 0))
    opened.begin(VERSION, 0, 1)
    opened.image[:5] = b"image"
    opened.finish(5, bytes(16))
    yield opened
    opened.close()
    arena.remove()


def _ask(slot: Slot, **changes: object) -> RangeData:
    message = ReadRange(request=1, path=str(slot.path), version=VERSION, offset=SLOT_HEADER_BYTES, length=5)
    answer = decode(serve_range(slot.path.parent, msgspec.structs.replace(message, **changes)))
    assert isinstance(answer, RangeData)
    assert answer.request == 1
    return answer


def test_a_clean_slot_is_served(slot: Slot) -> None:
    assert _ask(slot) == RangeData(request=1, data=b"image")


def test_a_slot_of_another_version_is_not_served(slot: Slot) -> None:
    answer = _ask(slot, version=msgspec.structs.replace(VERSION, step=8))
    assert (answer.data, answer.error) == (b"", "the slot holds another version")


def test_a_slot_that_is_being_filled_is_not_served(slot: Slot) -> None:
    slot.begin(VERSION, 0, 1)
    assert _ask(slot).error == "the slot holds another version"


@pytest.mark.parametrize("length", [0, -1, RANGE_BYTES + 1])
def test_a_length_out_of_bounds_is_refused(slot: Slot, length: int) -> None:
    assert "no range" in (_ask(slot, length=length).error or "")


def test_a_negative_offset_is_refused(slot: Slot) -> None:
    assert "no range" in (_ask(slot, offset=-1).error or "")


@pytest.mark.parametrize("name", ["control", "../outside", "slot-0-0-0/../node.state", "/etc/passwd"])
def test_nothing_but_slots_of_the_arena_is_served(slot: Slot, name: str) -> None:
    (slot.path.parent.parent / "outside").write_bytes(bytes(8192))
    answer = _ask(slot, path=str(slot.path.parent / name))
    assert answer.data == b""
    assert answer.error is not None


def test_a_slot_that_is_gone_is_an_error_for_the_reader(slot: Slot) -> None:
    assert _ask(slot, path=str(slot.path.parent / "slot-0-0-9")).error is not None
