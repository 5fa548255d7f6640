"""Object stores through obstore: S3, and with the same calls Google's and Azure's, which are not proven here.

What a file system gives and an object store does not:

- *Folders*: names are keys with slashes. `list` of a folder shows the prefixes below it as folders, without a time.
- *Rename*: `move` copies on the server, the root last, removes the root, then the rest. Killed at any instant it leaves
  the checkpoint under the old name, or under both, or under the new one; never under none.
- *Create once*: a PUT with ``If-None-Match: *``, decided by the store. Where its answer was lost, the object is
  compared with what was to be written: the same bytes mean that it was ours.

Requests are repeated here, with a growing wait and a line in the log each. The parts of a multipart upload are repeated
by obstore, which says nothing; where that does not help, the whole upload begins again if its chunks can be had again.
Credentials, endpoint and region come from the environment as obstore reads it (``AWS_ACCESS_KEY_ID``,
``AWS_ENDPOINT_URL``, ``AWS_REGION``, ``AWS_ALLOW_HTTP`` …).
"""

from __future__ import annotations

import builtins
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from holdfast.checkpoint.places import Bucket, UrlPath, place
from holdfast.checkpoint.retries import Backoff, first_line, retry
from holdfast.checkpoint.storage import StorageEntry
from holdfast.errors import CorruptError, StorageError, UsageError

if TYPE_CHECKING:
    from obstore.store import ObjectStore

T = TypeVar("T")

PART_BYTES = 16 << 20
"""Of a multipart upload; objects up to this size are one PUT. S3 allows 10,000 parts: 156 GiB in one image."""
PARTS_AT_ONCE = 3
PART_RETRIES = 8
READS_AT_ONCE = 8
"""Ranges that a process reads ahead at once: one connection alone is far slower than a store."""
_COPY_LIMIT = 5 << 30
"""Larger objects cannot be copied by S3 with one request."""
_PASSING = (
    "error sending request", "error decoding response body", "connection", "timed out", "timeout", "operation was slow",
    "status code: 5", "status code: 429", "status code: 408", "slowdown", "incomplete", "http error",
)  # fmt: skip

_stores: dict[tuple[int, Bucket, bool], ObjectStore] = {}
"""By process (a forked one must not use its parent's threads), bucket, and whether obstore repeats requests itself."""
_readers: dict[int, ThreadPoolExecutor] = {}
"""By process, too: threads that read ahead."""
_lock = threading.Lock()


