"""``repair``: make a damaged checkpoint readable from what of it is sound, and set aside what is none.

- A root with wrong bytes is written anew from what its parity corrects.
- A damaged copy of the index is written anew from the other. Where both are damaged the index is rebuilt from the
  headers of the images, which say the same.
- A root beyond repair is rebuilt in the same way; its tag and metrics are lost.
- A step without a root was never finished: it is moved to ``incomplete-<time>/``. With ``--rebuild`` it becomes a
  checkpoint, if every image of one version is there and every checksum matches.

Images are never changed: what is damaged in them is named, and stays damaged.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Generator, Iterator
from pathlib import Path

import msgspec
import xxhash

from holdfast.checkpoint.belongings import foreign_names
from holdfast.checkpoint.commit import INDEX_NAME, commit_step, image_record, read_index
from holdfast.checkpoint.image import read_header
from holdfast.checkpoint.index import IMAGE_NAME, ImageRecord, build_index, encode_index
from holdfast.checkpoint.places import place
from holdfast.checkpoint.root import ROOT_NAME, IndexFile, Root, decode_root, encode_root
from holdfast.checkpoint.steps import MAX_SMALL_BYTES
from holdfast.checkpoint.storage import storage_of
from holdfast.checkpoint.tools.parallel import workers_within
from holdfast.checkpoint.tools.units import argument, parse_size, plain
from holdfast.checkpoint.tools.verify import problems_of, step_paths
from holdfast.checkpoint.verified import OpenImage
from holdfast.checkpoint.version import Version
from holdfast.errors import CheckpointError, CorruptError, MismatchError, UsageError

EXAMPLE = "holdfast ckpt repair checkpoints --dry-run"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare them."""
    parser.add_argument(
        "path", type=argument(place), help="a step directory, or a checkpoint directory (all its steps)"
    )
    parser.add_argument("--rebuild", action="store_true", help="finish steps whose images are all there and sound")
    parser.add_argument(
        "--min-age",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="leave alone what has no root and is younger: a job may be writing it (default 600)",
    )
    parser.add_argument("--dry-run", action="store_true", help="only say what would be done")
    parser.add_argument("--workers", type=int, default=2, help="images verified at the same time (default 2)")
    parser.add_argument(
        "--max-memory", metavar="SIZE", type=argument(parse_size), default="2GiB", help="bound (default 2GiB)"
    )


def run(arguments: argparse.Namespace) -> int:
    """0 where all is sound now, 1 where something stays broken."""
    if not arguments.min_age >= 0:  # NaN is not
        raise UsageError(f"--min-age {arguments.min_age}: give seconds, 0 or more")
    workers = workers_within(arguments.workers, arguments.max_memory)
    broken = False
    for path in step_paths(arguments.path):
        lines = repair(path, rebuild=arguments.rebuild, min_age_s=arguments.min_age, dry_run=arguments.dry_run)
        is_sound = True
        for line in lines:
            sys.stdout.write(f"{path}: {plain(line)}\n")
            is_sound = False
        problems = problems_of(path, workers=workers) if path.exists() else []
        broken = broken or bool(problems)
        sys.stdout.write("".join(f"{path}: still broken: {plain(problem)}\n" for problem in problems))
        if is_sound and not problems:
            sys.stdout.write(f"{path}: sound, nothing to do\n")
    return int(broken)


def repair(path: Path, *, rebuild: bool, min_age_s: float, dry_run: bool) -> Iterator[str]:
    """Repair a step directory.

    Yields:
        What is done, one line each; none where nothing is to be done.

    Raises:
        StorageError: something cannot be written or moved.
    """
    storage = storage_of(path)
    if not (path / ROOT_NAME).exists():
        yield from _unfinished(path, rebuild=rebuild, min_age_s=min_age_s, dry_run=dry_run)
        return
    try:
        root, corrected = decode_root(storage.read(path / ROOT_NAME, limit=MAX_SMALL_BYTES))
    except CorruptError as error:
        yield from _without_root(path, str(error), dry_run=dry_run)
        return
    if corrected:
        yield "root written anew from its parity"
        if not dry_run:
            storage.write(path / ROOT_NAME, [encode_root(root)])
    yield from _index(path, root, dry_run=dry_run)


def _index(path: Path, root: Root, *, dry_run: bool) -> Iterator[str]:
    storage = storage_of(path)
    good, damaged = _copies(path, root)
    if not damaged:
        return
    if good is not None:
        for name in damaged:
            yield f"{name} written anew from the other copy"
            if not dry_run:
                storage.write(path / name, [good])
        return
    try:
        records = records_of(path, root.version, root.world_size)
        data = encode_index(build_index(records, version=root.version, world_size=root.world_size))
    except CheckpointError as error:
        yield f"the index cannot be rebuilt: {error}"
        return
    yield "index rebuilt from the headers of the images"
    if dry_run:
        return
    for name in damaged:
        storage.write(path / name, [data])
    if xxhash.xxh3_128_digest(data) != root.index_digest:
        _write_root(path, root, data)


