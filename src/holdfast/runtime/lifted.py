"""State that an object hands out as a tree (``state_dict()``, ``get_extra_state()``): tensors as entries, the rest as
one object."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from holdfast.checkpoint.objects import ObjectRecord, encode, join_tensors, split_tensors
from holdfast.checkpoint.tensors import dtype_name, torch_dtype
from holdfast.runtime.book import EntryBook
from holdfast.runtime.entries import Timing
from holdfast.runtime.layout import is_dtensor
from holdfast.runtime.reader import StateReader, placeholder_names

Tree = Any  # whatever the object hands out; only the codec looks inside


class Lifted:
    """One object of the training state whose tree is read anew at every boundary.

    Args:
        name: of the object record, and the prefix of the names of its tensors.
        read, write: give and take the tree.
        per_rank: whether each rank has its own.
    """

    def __init__(
        self, name: str, read: Callable[[], Tree], write: Callable[[Tree], object], *, per_rank: bool = False
    ) -> None:
        self.name = name
        self.per_rank = per_rank
        self._read = read
        self._write = write
        self._tree: Tree = None
        self._tensors: dict[str, torch.Tensor] = {}
        self._empty: dict[str, tuple[str, tuple[int, ...]]] = {}

    def read(self, book: EntryBook) -> None:
        """Call the object and put its tensors into the book (within a reading)."""
        self._take()
        for name, tensor in self._tensors.items():
            book.put(name, tensor, timing=Timing.BOUNDARY, per_rank=self.per_rank, stage=True)

    def refresh(self, book: EntryBook) -> bool:
        """Call the object again outside a reading; False where its tensors are others (read all again)."""
        names = self._tensors.keys()
        self._take()
        return self._tensors.keys() == names and all(book.refresh(name, t) for name, t in self._tensors.items())

    def _take(self) -> None:
        self._tree, tensors = split_tensors(self.name, self._read())
        self._tensors = {name: tensor for name, tensor in tensors.items() if tensor.numel()}
        self._empty = {
            name: (dtype_name(tensor.dtype), tuple(tensor.shape))
            for name, tensor in tensors.items()
            if not tensor.numel()
        }

    def record(self) -> ObjectRecord:
        """What was read last, encoded.

        Raises:
            StateError: a value without a codec, with its key path.
        """
        return ObjectRecord(data=encode([self._tree, self._empty], path=self.name), per_rank=self.per_rank)

    def check(self, reader: StateReader) -> None:
        """Note what of this object is missing in the saved state."""
        saved = reader.object(self.name)
        if saved is not None:
            reader.use(placeholder_names(saved[0]) - saved[1].keys())

    def begin(self, reader: StateReader) -> Callable[[], None]:
        """Ask for the saved tree of this rank; what is returned hands it to the object, once all is read."""
        tree = self.saved_tree(reader, live=split_tensors(self.name, self._read())[1])
        return lambda: self._hand(tree())

    def _hand(self, tree: Tree) -> None:
        self._write(tree)

    def wants_all_ranks(self, reader: StateReader) -> bool:
        """Whether `begin` looks at the objects of all old ranks."""
        return False

    def saved_tree(
        self, reader: StateReader, *, live: dict[str, torch.Tensor] | None = None, rank: int | None = None
    ) -> Callable[[], Tree]:
        """Ask for the tensors of the saved tree; what is returned gives it, once all is read.

        Args:
            live: tensors of the object as it is: where names agree, the saved ones come to their devices and meshes,
                else to the CPU.
            rank: take the state of this old rank.
        """
        saved = reader.object(self.name) if rank is None else reader.object_of(self.name, rank)
        empty: dict[str, Any] = saved[1]
        likes = live or {}
        made = {
            name: _empty(*empty[name]) if name in empty else _ask_like(reader, name, likes.get(name), rank)
            for name in sorted(placeholder_names(saved[0]))
        }

        def tree() -> Tree:
            there = {
                name: tensor if name in empty else _moved(tensor, likes.get(name)) for name, tensor in made.items()
            }
            return join_tensors(saved[0], there.__getitem__)

        return tree


class LiftedPerRank(Lifted):
    """As `Lifted`, for state that differs between ranks; knows what to do when their number has changed.

    Args:
        on_resize: (states of all old ranks, new rank, new world size) -> state; None: a resize is an error.
    """

    def __init__(
        self,
        name: str,
        read: Callable[[], Tree],
        write: Callable[[Tree], object],
        *,
        on_resize: Callable[[list[Tree], int, int], Tree] | None,
    ) -> None:
        super().__init__(name, read, write, per_rank=True)
        self._on_resize = on_resize

    def check(self, reader: StateReader) -> None:
        """Note what is missing. Raises StateError where the world has another size and nothing says what to do."""
        super().check(reader)
        if reader.resized and self._on_resize is None:
            raise reader.resize_error(self.name)

    def wants_all_ranks(self, reader: StateReader) -> bool:
        """Where the world has another size."""
        return reader.resized

    def begin(self, reader: StateReader) -> Callable[[], None]:
        """The same with this rank's state, or with what `on_resize` makes of all."""
        on_resize = self._on_resize
        if not reader.resized or on_resize is None:
            return super().begin(reader)
        trees = [self.saved_tree(reader, rank=rank) for rank in range(reader.catalog.world_size)]
        return lambda: self._hand(on_resize([tree() for tree in trees], reader.session_rank, reader.world_size))


def _empty(dtype: str, shape: Sequence[int]) -> torch.Tensor:
    return torch.empty(tuple(shape), dtype=torch_dtype(dtype))


def _ask_like(reader: StateReader, name: str, live: torch.Tensor | None, rank: int | None) -> torch.Tensor:
    if is_dtensor(live) and tuple(live.shape) == reader.record(name).shape:
        tensor = torch.empty_like(live, dtype=torch_dtype(reader.record(name).dtype))
        reader.fill(name, tensor)
        return tensor
    return reader.whole(name, rank=rank)


def _moved(tensor: torch.Tensor, live: torch.Tensor | None) -> torch.Tensor:
    return tensor if live is None or is_dtensor(live) else tensor.to(live.device)
