from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import xxhash
import zstandard
from checkpoint_images import ARRAYS, GENERATION, VERSION, meta_of, read_array, save_step, step_images
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.checkpoint import storage
from holdfast.checkpoint.boxes import whole
from holdfast.checkpoint.catalog import Catalog
from holdfast.checkpoint.commit import (
    commit_step,
    image_file_name,
    list_steps,
    newest_step,
    open_checkpoint,
    step_dir_name,
    subset_image,
    write_image,
)
from holdfast.checkpoint.index import ImageRecord, decode_index, encode_index
from holdfast.checkpoint.objects import encode
from holdfast.checkpoint.root import ROOT_BYTES, IndexFile, Root, decode_root, encode_root
from holdfast.checkpoint.source import MemorySource
from holdfast.checkpoint.storage import PosixStorage
from holdfast.checkpoint.version import Version
from holdfast.errors import CheckpointError, CorruptError, MismatchError, StorageError, UsageError


def _content(catalog: Catalog) -> dict[str, Any]:
    """Everything in a checkpoint, as read."""
    found: dict[str, Any] = {name: catalog.tensor(name) for name in catalog.tensors}
    for name, array in ARRAYS.items():
        for rank in range(2):
            found[f"{name}@{rank}"] = read_array(catalog, name, whole(array.shape), array.dtype, rank=rank).tobytes()
    found["objects"] = [catalog.objects(rank) for rank in range(2)]
    found["version"] = (catalog.version, catalog.world_size)
    return found


def _expected(version: Version = VERSION) -> dict[str, bytes]:
    return {f"{name}@{rank}": array.tobytes() for name, array in ARRAYS.items() for rank in range(2)}


def test_a_committed_step_reads_back_and_says_what_it_is(tmp_path: Path) -> None:
    path = save_step(tmp_path / step_dir_name(100), metrics={"loss": 1.5}, tag="best", history="ab" * 16)
    with open_checkpoint(path) as catalog:
        content = _content(catalog)
        catalog.verify()
        catalog.check_complete()
    assert _expected().items() <= content.items()
    assert content["objects"] == [{"step": encode(100), "rng": encode(rank)} for rank in range(2)]
    (info,) = list_steps(tmp_path)
    assert info == newest_step(tmp_path)
    assert (info.step, info.complete, info.version, info.tag) == (100, True, VERSION, "best")
    assert (info.metrics, info.history) == ({"loss": 1.5}, "ab" * 16)
    assert info.size_bytes == sum(f.stat().st_size for f in path.glob("*.safetensors"))
    assert sorted(f.name for f in path.iterdir()) == [
        "i01-7f3a9c02-g0004-rank-00000-of-00002.safetensors",
        "i01-7f3a9c02-g0004-rank-00001-of-00002.safetensors",
        "index-i01-7f3a9c02-g0004.json.zst",
        "index.json.zst",
        "root",
    ]


def test_only_job_pieces_go_to_storage_and_a_whole_image_is_copied_straight(tmp_path: Path) -> None:
    path = save_step(tmp_path / "a")
    images = step_images()
    files = sorted(path.glob("*.safetensors"))
    assert files[0].read_bytes() == images[0]
    assert len(files[1].read_bytes()) == len(images[1]) - ARRAYS["v"].nbytes


def test_a_damaged_slot_is_not_persisted(tmp_path: Path) -> None:
    for rank in range(2):
        image = step_images()[rank]
        meta = meta_of(image)
        image[meta.piece_offsets[0]] ^= 1
        with pytest.raises(CorruptError, match="block 0"):
            write_image(
                tmp_path, image_file_name(GENERATION, rank, 2), *subset_image(meta, MemorySource(memoryview(image)))
            )
    assert list(tmp_path.iterdir()) == []


def test_a_save_into_an_existing_step_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    path = save_step(tmp_path / step_dir_name(100))
    before = {f.name: f.read_bytes() for f in path.iterdir()}
    with pytest.raises(StorageError, match="holds a committed checkpoint"):
        save_step(path)
    with pytest.raises(StorageError, match="holds a committed checkpoint"):
        save_step(path, GENERATION.__class__(incarnation=2, nonce="00000000", generation=1).at(100))
    assert {f.name: f.read_bytes() for f in path.iterdir()} == before


