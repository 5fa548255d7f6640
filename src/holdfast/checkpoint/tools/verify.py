"""``verify``: every checksum of a checkpoint, and whether all of it is there."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import xxhash

from holdfast.checkpoint.boxes import whole
from holdfast.checkpoint.catalog import Catalog
from holdfast.checkpoint.commit import open_checkpoint
from holdfast.checkpoint.index import IMAGE_NAME
from holdfast.checkpoint.places import place
from holdfast.checkpoint.root import ROOT_NAME, Root, decode_root
from holdfast.checkpoint.steps import MAX_SMALL_BYTES, list_steps
from holdfast.checkpoint.storage import storage_of
from holdfast.checkpoint.tools.parallel import workers_within
from holdfast.checkpoint.tools.units import Progress, argument, human, parse_size, plain, put_json
from holdfast.checkpoint.verified import OpenImage
from holdfast.errors import CheckpointError, CorruptError, UsageError

EXAMPLE = "holdfast ckpt verify checkpoints/step-00000100 --workers 4"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare them."""
    parser.add_argument(
        "path", type=argument(place), help="a step directory, or a checkpoint directory (all its steps)"
    )
    parser.add_argument("--workers", type=int, default=2, help="images read at the same time (default 2)")
    parser.add_argument(
        "--max-memory", metavar="SIZE", type=argument(parse_size), default="2GiB", help="bound (default 2GiB)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    """0 where all is sound, 1 where something is broken."""
    workers = workers_within(arguments.workers, arguments.max_memory)
    results: dict[str, list[str]] = {}
    for path in step_paths(arguments.path):
        results[str(path)] = problems_of(path, workers=workers)
        if not arguments.json:
            _print(path, results[str(path)])
    if arguments.json:
        put_json({path: {"sound": not found, "problems": found} for path, found in results.items()})
    return int(any(results.values()))


def step_paths(path: Path) -> list[Path]:
    """The path itself where it is a step directory, else the steps in it.

    Raises:
        UsageError: there is none.
    """
    if not path.is_dir():
        raise UsageError(f"{path} is no directory")
    names = [entry.name for entry in storage_of(path).list(path)]
    if ROOT_NAME in names or any(map(IMAGE_NAME.fullmatch, names)):
        return [path if path.name not in ("", "..") else Path(os.path.abspath(path))]  # `.` has no name and no parent
    found = [info.path for info in list_steps(path)]
    if not found:
        raise UsageError(f"{path} is no step directory and holds none")
    return found


def _print(path: Path, problems: list[str]) -> None:
    for problem in problems:
        sys.stdout.write(f"{path}: {plain(problem)}\n")
    if not problems:
        size = sum(entry.size_bytes for entry in storage_of(path).list(path))
        sys.stdout.write(f"{path}: sound, {human(size)} read\n")


def problems_of(path: Path, *, workers: int = 1) -> list[str]:
    """All that is wrong with a step directory, one line each; none where it is sound."""
    try:
        root, corrected = decode_root(storage_of(path).read(path / ROOT_NAME, limit=MAX_SMALL_BYTES))
    except CheckpointError as error:
        return [f"root: {error}"]
    problems = ["root: wrong bytes, which its parity corrects"] if corrected else []
    problems += _index_problems(path, root)
    try:
        catalog = open_checkpoint(path)
    except CheckpointError as error:
        return [*problems, str(error)]
    with catalog:
        try:
            catalog.check_complete()
        except CheckpointError as error:
            problems.append(str(error))
        with Progress("verifying", root.size_bytes) as progress, ThreadPoolExecutor(workers, "verify") as pool:
            holds = _names_by_image(catalog)
            sizes = {entry.name: entry.size_bytes for entry in storage_of(path).list(path)}
            for number, found in enumerate(pool.map(lambda image: _image_problems(image, sizes), catalog.images)):
                problems += [f"{problem}{_named(holds[number], lost)}" for problem, lost in found]
                progress.add(root.size_bytes // len(catalog.images))
    return problems


def _index_problems(path: Path, root: Root) -> Iterator[str]:
    for copy in root.index_copies:
        try:
            data = storage_of(path).read(path / copy.name, limit=copy.size_bytes)
        except CheckpointError as error:
            yield f"index copy: {error}"
            continue
        if xxhash.xxh3_128_digest(data) != root.index_digest:
            yield f"index copy: {copy.name} does not match its digest"


def _names_by_image(catalog: Catalog) -> list[list[str]]:
    """What the index says that each image holds, for images whose own header cannot be read."""
    held: list[list[str]] = [[] for _ in catalog.images]
    for entry in catalog.saved:
        for number in sorted({number for _, number in entry.placement.overlapping(whole(entry.shape))}):
            held[number].append(entry.name)
    return held


def _named(all_names: list[str], lost: list[str] | None) -> str:
    names = all_names if lost is None else lost
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"; it holds {', '.join(names[:5])}{more}" if names else ""


def _image_problems(image: OpenImage, sizes: Mapping[str, int]) -> list[tuple[str, list[str] | None]]:
    """(what is wrong, the pieces that it concerns; None: all of the image). One thread per image."""
    try:
        meta = image.meta
        image.source.read(meta.size_bytes - 1, 1)
    except CheckpointError as error:
        return [(str(error), None)]
    problems: list[tuple[str, list[str] | None]] = []
    if sizes.get(Path(image.name).name, meta.size_bytes) != meta.size_bytes:
        problems.append((f"{image.name} is longer than its header says", []))
    for block in range(meta.num_blocks):
        start = meta.data_start + block * meta.block_bytes
        end = min(start + meta.block_bytes, meta.size_bytes)
        try:
            image.range(start, end - start)
        except CorruptError as error:
            problems.append((str(error), _pieces_in(image, start, end)))
        except CheckpointError as error:
            return [*problems, (str(error), None)]
    return problems


def _pieces_in(image: OpenImage, start: int, end: int) -> list[str]:
    meta = image.meta
    found = [
        piece.key
        for piece, offset in zip(meta.pieces, meta.piece_offsets, strict=True)
        if offset < end and offset + piece.size_bytes > start
    ]
    return [*found, "objects"] if end > meta.objects_offset and meta.objects_bytes else found
