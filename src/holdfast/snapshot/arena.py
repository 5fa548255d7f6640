"""The arena: shared memory of one node that outlives its workers and its daemon.

A directory under /dev/shm (mode 0700) of files (mode 0600), opened and mapped without
`multiprocessing.shared_memory`, whose resource tracker would remove a segment when a process that attached to it is
killed. Who finds the directory later (a successor of the daemon) reads everything that it has to know from the files:

    control                               the control page (`holdfast.snapshot.control`)
    node.state                            generations, parents, configuration (`NodeState`), replaced atomically
    slot-<pool>-<local_rank>-<index>      a slot: 4096 bytes of header, then room for one image
    parity-<n>, parity-<n>.record         parities for other nodes (`holdfast.snapshot.parity`)

A slot header exists twice; each write goes to the older copy with the next sequence number, and a reader takes the
newest copy whose checksum holds. A writer that dies in the middle of a header write thus leaves the header before it:
FILLING or CLEAN as it was, which is the truth, because the image is touched only after `begin` has returned and named
clean only after the last byte of it.

All slots of a pool have the same capacity. When images outgrow it, a new pool is made; the old one stays until its
newest complete version is no longer needed.
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
import errno
import functools
import logging
import mmap
import os
import re
import shutil
import stat
import struct
import sys
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import msgspec
import xxhash

from holdfast.checkpoint.version import GenerationId, Version
from holdfast.errors import DECODE_ERRORS, CorruptError, StorageError
from holdfast.snapshot.control import ControlPage
from holdfast.snapshot.messages import LeaderRestore, PersistEnded, StartGeneration
from holdfast.snapshot.records import Parentage, SessionConfig
from holdfast.snapshot.reports import Agreed, Pin, Request

SLOT_HEADER_BYTES: Final = 4096
_COPY_BYTES: Final = 2048
_MAGIC: Final = b"hfslot01"
_FIELDS: Final = struct.Struct("<8sQIIIQIIQQQ8s16s")
"""magic, sequence, state, incarnation, generation, step, global rank, world size, pid, pid start, image bytes, nonce,
header digest."""
_DIGEST: Final = struct.Struct("<Q")
_NAME: Final = re.compile(r"slot-(\d+)-(\d+)-(\d+)")
_FALLOCATE_CHUNK: Final = 64 << 20
_MADV_POPULATE_WRITE: Final = 23
_GRAIN: Final = 2 << 20
_ROOM_PART: Final = 256
_log = logging.getLogger(__name__)


class SlotState(enum.IntEnum):
    """What a slot holds."""

    FREE = 0
    FILLING = 1
    CLEAN = 2


@dataclass(frozen=True, kw_only=True)
class SlotHeader:
    """What the header of a slot says."""

    state: SlotState
    sequence: int
    version: Version | None
    """None where nothing was ever written."""
    global_rank: int
    world_size: int
    pid: int
    pid_start: int
    """Start time of the writer in clock ticks since boot: tells a reused pid."""
    size_bytes: int
    """Bytes of the image; 0 unless clean."""
    header_digest: bytes
    """16 bytes: xxh3_128 of the image's header; zeros unless clean."""


EMPTY_HEADER: Final = SlotHeader(
    state=SlotState.FREE,
    sequence=0,
    version=None,
    global_rank=0,
    world_size=0,
    pid=0,
    pid_start=0,
    size_bytes=0,
    header_digest=bytes(16),
)


