"""Object stores: a real S3 server over HTTP, with faults between it and the storage."""

from __future__ import annotations

import logging
import random
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from holdfast.checkpoint import object_storage
from holdfast.checkpoint.object_storage import PART_BYTES, ObjectStorage, _reader
from holdfast.checkpoint.places import UrlPath, place
from holdfast.checkpoint.retries import Backoff, retry
from holdfast.checkpoint.storage import PosixStorage, storage_of
from holdfast.errors import CorruptError, StorageError, UsageError
from support.s3 import S3, Kind, Together

FAST = Backoff(attempts=4, first_s=0.01, most_s=0.02)


@pytest.fixture
def url(runs: Path) -> UrlPath:
    assert isinstance(runs, UrlPath)
    return runs


def test_places_are_paths_urls_and_nothing_else() -> None:
    at = place("s3://bucket/a//b/step-1/")
    assert str(at) == "s3://bucket/a/b/step-1"
    assert isinstance(at, UrlPath)
    assert (at.bucket, at.key, at.name) == (("s3", "bucket"), "a/b/step-1", "step-1")
    assert str(at.parent / "root") == str(at.with_name("root")) == "s3://bucket/a/b/root"
    assert place(str(Path(at))) == place(Path(at)) == at == at.absolute()
    assert storage_of(Path(at)).__class__ is ObjectStorage
    assert place("file:///tmp/a%20b") == Path("/tmp/a b")
    assert not isinstance(place("runs/s3:/x"), UrlPath)
    assert isinstance(storage_of("runs"), PosixStorage)
    for wrong in ("s3://", "ftp://host/x", "s3://bucket/x?versionId=1"):
        with pytest.raises(UsageError):
            place(wrong)
    with pytest.raises(UsageError, match="files and folders only"):
        at.open()


def test_waits_grow_up_to_a_limit_and_the_last_error_is_raised(caplog: pytest.LogCaptureFixture) -> None:
    waits = list(Backoff(attempts=6, first_s=1.0, most_s=5.0).waits(random.Random(1)))
    assert len(waits) == 5
    assert all(limit / 2 <= wait <= limit for wait, limit in zip(waits, (1, 2, 4, 5, 5), strict=True))
    slept: list[float] = []

    def call(attempt: int) -> None:
        raise OSError(f"attempt {attempt}")

    with pytest.raises(OSError, match="attempt 3"):
        retry(call, "it", backoff=FAST, passing=lambda error: True, sleep=slept.append)
    assert len(slept) == 3
    assert caplog.records[0].getMessage().startswith("it failed, attempt 2 of 4 follows in")
    with pytest.raises(OSError, match="attempt 0"):
        retry(call, "it", backoff=FAST, passing=lambda error: False, sleep=slept.append)


def test_objects_are_written_listed_read_moved_and_removed(url: UrlPath) -> None:
    storage = ObjectStorage(FAST)
    assert storage.list(url) == []
    assert not url.exists()
    assert storage.write(url / "step-1" / "image", [b"abc", memoryview(b"defg")]) == 7
    assert storage.write(url / "step-1" / "root", [b"r"], exclusive=True) == 1
    assert storage.write(url / "step-1" / "empty", []) == 0
    assert [(e.name, e.size_bytes, e.is_folder) for e in storage.list(url / "step-1")] == [
        ("empty", 0, False), ("image", 7, False), ("root", 1, False),
    ]  # fmt: skip
    assert [(e.name, e.is_folder, e.time) for e in storage.list(url)] == [("step-1", True, 0.0)]
    assert (url / "step-1" / "root").exists()
    assert (url / "step-1").is_dir()
    assert bytes(storage.source(url / "step-1" / "image", 1).read(2, 3)) == b"def"
    with pytest.raises(CorruptError, match="2 bytes short"):
        storage.source(url / "step-1" / "image").read(5, 4)
    with pytest.raises(CorruptError, match="ends before"):
        storage.source(url / "step-1" / "image").read(7, 4)
    with pytest.raises(StorageError, match="does not exist"):
        storage.source(url / "absent").read(0, 4)
    with pytest.raises(StorageError, match="at most 6"):
        storage.read(url / "step-1" / "image", limit=6)
    storage.move(url / "step-1", url / "abandoned" / "step-1")
    assert [e.name for e in storage.list(url)] == ["abandoned"]
    assert storage.read(url / "abandoned" / "step-1" / "image", limit=9) == b"abcdefg"
    storage.remove(url / "abandoned")
    assert storage.list(url) == []
    with pytest.raises(StorageError, match="the bucket does not exist"):
        storage.write(place(f"s3://{secrets.token_hex(8)}/x"), [b""])


