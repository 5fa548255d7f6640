"""Where the local part of a tensor lies in the global one: `holdfast.checkpoint.layout`, under the name used here."""

from __future__ import annotations

from holdfast.checkpoint.flat import FlatRange
from holdfast.checkpoint.layout import (
    Layout,
    Run,
    box_view,
    dtensor_layout,
    flat_layout,
    flat_view,
    is_dtensor,
    layout_of,
    local_part,
    plain_layout,
    shard_runs,
)

__all__ = [
    "FlatRange",
    "Layout",
    "Run",
    "box_view",
    "dtensor_layout",
    "flat_layout",
    "flat_view",
    "is_dtensor",
    "layout_of",
    "local_part",
    "plain_layout",
    "shard_runs",
]