class ObjectStorage:
    """A bucket. Any thread may call it."""

    def __init__(self, backoff: Backoff | None = None) -> None:
        self._backoff = backoff or Backoff()

    def list(self, folder: str | Path) -> list[StorageEntry]:
        """See `Storage.list`. Folders have the time 0."""
        import obstore

        at = _url(folder)

        def ask(attempt: int) -> list[StorageEntry]:
            found = obstore.list_with_delimiter(_store(at), at.key or None)
            names = [(str(prefix), None) for prefix in found["common_prefixes"]]
            entries = [StorageEntry(name.rsplit("/", 1)[-1], 0, True, 0.0) for name, _ in names]
            for item in found["objects"]:
                name = item["path"].rsplit("/", 1)[-1]
                entries.append(StorageEntry(name, item["size"], False, item["last_modified"].timestamp()))
            return entries

        return sorted(self._try(ask, "listed", at), key=lambda entry: entry.name)

    def read(self, path: str | Path, *, limit: int) -> bytes:
        """See `Storage.read`."""
        import obstore

        at = _url(path)

        def ask(attempt: int) -> bytes:
            found = obstore.get(_store(at), at.key)
            size = found.meta["size"]
            if size > limit:
                raise StorageError(f"{at} has {size} bytes, at most {limit} are expected: it is no object of holdfast")
            return bytes(found.bytes())

        return self._try(ask, "read", at)

    def write(self, path: str | Path, chunks: Iterable[bytes | memoryview], *, exclusive: bool = False) -> int:
        """See `Storage.write`. Where `chunks` can be iterated again, a failed upload of a large object is repeated."""
        at = _url(path)
        parts = _parts(chunks)
        first = next(parts, bytearray())
        if len(first) < PART_BYTES:
            self._put(at, bytes(first), exclusive)
            return len(first)
        if exclusive:
            raise StorageError(f"{at}: only objects below {PART_BYTES} bytes are created once")
        return self._upload(at, chunks, _chained(first, parts))

    def source(self, path: str | Path, offset: int = 0) -> ObjectSource:
        """See `Storage.source`."""
        return ObjectSource(_url(path), offset, self._backoff)

    def move(self, path: str | Path, to: str | Path) -> None:
        """See `Storage.move`, and the head of this module."""
        source, target = _url(path), _url(to)
        if source.bucket != target.bucket:
            raise UsageError(f"{source} cannot be moved to {target}: another bucket")
        found = self._below(source)
        if not found:
            raise StorageError(f"{source} cannot be moved: it does not exist")
        for key, size in found:
            self._copy(source, key, size, target.key + key[len(source.key) :])
        self._delete(source, [key for key, _ in found])

    def remove(self, path: str | Path) -> None:
        """See `Storage.remove`."""
        at = _url(path)
        found = [key for key, _ in self._below(at)]
        self._delete(at, found or [at.key])

    def _put(self, at: UrlPath, data: bytes, exclusive: bool) -> None:
        import obstore
        from obstore.exceptions import AlreadyExistsError

        def ask(attempt: int) -> None:
            try:
                # obstore asks for ``create`` with If-None-Match: *
                obstore.put(_store(at), at.key, data, mode="create" if exclusive else "overwrite", use_multipart=False)
            except AlreadyExistsError as error:
                # The answer to an earlier attempt may have been lost on the way.
                if attempt == 0 or bytes(obstore.get(_store(at), at.key).bytes()) != data:
                    raise StorageError(f"{at} exists already and is never changed: use another name") from error

        self._try(ask, "written", at)

    def _upload(self, at: UrlPath, chunks: Iterable[bytes | memoryview], parts: Iterator[bytearray]) -> int:
        import obstore

        again = iter(chunks) is not chunks
        size = 0

        def ask(attempt: int) -> int:
            nonlocal size, parts
            if attempt:
                parts = _parts(chunks)
            size = 0
            store = _store(at, repeats=True)
            obstore.put(store, at.key, counted(), chunk_size=PART_BYTES, max_concurrency=PARTS_AT_ONCE)
            return size

        def counted() -> Iterator[bytearray]:
            nonlocal size
            for part in parts:
                size += len(part)
                yield part

        return self._try(ask, "written", at, again=again)

    def _below(self, at: UrlPath) -> builtins.list[tuple[str, int]]:
        """(key, size) of all objects in a folder, the roots of checkpoints last."""
        import obstore

        def ask(attempt: int) -> builtins.list[tuple[str, int]]:
            pages = obstore.list(_store(at), at.key)
            return [(item["path"], item["size"]) for page in pages for item in page]

        found = self._try(ask, "listed", at)
        return sorted(found, key=lambda item: (_is_root(item[0]), item[0]))

    def _copy(self, at: UrlPath, key: str, size: int, to: str) -> None:
        import obstore

        if size < _COPY_LIMIT:
            self._try(lambda attempt: obstore.copy(_store(at), key, to), "copied", at)
            return
        bucket = UrlPath(f"{at.bucket.scheme}:/{at.bucket.name}")
        self.write(bucket / to, _Ranges(self.source(bucket / key), size))

    def _delete(self, at: UrlPath, keys: builtins.list[str]) -> None:
        """Roots first: what is left is no checkpoint. Repeating it is harmless."""
        roots = [key for key in keys if _is_root(key)]
        for some in (roots, [key for key in keys if not _is_root(key)]):
            if some:
                self._delete_all(at, some)

    def _delete_all(self, at: UrlPath, keys: builtins.list[str]) -> None:
        import obstore

        self._try(lambda attempt: obstore.delete(_store(at), keys), "removed", at)

    def _try(self, ask: Callable[[int], T], done: str, at: UrlPath, *, again: bool = True) -> T:
        try:
            return retry(ask, f"{at}: a request", backoff=self._backoff, passing=lambda error: again and _passes(error))
        except Exception as error:  # noqa: BLE001  # `_refuse` raises: obstore's as ours, any other as it is
            _refuse(done, at, error)


