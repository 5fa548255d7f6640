"""The control page: one small shared mapping per node, read and written without locks, messages or system calls.

Every field is one aligned 64-bit word with one writer, so a load sees an old or a new value and never a mixture.
Fields that only mean something together are packed into one word (a grant) or guarded by a sequence word that is odd
while they change (the agreed step). A grant carries a part of its generation, so that what a fenced generation left
behind is never taken for news.

Writers: the node's daemon writes the node part, each worker its own rank part. Readers: everybody, agents too
(progress, hang detection, rehearsed faults). The page stays where it is when a daemon dies: a successor maps it.

    word 0..15        node: magic, epoch, generation, incarnation, pool, running, agreed sequence and agreed step,
                      settled step
    word 16..47       node: grant table, one word per slot of the pool in use
    word 48 + 16*r    rank part of local rank r
"""

from __future__ import annotations

import contextlib
import enum
import mmap
import os
import time
from pathlib import Path
from typing import Final

from holdfast.checkpoint.version import GenerationId
from holdfast.errors import CorruptError, PeerTimeout
from holdfast.snapshot.reports import Agreed

MAX_LOCAL_RANKS: Final = 253
MAX_SLOTS: Final = 32
MAX_STEP: Final = 1 << 39
NO_LIMIT: Final = (1 << 63) - 1
"""`RankPart.section_until` of a section without a limit."""

_MAGIC: Final = 0x3130_7466_646C_6F68  # "holdft01"
_EPOCH, _GENERATION, _INCARNATION, _POOL, _RUNNING, _AGREED_SEQUENCE = 1, 2, 3, 4, 5, 6
_AGREED_NUMBER, _AGREED_STEP, _AGREED_FLAGS = 7, 8, 9
_SETTLED = 10
_STOP, _CONFIRMED, _PERSIST, _REGROUP = 1, 2, 4, 8
_GRANTS = 16
_RANKS, _RANK_WORDS = 48, 16
_NUM_WORDS: Final = _RANKS + _RANK_WORDS * MAX_LOCAL_RANKS
_TRIES: Final = 1000


class Phase(enum.IntEnum):
    """How far a worker's Session has come; the value of `RankPart.phase`."""

    NONE = 0
    OPENED = 1
    RESTORED = 2
    FIRST_STEP = 3
    CLOSED = 4
    WAITING = 5
    """At the agreed step at which the membership changes, for its end."""


def stack_file(arena: Path, local_rank: int) -> Path:
    """Where the worker of `local_rank` writes its stacks, in the arena's directory; the agent reads and empties it."""
    return arena / f"stacks-{local_rank}"


def generation_word(generation: GenerationId) -> int:
    """`generation` as one positive 63-bit word; different for different generations of a job."""
    return (int(generation.nonce, 16) << 31) | (generation.generation & 0x7FFF_FFFF)