def process_start(pid: int) -> int | None:
    """Start time of process `pid` in clock ticks since boot, None where no such process runs (a zombie does not)."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rsplit(b")", 1)[1].split()
        return None if fields[0] in b"ZX" else int(fields[19])
    except (OSError, IndexError, ValueError):
        return None


@functools.cache
def _own_start(pid: int) -> int:
    """Start time of this process; by its pid, which differs after a fork."""
    return process_start(pid) or 0


class Slot:
    """One slot file, mapped. Used by the copier of the worker that it belongs to; the daemon maps it to read.

    `begin`, the bytes of the image, `finish`: in this order, by one thread at a time.
    """

    def __init__(self, path: Path, mapping: mmap.mmap) -> None:
        self.path = path
        self._mapping = mapping
        self._bytes = memoryview(mapping)
        self.image: memoryview = self._bytes[SLOT_HEADER_BYTES:]
        """Room for one image, writable; starts at a multiple of 4096 bytes in memory and in the file."""

    @classmethod
    def open(cls, path: Path | str) -> Slot:
        """Map the slot file at `path`, which a daemon has made.

        Raises:
            CorruptError: the file is too short to be a slot.
            OSError: there is no such file.
        """
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            size = os.fstat(descriptor).st_size
            if size < SLOT_HEADER_BYTES:
                raise CorruptError(f"{path} is no slot: {size} bytes")
            return cls(Path(path), mmap.mmap(descriptor, size))
        finally:
            os.close(descriptor)

    @property
    def capacity_bytes(self) -> int:
        """Room for one image."""
        return len(self._bytes) - SLOT_HEADER_BYTES

    def prefault(self) -> None:
        """Map every page now, without holding the interpreter lock, so that the first copy does not pay for it."""
        _populate(self._mapping)

    def read_header(self) -> SlotHeader:
        """The newest sound copy of the header; `EMPTY_HEADER` where there is none."""
        return read_slot_header(self._bytes[:SLOT_HEADER_BYTES])

    def begin(self, version: Version, global_rank: int, world_size: int) -> None:
        """The slot is being filled with the image of `global_rank` at `version` by this process."""
        pid = os.getpid()
        self._write(
            replace(
                EMPTY_HEADER,
                state=SlotState.FILLING,
                sequence=self.read_header().sequence + 1,
                version=version,
                global_rank=global_rank,
                world_size=world_size,
                pid=pid,
                pid_start=_own_start(pid),
            )
        )

    def finish(self, size_bytes: int, header_digest: bytes) -> None:
        """The image is whole: the first `size_bytes` of `image`. `header_digest`: 16 bytes, xxh3_128 of its header."""
        header = self.read_header()
        assert header.state is SlotState.FILLING, f"{self.path} is finished but was not begun: {header}"
        assert 0 < size_bytes <= self.capacity_bytes, f"an image of {size_bytes} bytes in {self.path}"
        self._write(
            replace(
                header,
                state=SlotState.CLEAN,
                sequence=header.sequence + 1,
                size_bytes=size_bytes,
                header_digest=header_digest,
            )
        )

    def clear(self) -> None:
        """Nothing is in the slot. The daemon calls this when it knows that no writer is left."""
        self._write(replace(EMPTY_HEADER, sequence=self.read_header().sequence + 1))

    def close(self) -> None:
        """Unmap; views of `image` that someone still holds keep the mapping until they go."""
        with contextlib.suppress(BufferError):
            self.image.release()
            self._bytes.release()
            self._mapping.close()

    def _write(self, header: SlotHeader) -> None:
        at = _COPY_BYTES * (header.sequence % 2)
        copy = pack_slot_header(header)
        self._bytes[at : at + len(copy)] = copy


def pack_slot_header(header: SlotHeader) -> bytes:
    """One copy of the header, with its checksum."""
    generation = header.version.generation if header.version else None
    fields = _FIELDS.pack(
        _MAGIC,
        header.sequence,
        header.state,
        generation.incarnation if generation else 0,
        generation.generation if generation else 0,
        header.version.step if header.version else 0,
        header.global_rank,
        header.world_size,
        header.pid,
        header.pid_start,
        header.size_bytes,
        generation.nonce.encode() if generation else b"",
        header.header_digest,
    )
    return fields + _DIGEST.pack(xxhash.xxh3_64_intdigest(fields))


def _unpack_copy(copy: memoryview) -> SlotHeader | None:
    if len(copy) < _FIELDS.size + _DIGEST.size:  # a file that was cut short
        return None
    fields = copy[: _FIELDS.size]
    (digest,) = _DIGEST.unpack_from(copy, _FIELDS.size)
    if bytes(fields[:8]) != _MAGIC or xxhash.xxh3_64_intdigest(fields) != digest:
        return None
    _, sequence, state, incarnation, number, step, rank, world, pid, start, size, nonce, digest = _FIELDS.unpack(fields)
    if state not in SlotState._value2member_map_:
        return None
    generation = GenerationId(incarnation=incarnation, nonce=nonce.rstrip(b"\0").decode("ascii"), generation=number)
    return SlotHeader(
        state=SlotState(state),
        sequence=sequence,
        version=generation.at(step) if nonce.rstrip(b"\0") else None,
        global_rank=rank,
        world_size=world,
        pid=pid,
        pid_start=start,
        size_bytes=size,
        header_digest=digest,
    )


def read_slot_header(data: memoryview | bytes) -> SlotHeader:
    """The newest sound copy in the 4096 bytes of a slot header; `EMPTY_HEADER` where none is sound."""
    view = memoryview(data)
    copies = [_unpack_copy(view[at : at + _COPY_BYTES]) for at in (0, _COPY_BYTES)]
    return max((copy for copy in copies if copy is not None), key=lambda copy: copy.sequence, default=EMPTY_HEADER)


class NodeState(msgspec.Struct, frozen=True, kw_only=True):
    """What a successor of the daemon has to know beside the slots; lies in `node.state`."""

    run_id: str | None = None
    generations: tuple[GenerationId, ...] = ()
    """Generations that this node took part in, oldest first."""
    parents: tuple[Parentage, ...] = ()
    history: str | None = None
    config: SessionConfig | None = None
    start: StartGeneration | None = None
    """The generation that runs now or ran last."""
    running: bool = False
    """No EndGeneration came yet."""
    endpoint: str = ""
    """tcp:// endpoint of the daemon; a successor takes it over, the other nodes know no other."""
    bulk: str = ""
    """tcp:// endpoint of its bulk server; taken over as well."""
    redundancy: str = "auto"
    domain: str = ""
    bandwidth: float = 0.0
    """As in Hello."""
    linger_s: float = 600.0
    agent_pid: int = 0
    memory_limit_bytes: int | None = None
    pool: int = -1
    """Number of the newest pool of slots, -1 where there is none."""
    num_slots: int = 0
    capacity_bytes: int = 0
    restore: LeaderRestore | None = None
    """What the generation of `start` started from; None until the leader has chosen."""
    requests: tuple[Request, ...] = ()
    """Open requests for agreed steps."""
    pinned: tuple[Pin, ...] = ()
    """Versions kept for a persist."""
    ended: tuple[PersistEnded, ...] = ()
    """The newest persists of this generation that ended: workers may not have heard of them."""
    agreed: Agreed | None = None
    """The agreed step that stands on the control page, with what the page has no room for."""
    protected: Version | None = None
    """The version that the leader's orders named as protected last."""
    newest_step: int = -1
    """Newest finished step that any worker of this node published."""


