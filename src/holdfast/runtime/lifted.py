"""State that an object hands out as a tree (``state_dict()``, ``get_extra_state()``): tensors as entries, the rest as
one object."""

from __future__ import annotations

from collections.abc import Callable
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

    def restore(self, reader: StateReader) -> None:
        """Hand the saved tree of this rank to the object."""
        live = split_tensors(self.name, self._read())[1]
        self._write(self.saved_tree(reader, live=live))

    def saved_tree(
        self, reader: StateReader, *, live: dict[str, torch.Tensor] | None = None, rank: int | None = None
    ) -> Tree:
        """The saved tree with its tensors: on the devices and meshes of `live` where names agree, else on the CPU.

        Args:
            live: tensors of the object as it is.
            rank: take the state of this old rank.
        """
        saved = reader.object(self.name) if rank is None else reader.object_of(self.name, rank)
        empty: dict[str, Any] = saved[1]
        made: dict[str, torch.Tensor] = {}

        def get(name: str) -> torch.Tensor:
            if name not in made:
                if name in empty:
                    dtype, shape = empty[name]
                    made[name] = torch.empty(tuple(shape), dtype=torch_dtype(dtype))
                else:
                    made[name] = _read_like(reader, name, (live or {}).get(name), rank)
            return made[name]

        return join_tensors(saved[0], get)


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

    def restore(self, reader: StateReader) -> None:
        """Hand this rank's state, or what `on_resize` makes of all, to the object."""
        if not reader.resized or self._on_resize is None:
            super().restore(reader)
            return
        states = [self.saved_tree(reader, rank=rank) for rank in range(reader.catalog.world_size)]
        self._write(self._on_resize(states, reader.session_rank, reader.world_size))


def _read_like(reader: StateReader, name: str, live: torch.Tensor | None, rank: int | None) -> torch.Tensor:
    if is_dtensor(live) and tuple(live.shape) == reader.record(name).shape:
        tensor = torch.empty_like(live, dtype=torch_dtype(reader.record(name).dtype))
        reader.fill(name, tensor)
        return tensor
    whole = reader.read_whole(name, rank=rank)
    return whole if live is None or is_dtensor(live) else whole.to(live.device)
