"""Job keys, and the seat that an agent takes on its host.

Agents of one job on one host take seats 0, 1, …; each seat is a file lock that only its agent holds (close-on-exec, so
no child keeps it). Arena, sockets and daemon carry key and seat: a new agent on the same seat finds what a killed one
left. A seat that another run of the same job holds is an error, not a neighbour.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import msgspec

from holdfast.checkpoint.version import GenerationId
from holdfast.errors import DECODE_ERRORS, PeerError, UsageError

logger = logging.getLogger(__name__)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,31}")
_MAX_SOCKET_PATH = 100
"""Less than the 107 bytes that the kernel allows, with room for the file's name."""
_TRIES, _TRY_S = 100, 0.01


def job_key(name: str | None, *, script: str, rendezvous_id: str | None, arguments: Sequence[str]) -> str:
    """What tells this job from others on the host: at most 32 letters, digits, dots, dashes, underscores."""
    if name is not None and _NAME.fullmatch(name):
        return name
    if name is not None:
        parts = [name]
    elif rendezvous_id is not None:
        parts = [str(os.getuid()), os.path.abspath(script), rendezvous_id]
    else:
        parts = [str(os.getuid()), os.path.abspath(script), os.getcwd(), *arguments]
    return hashlib.sha256("\0".join(parts).encode(errors="surrogateescape")).hexdigest()[:12]


def runtime_directory(*, make: bool = True) -> Path:
    """Directory of seats and sockets, mode 0700 and ours: under XDG_RUNTIME_DIR where that is usable, else /tmp.

    Args:
        make: False: only say where it would be.

    Raises:
        UsageError: the directory belongs to somebody else.
    """
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    if runtime and len(runtime) < _MAX_SOCKET_PATH - 70 and os.path.isdir(runtime) and os.access(runtime, os.W_OK):
        path = Path(runtime, "holdfast")
    else:
        path = Path("/tmp", f"holdfast-{os.getuid()}")
    return private(path) if make else path


def private(path: Path) -> Path:
    """Make the directory with mode 0700, or check that it is ours.

    Raises:
        UsageError: it belongs to somebody else, or cannot be made.
    """
    try:
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)
        found = path.lstat()
    except OSError as error:
        raise UsageError(f"{path} cannot be made ({error.strerror}): set XDG_RUNTIME_DIR, or TMPDIR") from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise UsageError(f"{path} is not a directory of this user: remove it, or set XDG_RUNTIME_DIR")
    if found.st_mode & 0o077:
        path.chmod(0o700)
    return path


class Tenant(msgspec.Struct, frozen=True, kw_only=True):
    """Who holds a seat; stands in the lock file."""

    pid: int
    endpoint: str
    """Rendezvous endpoint; "" for a job of one node, which shares its key with nobody."""
    node_rank: int | None = None

    def is_neighbour(self, other: Tenant) -> bool:
        """Whether both can be agents of one run."""
        if not self.endpoint or self.endpoint != other.endpoint:
            return False
        return self.node_rank is None or self.node_rank != other.node_rank


class RunRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Kept beside the sockets, so that a new agent on the seat continues the run of a killed one."""

    run_id: str
    run_dir: str
    generation: GenerationId | None = None
    """Newest generation that ran on the seat."""
    nodes: int = 0
    """How many nodes it had."""


class Seat:
    """The lowest seat of the job on this host that no living agent holds. Use as a context."""

    def __init__(self, key: str, tenant: Tenant, *, num_seats: int) -> None:
        """Nothing happens before ``with``.

        Args:
            key: the job's key.
            tenant: this agent.
            num_seats: most agents of the job, 1 for a job of one node.
        """
        self.key = key
        self._tenant = tenant
        self._num_seats = num_seats
        self._base = runtime_directory()
        self._lock: int | None = None
        self.number = -1

    def __enter__(self) -> Seat:
        """Take a seat.

        Raises:
            PeerError: another run holds one, or all are taken.
            UsageError: the directory of the seats cannot be used.
        """
        for number in range(self._num_seats):
            try:
                held_by = self._try(number)
            except OSError as error:
                raise UsageError(f"{self._base} cannot be used ({error.strerror}): set XDG_RUNTIME_DIR") from error
            if held_by is None:
                self.number = number
                return self
            if not self._tenant.is_neighbour(held_by):
                raise PeerError(
                    f"job {self.key} already runs on this host as process {held_by.pid}: "
                    "wait for it, or give this one another name with --hold-job"
                )
        raise PeerError(
            f"all {self._num_seats} seats of job {self.key} on this host are taken: see --nnodes, --hold-job"
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
            with contextlib.suppress(OSError):  # other jobs of this user have their seats there
                self._base.rmdir()

    @property
    def directory(self) -> Path:
        """Directory of the seat's sockets, mode 0700."""
        return self._base / f"{self.key}-{self.number}"

    @property
    def arena(self) -> Path:
        """Directory of the seat's arena."""
        return Path("/dev/shm", f"holdfast-{os.getuid()}-{self.key}-{self.number}")

    def record(self) -> RunRecord | None:
        """The run that was last on this seat and did not end in good order."""
        try:
            return msgspec.json.decode((self.directory / "run.json").read_bytes(), type=RunRecord)
        except (FileNotFoundError, *DECODE_ERRORS):
            return None

    def write_record(self, record: RunRecord) -> None:
        """Remember the run; where that fails (a full disk) what was remembered before stays."""
        new = self.directory / "run.json.new"
        try:
            new.write_bytes(msgspec.json.encode(record))
            new.replace(self.directory / "run.json")
        except OSError as error:
            logger.warning("%s cannot be written: %s", new, error)

    def clear(self) -> None:
        """The job has ended: nothing of the seat stays."""
        shutil.rmtree(self.directory, ignore_errors=True)

    def _try(self, number: int) -> Tenant | None:
        """Take seat `number`, or tell who holds it.

        The lock lies in the seat's directory, so a daemon whose time is up leaves that of a living agent alone.
        """
        directory = self._base / f"{self.key}-{number}"
        path = directory / "agent.lock"
        while True:
            directory.mkdir(mode=0o700, exist_ok=True)
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            except FileNotFoundError:
                continue  # a daemon removed the directory just now
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                try:
                    tenant = _read_tenant(descriptor)
                finally:
                    os.close(descriptor)
                if _is_alive(tenant.pid):
                    return tenant
                time.sleep(_TRY_S)  # its daemon holds the lock for the moment in which it removes the directory
                continue
            if _is_same_file(descriptor, path):
                break
            os.close(descriptor)  # its holder removed it between our open and our lock
        self._lock = descriptor
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, msgspec.json.encode(self._tenant), 0)
        return None


def _is_alive(pid: int) -> bool:
    """Whether the process exists; yes where nobody knows (0)."""
    return pid == 0 or Path("/proc", str(pid)).exists()


def _is_same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False


def _read_tenant(descriptor: int) -> Tenant:
    """Who holds the lock; waits a moment for one that has locked and not yet written its line."""
    for _ in range(_TRIES):
        try:
            return msgspec.json.decode(os.pread(descriptor, 4096, 0), type=Tenant)
        except DECODE_ERRORS:
            time.sleep(_TRY_S)
    return Tenant(pid=0, endpoint="")


def default_run_directory(key: str, run_id: str) -> Path:
    """Where a run's files go when the user names no directory."""
    return Path(tempfile.gettempdir(), f"holdfast-{os.getuid()}-runs", f"{key}-{run_id}")
