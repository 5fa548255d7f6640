"""Choosing with a checkpoint storage that cannot be used: an incarnation that runs goes on from memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from holdfast.checkpoint.steps import history_id
from holdfast.checkpoint.version import GenerationId, Version
from holdfast.errors import StorageError
from holdfast.snapshot.messages import Inventory
from holdfast.snapshot.records import CleanImage, Parentage, SessionConfig
from holdfast.snapshot.survey import Answer, Question, decide

OLD, NOW = (GenerationId(incarnation=1, nonce="00000abc", generation=number) for number in (1, 2))


def inventory(node: int, *versions: Version, history: str | None) -> Inventory:
    clean = tuple(
        CleanImage(version=one, global_rank=0, world_size=1, path="slot-1-0-0", offset=4096, size_bytes=1)
        for one in versions
    )
    parents = (Parentage(generation=OLD, parent=None, step=0),)
    return Inventory(generation=NOW, node_rank=node, clean=clean, parents=parents, history=history, newest_step=9)


def ask(directory: Path, *inventories: Inventory, fresh: bool = False) -> Answer:
    config = SessionConfig(
        ranks=(0,),
        checkpoint_dir=str(directory),
        snapshot_every=1,
        persist_every_steps=None,
        persist_every_s=None,
        keep="",
        resume="auto",
        has_init_from=False,
    )
    return decide(Question(generation=NOW, fresh=fresh, config=config, inventories=inventories))


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoints"
    path.write_text("no directory")
    return path


def test_memory_gives_what_an_unusable_storage_cannot_and_keeps_its_history(broken: Path) -> None:
    newcomer = inventory(0, history=None)
    answer = ask(broken, newcomer, inventory(1, OLD.at(7), history="h" * 32))
    assert (answer.choice.tier, answer.choice.version, answer.history) == ("memory", OLD.at(7), "h" * 32)
    assert str(broken) in answer.problem


def test_without_memory_an_unusable_storage_is_an_error(broken: Path) -> None:
    with pytest.raises(StorageError, match="checkpoints"):
        ask(broken, inventory(0, history="h" * 32))


def test_a_job_that_starts_anew_does_not_take_memory_for_that_of_an_unusable_directory(broken: Path) -> None:
    with pytest.raises(StorageError, match="checkpoints"):
        ask(broken, inventory(0, OLD.at(7), history=None), fresh=True)


def test_a_storage_that_works_is_used_and_nothing_is_said(tmp_path: Path) -> None:
    answer = ask(tmp_path / "made", inventory(0, OLD.at(7), history=None))
    assert (answer.choice.tier, answer.problem) == ("memory", "")
    assert answer.history == history_id(tmp_path / "made")