class RankPart:
    """The words of one local rank. Written by that worker only (the daemon clears them when a generation starts)."""

    _GENERATION, _PID, _STEP, _BEATS, _ACKNOWLEDGED, _PHASE, _PHASE_STEP = range(7)
    _BEAT_NS, _SECTION, _SIGNAL, _STEP_NS, _LEAD_NS, _INNER = range(7, 13)

    def __init__(self, words: memoryview) -> None:
        self._words = words

    def enter(self, generation: GenerationId, pid: int) -> None:
        """Take the seat: a worker calls this once, before anything else here."""
        self.clear()
        self._words[self._BEAT_NS] = time.monotonic_ns()
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
        self._words[self._INNER] = 0
        self._words[self._STEP] = value

    @property
    def beats(self) -> int:
        """Signs of life so far."""
        return int(self._words[self._BEATS])

    def beat(self) -> None:
        """One more sign of life. A count that two threads raise at once may grow by one only, which nobody minds."""
        self._words[self._BEATS] += 1
        self._words[self._INNER] += 1
        self._words[self._BEAT_NS] = time.monotonic_ns()

    @property
    def inner_beats(self) -> int:
        """Signs of life since the newest finished step: how far into the next one the rank is."""
        return int(self._words[self._INNER])

    @property
    def beat_ns(self) -> int:
        """time.monotonic_ns() of the newest sign of life: one clock for all processes of a host."""
        return int(self._words[self._BEAT_NS])

    @property
    def section_until(self) -> int:
        """While the script is in a declared stretch without steps: time.monotonic_ns() at which that has lasted too
        long, `NO_LIMIT` where it may last; else 0."""
        return int(self._words[self._SECTION])

    @section_until.setter
    def section_until(self, value: int) -> None:
        self._words[self._SECTION] = value

    @property
    def stack_signal(self) -> int:
        """Number of the signal at which the worker writes its Python stacks, 0 where it does not."""
        return int(self._words[self._SIGNAL])

    @stack_signal.setter
    def stack_signal(self, value: int) -> None:
        self._words[self._SIGNAL] = value

    @property
    def step_ns(self) -> int:
        """How long the newest finished step took, boundary to boundary, in ns; 0 before there is one."""
        return int(self._words[self._STEP_NS])

    @property
    def lead_ns(self) -> int:
        """The part of `step_ns` before the first forward pass had ended: what no other rank delays."""
        return int(self._words[self._LEAD_NS])

    def timed(self, step_ns: int, lead_ns: int) -> None:
        """Note how long the newest step took."""
        self._words[self._STEP_NS] = step_ns
        self._words[self._LEAD_NS] = lead_ns

    @property
    def acknowledged(self) -> int:
        """Number of the newest acknowledged proposal of an agreed step, 0 where there is none."""
        return int(self._words[self._ACKNOWLEDGED])

    @acknowledged.setter
    def acknowledged(self, number: int) -> None:
        self._words[self._ACKNOWLEDGED] = number

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
        self._grants = self._words[_GRANTS : _GRANTS + MAX_SLOTS]
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

    @classmethod
    def wait(cls, path: Path, deadline: float) -> ControlPage:
        """As `open`, but waits for a daemon to make it, until `deadline` (`time.monotonic()`).

        Raises:
            PeerTimeout: none did.
        """
        while True:
            try:
                return cls.open(path)
            except (FileNotFoundError, CorruptError) as error:
                if time.monotonic() >= deadline:
                    raise PeerTimeout(f"no snapshot daemon has made {path}: {error}") from error
                time.sleep(0.005)

    def close(self) -> None:
        """Unmap; nothing of the page may be used after it."""
        self._parts.clear()
        with contextlib.suppress(BufferError):  # a RankPart that someone still holds keeps the mapping until it goes
            self._grants.release()
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
        """No generation: every grant and agreed step is void."""
        self._words[_GENERATION] = 0
        self._words[_RUNNING] = 0
        self.clear_grants()
        self.publish_agreed(None)
        self._words[_SETTLED] = 0

    @property
    def running(self) -> bool:
        """All ranks of the Session have restored their state."""
        return bool(self._words[_RUNNING])

    @running.setter
    def running(self, value: bool) -> None:
        self._words[_RUNNING] = int(value)

    # --- grants

    @property
    def pool(self) -> int:
        """Number of the pool whose slots the grant table speaks of."""
        return int(self._words[_POOL])

    def use_pool(self, pool: int) -> None:
        """The grant table speaks of the slots of `pool` from now on; grants into another one are void."""
        if pool != self.pool:
            self.clear_grants()
            self._words[_POOL] = pool

    def clear_grants(self) -> None:
        """Take back every grant."""
        self._grants[:] = memoryview(bytes(8 * MAX_SLOTS)).cast("q")

    def publish_grant(self, slot: int, step: int) -> None:
        """Every rank of this node copies `step` into slot `slot`; what the slot was granted for before is void."""
        assert 0 <= step < MAX_STEP, f"step {step} is out of range"
        self._grants[slot] = (step << 16) | (self.generation & 0xFFFF)

    def withdraw_grant(self, slot: int, step: int) -> None:
        """Slot `slot` is no longer granted for `step`; a newer grant of the slot stays."""
        if self._grants[slot] >> 16 == step:
            self._grants[slot] = 0

    def grants(self) -> list[tuple[int, int]]:
        """What stands in the table, for a successor of the daemon: (slot, step)."""
        return [(slot, word >> 16) for slot, word in enumerate(self._grants.tolist()) if word]

    def grant(self, generation: int, step: int) -> int | None:
        """Slot granted for `step` to the generation with this `generation_word`, None where there is none."""
        if self._words[_GENERATION] != generation:
            return None
        try:
            return self._grants.tolist().index((step << 16) | (generation & 0xFFFF))
        except ValueError:
            return None

    def granted_before(self, generation: int, step: int) -> list[int]:
        """Steps below `step` that stand in the table for this generation."""
        if self._words[_GENERATION] != generation:
            return []
        return [word >> 16 for word in self._grants.tolist() if word and word >> 16 < step]

    # --- the agreed step

    def publish_agreed(self, agreed: Agreed | None) -> None:
        """Write the agreed step that the leader named last."""
        flags = 0
        if agreed is not None:
            flags = _STOP * (agreed.kind == "stop") | _REGROUP * (agreed.kind == "regroup")
            flags |= _CONFIRMED * agreed.confirmed | _PERSIST * agreed.persist
        self._words[_AGREED_SEQUENCE] |= 1
        self._words[_AGREED_NUMBER] = agreed.number if agreed else 0
        self._words[_AGREED_STEP] = agreed.step if agreed else 0
        self._words[_AGREED_FLAGS] = flags
        self._words[_AGREED_SEQUENCE] += 1

    @property
    def agreed_sequence(self) -> int:
        """Changes whenever the agreed step changes: one load tells a worker that there is nothing new."""
        return int(self._words[_AGREED_SEQUENCE])

    def agreed(self) -> Agreed | None:
        """The agreed step that the leader named last, less tag, metrics and requests.

        A daemon that died in the middle of a change leaves none until its successor writes it again.
        """
        for _ in range(_TRIES):
            before = self.agreed_sequence
            number, step, flags = self._words[_AGREED_NUMBER : _AGREED_FLAGS + 1].tolist()
            if before % 2 == 0 and before == self.agreed_sequence:
                kind = "stop" if flags & _STOP else "regroup" if flags & _REGROUP else "save"
                confirmed, persist = bool(flags & _CONFIRMED), bool(flags & _PERSIST)
                return (
                    Agreed(number=number, step=step, confirmed=confirmed, kind=kind, persist=persist)
                    if number
                    else None
                )
        return None

    @property
    def settled(self) -> int:
        """The agreed step of a regroup, once its version outlives the generation; 0 before."""
        return int(self._words[_SETTLED])

    @settled.setter
    def settled(self, step: int) -> None:
        self._words[_SETTLED] = step
