"""The claim store on its own: one claim comes after each other one, whoever asks how often, and whoever dies."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import msgspec
import pytest

from holdfast.checkpoint.storage import PosixStorage
from holdfast.checkpoint.version import GenerationId
from holdfast.errors import CorruptError, StorageError
from holdfast.launcher.claims import ClaimStore
from holdfast.launcher.wire import Standing

NONCE = "0a1b2c3d"


def standing(incarnation: int, generation: int, *members: str) -> Standing:
    number = GenerationId(incarnation=incarnation, nonce=NONCE, generation=generation)
    return Standing(generation=number, members=members, addresses=members)


FIRST = standing(1, 1, "a", "b", "c", "d")
ONE_SIDE = standing(1, 2, "a", "b")
OTHER_SIDE = standing(8, 2, "c", "d")


class Failing(PosixStorage):
    """Fails after so many writes; `silently`: that one is done, and only the answer is lost."""

    def __init__(self, writes: int, *, silently: bool = False) -> None:
        self.writes, self.silently = writes, silently

    def write(self, path: str | Path, chunks: Iterable[bytes | memoryview], *, exclusive: bool = False) -> int:
        self.writes -= 1
        if self.writes >= 0 or self.silently:
            super().write(path, chunks, exclusive=exclusive)
        if self.writes < 0:
            raise StorageError(f"{path} cannot be written")
        return 0


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """A store in which the first generation is claimed."""
    assert ClaimStore(str(tmp_path)).create(FIRST, None)
    return str(tmp_path)


def test_one_successor_is_claimed_though_two_sides_name_it_differently(folder: str) -> None:
    one, other = ClaimStore(folder), ClaimStore(folder)
    assert one.create(ONE_SIDE, FIRST.generation)
    assert not other.create(OTHER_SIDE, FIRST.generation)
    assert other.newest() == one.newest() == ONE_SIDE


def test_of_two_that_found_an_incarnation_in_an_empty_store_one_does(tmp_path: Path) -> None:
    one, other = ClaimStore(str(tmp_path)), ClaimStore(str(tmp_path))
    assert one.create(FIRST, None)
    assert not other.create(standing(3, 1, "e"), None)
    assert other.newest() == FIRST


def test_the_same_name_with_other_members_is_lost(folder: str) -> None:
    assert ClaimStore(folder).create(ONE_SIDE, FIRST.generation)
    assert not ClaimStore(folder).create(standing(1, 2, "c", "d"), FIRST.generation)


@pytest.mark.parametrize("writes", [0, 1])
def test_a_claim_whose_answer_was_lost_is_won_when_asked_again(folder: str, writes: int) -> None:
    assert ClaimStore(folder, Failing(writes, silently=True)).create(ONE_SIDE, FIRST.generation)
    store = ClaimStore(folder)
    assert store.create(ONE_SIDE, FIRST.generation)
    assert not store.create(OTHER_SIDE, FIRST.generation)


def test_who_dies_between_the_two_names_has_claimed(folder: str) -> None:
    with pytest.raises(StorageError):
        ClaimStore(folder, Failing(1)).create(ONE_SIDE, FIRST.generation)
    store = ClaimStore(folder)
    assert store.newest() == ONE_SIDE
    assert not store.create(OTHER_SIDE, FIRST.generation)
    after = standing(1, 3, "b")
    assert store.create(after, ONE_SIDE.generation)
    assert store.newest() == after


def test_who_failed_between_the_two_names_goes_on_when_it_asks_again(folder: str) -> None:
    with pytest.raises(StorageError):
        ClaimStore(folder, Failing(1)).create(ONE_SIDE, FIRST.generation)
    assert ClaimStore(folder).create(ONE_SIDE, FIRST.generation)
    assert ClaimStore(folder).newest() == ONE_SIDE


def test_claims_of_a_store_that_knows_no_successors_are_read_and_followed(tmp_path: Path) -> None:
    for claim in (FIRST, ONE_SIDE):
        name = f"{claim.generation.incarnation}-{claim.generation.generation}"
        PosixStorage().write(tmp_path / "generations" / name, [msgspec.json.encode(claim)])
    store = ClaimStore(str(tmp_path))
    assert store.newest() == ONE_SIDE
    after = standing(1, 3, "a")
    assert store.create(after, ONE_SIDE.generation)
    assert store.newest() == after


def test_an_empty_store_has_no_claim(tmp_path: Path) -> None:
    assert ClaimStore(str(tmp_path)).newest() is None


@pytest.mark.parametrize(
    "torn", [msgspec.json.encode(ONE_SIDE)[:40], msgspec.json.encode(ONE_SIDE).replace(b"a", b"\xff")]
)
def test_a_claim_that_was_cut_short_is_named_and_never_taken_for_one(folder: str, torn: bytes) -> None:
    path = Path(folder, "successors", str(FIRST.generation))
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(torn)
    for ask in (ClaimStore(folder).newest, lambda: ClaimStore(folder).create(OTHER_SIDE, FIRST.generation)):
        with pytest.raises(CorruptError, match=r"successors.*is no claim"):
            ask()