def test_of_two_roots_written_at_once_the_first_stays(tmp_path: Path) -> None:
    storage = PosixStorage()
    storage.write(tmp_path / "root", [b"first"], exclusive=True)
    with pytest.raises(StorageError, match="exists already"):
        storage.write(tmp_path / "root", [b"second"], exclusive=True)
    assert (tmp_path / "root").read_bytes() == b"first"
    assert [f.name for f in tmp_path.iterdir()] == ["root"]


def test_a_zombie_of_an_older_generation_cannot_spoil_a_committed_step(tmp_path: Path) -> None:
    path = save_step(tmp_path / step_dir_name(100))
    (path / "index.json.zst").write_bytes(b"of a zombie")
    (path / "i01-7f3a9c02-g0003-rank-00000-of-00002.safetensors").write_bytes(b"of a zombie")
    with open_checkpoint(path) as catalog:
        assert _expected().items() <= _content(catalog).items()


def _save_records(tmp_path: Path) -> list[ImageRecord]:
    return [
        write_image(
            tmp_path,
            image_file_name(GENERATION, rank, 2),
            *subset_image(meta_of(image), MemorySource(memoryview(image))),
        )
        for rank, image in enumerate(step_images())
    ]


def test_images_that_are_not_the_whole_state_are_not_committed(tmp_path: Path) -> None:
    records = [ImageRecord.decode(r.encode()) for r in _save_records(tmp_path)]
    with pytest.raises(MismatchError, match="no image of rank 1"):
        commit_step(tmp_path, records[:1], version=VERSION, world_size=2)
    with pytest.raises(MismatchError, match=r"is of .*step-00000100"):
        commit_step(tmp_path, records, version=GENERATION.at(101), world_size=2)
    empty = msgspec.structs.replace(records[1], pieces=records[0].pieces)
    with pytest.raises(MismatchError, match=r"no image holds w\[5:10,0:4\]"):
        commit_step(tmp_path, [records[0], empty], version=VERSION, world_size=2)
    assert not (tmp_path / "root").exists()
    with pytest.raises(UsageError, match="metrics take"):
        commit_step(tmp_path, records, version=VERSION, world_size=2, metrics={f"m{i}": 1.0 for i in range(1000)})
    commit_step(tmp_path, records, version=VERSION, world_size=2)


def test_replicas_that_disagree_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    records = _save_records(tmp_path)
    records[1] = msgspec.structs.replace(records[1], objects={"step": b"x" * 16})
    with caplog.at_level(logging.WARNING):
        commit_step(tmp_path, records, version=VERSION, world_size=2)
    assert "replicas disagree about step" in caplog.text


def test_a_record_that_is_none_is_refused() -> None:
    with pytest.raises(CorruptError, match="image record"):
        ImageRecord.decode(b"\xc1")


@pytest.mark.parametrize("kind", ["root", "index.json.zst", "both", "image0", "image1"])
def test_every_flipped_byte_is_corrected_or_noticed(tmp_path: Path, kind: str) -> None:
    path = save_step(tmp_path / "a")
    with open_checkpoint(path) as catalog:
        expected = _content(catalog)
    names = {
        "both": ["index.json.zst", "index-i01-7f3a9c02-g0004.json.zst"],
        "image0": [image_file_name(GENERATION, 0, 2)],
        "image1": [image_file_name(GENERATION, 1, 2)],
    }.get(kind, [kind])
    sound = {name: (path / name).read_bytes() for name in names}
    size = min(len(data) for data in sound.values())
    header = 4096 if kind.startswith("image") else 0
    # In a header every 13th byte (each is under the same digest), elsewhere every one.
    positions = [*range(0, header, 13), *range(header, size)]
    if kind == "root":
        positions = positions[::41]
    noticed = 0
    for position in positions:
        for name, data in sound.items():
            damaged = bytearray(data)
            damaged[position] ^= 1 << (position % 8)
            (path / name).write_bytes(damaged)
        try:
            with open_checkpoint(path) as catalog:
                assert _content(catalog) == expected
        except CheckpointError:
            noticed += 1
    assert noticed == (0 if kind in ("root", "index.json.zst") else len(positions))


