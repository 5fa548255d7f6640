"""A glance at the arena of this node: the newest step in its memory."""

from __future__ import annotations

from holdfast.environment import WorkerEnvironment
from holdfast.errors import CorruptError
from holdfast.snapshot.arena import Slot, SlotState


def newest_in_memory(environment: WorkerEnvironment) -> int | None:
    """The newest step of which every image on this node is clean; None where there is none.

    A version counts when as many clean images of it lie here as the generation that wrote it had ranks here.
    """
    held: dict[int, int] = {}
    for path in environment.arena.glob("slot-*"):
        try:
            slot = Slot.open(path)
        except (OSError, CorruptError):
            continue  # removed meanwhile, or being made
        header = slot.read_header()
        slot.close()
        if header.state is SlotState.CLEAN and header.version is not None:
            held[header.version.step] = held.get(header.version.step, 0) + 1
    most = max(held.values(), default=0)
    return max((step for step, count in held.items() if count == most), default=None)
