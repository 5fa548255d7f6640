"""Storages: where checkpoints are written and read. POSIX file systems here, object stores in `object_storage`."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NoReturn, Protocol

import msgspec

from holdfast.checkpoint.places import UrlPath, place
from holdfast.checkpoint.source import FileSource, Source
from holdfast.errors import StorageError

TEMPORARY_PREFIX = ".tmp-"
"""Names that start so are writes that did not end; nothing reads them."""
_TEMPORARY = re.compile(r"\.tmp-.+-\d+-[0-9a-f]{8}", re.ASCII | re.DOTALL)
"""The whole of such a name: what it becomes, the writer's pid, and chance."""
_BATCH_BYTES = 8 << 20
_BATCH_BUFFERS = 512
_WRITEBACK_BYTES = 1 << 20
"""Less than this is left to the fsync."""
_SYNC_FILE_RANGE_WRITE = 2
"""From linux/fs.h: begin to write dirty pages, wait for nothing."""
_AT_FDCWD, _RENAME_NOREPLACE = -100, 1
"""From linux/fcntl.h and linux/fs.h."""


class StorageEntry(msgspec.Struct, frozen=True):
    """One name in a folder."""

    name: str
    size_bytes: int
    is_folder: bool
    time: float
    """Unix seconds of the last change; 0 of a folder in an object store."""


class Storage(Protocol):
    """Where checkpoints lie. These six methods are the whole surface (one more than a seam should have: whoever writes
    images must be able to say how they are read, and no method here could be made of the others).

    Every method raises `StorageError`, with the path and what to do. A process killed at any instant leaves under a
    name either nothing (or what was there) or the whole content.
    """

    def list(self, folder: str | Path) -> list[StorageEntry]:
        """Names in a folder, sorted; none where the folder does not exist. Called to find checkpoints."""
        ...

    def read(self, path: str | Path, *, limit: int) -> bytes:
        """A whole small object: root, index, history. More than `limit` bytes is an error. Images are read by range,
        through a `Source`."""
        ...

    def write(self, path: str | Path, chunks: Iterable[bytes | memoryview], *, exclusive: bool = False) -> int:
        """Write an object durably, folders included; its size in bytes. It appears whole, after the last chunk, or not
        at all. `exclusive`: an error where the name exists, decided by the storage itself, whoever else writes at the
        same time. Called for images, then the index, then (exclusive) the root."""
        ...

    def source(self, path: str | Path, offset: int = 0) -> Source:
        """An object, from byte `offset` on, to be read by range. Nothing is opened before the first read. Called for
        each image of a checkpoint that is opened."""
        ...

    def move(self, path: str | Path, to: str | Path) -> None:
        """Rename a folder durably. Called to set checkpoints aside."""
        ...

    def remove(self, path: str | Path) -> None:
        """Remove an object, or a folder with all in it, its root first: what is left is no checkpoint. Called by
        retention, and for what interrupted saves left."""
        ...


