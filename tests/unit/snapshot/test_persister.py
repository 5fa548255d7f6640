"""Index and root: what the leader's daemon writes when all parts are there."""

from __future__ import annotations

from pathlib import Path

import pytest

from holdfast.checkpoint.boxes import whole
from holdfast.checkpoint.image import ImageLayout, block_checksums, read_header
from holdfast.checkpoint.objects import ObjectRecord, encode_objects
from holdfast.checkpoint.pieces import Piece
from holdfast.checkpoint.retention import Retention
from holdfast.checkpoint.source import MemorySource
from holdfast.checkpoint.steps import list_steps
from holdfast.checkpoint.verified import OpenImage
from holdfast.checkpoint.version import GenerationId, Version
from holdfast.errors import StorageError
from holdfast.snapshot.persister import Commit, Part, commit, step_directory, write_part

GENERATION = GenerationId(incarnation=1, nonce="7f3a9c02", generation=4)


def written(folder: Path, version: Version) -> tuple[bytes, ...]:
    """The only image of a version is in storage; its record."""
    blob = encode_objects({"session": ObjectRecord(b"{}")})
    layout = ImageLayout.plan([Piece("w", "uint8", (8,), whole((8,)))], objects_capacity=len(blob))
    data = bytearray(layout.size_bytes)
    data[layout.objects_offset : layout.objects_offset + len(blob)] = blob
    checksums = block_checksums([memoryview(data)[layout.data_start :]], layout.block_bytes)
    header = layout.header(version=version, global_rank=0, world_size=1, checksums=checksums, objects_bytes=len(blob))
    image = memoryview(bytes(header + data[layout.data_start :]))

    def opened() -> OpenImage:
        return OpenImage("slot", read_header(lambda at, length: image[at : at + length]), MemorySource(image))

    return write_part(Part(version, 1, step_directory(str(folder), version.step), (), (opened,)))


def order(folder: Path, step: int, tag: str | None, records: tuple[bytes, ...] = (), keep: str = "") -> Commit:
    directory = step_directory(str(folder), step)
    return Commit(GENERATION.at(step), directory, records, 1, {}, tag, None, keep)


def test_a_step_that_is_in_storage_already_gets_the_tag_that_comes_later(tmp_path: Path) -> None:
    records = written(tmp_path, GENERATION.at(7))
    assert commit(order(tmp_path, 7, None, records)).tag is None
    root = (step_directory(str(tmp_path), 7) / "root").read_bytes()
    assert written(tmp_path, GENERATION.at(7)) == ()
    assert commit(order(tmp_path, 7, "best")).tag == "best"
    assert commit(order(tmp_path, 7, "best")).tag == "best"
    assert commit(order(tmp_path, 7, None)).tag == "best"
    assert [info.tag for info in list_steps(tmp_path)] == ["best"]
    assert (step_directory(str(tmp_path), 7) / "root").read_bytes() == root
    with pytest.raises(StorageError, match="cannot be tagged 'second'"):
        commit(order(tmp_path, 7, "second"))


def test_the_tag_counts_before_old_steps_are_deleted(tmp_path: Path) -> None:
    for step in (7, 8):
        commit(order(tmp_path, step, None, written(tmp_path, GENERATION.at(step))))
    commit(order(tmp_path, 7, "best", keep=Retention(last=1).encode()))
    assert [info.step for info in list_steps(tmp_path)] == [7, 8]
