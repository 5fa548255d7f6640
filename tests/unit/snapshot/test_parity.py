"""Parity buffers: what a successor of the daemon finds whole, and what it discards."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from holdfast.checkpoint.version import GenerationId
from holdfast.errors import CorruptError, PeerError
from holdfast.snapshot.arena import SLOT_HEADER_BYTES, Arena
from holdfast.snapshot.bulk import ParityRange
from holdfast.snapshot.parity import PARITY_BLOCK_BYTES, ParityStore, WholeParity
from holdfast.snapshot.shelf import ParityExtent, Shelf

VERSION = GenerationId(incarnation=1, nonce="7f3a9c02", generation=4).at(7)
SIZE = PARITY_BLOCK_BYTES + 1000


@pytest.fixture
def arena(tmp_path: Path) -> Iterator[Arena]:
    made = Arena.open(tmp_path / "arena")
    yield made
    made.control.close()
    made.remove()


def fill(arena: Arena, *, finish: bool = True) -> WholeParity | None:
    """A buffer that ends in ``end``."""
    store = ParityStore(arena)
    assert store.reserve(0, SIZE, lambda: 1 << 30) is None
    view = store.begin(0, VERSION, SIZE)
    view[-3:] = b"end"
    view.release()
    whole = store.finish(0, VERSION, SIZE, b"the map") if finish else None
    store.close()
    return whole


def test_a_successor_finds_what_is_whole(arena: Arena) -> None:
    whole = fill(arena)
    assert whole is not None
    assert ParityStore(arena).adopt() == [whole]
    assert (whole.map, whole.size_bytes) == (b"the map", SIZE)
    assert arena.used_bytes() >= SIZE


def test_a_successor_discards_what_is_not(arena: Arena) -> None:
    fill(arena, finish=False)
    assert ParityStore(arena).adopt() == []
    fill(arena)
    (arena.directory / "parity-0.record").write_bytes(b"another record")
    assert ParityStore(arena).adopt() == []
    assert ParityStore(arena).adopt() == []  # and for good


def test_a_buffer_is_used_again_or_made_anew_within_the_limit(arena: Arena) -> None:
    store = ParityStore(arena)
    assert "do not fit" in (store.reserve(0, SIZE, lambda: SIZE - 1) or "")
    assert not store.path(0).exists()
    assert store.reserve(0, SIZE, lambda: 2 * SIZE) is None
    assert store.reserve(0, SIZE - 1, lambda: 0) is None
    assert store.reserve(0, 0, lambda: 0) is None
    store.close()


def test_parity_leaves_only_as_it_was_sealed(arena: Arena) -> None:
    whole = fill(arena)
    assert whole is not None
    shelf, path = Shelf(arena.directory), ParityStore(arena).path(0)
    shelf.parities = {(VERSION, 2, 1): ParityExtent(path, 64, SIZE - 64, whole.checksums, SIZE)}
    wanted = ParityRange(version=VERSION, stripe=2, number=1, offset=SIZE - 67, length=3)
    assert shelf.read(wanted) == b"end"
    with pytest.raises(PeerError, match="past the end"):
        shelf.read(ParityRange(version=VERSION, stripe=2, number=1, offset=SIZE - 67, length=4))
    with pytest.raises(PeerError, match="does not hold"):
        shelf.read(ParityRange(version=VERSION, stripe=1, number=1, offset=0, length=4))
    with open(path, "r+b") as file:
        file.seek(SLOT_HEADER_BYTES + SIZE - 50)
        file.write(b"\x01")
    with pytest.raises(CorruptError, match="block 1"):
        shelf.read(wanted)
