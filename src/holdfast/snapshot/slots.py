"""The rows of a node's slot table: who may write what, and when a row may be used again (pure).

A *row* is one slot of every local rank: version v of the node lies in row i of each local rank's files. A row is in use
while any of these holds, and free otherwise:

- it is granted: some step of the current generation was promised to it (`Row.version`, with one `Writer` per local
  rank);
- it keeps images of versions of older generations (`Row.images`), until the ledger lets go of them;
- a writer of an older generation may still write into it (`Row.strangers`). A store through a mapping cannot be
  refused, so the row waits until that process has let go or is dead.

An abandoned row (`Row.abandoned`) is the same case within a generation: its grant is withdrawn from the control page,
and it becomes free when its last writer lets go.
What a writer did is known from its doorbells, from its headers and from its death:

    MAY_WRITE --committed--> CLEAN           the image is whole
    MAY_WRITE --missed, newer, dead--> GONE  it will never write this version (or the grant was withdrawn before the
                                             rank came to its step)
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from holdfast.checkpoint.version import GenerationId, Version
from holdfast.snapshot.reports import SlotRef


@dataclass(frozen=True, kw_only=True)
class Header:
    """The slot header of one local rank as read from the arena. FREE headers are not passed."""

    slot: SlotRef
    local_rank: int
    """Whose file."""
    version: Version
    global_rank: int
    """In the generation that wrote it."""
    clean: bool
    """CLEAN; otherwise FILLING."""
    writer_alive: bool
    """The process that wrote it (pid and start time of the header) lives."""


@dataclass(frozen=True, kw_only=True, order=True)
class Image:
    """A clean image that may be read."""

    slot: SlotRef
    local_rank: int
    global_rank: int
    version: Version


class Writer(enum.Enum):
    """What one local rank may still do to a granted row."""

    MAY_WRITE = "may write"
    CLEAN = "clean"
    GONE = "gone"


@dataclass(frozen=True)
class Stranger:
    """A process of an older generation that may still write a file of a row."""

    generation: GenerationId
    global_rank: int
    step: int


@dataclass
class Row:
    """One slot of every local rank."""

    ref: SlotRef
    version: Version | None = None
    writers: dict[int, Writer] = field(default_factory=dict)
    """By global rank of the current generation."""
    abandoned: bool = False
    images: dict[int, tuple[Version, int]] = field(default_factory=dict)
    """Older images by local rank: version and the global rank that it had."""
    strangers: dict[int, Stranger] = field(default_factory=dict)
    """By local rank."""
    wait_s: float = 0.0
    step_s: float = 0.0
    reported: dict[int, dict[str, float]] = field(default_factory=dict)
    """Metrics by global rank; ranks without any have no entry."""

    @property
    def metrics(self) -> dict[str, float]:
        """Those of all ranks; the smallest rank counts where they differ."""
        merged: dict[str, float] = {}
        if not self.reported:  # the usual case, asked for at every event
            return merged
        for _, metrics in sorted(self.reported.items(), reverse=True):
            merged |= metrics
        return merged

    @property
    def state(self) -> str:
        """granted, clean or missed, as in `reports.Held`."""
        writers = self.writers.values()
        if Writer.GONE in writers:
            return "missed"
        return "granted" if Writer.MAY_WRITE in writers else "clean"

    @property
    def in_use(self) -> bool:
        """Whether anything stands against a new grant."""
        return self.version is not None or bool(self.images or self.strangers)

    def grant(self, version: Version, ranks: Iterable[int]) -> None:
        """Promise the row to `version`."""
        assert not self.in_use, f"slot {self.ref} is in use"
        self.version, self.abandoned = version, False
        self.writers = dict.fromkeys(ranks, Writer.MAY_WRITE)
        self.wait_s = self.step_s = 0.0
        self.reported = {}

    def revive(self) -> None:
        """Grant the row to its version again. Who had let go may take it now; who has passed it will say so again."""
        self.abandoned = False
        self.writers = {rank: Writer.MAY_WRITE if one is Writer.GONE else one for rank, one in self.writers.items()}

    def release(self) -> None:
        """Forget the grant: nobody writes it any more and nobody needs it."""
        self.version, self.abandoned, self.writers = None, False, {}


class SlotTable:
    """All rows of a node, of the pool in use and of former pools that still hold something."""

    def __init__(self) -> None:
        self.rows: dict[SlotRef, Row] = {}
        self.pool: int | None = None
        self.num_slots = 0
        self.places: dict[int, int] = {}
        """Local rank by global rank, in the generation of the grants."""

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows.values())

    def row(self, ref: SlotRef) -> Row:
        """The row, made where it is unknown."""
        return self.rows.setdefault(ref, Row(ref))

    def use_pool(self, pool: int, num_slots: int) -> None:
        """Rows 0..num_slots-1 of `pool` are the ones to grant from now on."""
        self.pool, self.num_slots = pool, num_slots
        for index in range(num_slots):
            self.row(SlotRef(pool, index))

    def granted(self) -> list[Row]:
        """Rows with a grant that is not abandoned, oldest step first."""
        rows = [row for row in self if row.version is not None and not row.abandoned]
        return sorted(rows, key=lambda row: row.version.step if row.version else 0)

    def holding(self, version: Version) -> Row | None:
        """The row that is granted to `version`."""
        return next((row for row in self if row.version == version and not row.abandoned), None)

    def free(self) -> list[Row]:
        """Rows of the pool in use that a grant may take."""
        return [row for row in self if not row.in_use and self._current(row.ref)]

    def _current(self, ref: SlotRef) -> bool:
        return ref.pool == self.pool and ref.index < self.num_slots

    def settle(self) -> None:
        """Release the abandoned rows whose writers have all let go."""
        for row in self:
            if row.abandoned and Writer.MAY_WRITE not in row.writers.values():
                row.release()

    def watched(self, steps: Mapping[int, int]) -> frozenset[int]:
        """Ranks that may write an abandoned row, or a granted one whose step they have passed (`steps` by rank)."""
        return frozenset(
            global_rank
            for row in self
            if row.version is not None
            for global_rank, writer in row.writers.items()
            if writer is Writer.MAY_WRITE and (row.abandoned or steps.get(global_rank, 0) > row.version.step)
        )

    def drop_former(self) -> list[SlotRef]:
        """Forget the rows of former pools that are free; which ones."""
        if self.pool is None or len(self.rows) == self.num_slots:  # `use_pool` made that many
            return []
        gone = [row.ref for row in self if not self._current(row.ref) and not row.in_use]
        for ref in gone:
            del self.rows[ref]
        return gone

    def forget_images(self, needed: Callable[[Version], bool]) -> None:
        """Let go of the older images that are not needed."""
        for row in self:
            row.images = {local: image for local, image in row.images.items() if needed(image[0])}

    # --- what writers did

    def note_metrics(self, version: Version, global_rank: int, metrics: dict[str, float]) -> None:
        """What the rank's script reported at the step of `version`."""
        for row in self:
            if row.version == version and global_rank in row.writers:
                row.reported[global_rank] = metrics

    def committed(self, version: Version, global_rank: int, wait_s: float, step_s: float) -> None:
        """The rank's image of `version` is whole; it has let go of everything older."""
        row = next((row for row in self if row.version == version and global_rank in row.writers), None)
        if row is not None and row.writers[global_rank] is Writer.MAY_WRITE:
            row.writers[global_rank] = Writer.CLEAN
            row.wait_s, row.step_s = max(row.wait_s, wait_s), max(row.step_s, step_s)
        self.let_go(version.generation, global_rank, below=version.step)
        self.strangers_gone(version.generation, global_rank, through=version.step)

    def missed(self, version: Version, global_rank: int) -> None:
        """The rank has passed `version` without a copy: it will never write it, nor anything older."""
        self.let_go(version.generation, global_rank, below=version.step + 1)
        self.strangers_gone(version.generation, global_rank, through=version.step)

    def let_go(self, generation: GenerationId, global_rank: int, *, below: int | None = None) -> None:
        """The rank will not write granted rows of steps under `below` (None: of any step)."""
        for row in self:
            if row.version is None or row.version.generation != generation:
                continue
            if row.writers.get(global_rank) is Writer.MAY_WRITE and (below is None or row.version.step < below):
                row.writers[global_rank] = Writer.GONE

    def strangers_gone(self, generation: GenerationId, global_rank: int, *, through: int | None = None) -> None:
        """A process of an older generation let go of steps up to `through` (None: it is dead)."""
        for row in self:
            for local, who in list(row.strangers.items()):
                if (who.generation, who.global_rank) == (generation, global_rank) and (
                    through is None or who.step <= through
                ):
                    del row.strangers[local]

    def read(self, generation: GenerationId, global_rank: int, step: int, headers: Iterable[Header]) -> None:
        """The rank has published `step`, and afterwards its headers were these: as if it rang for each. Abandoned rows
        are withdrawn by now: a rank that has not reached their step will not see them."""
        found = {(header.slot, header.version): header.clean for header in headers if header.global_rank == global_rank}
        for row in self:
            if row.version is None or row.version.generation != generation:
                continue
            clean = found.get((row.ref, row.version))
            if row.writers.get(global_rank) is not Writer.MAY_WRITE:
                continue
            if clean:
                row.writers[global_rank] = Writer.CLEAN
            elif clean is None and (step > row.version.step or (row.abandoned and step < row.version.step)):
                row.writers[global_rank] = Writer.GONE

    # --- generations and restarts

    def fence(self, local_ranks: tuple[int, ...], headers: Iterable[Header]) -> None:
        """A generation ended: grants become strangers where their writers are not known to be gone or done, and what
        is clean is read anew from the headers."""
        headers = tuple(headers)
        done = {(header.slot, header.local_rank, header.version) for header in headers if header.clean}
        for row in self:
            for local, global_rank in enumerate(local_ranks):
                if row.version is None or (row.ref, local, row.version) in done:
                    continue
                if row.writers.get(global_rank) is Writer.MAY_WRITE:
                    row.strangers[local] = Stranger(row.version.generation, global_rank, row.version.step)
            row.release()
            row.images = {}
        for header in headers:
            self.adopt_image(header)

    def adopt_image(self, header: Header) -> None:
        """Take over what a header of no current grant says."""
        row = self.row(header.slot)
        if header.clean:
            row.images[header.local_rank] = (header.version, header.global_rank)
        elif header.writer_alive:
            row.strangers.setdefault(
                header.local_rank, Stranger(header.version.generation, header.global_rank, header.version.step)
            )

    def adopt_grant(self, ref: SlotRef, version: Version, ranks: tuple[int, ...], headers: Iterable[Header]) -> None:
        """Take over a grant that stands on the control page; images of other versions in its row are about to be
        overwritten and do not count."""
        row = self.row(ref)
        row.images = {}
        row.version, row.abandoned, row.writers = version, False, {}
        states = {header.global_rank: header for header in headers if header.version == version}
        for global_rank in ranks:
            header = states.get(global_rank)
            if header is None:
                row.writers[global_rank] = Writer.MAY_WRITE
            elif header.clean:
                row.writers[global_rank] = Writer.CLEAN
            else:
                row.writers[global_rank] = Writer.MAY_WRITE if header.writer_alive else Writer.GONE

    def images(self) -> list[Image]:
        """Every clean image that nobody may write."""
        found: list[Image] = []
        for row in self:
            found += [
                Image(slot=row.ref, local_rank=local, global_rank=global_rank, version=version)
                for local, (version, global_rank) in row.images.items()
                if local not in row.strangers
            ]
            if row.version is not None:
                found += [
                    Image(
                        slot=row.ref, local_rank=self.places[global_rank], global_rank=global_rank, version=row.version
                    )
                    for global_rank, writer in row.writers.items()
                    if writer is Writer.CLEAN
                ]
        return sorted(found)
