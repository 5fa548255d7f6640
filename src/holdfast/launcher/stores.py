"""The TCPStore of a generation: a fresh one each time, so that no worker reads what a dead one left there."""

from __future__ import annotations

import contextlib
from typing import Any


def new_store(port: int) -> Any:  # torch._C._distributed_c10d.TCPStore; torch is not imported for the type alone
    """A store of our own that listens on `port` where that is free, else (and for 0) wherever the system likes.

    A job of one node that names ``--master-port`` has it there: scripts may give it to ``init_process_group`` by
    themselves (``tcp://host:port``), and torch then expects the launcher's store behind it.
    """
    from torch._C._distributed_c10d import TCPStore

    if port:
        with contextlib.suppress(RuntimeError):  # torch's DistNetworkError: somebody else has it
            return TCPStore("localhost", port, is_master=True, wait_for_workers=False)
    return TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