class PosixStorage:
    """Files. Each write goes to a temporary name in the same folder, is synced, gets its name by link or rename, and
    the folder is synced."""

    def list(self, folder: str | Path) -> list[StorageEntry]:
        """See `Storage.list`."""
        try:
            with os.scandir(folder) as found:
                entries = [entry for item in found for entry in _entry(item)]
        except FileNotFoundError:
            return []
        except OSError as error:
            refuse("listed", folder, error)
        return sorted(entries, key=lambda entry: entry.name)

    def read(self, path: str | Path, *, limit: int) -> bytes:
        """See `Storage.read`."""
        try:
            with open(path, "rb", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                if size > limit:
                    raise StorageError(
                        f"{path} has {size} bytes, at most {limit} are expected: it is no file of holdfast"
                    )
                return file.read(limit)
        except OSError as error:
            refuse("read", path, error)

    def write(self, path: str | Path, chunks: Iterable[bytes | memoryview], *, exclusive: bool = False) -> int:
        """See `Storage.write`."""
        return self._put(path, lambda temporary: _write_file(temporary, chunks), exclusive=exclusive)

    def write_header_last(
        self, path: str | Path, header_bytes: int, header: Callable[[], bytes], chunks: Iterable[bytes | memoryview]
    ) -> int:
        """The same for content whose first bytes follow from the others (checksums), so that these are gone through
        once.

        Args:
            path: of the object.
            header_bytes: length of what `header` gives.
            header: called after the last chunk was taken.
            chunks: what follows the header.
        """
        return self._put(path, lambda temporary: _write_file(temporary, chunks, header_bytes, header))

    def _put(self, path: str | Path, write: Callable[[Path], int], *, exclusive: bool = False) -> int:
        """Write under a temporary name, then give the name."""
        path = Path(path)
        temporary = path.with_name(f"{TEMPORARY_PREFIX}{path.name}-{os.getpid()}-{secrets.token_hex(4)}")
        try:
            make_folders(path.parent)
            size = write(temporary)
            try:
                if exclusive:
                    _link(temporary, path)
                else:
                    os.replace(temporary, path)
            except FileExistsError as error:
                raise StorageError(f"{path} exists already and is never changed: use another name") from error
            sync_folder(path.parent)
            return size
        except OSError as error:
            refuse("written", path, error)
        finally:
            with suppress(OSError):
                os.unlink(temporary)

    def source(self, path: str | Path, offset: int = 0) -> FileSource:
        """See `Storage.source`."""
        return FileSource(path, offset)

    def move(self, path: str | Path, to: str | Path) -> None:
        """See `Storage.move`."""
        path, to = Path(path), Path(to)
        try:
            make_folders(to.parent)
            os.rename(path, to)
            sync_folder(to.parent)
            sync_folder(path.parent)
        except OSError as error:
            refuse("moved", path, error)

    def remove(self, path: str | Path) -> None:
        """See `Storage.remove`."""
        path = Path(path)
        try:
            if path.is_dir() and not path.is_symlink():  # a link goes; what it leads to is somebody else's
                with suppress(FileNotFoundError):
                    os.unlink(path / "root")
                    sync_folder(path)
                shutil.rmtree(path)
            else:
                os.unlink(path)
            sync_folder(path.parent)
        except OSError as error:
            refuse("removed", path, error)


def storage_of(path: str | Path) -> Storage:
    """The storage that a path or a URL belongs to.

    Raises:
        UsageError: a URL that nothing here opens.
    """
    if isinstance(place(path), UrlPath):
        from holdfast.checkpoint.object_storage import ObjectStorage

        return ObjectStorage()
    return PosixStorage()


def remove_leftovers(storage: Storage, folder: str | Path) -> None:
    """Remove writes that did not end; called by whoever is about to finish what belongs into the folder.

    Raises:
        StorageError: one cannot be removed.
    """
    for entry in storage.list(folder):
        if _TEMPORARY.fullmatch(entry.name) and not entry.is_folder:
            storage.remove(Path(folder) / entry.name)


_ADVICE = {
    errno.ENOSPC: "no space is left: free some, or keep fewer checkpoints",
    errno.EDQUOT: "the disk quota is used up: free some space, or keep fewer checkpoints",
    errno.EACCES: "permission denied: give this user the right to write there, or choose another checkpoint_dir",
    errno.EPERM: "not permitted: give this user the right to write there, or choose another checkpoint_dir",
    errno.EROFS: "the file system is read-only: choose another checkpoint_dir",
    errno.ENOTDIR: "a part of the path is a file: choose another checkpoint_dir",
    errno.ENOENT: "it does not exist",
    errno.EIO: "the device reports an error: check the disk",
}


def refuse(done: str, path: str | Path, error: OSError) -> NoReturn:
    """Raise `StorageError` for what the system said when `path` was to be `done`."""
    advice = _ADVICE.get(error.errno or 0, error.strerror or str(error))
    if done in ("read", "listed") and error.errno in (errno.EACCES, errno.EPERM):
        advice = "permission denied: give this user the right to read it"
    raise StorageError(f"{path} cannot be {done}: {advice}") from error


def _entry(item: os.DirEntry[str]) -> Iterator[StorageEntry]:
    try:
        stat = item.stat()
        yield StorageEntry(item.name, stat.st_size, item.is_dir(), stat.st_mtime)
    except OSError as error:
        # A name may go between the scan and the stat (another process's retention, of another host too), and a link
        # may lead to itself: there is nothing under it.
        if error.errno not in (errno.ENOENT, errno.ESTALE, errno.ELOOP):
            raise


def make_folders(folder: Path) -> None:
    """Make a folder and those above it, each synced into the one above."""
    if folder.is_dir():
        return
    make_folders(folder.parent)
    with suppress(FileExistsError):
        os.mkdir(folder)
        sync_folder(folder.parent)
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "not a folder", str(folder))


