"""Checkpoints of `torch.distributed.checkpoint`, read without running what their metadata says.

``.metadata`` is a pickle. It is read by an unpickler that knows DCP's own classes by name and makes stand-ins of them
that only hold what they are given; any other name ends the reading. Tensors lie in torch's zip files, which are read
with ``weights_only=True``, and without their bytes: these are then read by range.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

from holdfast.checkpoint.boxes import Box
from holdfast.checkpoint.dtypes import DTYPES
from holdfast.checkpoint.objects import TensorRef
from holdfast.checkpoint.source import FileSource
from holdfast.checkpoint.tiles import Placement, Tiles
from holdfast.checkpoint.tools.native import unflatten
from holdfast.checkpoint.tools.safetensors_format import read_box
from holdfast.checkpoint.tools.states import SavedTensor, fingerprint_of
from holdfast.errors import CorruptError, MismatchError, StateError, StorageError

METADATA_NAME = ".metadata"
_MAX_METADATA_BYTES = 1 << 32


class _Record:
    """Stands for any of DCP's data classes: holds what the pickle gives it, and does nothing."""

    kind = ""

    def __init__(self, *args: object) -> None:
        self.args = args

    def __setstate__(self, state: object) -> None:
        if isinstance(state, dict):
            self.__dict__.update({str(key): value for key, value in state.items() if key not in ("kind", "args")})
        else:
            self.args = state if isinstance(state, tuple) else (state,)


def _kind(name: str) -> type[_Record]:
    return type(name, (_Record,), {"kind": name})


_METADATA = "torch.distributed.checkpoint.metadata"
_FILES = "torch.distributed.checkpoint.filesystem"
_CLASSES: dict[tuple[str, str], Callable[..., object]] = {
    **{
        (_METADATA, name): _kind(name)
        for name in (
            "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "MetadataIndex",
            "TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING",
        )
    },
    **{(_FILES, name): _kind(name) for name in ("_StorageInfo", "_StoragePrefix")},
    ("torch", "Size"): lambda values=(): tuple(values),
    ("torch.serialization", "_get_layout"): str,
    ("pathlib", "PosixPath"): lambda *parts: str(PurePosixPath(*map(str, parts))),
    ("pathlib", "PurePosixPath"): lambda *parts: str(PurePosixPath(*map(str, parts))),
    ("collections", "OrderedDict"): dict,
}  # fmt: skip


