"""Files of `torch.save`, read with ``weights_only=True`` through a memory map."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

from holdfast.checkpoint.boxes import Box
from holdfast.checkpoint.objects import split_tensors
from holdfast.checkpoint.retries import first_line
from holdfast.checkpoint.tools.states import SavedTensor, fingerprint_of
from holdfast.errors import CorruptError, StorageError


class TorchState:
    """A file of `torch.save`."""

    format = "torch"
    step = 0

    def __init__(self, path: Path) -> None:
        """
        Raises:
            CorruptError: it is no such file, or would need more than plain data and tensors.
        """
        import torch

        self.fingerprint = fingerprint_of([path])
        try:
            # Files from before torch 1.6 are no zip files and cannot be mapped: they are read whole.
            with open(path, "rb") as file:
                mapped = file.read(4) == b"PK\x03\x04"
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        except OSError as error:
            raise StorageError(f"{path} cannot be read: {error.strerror or error}") from error
        except Exception as error:  # a damaged pickle can raise anything; the caller gets one kind
            said = _reason(error) if isinstance(error, RuntimeError | pickle.UnpicklingError) else repr(error)
            raise CorruptError(f"{path} is refused, torch.load does not read it as plain data: {said}") from error
        self._tree, self._by_name = split_tensors("", loaded, tied=True)
        self.tensors = tuple(sorted(self._described(name) for name in self._by_name))

    def _described(self, name: str) -> SavedTensor:
        from holdfast.checkpoint.tensors import check_tensor, dtype_name

        tensor = self._by_name[name]
        check_tensor(name, tensor)
        return SavedTensor(name, None, dtype_name(tensor.dtype), tuple(tensor.shape))

    def read(self, tensor: SavedTensor, box: Box, out: memoryview) -> None:
        """See `SavedState.read`."""
        from holdfast.checkpoint.tensors import contiguous_on_cpu, tensor_bytes

        view = self._by_name[tensor.name]
        for dim, (start, length) in enumerate(zip(box.offsets, box.lengths, strict=True)):
            view = view.narrow(dim, start, length)
        out[:] = tensor_bytes(contiguous_on_cpu(view))

    def nested(self) -> Any:
        """See `SavedState.nested`."""
        return self._tree

    def close(self) -> None:
        """See `SavedState.close`: the map goes with the last tensor."""
        self._by_name.clear()


def _reason(error: Exception) -> str:
    """What torch says, without its advice to load the file as code."""
    lines = str(error).splitlines()
    return next((line.strip() for line in lines if "WeightsUnpickler error" in line), first_line(error))
