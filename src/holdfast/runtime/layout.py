"""Where the local part of a tensor lies in the global one: `holdfast.checkpoint.layout`, under the name used here."""

from __future__ import annotations

from holdfast.checkpoint.layout import Layout, Run, dtensor_layout, is_dtensor, local_part, plain_layout, shard_runs

__all__ = ["Layout", "Run", "dtensor_layout", "is_dtensor", "local_part", "plain_layout", "shard_runs"]