class ObjectSource:
    """An image in an object store, read by ranged GETs. One thread at a time; what it is told of before is on its way
    in other threads meanwhile."""

    def __init__(self, at: UrlPath, offset: int, backoff: Backoff) -> None:
        """Called by `ObjectStorage.source`."""
        self._at = at
        self._offset = offset
        self._backoff = backoff
        self._coming: dict[tuple[int, int], Future[memoryview]] = {}
        """By offset and length."""
        self._closed = False

    def read(self, offset: int, length: int) -> memoryview:
        """See `Source.read`.

        Raises:
            StorageError: the object cannot be read.
            CorruptError: it ends before the range does.
        """
        coming = self._coming.pop((offset, length), None)
        return self._get(offset, length) if coming is None else coming.result()

    def will_read(self, offset: int, length: int) -> None:
        """See `FarSource.will_read`. The bytes are kept until they are read; the caller bounds how much it tells of."""
        if (offset, length) not in self._coming:
            self._coming[offset, length] = _reader().submit(self._get, offset, length)

    def _get(self, offset: int, length: int) -> memoryview:
        import obstore

        if length == 0:
            return memoryview(b"")
        start = self._offset + offset

        def ask(attempt: int) -> memoryview:
            return memoryview(obstore.get_range(_store(self._at), self._at.key, start=start, length=length))

        def passes(error: Exception) -> bool:
            return not self._closed and _passes(error)

        try:
            data = retry(ask, f"{self._at}: a request", backoff=self._backoff, passing=passes)
        except Exception as error:  # see ObjectStorage._try
            if "416" in str(error):
                raise CorruptError(f"{self._at} ends before byte {start}") from error
            _refuse("read", self._at, error)
        if len(data) < length:
            raise CorruptError(f"{self._at} ends {length - len(data)} bytes short of {start + length}")
        return data

    def close(self) -> None:
        """Drop what was read ahead for nothing."""
        self._closed = True
        for coming in self._coming.values():
            coming.cancel()
        self._coming.clear()


class _Ranges:
    """The bytes of an object; can be iterated again."""

    def __init__(self, source: ObjectSource, size: int) -> None:
        self._source, self._size = source, size

    def __iter__(self) -> Iterator[memoryview]:
        for start in range(0, self._size, PART_BYTES):
            yield self._source.read(start, min(PART_BYTES, self._size - start))


def _is_root(key: str) -> bool:
    return key.rsplit("/", 1)[-1] == "root"


def _url(path: str | Path) -> UrlPath:
    url = place(path)
    assert isinstance(url, UrlPath), path
    return url


def _store(at: UrlPath, *, repeats: bool = False) -> ObjectStore:
    """
    Raises:
        UsageError: obstore is not installed, or the environment does not say how to reach the store.
    """
    key = (os.getpid(), at.bucket, repeats)
    with _lock:
        if key not in _stores:
            _stores[key] = _open(at.bucket, repeats)
        return _stores[key]


def _reader() -> ThreadPoolExecutor:
    process = os.getpid()
    with _lock:
        if process not in _readers:
            _readers[process] = ThreadPoolExecutor(READS_AT_ONCE, thread_name_prefix="holdfast-get")
        return _readers[process]


def _open(bucket: Bucket, repeats: bool) -> ObjectStore:
    try:
        from obstore.store import from_url
    except ImportError as error:
        raise UsageError(f"{bucket}: object stores need obstore: pip install 'holdfast[s3]'") from error
    retries: Any = {"max_retries": PART_RETRIES if repeats else 0}  # Any: obstore's dict type cannot be imported
    try:
        return from_url(str(bucket), retry_config=retries)
    except Exception as error:  # whatever obstore makes of a configuration
        raise UsageError(f"{bucket} cannot be opened: {first_line(error)}") from error


def _passes(error: Exception) -> bool:
    """Whether an error may pass by itself: by its text, because obstore gives all of them one class."""
    if isinstance(error, StorageError | CorruptError | UsageError | FileNotFoundError | PermissionError):
        return False
    return any(sign in first_line(error).lower() for sign in _PASSING)


def _refuse(done: str, at: UrlPath, error: Exception) -> NoReturn:
    from obstore.exceptions import BaseError

    if isinstance(error, FileNotFoundError) and "NoSuchBucket" not in str(error):
        raise StorageError(f"{at} cannot be {done}: it does not exist") from error
    if not isinstance(error, BaseError | OSError):
        raise error
    advice = {
        "NoSuchBucket": "the bucket does not exist",
        "403": "permission denied: check the credentials in the environment and what they allow",
        "401": "the store does not know these credentials",
    }
    said = next((text for sign, text in advice.items() if sign in str(error)), first_line(error))
    raise StorageError(f"{at} cannot be {done}: {said}") from error


def _parts(chunks: Iterable[bytes | memoryview]) -> Iterator[bytearray]:
    """The bytes in parts of `PART_BYTES`, the last one shorter; each in memory of its own: what the chunks lie in may
    change while a part is on its way."""
    part = bytearray()
    for chunk in chunks:
        view = memoryview(chunk).cast("B")
        while view.nbytes:
            room = PART_BYTES - len(part)
            part += view[:room]
            view = view[room:]
            if len(part) == PART_BYTES:
                yield part
                part = bytearray()
    if part:
        yield part


def _chained(first: bytearray, rest: Iterator[bytearray]) -> Iterator[bytearray]:
    yield first
    yield from rest
