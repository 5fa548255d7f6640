"""The slot headers of a node's arena, read for the ledger: they are the truth about what is clean."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from holdfast.checkpoint.version import Version
from holdfast.snapshot import ledger
from holdfast.snapshot.arena import Arena, FoundSlot, SlotState, process_start, read_header_of
from holdfast.snapshot.reports import SlotRef


@dataclass(frozen=True, kw_only=True)
class OwnImage:
    """One clean image of this node."""

    path: Path
    """Of its slot."""
    global_rank: int
    """In the generation that wrote it."""


class SlotHeaders:
    """Reads them; remembers which files it found."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._found: dict[tuple[SlotRef, int], FoundSlot] = {}

    def all(self) -> tuple[ledger.Header, ...]:
        """Every slot header of the arena that is not FREE."""
        self._found = {}
        headers = []
        for found in self._arena.scan():
            slot = SlotRef(found.pool, found.index)
            self._found[slot, found.local_rank] = found
            if found.header.state is not SlotState.FREE and found.header.version is not None:
                headers.append(
                    ledger.Header(
                        slot=slot,
                        local_rank=found.local_rank,
                        version=found.header.version,
                        global_rank=found.header.global_rank,
                        clean=found.header.state is SlotState.CLEAN,
                        writer_alive=process_start(found.header.pid) == found.header.pid_start,
                    )
                )
        return tuple(headers)

    def of_rank(self, local_rank: int) -> tuple[ledger.Header, ...]:
        """The headers of a living local rank's slots in the pool in use."""
        headers = []
        state = self._arena.state
        for index in range(state.num_slots):
            try:
                header, _ = read_header_of(self._arena.slot_path(state.pool, local_rank, index))
            except FileNotFoundError:
                continue
            if header.state is not SlotState.FREE and header.version is not None:
                headers.append(
                    ledger.Header(
                        slot=SlotRef(state.pool, index),
                        local_rank=local_rank,
                        version=header.version,
                        global_rank=header.global_rank,
                        clean=header.state is SlotState.CLEAN,
                        writer_alive=True,
                    )
                )
        return tuple(headers)

    def images_of(self, version: Version) -> list[OwnImage]:
        """The clean images of `version`, read anew."""
        return [
            OwnImage(path=found.path, global_rank=found.header.global_rank)
            for found in self._arena.scan()
            if found.header.state is SlotState.CLEAN and found.header.version == version
        ]

    def find(self, slot: SlotRef, local_rank: int) -> FoundSlot | None:
        """The file of a slot, None where there is none."""
        found = self._found.get((slot, local_rank))
        if found is None:
            self.all()
            found = self._found.get((slot, local_rank))
        return found
