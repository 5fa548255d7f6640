"""Hugging Face safetensors: numbered files and an index, as `transformers` and others open them."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import xxhash

from holdfast.checkpoint.dtypes import dtype_info
from holdfast.checkpoint.storage import PosixStorage, remove_leftovers
from holdfast.checkpoint.tools.exported import Export, Item
from holdfast.checkpoint.tools.parallel import in_parallel
from holdfast.checkpoint.tools.safetensors_format import INDEX_NAME, MAX_HEADER_BYTES
from holdfast.errors import DECODE_ERRORS, StateError, StorageError

_SOURCE = "holdfast.source"
"""In the metadata of a file: of which source and options it is."""


class _Header(msgspec.Struct):
    """What is read of the header of a file that is there."""

    metadata: dict[str, str] = msgspec.field(name="__metadata__", default_factory=dict)


def export_hf(exports: Sequence[Export], directory: Path, shard_bytes: int) -> None:
    """Write the files, then the index. A file that an interrupted run finished is kept.

    Args:
        exports: the same export once for each worker: one thread at a time may use one.
        directory: a new one.
        shard_bytes: most bytes in a file, unless one tensor has more.

    Raises:
        StateError: a dtype that safetensors lacks.
        StorageError: there is an export already, or something cannot be written.
    """
    storage = PosixStorage()
    export = exports[0]
    if (directory / INDEX_NAME).exists():
        raise StorageError(f"{directory} holds an export already: give another directory")
    for item in export.items:
        if dtype_info(item.dtype).code == "U8" and item.dtype != "uint8":
            raise StateError(f"{item.name} is {item.dtype}, which safetensors cannot hold: --cast it, or export torch")
    _refuse_foreign(directory)
    shards = _shards(export.items, shard_bytes)
    weight_map: dict[str, str] = {}
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]

    def write(number: int, export: Export) -> None:
        header = _header(export, shards[number])
        if not _is_there(directory / names[number], header, shards[number]):
            storage.write(directory / names[number], _file(export, header, shards[number]))

    in_parallel(write, range(len(shards)), exports, "export", export.progress)
    for name, shard in zip(names, shards, strict=True):
        weight_map.update((item.name, name) for item in shard)
    remove_leftovers(storage, directory)
    index = {"metadata": {"total_size": export.size_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    storage.write(directory / INDEX_NAME, [json.dumps(index, indent=2).encode() + b"\n"], exclusive=True)


def _refuse_foreign(directory: Path) -> None:
    """Another program's files are not overwritten, nor put beside ours: readers would take them for a part.

    Raises:
        StorageError: there is one.
    """
    for path in sorted(directory.glob("*.safetensors")):
        if not _is_exported(path):
            raise StorageError(f"{path} was not written by an export: give another directory")


def _is_exported(path: Path) -> bool:
    """Whether the header says that an export wrote it."""
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if not 2 <= length <= MAX_HEADER_BYTES:
                return False
            return _SOURCE in msgspec.json.decode(file.read(length), type=_Header).metadata
    except (OSError, struct.error, *DECODE_ERRORS):
        return False


def _shards(items: Sequence[Item], shard_bytes: int) -> list[list[Item]]:
    shards: list[list[Item]] = [[]]
    size = 0
    for item in items:
        if shards[-1] and size + item.size_bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(item)
        size += item.size_bytes
    # Larger items first: each is aligned to its item size without holes, which the format forbids.
    return [sorted(shard, key=lambda item: (-dtype_info(item.dtype).itemsize, item.name)) for shard in shards]


def _header(export: Export, shard: Sequence[Item]) -> bytes:
    source = xxhash.xxh3_64_hexdigest(export.identity().encode())
    entries: dict[str, object] = {"__metadata__": {"format": "pt", _SOURCE: source}}
    start = 0
    for item in shard:
        end = start + item.size_bytes
        code = dtype_info(item.dtype).code
        entries[item.name] = {"dtype": code, "shape": item.saved.shape, "data_offsets": (start, end)}
        start = end
    text = msgspec.json.encode(entries)
    text = text.ljust(-(-len(text) // 8) * 8)
    return struct.pack("<Q", len(text)) + text


def _is_there(path: Path, header: bytes, shard: Sequence[Item]) -> bool:
    """Files get their names when they are whole; the header says of which source and options this one is."""
    if not path.exists() or path.stat().st_size != len(header) + sum(item.size_bytes for item in shard):
        return False
    with open(path, "rb") as file:
        return file.read(len(header)) == header


def _file(export: Export, header: bytes, shard: Sequence[Item]) -> Iterator[bytes | memoryview]:
    yield header
    for item in shard:
        for _, data in export.parts(item):
            yield data