def sync_folder(folder: Path) -> None:
    """Make names in a folder durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems sync folders by themselves
            raise
    finally:
        os.close(fd)


def _write_file(
    path: Path, chunks: Iterable[bytes | memoryview], header_bytes: int = 0, header: Callable[[], bytes] | None = None
) -> int:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        size = os.lseek(fd, header_bytes, os.SEEK_SET)
        for batch in _batches(chunks):
            written = _write_all(fd, batch)
            _begin_writeback(fd, size, written)
            size += written
        if header is not None:
            os.lseek(fd, 0, os.SEEK_SET)
            written = _write_all(fd, [memoryview(header())])
            assert written == header_bytes, (written, header_bytes)
        os.fsync(fd)
    finally:
        os.close(fd)
    return size


def _begin_writeback(fd: int, start: int, length: int) -> None:
    """Let the disk begin with these bytes while the next are made: the fsync at the end then finds little to do.

    A hint: where the system does not know it, or refuses, the fsync does everything.
    """
    begin = _sync_file_range()
    if begin is not None and length >= _WRITEBACK_BYTES:
        begin(fd, start, length, _SYNC_FILE_RANGE_WRITE)


@cache
def _sync_file_range() -> Callable[[int, int, int, int], int] | None:
    function = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if function is not None:
        function.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    return function


def _batches(chunks: Iterable[bytes | memoryview]) -> Iterator[list[memoryview]]:
    """Groups of chunks, so that many small ones take one call."""
    batch: list[memoryview] = []
    size = 0
    for chunk in chunks:
        view = memoryview(chunk).cast("B")
        if not view.nbytes:
            continue
        batch.append(view)
        size += view.nbytes
        if size >= _BATCH_BYTES or len(batch) >= _BATCH_BUFFERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _write_all(fd: int, buffers: list[memoryview]) -> int:
    total = 0
    while buffers:
        done = os.writev(fd, buffers)
        total += done
        while buffers and done >= buffers[0].nbytes:
            done -= buffers[0].nbytes
            del buffers[0]
        if done:
            buffers[0] = buffers[0][done:]
    return total


def _link(temporary: Path, path: Path) -> None:
    """Give the file its name unless the name is taken: by ``link``, which NFS decides on the server."""
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        # No hard links here (exFAT, some FUSE).
        if _rename_new(temporary, path):
            return
        # Nor such renames. The name is still created once; a kill in between leaves a file that does not match its
        # digest, which counts as absent.
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            _write_all(fd, [memoryview(temporary.read_bytes())])
            os.fsync(fd)
        finally:
            os.close(fd)


def _rename_new(temporary: Path, path: Path) -> bool:
    """Rename unless the name is taken, in one step; False where the file system knows no such rename.

    Raises:
        FileExistsError: the name is taken.
    """
    rename = _renameat2()
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(temporary), _AT_FDCWD, os.fsencode(path), _RENAME_NOREPLACE) == 0:
        return True
    if ctypes.get_errno() == errno.EEXIST:
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
    return False


@cache
def _renameat2() -> Callable[[int, bytes, int, bytes, int], int] | None:
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is not None:
        function.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
    return function
