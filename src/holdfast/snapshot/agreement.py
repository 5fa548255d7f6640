"""Agreed steps: all workers stop, or save, at the end of the same step (pure).

SIGNATURES FIRST, bodies follow. The leader's half is used by `LeaderLedger` alone; `at_boundary` is the worker's half.
"""

from __future__ import annotations

import enum

from holdfast.snapshot.reports import Agreed


class Decision(enum.Enum):
    """What a worker does at a boundary."""

    GO_ON = "go on"
    """Nothing stands against the next step."""
    ACKNOWLEDGE = "acknowledge"
    """Write the number on the page (before leaving the boundary), then go on."""
    WAIT = "wait"
    """Stay, read the page again until the answer is another one."""
    PERFORM = "perform"
    """This is the agreed step: save or stop here."""


def at_boundary(step: int, agreed: Agreed | None, acknowledged: int) -> Decision:
    """The worker's half: it has published `step` and then read the page.

    Args:
        step: completed steps of this worker.
        agreed: what stands on the page.
        acknowledged: newest number that this worker acknowledged.
    """
    raise NotImplementedError
