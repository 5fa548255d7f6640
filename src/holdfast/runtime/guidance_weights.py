"""A teacher's weights from files: a holdfast checkpoint, or safetensors as Hugging Face lays them out."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch
import xxhash
from torch import Tensor, nn

from holdfast.checkpoint.boxes import whole
from holdfast.checkpoint.commit import newest_step, open_checkpoint
from holdfast.checkpoint.dtypes import DTYPES
from holdfast.checkpoint.tensors import contiguous_on_cpu, empty_for, tensor_bytes, torch_dtype
from holdfast.errors import CorruptError, MismatchError, UsageError
from holdfast.runtime.guidance_layers import unwrap

_PREFIX = "model."
_SHOWN = 5
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors specification
_NAMES = {info.code: name for name, info in reversed(DTYPES.items()) if info.code != "U8"} | {"U8": "uint8"}
_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")

Read = Callable[[], Tensor]


def load_weights(module: nn.Module, path: Path) -> None:
    """Fill a module's parameters and buffers, in their own dtypes, from `path`.

    Args:
        module: on any device; tensors that are saved but are not in it are left alone (optimizer state).
        path: a step directory or a checkpoint directory of holdfast, a ``.safetensors`` file, or a folder of them.

    Raises:
        UsageError: there are no weights at the path.
        MismatchError: names of the module are missing there, or a shape differs.
        CorruptError: bytes that do not match their checksum, or a header that does not parse.
    """
    step = _step_directory(path)
    if step is not None:
        with open_checkpoint(step) as catalog:
            _fill(module, {name: _of_catalog(catalog, name) for name in catalog.tensors}, path)
        return
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors")) if path.is_dir() else []
    if not files:
        raise UsageError(f"there are no weights at {str(path)!r}: neither a holdfast checkpoint nor safetensors files")
    readers: dict[str, Read] = {}
    for file in files:
        readers.update(_of_safetensors(file))
    _fill(module, readers, path)


def weights_hash(module: nn.Module) -> str:
    """Identity of a module: names, dtypes, shapes and bytes of its state; layout and wrappers do not matter.

    With DTensors every rank of their mesh calls it: they are gathered one by one.
    """
    found = xxhash.xxh3_128()
    for name, tensor in sorted(named_state(module).items()):
        full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        found.update(f"{name} {full.dtype} {tuple(full.shape)} ".encode())
        found.update(tensor_bytes(contiguous_on_cpu(full)))
    return found.hexdigest()


def named_state(module: nn.Module) -> dict[str, Tensor]:
    """What ``state_dict`` holds, by names without wrappers."""
    state = {}
    for name, tensor in unwrap(module).state_dict(keep_vars=True).items():
        for wrapper in _WRAPPERS:
            name = name.replace(wrapper, "")
        if isinstance(tensor, Tensor):
            state[name] = tensor.detach()
    return state


def _step_directory(path: Path) -> Path | None:
    if (path / "root").exists():
        return path
    newest = newest_step(path) if path.is_dir() else None
    return newest.path if newest is not None else None


def _fill(module: nn.Module, readers: Mapping[str, Read], path: Path) -> None:
    state = named_state(module)
    names = {name: _saved_name(name, readers) for name in state}
    names = {name: saved or _tied_name(module, name, readers) for name, saved in names.items()}
    missing = [name for name, saved in names.items() if saved is None]
    if missing:
        raise MismatchError(
            f"{path}: {len(missing)} tensors of the teacher are not there: {', '.join(missing[:_SHOWN])}"
            f"{', …' if len(missing) > _SHOWN else ''}; is it a checkpoint of another model?"
        )
    for name, saved in names.items():
        assert saved is not None
        read = readers[saved]()
        if read.shape != state[name].shape:
            raise MismatchError(f"{path}: {name} is saved as {list(read.shape)}, the teacher has it as "
                                f"{list(state[name].shape)}")  # fmt: skip
        _copy(read, state[name])


def _copy(read: Tensor, target: Tensor) -> None:
    if hasattr(target, "full_tensor"):
        raise UsageError("teacher_weights are read into a plain module: load them first, shard the teacher afterwards")
    with torch.no_grad():
        target.copy_(read)


def _saved_name(name: str, readers: Mapping[str, Read]) -> str | None:
    return next((saved for saved in (_PREFIX + name, name) if saved in readers), None)


def _tied_name(module: nn.Module, name: str, readers: Mapping[str, Read]) -> str | None:
    """Where a tensor is saved under another name that it has in the module as well (tied embeddings)."""
    plain = named_state(module)
    others = [other for other in plain if other != name and plain[other].data_ptr() == plain[name].data_ptr()]
    return next((saved for other in others if (saved := _saved_name(other, readers))), None)


def _of_catalog(catalog: Any, name: str) -> Read:  # Any: Catalog; its import is above, its use is here only
    def read() -> Tensor:
        record = catalog.tensors[name]
        tensor = empty_for(record.dtype, record.shape)
        catalog.read(name, whole(record.shape), tensor_bytes(tensor), rank=0 if record.per_rank else None)
        return tensor

    return read


def _of_safetensors(file: Path) -> Iterator[tuple[str, Read]]:
    """Names in a safetensors file, and how to read each (huggingface/safetensors, README, "Format")."""
    with file.open("rb") as opened:
        size = file.stat().st_size
        length = int.from_bytes(opened.read(8), "little")
        if not 2 <= length <= min(size - 8, _MAX_HEADER_BYTES):
            raise CorruptError(f"{file} is no safetensors file: its header would be {length} bytes long")
        mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
    try:
        header = msgspec.json.decode(mapped[8 : 8 + length], type=dict[str, dict[str, Any]])
        for name, entry in header.items():
            if name != "__metadata__":
                yield name, _of_bytes(file, name, entry, memoryview(mapped)[8 + length :])
    except (msgspec.DecodeError, KeyError, TypeError, ValueError) as error:
        raise CorruptError(f"{file} is no safetensors file: {error}") from error


def _of_bytes(file: Path, name: str, entry: Mapping[str, Any], data: memoryview) -> Read:
    code, shape, (begin, end) = entry["dtype"], [int(n) for n in entry["shape"]], entry["data_offsets"]
    if code not in _NAMES:
        raise CorruptError(f"{file}: {name} has the unknown dtype {code!r}")
    dtype = torch_dtype(_NAMES[code])
    count = 1
    for n in shape:
        count *= n
    if not 0 <= begin <= end <= len(data) or end - begin != count * dtype.itemsize:
        raise CorruptError(f"{file}: {name} does not fit its place in the file")

    def read() -> Tensor:
        return torch.frombuffer(bytearray(data[begin:end]), dtype=torch.uint8).view(dtype).view(shape)

    return read