def test_the_root_goes_first_when_removed_and_last_when_moved(s3: S3, url: UrlPath) -> None:
    storage = ObjectStorage(FAST)
    for name in ("a", "root", "z"):
        storage.write(url / "step" / name, [name.encode()])
    s3.requests.clear()
    storage.move(url / "step", url / "aside")
    puts = [line.rsplit("/", 1)[-1] for line in s3.requests if line.startswith("PUT")]
    assert puts == ["a", "z", "root"]
    deletions = [line.split()[2:] for line in s3.requests if line.startswith("POST")]
    assert deletions == [["runs/step/root"], ["runs/step/a", "runs/step/z"]]
    s3.requests.clear()
    storage.remove(url / "aside")
    deletions = [line.split()[2:] for line in s3.requests if line.startswith("POST")]
    assert deletions == [["runs/aside/root"], ["runs/aside/a", "runs/aside/z"]]


def test_one_of_two_creators_wins_and_the_other_is_told(s3: S3, url: UrlPath) -> None:
    ObjectStorage(FAST).write(url / "root", [b"first"], exclusive=True)
    with pytest.raises(StorageError, match="exists already and is never changed"):
        ObjectStorage(FAST).write(url / "root", [b"second"], exclusive=True)
    # The same bytes by someone else are someone else's, too: only after a lost answer they may be ours.
    with pytest.raises(StorageError, match="exists already"):
        ObjectStorage(FAST).write(url / "root", [b"first"], exclusive=True)
    assert ObjectStorage(FAST).read(url / "root", limit=9) == b"first"
    lost = s3.fail("lost", "PUT", "/other")
    assert ObjectStorage(FAST).write(url / "other", [b"mine"], exclusive=True) == 4
    assert lost.fired == 1


@pytest.mark.parametrize("kind", ["500", "503", "429", "reset", "lost", "slow"])
def test_small_requests_are_repeated_and_every_repetition_is_logged(
    s3: S3, url: UrlPath, kind: Kind, caplog: pytest.LogCaptureFixture
) -> None:
    storage = ObjectStorage(FAST)
    asked = (("PUT", "/file"), ("GET", "/file"), ("POST", "?delete"))
    rules = [s3.fail(kind, method, path, times=2) for method, path in asked]
    storage.write(url / "file", [b"abc"])
    assert bytes(storage.source(url / "file").read(0, 3)) == b"abc"
    storage.remove(url / "file")
    assert [rule.fired for rule in rules] == [1 if kind == "slow" else 2] * 3
    warned = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warned) == (0 if kind == "slow" else 6)
    assert all("of 4 follows in" in r.getMessage() and "/runs/file" in r.getMessage() for r in warned)