@dataclass(frozen=True)
class FoundSlot:
    """A slot file that lies in the arena."""

    path: Path
    pool: int
    local_rank: int
    index: int
    capacity_bytes: int
    header: SlotHeader


class Arena:
    """The directory of one node. The daemon owns it; every method is the daemon's."""

    def __init__(self, directory: Path, control: ControlPage, state: NodeState) -> None:
        self.directory = directory
        self.control = control
        self.state = state
        self._stop = threading.Event()  # set by `remove`: reservations under way give up

    @classmethod
    def open(cls, directory: Path) -> Arena:
        """Make the directory, or adopt what a predecessor left there (a damaged `node.state` counts as none).

        Raises:
            StorageError: the directory belongs to someone else, is open to others, or has no room.
        """
        try:
            os.makedirs(directory, mode=0o700, exist_ok=True)
            status = os.lstat(directory)
        except OSError as error:
            raise StorageError(
                f"cannot make the arena {directory}: {error}; set --hold-job to a shorter name"
            ) from error
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
            raise StorageError(
                f"the arena {directory} is no private directory of this user (mode {stat.filemode(status.st_mode)}, "
                f"owner {status.st_uid}): remove it"
            )
        try:
            for leftover in directory.glob("making-*"):
                leftover.unlink(missing_ok=True)
            page = ControlPage.create(directory / "control")
        except OSError as error:
            raise StorageError(f"cannot make {directory}/control: {error}; free some of the shared memory") from error
        return cls(directory, page, _load_state(directory / "node.state"))

    def save_state(self, state: NodeState) -> None:
        """Replace `node.state` atomically. Where /dev/shm is full the file stays as it was until the next call: a
        successor would know less, which is better than a daemon that dies of it."""
        self.state = state
        data = msgspec.msgpack.encode(state)
        temporary = self.directory / "making-node.state"
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            with open(descriptor, "wb") as file:
                file.write(xxhash.xxh3_128_digest(data) + data)
            os.replace(temporary, self.directory / "node.state")
        except OSError as error:
            _log.error("%s/node.state cannot be written: %s; the node goes on without", self.directory, error)
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)

    def slot_path(self, pool: int, local_rank: int, index: int) -> Path:
        """Where that slot lies."""
        return self.directory / f"slot-{pool}-{local_rank}-{index}"

    def scan(self) -> list[FoundSlot]:
        """Every whole slot file with its header, in the order of pool, local rank and index."""
        found = []
        for path in self.directory.iterdir():
            match = _NAME.fullmatch(path.name)
            if match is not None:
                with contextlib.suppress(FileNotFoundError):
                    pool, local_rank, index = (int(group) for group in match.groups())
                    header, size = read_header_of(path)
                    found.append(FoundSlot(path, pool, local_rank, index, size - SLOT_HEADER_BYTES, header))
        return sorted(found, key=lambda slot: (slot.pool, slot.local_rank, slot.index))

    def used_bytes(self) -> int:
        """Bytes of all slot files and parity buffers."""
        return self.parity_bytes() + sum(slot.capacity_bytes + SLOT_HEADER_BYTES for slot in self.scan())

    def parity_bytes(self) -> int:
        """Bytes of all parity buffers."""
        found = 0
        for path in self.directory.glob("parity-?"):
            with contextlib.suppress(FileNotFoundError):
                found += path.stat().st_size
        return found

    def reserve(self, pool: int, local_ranks: Iterable[int], num_slots: int, capacity_bytes: int) -> int:
        """Make the missing slots of `pool` of these local ranks, with real pages behind them; blocks, call it from a
        thread of its own.

        A slot appears under its name only when all of its pages are there, so a successor never adopts half of one.

        Returns:
            How many slots every one of them has: fewer than `num_slots` where memory ended early.
        """
        local_ranks = tuple(local_ranks)
        with ThreadPoolExecutor(max(1, min(4, os.cpu_count() or 1)), thread_name_prefix="holdfast-reserve") as threads:
            for index in range(num_slots):
                paths = [self.slot_path(pool, local_rank, index) for local_rank in local_ranks]
                missing = [path for path in paths if not path.exists()]
                if not all(list(threads.map(lambda path: self.reserve_file(path, capacity_bytes), missing))):
                    self.drop(missing)
                    return index
        return num_slots

    def reserve_file(self, path: Path, capacity_bytes: int) -> bool:
        """Make a file of a header and `capacity_bytes`, with real pages behind it; blocks. False: there is no room."""
        temporary = path.with_name(f"making-{path.name}")
        size = SLOT_HEADER_BYTES + capacity_bytes
        try:
            if size > self._free_bytes():  # taking what is left first would leave nothing to others meanwhile
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            try:
                for start in range(0, size, _FALLOCATE_CHUNK):
                    if self._stop.is_set():
                        raise InterruptedError("the arena is being removed")
                    os.posix_fallocate(descriptor, start, min(_FALLOCATE_CHUNK, size - start))
            finally:
                os.close(descriptor)
            os.rename(temporary, path)
        except OSError as error:
            _log.warning("cannot reserve %d bytes for %s: %s", size, path, error)
            temporary.unlink(missing_ok=True)
            return False
        return True

    def _free_bytes(self) -> int:
        found = os.statvfs(self.directory)
        return found.f_bavail * found.f_frsize if found.f_blocks else sys.maxsize  # a tmpfs without a limit tells none

    def drop(self, paths: Iterable[Path]) -> None:
        """Remove slot files; who has mapped them keeps the bytes until it unmaps."""
        for path in paths:
            path.unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove everything, the directory too."""
        self._stop.set()
        shutil.rmtree(self.directory, ignore_errors=True)


def read_header_of(path: Path) -> tuple[SlotHeader, int]:
    """The header of the slot file at `path` and the size of the file in bytes, without mapping it.

    Raises:
        OSError: there is no such file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        return read_slot_header(os.pread(descriptor, SLOT_HEADER_BYTES, 0)), os.fstat(descriptor).st_size
    finally:
        os.close(descriptor)


