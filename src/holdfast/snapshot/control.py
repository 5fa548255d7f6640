"""The control page: one small shared mapping per node, read and written without locks, messages or system calls.

Every field is one aligned 64-bit word with one writer, so a load sees an old or a new value and never a mixture. Fields
that only mean something together are packed into one word (a grant, an acknowledgement) or guarded by a sequence word
that is odd while they change (the agreed steps). A word that belongs to a generation carries it, so that what a fenced
generation left behind is never taken for news.

Writers: the node's daemon writes the node part, each worker its own rank part. Readers: everybody, agents too
(progress, hang detection, rehearsed faults). The page stays where it is when a daemon dies: a successor maps it.

    word 0..63        node: magic, epoch, generation, granted_through, must_persist, agreed sequence and table
    word 64..127      node: grants ring
    word 512 + 16*r   rank part of local rank r
"""

from __future__ import annotations

import contextlib
import enum
import mmap
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from holdfast.checkpoint.version import GenerationId
from holdfast.errors import CorruptError

MAX_LOCAL_RANKS: Final = 224
RING: Final = 64
AGREED_ENTRIES: Final = 8
MAX_SLOTS: Final = 255
MAX_STEP: Final = 1 << 39

_MAGIC: Final = 0x3130_7466_646C_6F68  # "holdft01"
_EPOCH, _GENERATION, _GRANTED_THROUGH, _MUST_PERSIST, _AGREED_SEQUENCE, _INCARNATION = 1, 2, 3, 4, 5, 6
_AGREED, _AGREED_WORDS = 16, 4
_RING = 64
_RANKS, _RANK_WORDS = 512, 16
_NUM_WORDS: Final = _RANKS + _RANK_WORDS * MAX_LOCAL_RANKS
_TRIES: Final = 1000


class Phase(enum.IntEnum):
    """How far a worker's Session has come; the value of `RankPart.phase`."""

    NONE = 0
    OPENED = 1
    RESTORED = 2
    FIRST_STEP = 3
    CLOSED = 4


@dataclass(frozen=True)
class AgreedEntry:
    """One agreed step as the leader has last named it."""

    request: int
    """Number of the request, 1 and up; a request that is given a later step keeps its number."""
    step: int
    confirmed: bool
    kind: str
    """save or stop."""


def generation_word(generation: GenerationId) -> int:
    """`generation` as one positive 63-bit word; different for different generations of a job."""
    return (int(generation.nonce, 16) << 31) | (generation.generation & 0x7FFF_FFFF)


def _grant_word(generation: int, step: int, slot: int) -> int:
    return (step << 24) | ((generation & 0xFFFF) << 8) | (slot + 1)


class RankPart:
    """The words of one local rank. Written by that worker only (the daemon clears them when a generation starts)."""

    _GENERATION, _PID, _STEP, _BEATS, _ACK_REQUEST, _ACK_STEP, _PHASE, _PHASE_STEP = range(8)

    def __init__(self, words: memoryview) -> None:
        self._words = words

    def enter(self, generation: GenerationId, pid: int) -> None:
        """Take the seat: a worker calls this once, before anything else here."""
        self.clear()
        self._words[self._PID] = pid
        self._words[self._GENERATION] = generation_word(generation)

    def clear(self) -> None:
        """Leave the seat empty."""
        self._words[self._GENERATION] = 0
        for index in range(1, _RANK_WORDS):
            self._words[index] = 0
        self._words[self._STEP] = -1

    @property
    def generation(self) -> int:
        """`generation_word` of the generation of the worker that sits here, 0 where none has entered."""
        return int(self._words[self._GENERATION])

    @property
    def pid(self) -> int:
        """Process id of the worker, 0 where none has entered."""
        return int(self._words[self._PID])

    @property
    def step(self) -> int:
        """Newest finished step; -1 until the first one is published (the restored step counts)."""
        return int(self._words[self._STEP])

    @step.setter
    def step(self, value: int) -> None:
        self._words[self._STEP] = value

    @property
    def beats(self) -> int:
        """Signs of life so far."""
        return int(self._words[self._BEATS])

    def beat(self) -> None:
        """One more sign of life (one thread only)."""
        self._words[self._BEATS] += 1

    @property
    def acknowledged(self) -> tuple[int, int]:
        """(request, step) of the newest acknowledged proposal; (0, 0) where there is none."""
        return int(self._words[self._ACK_REQUEST]), int(self._words[self._ACK_STEP])

    def acknowledge(self, request: int, step: int) -> None:
        """Acknowledge the proposal of `step` for `request`.

        The step is withdrawn first, so that no reader sees the new step with the old request.
        """
        self._words[self._ACK_STEP] = 0
        self._words[self._ACK_REQUEST] = request
        self._words[self._ACK_STEP] = step

    @property
    def phase(self) -> Phase:
        """How far the Session has come."""
        value = int(self._words[self._PHASE])
        return Phase(value) if value in Phase._value2member_map_ else Phase.NONE

    @property
    def phase_step(self) -> int:
        """Step at which the phase was reached."""
        return int(self._words[self._PHASE_STEP])

    def reached(self, phase: Phase, step: int) -> None:
        """Note the phase."""
        self._words[self._PHASE_STEP] = step
        self._words[self._PHASE] = int(phase)


