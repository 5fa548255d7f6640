"""The event log: what is written is what docs/events.md says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import msgspec

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


def test_the_schema_number_and_the_common_fields_are_documented() -> None:
    assert f"**schema {events.SCHEMA}**" in DOCUMENT
    head = DOCUMENT.partition("## Kinds")[0]
    assert all(f"`{name}`" in head for name in COMMON | {"schema", "kind"})
