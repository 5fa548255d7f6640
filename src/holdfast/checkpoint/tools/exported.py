"""What is exported: tensors under the names and in the types that the other program gets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from holdfast.checkpoint.boxes import Box, cut_rows, whole
from holdfast.checkpoint.dtypes import DTYPES, itemsize
from holdfast.checkpoint.objects import TensorRef
from holdfast.checkpoint.tools.states import SavedState, SavedTensor, select
from holdfast.checkpoint.tools.units import Progress
from holdfast.errors import MismatchError, UsageError

_SHORT = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}
FLOATS = tuple(name for name in DTYPES if name.startswith(("float", "bfloat")) and "_x2" not in name)


class Item(NamedTuple):
    """One tensor that is exported."""

    name: str
    """Its name there."""
    saved: SavedTensor
    dtype: str
    """Its dtype there."""

    @property
    def size_bytes(self) -> int:
        """Bytes there."""
        return whole(self.saved.shape).volume * itemsize(self.dtype)


def cast_dtype(text: str) -> str:
    """The dtype of ``--cast``.

    Raises:
        UsageError: it is no floating point type.
    """
    name = _SHORT.get(text, text.removeprefix("torch."))
    if name not in FLOATS:
        raise UsageError(f"--cast {text}: give one of {', '.join((*_SHORT, *FLOATS))}")
    return name


@dataclass
class Export:
    """A state on its way out."""

    state: SavedState
    items: tuple[Item, ...]
    """By name."""
    only: str | None
    max_bytes: int
    """Of one part in memory."""
    progress: Progress | None = None

    @classmethod
    def of(cls, state: SavedState, *, only: str | None, cast: str | None, max_bytes: int) -> Export:
        """
        Raises:
            MismatchError: `only` leaves nothing.
        """
        chosen = select(state.tensors, only)
        items = (Item(n, t, cast if cast is not None and t.dtype in FLOATS else t.dtype) for n, t in chosen)
        return cls(state, tuple(items), only, max_bytes)

    @property
    def size_bytes(self) -> int:
        """Of all tensors."""
        return sum(item.size_bytes for item in self.items)

    def identity(self) -> str:
        """Changes with the source and with what is exported of it."""
        return f"{self.state.fingerprint} {self.only} {sorted({(i.saved.dtype, i.dtype) for i in self.items})}"

    def parts(self, item: Item) -> Iterator[tuple[Box, memoryview]]:
        """A tensor in boxes that follow each other in C order, each with its bytes, good until the next."""
        box = whole(item.saved.shape)
        if box.is_empty:
            return
        for part in cut_rows(box, max(self.max_bytes // max(itemsize(item.saved.dtype), itemsize(item.dtype)), 1)):
            yield part, self.read(item, part)

    def read(self, item: Item, box: Box) -> memoryview:
        """The bytes of a region, in the exported type."""
        data = memoryview(bytearray(box.volume * itemsize(item.saved.dtype)))
        self.state.read(item.saved, box, data)
        if self.progress is not None:
            self.progress.add(box.volume * itemsize(item.dtype))
        return data if item.dtype == item.saved.dtype else _cast(data, item.saved.dtype, item.dtype)

    def nested(self) -> Any:
        """The exported part of the nested state: `TensorRef` of exported names. Any: whatever was saved.

        Raises:
            MismatchError: `only` does not name a part of the nested state.
        """
        tree = self.state.nested()
        names = {item.saved.name: item.name for item in self.items}
        for key in (self.only or "").rstrip(".").split(".") if self.only else ():
            if not isinstance(tree, dict) or key not in tree:
                return {item.name: TensorRef(item.name) for item in self.items}
            tree = tree[key]
        return _renamed(tree, names)


# Any: whatever was saved.
def _renamed(tree: Any, names: dict[str, str]) -> Any:
    if type(tree) is TensorRef:
        if tree.name not in names:
            raise MismatchError(f"{tree.name} stands in the state, but no tensor of that name is saved")
        return TensorRef(names[tree.name])
    if isinstance(tree, dict):
        return {key: _renamed(item, names) for key, item in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(_renamed(item, names) for item in tree)
    return tree


def _cast(data: memoryview, dtype: str, to: str) -> memoryview:
    import torch

    from holdfast.checkpoint.tensors import tensor_bytes, torch_dtype

    if not len(data):
        return data
    tensor = torch.frombuffer(data, dtype=torch.uint8).view(torch_dtype(dtype))
    return tensor_bytes(tensor.to(torch_dtype(to)))