def round_capacity(size_bytes: int) -> int:
    """Capacity of a slot for images of `size_bytes`: a little room, so that the next layout of the same state fits.

    Every slot has it, so it counts six times against the memory that users were told of: a 256th is more than headers,
    objects and the cuts of pieces differ by.
    """
    return -(-(size_bytes + size_bytes // _ROOM_PART) // _GRAIN) * _GRAIN


def _load_state(path: Path) -> NodeState:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return NodeState()
    if xxhash.xxh3_128_digest(data[16:]) != data[:16]:
        _log.warning("%s is damaged; what it knew is forgotten", path)
        return NodeState()
    try:
        return msgspec.msgpack.decode(data[16:], type=NodeState)
    except DECODE_ERRORS as error:
        _log.warning("%s is of another version of holdfast (%s); what it knew is forgotten", path, error)
        return NodeState()


def _populate(mapping: mmap.mmap) -> None:
    """Fault in all pages of `mapping`; ctypes releases the interpreter lock, `mmap.madvise` would hold it."""
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    first = ctypes.c_char.from_buffer(mapping)
    try:
        start = ctypes.addressof(first)
        for offset in range(0, len(mapping), _FALLOCATE_CHUNK):
            if madvise(start + offset, min(_FALLOCATE_CHUNK, len(mapping) - offset), _MADV_POPULATE_WRITE):
                return  # a kernel older than 5.14: pages are mapped at their first use
    finally:
        del first
