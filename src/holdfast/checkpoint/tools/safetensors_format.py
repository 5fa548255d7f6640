"""safetensors files that others wrote, with or without a Hugging Face index. Headers are data from anywhere."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from holdfast.checkpoint.boxes import Box, whole
from holdfast.checkpoint.dtypes import DTYPES, itemsize
from holdfast.checkpoint.objects import TensorRef
from holdfast.checkpoint.planner import Segment, segments, strides_of
from holdfast.checkpoint.source import FileSource
from holdfast.checkpoint.tools.states import SavedTensor, fingerprint_of
from holdfast.errors import DECODE_ERRORS, CorruptError, UsageError

INDEX_NAME = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000
"""What safetensors itself accepts."""
_WINDOW_BYTES = 8 << 20
_CODES = {info.code: name for name, info in reversed(DTYPES.items()) if info.code != "U8"} | {"U8": "uint8"}


class _Entry(msgspec.Struct):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


class Placed(msgspec.Struct, frozen=True):
    """Where a tensor lies."""

    file: Path
    start: int
    """Bytes from the start of the file."""


class SafetensorsState:
    """A safetensors file, or a folder of them."""

    format = "safetensors"
    step = 0

    def __init__(self, path: Path) -> None:
        """
        Raises:
            CorruptError: a header or the index is damaged, or says what cannot be.
            StorageError: a file cannot be read.
        """
        files = _files(path)
        self.fingerprint = fingerprint_of(files)
        self._placed: dict[str, Placed] = {}
        tensors: list[SavedTensor] = []
        for file in files:
            for name, dtype, shape, start in read_tensors(file):
                if name in self._placed:
                    raise CorruptError(f"{name} is in {self._placed[name].file.name} and in {file.name}")
                self._placed[name] = Placed(file, start)
                tensors.append(SavedTensor(name, None, dtype, shape))
        self.tensors = tuple(sorted(tensors))
        self._sources = {file: FileSource(file) for file in files}

    def read(self, tensor: SavedTensor, box: Box, out: memoryview) -> None:
        """See `SavedState.read`."""
        placed = self._placed[tensor.name]
        read_box(self._sources[placed.file], placed.start, tensor, box, out)

    def nested(self) -> Any:
        """See `SavedState.nested`: the format knows no nesting."""
        return {tensor.name: TensorRef(tensor.name) for tensor in self.tensors}

    def close(self) -> None:
        """See `SavedState.close`."""
        for source in self._sources.values():
            source.close()


def read_box(source: FileSource, start: int, tensor: SavedTensor, box: Box, out: memoryview) -> None:
    """Read a box of a tensor that lies in C order at `start` of a file."""
    import numpy

    size = itemsize(tensor.dtype)
    outer = whole(tensor.shape)
    target: Any = numpy.frombuffer(out, numpy.dtype(f"V{size}")).reshape(box.lengths)
    strides = strides_of(outer.lengths, size)
    for segment in segments(outer, box, piece_offset=start, itemsize=size, max_gap=1 << 20, max_bytes=_WINDOW_BYTES):
        place = tuple(
            slice(o - b, o - b + n)
            for o, b, n in zip(segment.box.offsets, box.offsets, segment.box.lengths, strict=True)
        )
        target[place] = _elements(source, segment, size, strides)


# Any: a numpy array of raw elements.
def _elements(source: FileSource, segment: Segment, size: int, strides: tuple[int, ...]) -> Any:
    import numpy

    data = source.read(segment.start, segment.length)
    return numpy.ndarray(segment.box.lengths, numpy.dtype(f"V{size}"), buffer=data, strides=strides)


def read_tensors(file: Path) -> Iterator[tuple[str, str, tuple[int, ...], int]]:
    """The header of a file: name, dtype, shape, and where each tensor starts (bytes from the start of the file).

    Raises:
        CorruptError: it is damaged, or says what cannot be.
        StorageError: the file cannot be read.
    """
    source = FileSource(file)
    try:
        size = file.stat().st_size
        (length,) = struct.unpack("<Q", source.read(0, 8)) if size >= 8 else (0,)
        if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise CorruptError(f"{file} is no safetensors file: {size} bytes with a header of {length} bytes")
        header = msgspec.json.decode(source.read(8, length), type=dict[str, msgspec.Raw])
        header.pop("__metadata__", None)
        for name, raw in header.items():
            entry = msgspec.json.decode(raw, type=_Entry)
            yield name, *_checked(file, name, entry, 8 + length, size)
    except DECODE_ERRORS as error:
        raise CorruptError(f"the header of {file} does not parse: {error}") from error
    finally:
        source.close()


def _checked(file: Path, name: str, entry: _Entry, data_start: int, size: int) -> tuple[str, tuple[int, ...], int]:
    dtype = _CODES.get(entry.dtype)
    if dtype is None:
        raise CorruptError(f"{file}: {name} is of the dtype {entry.dtype}, which is not known")
    start, end = entry.data_offsets
    sound = all(n >= 0 for n in entry.shape) and 0 <= start <= end <= size - data_start
    if not sound or end - start != whole(entry.shape).volume * itemsize(dtype):
        raise CorruptError(
            f"{file}: {name} of shape {list(entry.shape)} is said to lie at bytes {start} to {end}, "
            f"of {size - data_start}"
        )
    return dtype, entry.shape, data_start + start


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    indices = sorted(path.glob("*.safetensors.index.json"))
    if not indices:
        return sorted(path.glob("*.safetensors"))
    if len(indices) > 1:
        raise UsageError(f"{path} holds more than one index: {', '.join(index.name for index in indices)}")
    return _indexed(path, indices[0])


def _indexed(path: Path, index: Path) -> list[Path]:
    try:
        names = set(msgspec.json.decode(index.read_bytes(), type=_Index).weight_map.values())
    except DECODE_ERRORS as error:
        raise CorruptError(f"{index} does not parse: {error}") from error
    for name in sorted(names):
        if "/" in name or "\\" in name or name in ("", ".", "..") or "\0" in name:
            raise CorruptError(f"{index} names the file {name!r}, which is not in its directory")
        if not (path / name).is_file():
            raise CorruptError(f"{index} names the file {name!r}, which does not exist")
    return [path / name for name in sorted(names)]
