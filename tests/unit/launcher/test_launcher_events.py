"""The event log: what is written is what docs/events.md says."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path
from typing import get_args

import msgspec
import pytest

from holdfast.launcher import events

DOCUMENT = (Path(__file__).parents[3] / "docs" / "events.md").read_text()
COMMON = {field.name for field in msgspec.structs.fields(events.Event)}


def test_every_kind_and_field_is_documented_and_nothing_else() -> None:
    documented = {
        row[1]: set(re.findall(r"`(\w+)`", re.sub(r"\([^)]*\)", "", row[2])))
        for row in re.finditer(r"^\| `(\w+)` \| [^|]* \| ([^|]*) \|$", DOCUMENT, re.MULTILINE)
    }
    written = {
        str(kind.__struct_config__.tag): {field.name for field in msgspec.structs.fields(kind)} - COMMON
        for kind in get_args(events.AnyEvent)
    }
    assert documented == written


def test_every_change_of_membership_is_documented_and_nothing_else() -> None:
    (row,) = [line for line in DOCUMENT.splitlines() if line.startswith("| `membership` |")]
    listed = row.partition("`change` (")[2].rpartition("), `text`")[0]
    sources = "".join(path.read_text() for path in Path(events.__file__).parent.glob("*.py"))
    written = re.findall(r"""(?:\b_note\(|\bMembership\(change=)\s*"(\w+)\"""", sources)
    assert set(re.sub(r" \([^)]*\)", "", listed).split(", ")) == set(written)


def test_the_schema_number_and_the_common_fields_are_documented() -> None:
    assert f"**schema {events.SCHEMA}**" in DOCUMENT
    head = DOCUMENT.partition("## Kinds")[0]
    assert all(f"`{name}`" in head for name in COMMON | {"schema", "kind"})


FULL = OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_costs_lines_and_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = os.write
    rooms = [1 << 20, 10, 0, 0, 1 << 20, 1 << 20]

    def write(descriptor: int, data: bytes) -> int:
        room = rooms.pop(0)
        if room == 0:
            raise FULL
        return plain(descriptor, data[:room])

    with events.EventLog(tmp_path, "h") as log:
        monkeypatch.setattr(events.os, "write", write)
        for number in range(4):
            log.write(events.DaemonChanged(change="died", pid=number + 1), 1.0)
        log.write(events.DaemonChanged(change="died", pid=5), 2.0)
        monkeypatch.undo()
    found = events.read_events(tmp_path)
    assert [event.get("pid", event.get("text")) for event in found] == [
        1,
        "3 events could not be written, and are lost",
        5,
    ]
    assert capsys.readouterr().err.count("cannot be written") == 1


def test_an_argument_that_is_no_text_is_written_all_the_same(tmp_path: Path) -> None:
    with events.EventLog(tmp_path, "h") as log:
        log.write(events.RunStarted(run_id="r", command="train.py", arguments=("caf\udce9",), nproc=1, job="j"), 1.0)
    (event,) = events.read_events(tmp_path)
    assert event["arguments"] == ["caf?"]