def _write_root(path: Path, root: Root, index: bytes) -> None:
    copies = tuple(IndexFile(name=copy.name, size_bytes=len(index)) for copy in root.index_copies)
    new = msgspec.structs.replace(root, index_digest=xxhash.xxh3_128_digest(index), index_copies=copies)
    storage_of(path).write(path / ROOT_NAME, [encode_root(new)])


def _copies(path: Path, root: Root) -> tuple[bytes | None, list[str]]:
    """(a sound copy of the index, the names of damaged ones)."""
    good: bytes | None = None
    damaged: list[str] = []
    for copy in root.index_copies:
        try:
            data = storage_of(path).read(path / copy.name, limit=max(copy.size_bytes, 1))
        except CheckpointError:
            data = b""
        if xxhash.xxh3_128_digest(data) == root.index_digest:
            good = data
        else:
            damaged.append(copy.name)
    return good, damaged


def _without_root(path: Path, problem: str, *, dry_run: bool) -> Iterator[str]:
    """The root is beyond repair: the images' headers say all but tag and metrics."""
    versions = {(meta_version, world) for meta_version, world in _versions(path)}
    if len(versions) != 1:
        yield f"{problem}; images of {len(versions)} versions are there, so it cannot be rebuilt"
        return
    ((version, world_size),) = versions
    try:
        records = records_of(path, version, world_size)
        data = encode_index(build_index(records, version=version, world_size=world_size))
    except CheckpointError as error:
        yield f"{problem}; it cannot be rebuilt: {error}"
        return
    yield "root and index rebuilt from the headers of the images; tag and metrics are lost"
    if dry_run:
        return
    names = (INDEX_NAME, f"index-{version.generation}.json.zst")
    root = Root(
        version=version,
        world_size=world_size,
        num_images=len(records),
        size_bytes=sum(record.size_bytes for record in records),
        index_digest=xxhash.xxh3_128_digest(data),
        index_copies=tuple(IndexFile(name=name, size_bytes=len(data)) for name in names),
        time=max((entry.time for entry in storage_of(path).list(path)), default=0.0),
    )
    for name in names:
        storage_of(path).write(path / name, [data])
    storage_of(path).write(path / ROOT_NAME, [encode_root(root)])


def _unfinished(path: Path, *, rebuild: bool, min_age_s: float, dry_run: bool) -> Iterator[str]:
    age = time.time() - last_change(path)
    if age < min_age_s:
        yield f"no root, changed {age:.0f} s ago: left alone (--min-age)"
        return
    if rebuild:
        finished = yield from _finish(path, dry_run=dry_run)
        if finished:
            return
    foreign = foreign_names(storage_of(path), path)
    if foreign:
        yield f"no root, so it was never finished; {foreign[0]} is no file of holdfast: left alone"
        return
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    aside = path.parent / f"incomplete-{stamp}" / path.name
    yield f"no root, so it was never finished: set aside as {aside}"
    if not dry_run:
        storage_of(path).move(path, aside)


def _finish(path: Path, *, dry_run: bool) -> Generator[str, None, bool]:
    """Commit images of one version that are all there and sound; returns whether it did."""
    for version, world_size in sorted(set(_versions(path)), reverse=True):
        try:
            records = records_of(path, version, world_size, verify=True)
            build_index(records, version=version, world_size=world_size)
            if not dry_run:
                commit_step(path, records, version=version, world_size=world_size)
                read_index(path)
        except (CorruptError, MismatchError) as error:
            yield f"cannot be finished as {version}: {error}"
            continue
        yield f"finished as {version}: every image is there and sound"
        return True
    return False


def last_change(path: Path) -> float:
    """Unix seconds of the last change in a step directory."""
    times = [entry.time for entry in storage_of(path).list(path)]
    times += [entry.time for entry in storage_of(path).list(path.parent) if not times and entry.name == path.name]
    return max(times, default=0.0)


def _versions(path: Path) -> Iterator[tuple[Version, int]]:
    storage = storage_of(path)
    for entry in storage.list(path):
        if IMAGE_NAME.fullmatch(entry.name):
            source = storage.source(path / entry.name)
            try:
                meta = read_header(source.read)
                yield meta.version, meta.world_size
            except CheckpointError:
                continue  # it belongs to no version that can be told
            finally:
                source.close()


def records_of(path: Path, version: Version, world_size: int, *, verify: bool = False) -> list[ImageRecord]:
    """What a commit needs of the images of a version, from their own headers.

    Raises:
        CorruptError: one is damaged.
    """
    records: list[ImageRecord] = []
    storage = storage_of(path)
    for entry in storage.list(path):
        if not IMAGE_NAME.fullmatch(entry.name) or not entry.name.startswith(f"{version.generation}-"):
            continue
        file = path / entry.name
        image = OpenImage(str(file), None, storage.source(file))
        try:
            meta = image.meta
            if (meta.version, meta.world_size) != (version, world_size):
                continue
            if entry.size_bytes != meta.size_bytes:
                raise CorruptError(f"{file} has {entry.size_bytes} bytes, its header says {meta.size_bytes}")
            if verify:
                image.verify()
            records.append(image_record(file.name, meta, bytes(image.objects_blob())))
        finally:
            image.close()
    return records