class _Dtype(str):
    """A dtype by name."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:  # Any: as in the base class
        known = _CLASSES.get((module, name))
        if known is not None:
            return known
        if module == "torch" and name in DTYPES:
            return _Dtype(name)
        if module == "torch" and name in ("strided", "contiguous_format"):
            return name
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no metadata of DCP does")

    def persistent_load(self, pid: object) -> NoReturn:
        raise pickle.UnpicklingError("it asks for an object outside of it")


def read_metadata(path: Path) -> Any:
    """DCP's metadata as a record with its attributes. Any: stand-ins, see the head of this module.

    Raises:
        CorruptError: it is no metadata of DCP, or asks for anything else.
        StorageError: it cannot be read.
    """
    try:
        if path.stat().st_size > _MAX_METADATA_BYTES:
            raise CorruptError(f"{path} has {path.stat().st_size} bytes, which is no metadata of DCP")
        data = path.read_bytes()
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror}") from error
    try:
        metadata = _Unpickler(io.BytesIO(data)).load()
    except Exception as error:  # a pickle can raise anything; the caller gets one kind of error
        raise CorruptError(f"{path} is refused: {error}") from error
    if getattr(metadata, "kind", "") != "Metadata":
        raise CorruptError(f"{path} is refused: it is no metadata of DCP")
    return metadata


class _Chunk:
    """A part of a tensor: where its zip file lies; where its raw bytes lie, once that is known."""

    def __init__(self, file: Path, offset: int, length: int) -> None:
        self.file = file
        self.offset = offset
        self.length = length
        self.data_start: int | None = None


class DcpState:
    """A directory of DCP."""

    format = "DCP"
    step = 0

    def __init__(self, path: Path) -> None:
        """
        Raises:
            CorruptError: the metadata is refused, damaged, or names what is not in its directory.
            StorageError: it cannot be read.
        """
        self._path = path
        metadata = read_metadata(path / METADATA_NAME)
        try:
            self._take(metadata)
        except (AttributeError, TypeError, KeyError, ValueError, IndexError) as error:
            raise CorruptError(f"{path / METADATA_NAME} is not laid out as DCP does it: {error!r}") from error
        self.fingerprint = fingerprint_of([path / METADATA_NAME, *{chunk.file for chunk in self._chunks.values()}])
        self._sources: dict[Path, FileSource] = {}

    def _take(self, metadata: Any) -> None:
        self._chunks: dict[tuple[str, tuple[int, ...] | None], _Chunk] = {}
        for index, info in metadata.storage_data.items():
            offset = getattr(index, "offset", None)
            key = (str(index.fqn), None if offset is None else tuple(int(o) for o in offset))
            self._chunks[key] = _Chunk(self._file(str(info.relative_path)), int(info.offset), int(info.length))
        self._placements: dict[str, Placement] = {}
        self._objects: list[str] = []
        tensors: list[SavedTensor] = []
        for name, entry in metadata.state_dict_metadata.items():
            if entry.kind == "BytesStorageMetadata":
                self._objects.append(str(name))
                continue
            shape = tuple(int(n) for n in entry.size)
            boxes = [Box(tuple(map(int, c.offsets)), tuple(map(int, c.sizes))) for c in entry.chunks]
            tensors.append(SavedTensor(str(name), None, self._dtype(name, entry.properties), shape))
            self._placements[str(name)] = self._placement(str(name), shape, boxes)
        self.tensors = tuple(sorted(tensors))
        self._paths = {str(k): tuple(v) for k, v in (metadata.planner_data or {}).items()}

    def _file(self, relative: str) -> Path:
        if "/" in relative or "\\" in relative or relative in ("", ".", "..") or "\0" in relative:
            raise CorruptError(
                f"{self._path / METADATA_NAME} names the file {relative!r}, which is not in its directory"
            )
        if not (self._path / relative).is_file():
            raise CorruptError(f"{self._path / METADATA_NAME} names the file {relative!r}, which does not exist")
        return self._path / relative

    def _dtype(self, name: object, properties: Any) -> str:
        # TensorProperties pickles itself as a tuple, in earlier versions of torch as a dict.
        dtype = properties.__dict__.get("dtype", properties.args[0] if properties.args else None)
        if type(dtype) is not _Dtype:
            raise CorruptError(f"{self._path / METADATA_NAME} gives {name} the dtype {dtype!r}")
        return str(dtype)

    def _placement(self, name: str, shape: tuple[int, ...], boxes: list[Box]) -> Placement:
        for box in boxes:
            if (name, box.offsets) not in self._chunks:
                raise CorruptError(f"{self._path / METADATA_NAME} does not say where {name}{box} lies")
        placement = Placement(shape, Tiles(tuple(boxes), tuple(range(len(boxes)))), len(boxes))
        try:
            placement.check_once(name)
        except MismatchError as error:
            raise CorruptError(f"{self._path / METADATA_NAME}: {error}") from error
        return placement

    def read(self, tensor: SavedTensor, box: Box, out: memoryview) -> None:
        """See `SavedState.read`."""
        import numpy

        element = numpy.dtype(f"V{DTYPES[tensor.dtype].itemsize}")
        target: Any = numpy.frombuffer(out, element).reshape(box.lengths)
        for tile, _ in self._placements[tensor.name].overlapping(box):
            hit = tile.intersection(box)
            if hit is None:
                continue
            part = memoryview(bytearray(hit.volume * element.itemsize))
            self._read_chunk(tensor, tile, hit.relative_to(tile), part)
            place = tuple(
                slice(o - b, o - b + n) for o, b, n in zip(hit.offsets, box.offsets, hit.lengths, strict=True)
            )
            target[place] = numpy.frombuffer(part, element).reshape(hit.lengths)

    def _read_chunk(self, tensor: SavedTensor, tile: Box, wanted: Box, out: memoryview) -> None:
        chunk = self._chunks[tensor.name, tile.offsets]
        if chunk.data_start is None:
            chunk.data_start = _locate(chunk, tensor, tile)
        source = self._sources.setdefault(chunk.file, FileSource(chunk.file))
        read_box(source, chunk.data_start, SavedTensor(tensor.name, None, tensor.dtype, tile.lengths), wanted, out)

    def nested(self) -> Any:
        """See `SavedState.nested`."""
        values: dict[str, Any] = {tensor.name: TensorRef(tensor.name) for tensor in self.tensors}
        values.update({name: self._object(name) for name in self._objects})
        return unflatten(values, self._paths)

    def _object(self, name: str) -> Any:
        import torch

        chunk = self._chunks.get((name, None))
        if chunk is None:
            raise CorruptError(f"{self._path / METADATA_NAME} does not say where {name} lies")
        data = FileSource(chunk.file, chunk.offset)
        try:
            return torch.load(io.BytesIO(data.read(0, chunk.length)), weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
            first = str(error).strip().split("\n")[0]
            raise StateError(f"{name} in {chunk.file} is no plain data, which is all that is read: {first}") from error
        finally:
            data.close()

    def close(self) -> None:
        """See `SavedState.close`."""
        for source in self._sources.values():
            source.close()


def _locate(chunk: _Chunk, tensor: SavedTensor, tile: Box) -> int:
    """Where the raw bytes of a chunk start in its file. Its zip file is opened, its bytes are not read.

    Raises:
        CorruptError: it is not what the metadata says.
    """
    import torch
    from torch.distributed.checkpoint.utils import _create_file_view

    try:
        with open(chunk.file, "rb") as file:
            view: Any = _create_file_view(file, chunk.offset, chunk.length)  # IO in all but its type
            if chunk.length < 4 or view.read(4) != b"PK\x03\x04":
                raise CorruptError(
                    f"{chunk.file}: {tensor.name}{tile} is in a form of DCP that is not read (no zip file)"
                )
            view.seek(0)
            with torch.serialization.skip_data():
                found = torch.load(view, weights_only=True, map_location="cpu")
            view.seek(0)
            reader: Any = torch._C.PyTorchFileReader(view)  # its stub lacks a method
            start = chunk.offset + int(reader.get_record_offset("data/0"))
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError) as error:
        raise CorruptError(f"{chunk.file}: {tensor.name}{tile} cannot be read: {str(error).splitlines()[0]}") from error
    sound = (
        isinstance(found, torch.Tensor)
        and tuple(found.shape) == tile.lengths
        and str(found.dtype) == f"torch.{tensor.dtype}"
        and found.is_contiguous()
    )
    if not sound:
        raise CorruptError(f"{chunk.file} does not hold {tensor.name}{tile} as the metadata says")
    return start + int(found.storage_offset() * found.element_size())
