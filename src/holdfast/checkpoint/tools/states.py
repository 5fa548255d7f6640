"""What the tools read from: a state in any of the formats, tensor by tensor and box by box."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import xxhash

from holdfast.checkpoint.boxes import Box, cut_rows, whole
from holdfast.checkpoint.dtypes import itemsize
from holdfast.checkpoint.objects import TensorRef
from holdfast.checkpoint.places import UrlPath, place
from holdfast.checkpoint.root import ROOT_NAME
from holdfast.errors import MismatchError, UsageError

_PLAIN = (str, int, float, complex, type(None))
_SHOWN = 60
"""Characters of a value that are shown."""


class SavedTensor(NamedTuple):
    """One tensor of a saved state."""

    name: str
    rank: int | None
    """Set where each rank has one of its own."""
    dtype: str
    """torch's name without ``torch.``."""
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of the whole tensor."""
        return whole(self.shape).volume * itemsize(self.dtype)

    @property
    def label(self) -> str:
        """Its name, with the rank where it has one."""
        return self.name if self.rank is None else f"{self.name}@rank{self.rank}"


class SavedState(Protocol):
    """A saved state. Four attributes and three methods are the whole surface; one thread at a time."""

    format: str
    """What it is, for messages."""
    fingerprint: str
    """Changes when the source does: what is made of another source is not continued."""
    tensors: tuple[SavedTensor, ...]
    """By name and rank."""
    step: int
    """0 where it has none."""

    def read(self, tensor: SavedTensor, box: Box, out: memoryview) -> None:
        """Read a region into exactly its bytes; called for each part that a tool needs.

        Raises:
            CorruptError, StorageError: it cannot be read.
        """
        ...

    def nested(self) -> Any:
        """The state as the user nested it, with `TensorRef` in the place of tensors. Any: whatever was saved.

        Raises:
            CorruptError, StateError: its objects cannot be read.
        """
        ...

    def close(self) -> None:
        """Close what is open; called once."""
        ...


def open_state(path: str | Path) -> SavedState:
    """Find out what lies at a path and open it.

    Args:
        path: a step directory or a checkpoint directory (its newest step) or the URL of one, a DCP directory, a
            safetensors file or a folder of them, or a file of `torch.save`.

    Raises:
        UsageError: there is nothing that is known.
        CheckpointError: it cannot be read.
    """
    path = place(path)
    if (path / ROOT_NAME).exists():
        from holdfast.checkpoint.tools.native import NativeState

        return NativeState(path)
    if isinstance(path, UrlPath):
        return _open_folder(path)
    if (path / ".metadata").exists():
        from holdfast.checkpoint.tools.dcp_format import DcpState

        return DcpState(path)
    if path.is_dir():
        return _open_folder(path)
    if not path.exists():
        raise UsageError(f"{path} does not exist")
    if path.suffix == ".safetensors":
        from holdfast.checkpoint.tools.safetensors_format import SafetensorsState

        return SafetensorsState(path)
    from holdfast.checkpoint.tools.torch_format import TorchState

    return TorchState(path)


def open_states(path: str | Path, number: int) -> list[SavedState]:
    """The same state for as many threads: each reads from one of its own.

    Raises:
        UsageError, CheckpointError: as `open_state`.
    """
    first = open_state(path)
    if first.format == "torch":  # in memory or mapped: any thread may read it, and a second one would double it
        return [first] * number
    return [first, *(open_state(path) for _ in range(number - 1))]


def _open_folder(path: Path) -> SavedState:
    from holdfast.checkpoint.steps import newest_step

    newest = newest_step(path)
    if newest is not None:
        from holdfast.checkpoint.tools.native import NativeState

        return NativeState(newest.path)
    if isinstance(path, UrlPath):
        raise UsageError(f"{path} holds no complete checkpoint of holdfast; other formats are read from files only")
    if any(path.glob("*.safetensors")):
        from holdfast.checkpoint.tools.safetensors_format import SafetensorsState

        return SafetensorsState(path)
    raise UsageError(f"{path} holds no complete checkpoint, no DCP metadata and no safetensors files")


def fingerprint_of(files: Iterable[Path]) -> str:
    """Of files by name, size and time of change."""
    digest = xxhash.xxh3_128()
    for file in sorted(files):
        stat = file.stat()
        digest.update(os.fsencode(file.name) + f"\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
    return digest.hexdigest()


def select(tensors: Iterable[SavedTensor], only: str | None) -> list[tuple[str, SavedTensor]]:
    """The tensors below a prefix, with their names there.

    Args:
        tensors: all.
        only: ``model``: those named ``model.…``, whose names go on without it; None: all under their own names.

    Returns:
        (name, tensor); of a tensor that each rank has of its own, the lowest rank's.

    Raises:
        MismatchError: there is none.
    """
    prefix = "" if not only else only.rstrip(".") + "."
    chosen: dict[str, SavedTensor] = {}
    for tensor in tensors:
        if tensor.name.startswith(prefix):
            chosen.setdefault(tensor.name.removeprefix(prefix), tensor)
    if not chosen:
        raise MismatchError(f"no tensor is named {prefix}…" if prefix else "there is no tensor")
    return sorted(chosen.items())


def parts(tensor: SavedTensor, max_bytes: int) -> Iterator[Box]:
    """A tensor cut into boxes of at most `max_bytes` that follow each other in C order; none of an empty one."""
    box = whole(tensor.shape)
    if not box.is_empty:
        yield from cut_rows(box, max(max_bytes // itemsize(tensor.dtype), 1))


def tensor_names(tree: Any) -> Iterator[str]:
    """The tensors that a nested state names. Any: see `SavedState.nested`."""
    if type(tree) is TensorRef:
        yield tree.name
    elif isinstance(tree, dict):
        for item in tree.values():
            yield from tensor_names(item)
    elif isinstance(tree, list | tuple):
        for item in tree:
            yield from tensor_names(item)


def leaves(tree: Any, path: str = "", *, whole_lists: bool = False) -> Iterator[tuple[str, Any]]:
    """What a nested state holds beside tensors, with where it lies.

    Args:
        tree: Any: see `SavedState.nested`.
        path: of it.
        whole_lists: give a list of plain values as one.
    """
    if type(tree) is TensorRef:
        return
    items: list[tuple[object, Any]] = []
    if isinstance(tree, dict):
        items = list(tree.items())
    elif isinstance(tree, list | tuple) and not (whole_lists and all(isinstance(item, _PLAIN) for item in tree)):
        items = list(enumerate(tree))
    if not items:
        yield path, tree
    for key, item in items:
        yield from leaves(item, f"{path}.{key}" if path else str(key), whole_lists=whole_lists)


def shown(value: Any) -> str:  # Any: see `SavedState.nested`
    """A value in one short line."""
    text = f"{len(value)} bytes" if isinstance(value, bytes) else " ".join(repr(value).split())
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"