def test_an_answer_that_takes_too_long_is_asked_for_again(
    s3: S3, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("AWS_TIMEOUT", "2s")
    monkeypatch.setattr(s3, "slow_s", 5.0)
    at = place(s3.make_bucket(f"b{secrets.token_hex(6)}")) / "file"
    rule = s3.fail("slow", "PUT", "/file")
    assert ObjectStorage(Backoff(attempts=9, first_s=0.01)).write(at, [b"abc"]) == 3
    assert rule.fired == 1
    assert "attempt 2 of 9 follows" in caplog.text


def test_a_cut_answer_is_read_again(s3: S3, url: UrlPath) -> None:
    storage = ObjectStorage(FAST)
    storage.write(url / "file", [bytes(range(256)) * 8])
    rule = s3.fail("cut", "GET", "/file")
    assert bytes(storage.source(url / "file").read(0, 2048)) == bytes(range(256)) * 8
    assert rule.fired == 1


def test_what_is_read_ahead_is_asked_for_once_and_its_error_comes_with_the_read(s3: S3, url: UrlPath) -> None:
    ObjectStorage(FAST).write(url / "file", [bytes(range(256)) * 8])
    source = ObjectStorage(FAST).source(url / "file")
    asked = len(s3.requests)
    for offset, length in ((0, 512), (512, 512), (512, 512), (1024, 0), (4096, 5)):
        source.will_read(offset, length)
    assert bytes(source.read(0, 512)) == bytes(range(256)) * 2
    assert bytes(source.read(512, 512)) == bytes(range(256)) * 2
    assert bytes(source.read(1024, 0)) == b""
    with pytest.raises(CorruptError, match="ends before byte 4096"):
        source.read(4096, 5)
    assert len(s3.requests) == asked + 3
    assert bytes(source.read(0, 512)) == bytes(range(256)) * 2  # what was read is not kept
    assert len(s3.requests) == asked + 4
    source.close()


def test_nothing_is_tried_again_for_a_reader_that_is_gone(
    s3: S3, url: UrlPath, caplog: pytest.LogCaptureFixture
) -> None:
    ObjectStorage(FAST).write(url / "file", [bytes(2 << 20)])
    source = ObjectStorage(Backoff(attempts=9, first_s=0.01)).source(url / "file")
    s3.together = Together(2)
    rule = s3.fail("503", "GET", "/file", times=99)
    source.will_read(0, 2 << 20)
    assert s3.together.arrived.acquire(timeout=120)
    source.close()
    s3.together.wait()
    s3.together = None
    _reader().submit(lambda: None).result(120)
    assert rule.fired == 1
    assert "attempt" not in caplog.text


def test_what_does_not_pass_is_said_at_once(s3: S3, url: UrlPath) -> None:
    rule = s3.fail("403", "PUT", times=9)
    with pytest.raises(StorageError, match="permission denied"):
        ObjectStorage(FAST).write(url / "file", [b"abc"])
    assert rule.fired == 1
    rule = s3.fail("503", "GET", times=99)
    with pytest.raises(StorageError, match="503"):
        ObjectStorage(FAST).read(url / "file", limit=9)
    assert rule.fired == FAST.attempts


class Chunks:
    """Can be iterated again. One buffer is used over and over, as the tools do it."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.begun = 0

    def __iter__(self) -> Iterator[memoryview]:
        self.begun += 1
        buffer = bytearray(1 << 20)
        for number in range(self.size >> 20):
            buffer[:] = bytes([number % 251]) * len(buffer)
            yield memoryview(buffer)


def test_large_objects_go_up_in_parts_that_are_repeated(s3: S3, url: UrlPath) -> None:
    storage = ObjectStorage(FAST)
    size = 2 * PART_BYTES + (3 << 20)
    rules = [s3.fail("500", "PUT", "partNumber=2"), s3.fail("reset", "PUT", "partNumber=3"), s3.fail("503", "POST")]
    assert storage.write(url / "image", iter(Chunks(size))) == size
    assert [rule.fired for rule in rules] == [1, 1, 1]
    source = storage.source(url / "image")
    for number in (0, 15, 16, 34):
        assert bytes(source.read((number << 20) + 5, 3)) == bytes([number] * 3)
    assert storage.list(url)[0].size_bytes == size
    assert b"<Upload>" not in s3.uploads(url.bucket.name)


def test_an_upload_begins_again_where_its_chunks_can_be_had_again(
    s3: S3, url: UrlPath, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_storage, "PART_RETRIES", 0)
    storage = ObjectStorage(FAST)
    chunks = Chunks(PART_BYTES + (1 << 20))
    s3.fail("500", "PUT", "partNumber=1")
    assert storage.write(url / "image", chunks) == chunks.size
    assert chunks.begun == 2
    assert "attempt 2 of 4" in caplog.text
    s3.fail("500", "PUT", "partNumber=1")
    with pytest.raises(StorageError, match="500"):
        storage.write(url / "other", iter(chunks))
    assert not (url / "other").exists()


def test_an_upload_whose_chunks_fail_leaves_nothing(s3: S3, url: UrlPath) -> None:
    def broken() -> Iterator[bytes]:
        yield bytes(PART_BYTES + 1)
        raise CorruptError("mine")

    with pytest.raises(CorruptError, match="mine"):
        ObjectStorage(FAST).write(url / "image", broken())
    assert not (url / "image").exists()
    assert b"<Upload>" not in s3.uploads(url.bucket.name)