def test_truncated_and_missing_files_are_noticed(tmp_path: Path) -> None:
    for name in (image_file_name(GENERATION, 1, 2), "root"):
        for size in (0, 100, None):
            path = save_step(tmp_path / f"{name}-{size}")
            if size is None:
                (path / name).unlink()
            else:
                os.truncate(path / name, size)
            with pytest.raises(CheckpointError, match=r"root|rank-00001"), open_checkpoint(path) as catalog:
                _content(catalog)


@settings(max_examples=25)
@given(st.lists(st.integers(0, ROOT_BYTES - 1), min_size=1, max_size=24), st.integers(1, 255))
def test_any_24_wrong_bytes_of_a_root_are_corrected(positions: list[int], flip: int) -> None:
    good = _root_bytes()
    data = bytearray(good)
    for position in positions:
        data[position] = good[position] ^ flip
    assert decode_root(bytes(data))[0] == decode_root(good)[0]


def test_a_burst_is_corrected_and_a_longer_one_is_refused() -> None:
    good = _root_bytes()
    data = bytearray(good)
    data[20:404] = bytes(byte ^ 255 for byte in data[20:404])
    assert decode_root(bytes(data)) == (decode_root(good)[0], True)
    data[404:900] = bytes(byte ^ 255 for byte in data[404:900])
    with pytest.raises(CorruptError):
        decode_root(bytes(data))
    for junk in (b"", b"x", bytes(ROOT_BYTES), b"\xff" * 5000):
        with pytest.raises(CorruptError):
            decode_root(junk)


_ROOT: list[bytes] = []


def _root_bytes() -> bytes:
    if not _ROOT:
        _ROOT.append(
            encode_root(
                Root(
                    version=VERSION,
                    world_size=2,
                    num_images=2,
                    size_bytes=10,
                    index_digest=bytes(16),
                    index_copies=(IndexFile(name="index.json.zst", size_bytes=5),),
                    time=1.0,
                )
            )
        )
    return _ROOT[0]