class ControlPage:
    """The mapping of one node's control page. Use as a context manager or call `close`.

    The node part has one writer, the daemon; its setters are called by no one else. Every read takes microseconds,
    holds no lock and makes no system call.
    """

    def __init__(self, path: Path, mapping: mmap.mmap) -> None:
        self.path = path
        self._mapping = mapping
        self._bytes = memoryview(mapping)
        self._words = self._bytes.cast("q")
        self._ring = self._words[_RING : _RING + RING]
        self._ring_next = 0
        self._parts: dict[int, RankPart] = {}

    @classmethod
    def create(cls, path: Path) -> ControlPage:
        """Make the file (mode 0600), or map it as it is where it exists and is sound. The daemon calls this."""
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, _NUM_WORDS * 8)
            page = cls(path, mmap.mmap(descriptor, _NUM_WORDS * 8))
        finally:
            os.close(descriptor)
        if page._words[0] != _MAGIC:
            page._words[1:_NUM_WORDS] = memoryview(bytes((_NUM_WORDS - 1) * 8)).cast("q")
            page._words[0] = _MAGIC
        return page

    @classmethod
    def open(cls, path: Path) -> ControlPage:
        """Map the page that a daemon has made.

        Raises:
            FileNotFoundError: no daemon has made it yet.
            CorruptError: the file is no control page.
        """
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            if os.fstat(descriptor).st_size < _NUM_WORDS * 8:
                raise CorruptError(f"{path} is no control page: {os.fstat(descriptor).st_size} bytes")
            page = cls(path, mmap.mmap(descriptor, _NUM_WORDS * 8))
        finally:
            os.close(descriptor)
        if page._words[0] != _MAGIC:
            page.close()
            raise CorruptError(f"{path} is no control page: its magic number is missing")
        return page

    def close(self) -> None:
        """Unmap; nothing of the page may be used after it."""
        self._parts.clear()
        with contextlib.suppress(BufferError):  # a RankPart that someone still holds keeps the mapping until it goes
            self._ring.release()
            self._words.release()
            self._bytes.release()
            self._mapping.close()

    def __enter__(self) -> ControlPage:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def rank(self, local_rank: int) -> RankPart:
        """The part of `local_rank` (0 .. MAX_LOCAL_RANKS - 1)."""
        part = self._parts.get(local_rank)
        if part is None:
            assert 0 <= local_rank < MAX_LOCAL_RANKS, f"local rank {local_rank} is out of range"
            start = _RANKS + _RANK_WORDS * local_rank
            part = self._parts[local_rank] = RankPart(self._words[start : start + _RANK_WORDS])
        return part

    # --- the daemon and its generation

    @property
    def daemon_epoch(self) -> int:
        """Changes whenever a daemon takes over the arena."""
        return int(self._words[_EPOCH])

    def new_epoch(self) -> int:
        """A daemon takes over: the next epoch."""
        self._words[_EPOCH] += 1
        return self.daemon_epoch

    @property
    def generation(self) -> int:
        """`generation_word` of the generation that this node is in, 0 between generations."""
        return int(self._words[_GENERATION])

    @property
    def incarnation(self) -> int:
        """Number of the incarnation, 0 before the first."""
        return int(self._words[_INCARNATION])

    def start_generation(self, generation: GenerationId) -> None:
        """Forget the grants and agreed steps of older generations, then name this one."""
        self.end_generation()
        self._words[_INCARNATION] = generation.incarnation
        self._words[_GENERATION] = generation_word(generation)

    def end_generation(self) -> None:
        """No generation: every grant is void."""
        self._words[_GENERATION] = 0
        self._ring[:] = memoryview(bytes(RING * 8)).cast("q")
        self._ring_next = 0
        self._words[_GRANTED_THROUGH] = 0
        self._words[_MUST_PERSIST] = 0
        self.publish_agreed(())

    # --- grants

    def publish_grant(self, step: int, slot: int) -> None:
        """Grant `step`: every rank of this node copies it into slot `slot`."""
        assert 0 <= step < MAX_STEP, f"step {step} is out of range"
        assert 0 <= slot < MAX_SLOTS, f"slot {slot} is out of range"
        self._ring[self._ring_next % RING] = _grant_word(self.generation, step, slot)
        self._ring_next += 1
        self._words[_GRANTED_THROUGH] = max(self.granted_through, step)

    def withdraw_grant(self, step: int) -> None:
        """The version of `step` was abandoned: a rank that has not begun it copies nothing."""
        key = _grant_word(self.generation, step, 0) >> 8
        for index, word in enumerate(self._ring.tolist()):
            if word >> 8 == key:
                self._ring[index] = 0

    def grant(self, generation: int, step: int) -> int | None:
        """Slot granted for `step` to the generation with this `generation_word`, None where there is none."""
        if self._words[_GENERATION] != generation or self._words[_GRANTED_THROUGH] < step:
            return None
        key = (step << 16) | (generation & 0xFFFF)
        for word in self._ring.tolist():
            if word >> 8 == key:
                return (word & 0xFF) - 1
        return None

    @property
    def granted_through(self) -> int:
        """Largest step that was ever granted in this generation."""
        return int(self._words[_GRANTED_THROUGH])

    @property
    def must_persist(self) -> int:
        """Next step that has to become a version because it is persisted, 0 where none is known."""
        return int(self._words[_MUST_PERSIST])

    @must_persist.setter
    def must_persist(self, step: int) -> None:
        self._words[_MUST_PERSIST] = step

    # --- agreed steps

    def publish_agreed(self, entries: tuple[AgreedEntry, ...]) -> None:
        """Replace the table of agreed steps; only the newest `AGREED_ENTRIES` are kept."""
        self._words[_AGREED_SEQUENCE] |= 1
        for index in range(AGREED_ENTRIES):
            at = _AGREED + _AGREED_WORDS * index
            entry = entries[-AGREED_ENTRIES:][index] if index < len(entries[-AGREED_ENTRIES:]) else None
            self._words[at] = entry.request if entry else 0
            self._words[at + 1] = entry.step if entry else 0
            self._words[at + 2] = (2 if entry.kind == "stop" else 1) if entry else 0
            self._words[at + 3] = int(entry.confirmed) if entry else 0
        self._words[_AGREED_SEQUENCE] += 1

    @property
    def agreed_sequence(self) -> int:
        """Changes whenever the table changes: one load tells a worker that there is nothing new."""
        return int(self._words[_AGREED_SEQUENCE])

    def agreed(self) -> tuple[AgreedEntry, ...]:
        """The agreed steps as the leader last named them, oldest request first.

        A daemon that died in the middle of a change leaves the table empty until its successor writes it again.
        """
        for _ in range(_TRIES):
            before = self.agreed_sequence
            table = self._words[_AGREED : _AGREED + _AGREED_WORDS * AGREED_ENTRIES].tolist()
            if before % 2 == 0 and before == self.agreed_sequence:
                return tuple(
                    AgreedEntry(request, step, bool(confirmed), "stop" if kind == 2 else "save")
                    for request, step, kind, confirmed in zip(*[iter(table)] * _AGREED_WORDS, strict=True)
                    if request
                )
        return ()