def _forge_index(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the index, and make the root agree with it."""
    index = msgspec.json.decode(zstandard.decompress((path / "index.json.zst").read_bytes()))
    change(index)
    data = zstandard.compress(msgspec.json.encode(index))
    root, _ = decode_root((path / "root").read_bytes())
    copies = tuple(msgspec.structs.replace(copy, size_bytes=len(data)) for copy in root.index_copies)
    for copy in copies:
        (path / copy.name).write_bytes(data)
    forged = msgspec.structs.replace(root, index_digest=xxhash.xxh3_128_digest(data), index_copies=copies)
    (path / "root").write_bytes(encode_root(forged))


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/passwd", "..", "", "a/b", "i01-7f3a9c02-g0004-rank-00000-of-00002.pt"]
)
def test_names_in_an_index_cannot_leave_its_directory(tmp_path: Path, name: str) -> None:
    path = save_step(tmp_path / "a")
    _forge_index(path, lambda index: index["images"][0].update(name=name))
    with pytest.raises(CorruptError, match="no name of an image"):
        open_checkpoint(path)


@pytest.mark.parametrize("name", ["../index.json.zst", "/index.json.zst", "root", "", "..", "a/index.json.zst", "tag"])
@pytest.mark.parametrize("which", [0, 1])
def test_names_in_a_root_cannot_leave_its_directory(tmp_path: Path, name: str, which: int) -> None:
    path = save_step(tmp_path / "a")
    root, _ = decode_root((path / "root").read_bytes())
    copies = list(root.index_copies)
    copies[which] = msgspec.structs.replace(copies[which], name=name)
    (path / "root").write_bytes(encode_root(msgspec.structs.replace(root, index_copies=tuple(copies))))
    with pytest.raises(CorruptError, match="not in its directory"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.update(shape=[-1]),
        lambda t: t.update(dtype="object"),
        lambda t: t["tiling"].update(images=[9]),
        lambda t: t["tiling"].update(images={"first": -1, "step": 1}),
        lambda t: t["tiling"].update(axes=[0, 0]),
        lambda t: t["tiling"].update(axes=[[5, 5], 4]),
        lambda t: t["tiling"].update(axes=[5]),
        lambda t: t.update(shape=[1 << 62, 4]),
    ],
)
def test_an_index_that_makes_no_sense_is_refused(tmp_path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = save_step(tmp_path / "a")
    _forge_index(path, lambda index: change(next(t for t in index["tensors"] if t["name"] == "w")))
    with pytest.raises(CheckpointError), open_checkpoint(path) as catalog:
        _content(catalog)


@pytest.mark.parametrize(
    "change",
    [
        lambda index: index.update(world_size=0),
        lambda index: index.update(images=[]),
        lambda index: index["images"][0].update(rank=-1),
        lambda index: index["images"][0].update(rank=2),
    ],
)
def test_an_index_of_no_ranks_or_of_others_is_refused(tmp_path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = save_step(tmp_path / "a")
    _forge_index(path, change)
    with pytest.raises(CorruptError, match="the index names"):
        open_checkpoint(path)


def test_an_index_bomb_is_refused() -> None:
    with pytest.raises(CorruptError):
        decode_index(b"\x28\xb5\x2f\xfd" + b"\xff" * 20)
    with pytest.raises(CorruptError):
        decode_index(zstandard.compress(b"[]"))


def test_the_index_is_readable_json(tmp_path: Path) -> None:
    path = save_step(tmp_path / "a")
    index = decode_index((path / "index.json.zst").read_bytes())
    assert decode_index(encode_index(index)) == index
    assert [t.name for t in index.tensors] == ["mean", "mean", "v", "w"]


class Killed(BaseException):
    """The process is gone: nothing after it runs, no clean-up either."""


@pytest.fixture
def kill_at(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int | None], list[str]]]:
    """Make the n-th and all later calls of file operations fail as if the process had been killed before it."""
    names = ("open", "writev", "fsync", "link", "unlink", "replace", "mkdir", "rename", "rmdir")
    real = {name: getattr(os, name) for name in names}
    calls: list[str] = []
    limit: list[int | None] = [None]

    def patched(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            writes = name != "open" or len(args) < 2 or bool(args[1] & os.O_CREAT)
            if writes:
                if limit[0] is not None and len(calls) >= limit[0]:
                    raise Killed(name)
                calls.append(name)
            return real[name](*args, **kwargs)

        return call

    for name in names:
        monkeypatch.setattr(os, name, patched(name))

    def set_limit(n: int | None) -> list[str]:
        limit[0] = n
        calls.clear()
        return calls

    yield set_limit
    set_limit(None)


def test_a_kill_between_any_two_file_operations_leaves_a_whole_checkpoint_or_none(
    tmp_path: Path, kill_at: Callable[[int | None], list[str]]
) -> None:
    older = save_step(tmp_path / step_dir_name(90), GENERATION.at(90))
    before = {f.name: f.read_bytes() for f in older.iterdir()}
    calls = kill_at(None)
    save_step(tmp_path / "whole")
    total = len(calls)
    assert total > 30
    outcomes = []
    for n in range(total + 1):
        shutil.rmtree(tmp_path / step_dir_name(100), ignore_errors=True)
        kill_at(n)
        try:
            save_step(tmp_path / step_dir_name(100))
        except Killed:
            pass
        finally:
            kill_at(None)
        done = [info for info in list_steps(tmp_path) if info.step == 100 and info.complete]
        outcomes.append(bool(done))
        if done:
            with open_checkpoint(done[0].path) as catalog:
                assert _expected().items() <= _content(catalog).items()
        else:
            with pytest.raises(CheckpointError):
                open_checkpoint(tmp_path / step_dir_name(100))
            assert newest_step(tmp_path).step == 90  # type: ignore[union-attr]
        assert {f.name: f.read_bytes() for f in older.iterdir()} == before
    assert outcomes == sorted(outcomes)
    assert (outcomes[0], outcomes[-1]) == (False, True)


def test_an_interrupted_save_can_be_made_again(tmp_path: Path, kill_at: Callable[[int | None], list[str]]) -> None:
    kill_at(20)
    with pytest.raises(Killed):
        save_step(tmp_path / step_dir_name(100))
    kill_at(None)
    (tmp_path / step_dir_name(100) / ".tmp-root-1-00").write_bytes(b"of a killed process")
    other = GENERATION.__class__(incarnation=1, nonce="7f3a9c02", generation=5).at(100)
    save_step(tmp_path / step_dir_name(100), other)
    with open_checkpoint(tmp_path / step_dir_name(100)) as catalog:
        assert _expected().items() <= _content(catalog).items()
    assert sorted(f.name for f in (tmp_path / step_dir_name(100)).iterdir()) == [
        image_file_name(other.generation, 0, 2),
        image_file_name(other.generation, 1, 2),
        "index-i01-7f3a9c02-g0005.json.zst",
        "index.json.zst",
        "root",
    ]


class FullStorage(PosixStorage):
    """The disk is full after a number of writes."""

    def __init__(self, room: int) -> None:
        self.room = room

    def write(self, path: str | Path, chunks: Any, *, exclusive: bool = False) -> int:
        def limited() -> Iterator[Any]:
            yield from list(chunks)[:1] if self.room == 0 else chunks
            if self.room == 0:
                raise OSError(28, "No space left on device")
            self.room -= 1

        return super().write(path, limited(), exclusive=exclusive)


@pytest.mark.parametrize("room", range(5))
def test_a_full_disk_is_a_clear_error_and_leaves_older_checkpoints(tmp_path: Path, room: int) -> None:
    save_step(tmp_path / step_dir_name(90), GENERATION.at(90))
    with pytest.raises(StorageError, match="no space is left"):
        save_step(tmp_path / step_dir_name(100), storage=FullStorage(room))
    assert [info.step for info in list_steps(tmp_path) if info.complete] == [90]
    assert not list((tmp_path / step_dir_name(100)).glob(".tmp-*"))


def test_the_root_is_written_last_and_everything_is_synced_before_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[tuple[str, str]] = []
    paths: dict[int, str] = {}
    real_open, real_fsync, real_link, real_replace = os.open, os.fsync, os.link, os.replace

    def _open(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        fd = real_open(path, flags, *args, **kwargs)
        paths[fd] = Path(path).name
        return fd

    monkeypatch.setattr(os, "open", _open)
    monkeypatch.setattr(os, "fsync", lambda fd: (log.append(("sync", paths[fd])), real_fsync(fd))[1])
    monkeypatch.setattr(os, "link", lambda a, b: (log.append(("name", Path(b).name)), real_link(a, b))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (log.append(("name", Path(b).name)), real_replace(a, b))[1])
    save_step(tmp_path / "step")
    names = [what for kind, what in log if kind == "name"]
    assert names[-1] == "root"
    assert len(names) == 5
    for at, (kind, what) in enumerate(log):
        if kind == "name":
            assert log[at - 1][0] == "sync"
            assert log[at - 1][1].startswith(f".tmp-{what}")
            assert log[at + 1] == ("sync", "step")


def no_links(source: Any, to: Any) -> None:
    raise PermissionError(errno.EPERM, "Operation not permitted")


@pytest.mark.parametrize("renames", [True, False])
def test_without_hard_links_a_name_is_still_created_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renames: bool
) -> None:
    monkeypatch.setattr(os, "link", no_links)
    if not renames:
        monkeypatch.setattr(storage, "_renameat2", lambda: None)
    root = tmp_path / "root"
    PosixStorage().write(root, [b"first"], exclusive=True)
    with pytest.raises(StorageError, match="exists already"):
        PosixStorage().write(root, [b"second"], exclusive=True)
    assert root.read_bytes() == b"first"
    assert [path.name for path in tmp_path.iterdir()] == ["root"]


def test_without_hard_links_a_name_appears_with_its_whole_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who is killed after any of the steps leaves nothing under the name, or everything."""
    monkeypatch.setattr(os, "link", no_links)
    seen: list[bytes] = []
    plain = os.writev

    def writev(fd: int, buffers: Any) -> int:
        seen.extend(path.read_bytes() for path in tmp_path.glob("root"))
        return plain(fd, buffers)

    monkeypatch.setattr(os, "writev", writev)
    PosixStorage().write(tmp_path / "root", [b"whole"], exclusive=True)
    assert seen == []
    assert (tmp_path / "root").read_bytes() == b"whole"
