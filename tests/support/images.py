"""Images in memory from a `TrainingState`, and catalogs over them, without slots, threads or daemons."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from holdfast.checkpoint.catalog import Catalog, OpenImage
from holdfast.checkpoint.image import ImageLayout, block_checksums, read_header
from holdfast.checkpoint.objects import encode_objects
from holdfast.checkpoint.source import MemorySource
from holdfast.checkpoint.tensors import tensor_bytes
from holdfast.checkpoint.version import GenerationId
from holdfast.runtime.capture import TrainingState
from holdfast.runtime.rng import read_rng

GENERATION = GenerationId(incarnation=1, nonce="0123abcd", generation=1)


def save_image(state: TrainingState, step: int, *, global_rank: int = 0, world_size: int = 1) -> bytes:
    """The image of one rank, all ranks on one node."""
    owned = state.pieces(state.entries(), node_of=lambda rank: 0)
    blob = encode_objects(state.objects(step))
    layout = ImageLayout.plan([one.piece for one in owned], objects_capacity=len(blob))
    tensors = {one.piece.key: one.tensor for one in owned}
    image = bytearray(layout.size_bytes)
    for piece, offset in zip(layout.pieces, layout.piece_offsets, strict=True):
        data = tensor_bytes(tensors[piece.key].contiguous())
        image[offset : offset + len(data)] = data
    image[layout.objects_offset : layout.objects_offset + len(blob)] = blob
    checksums = block_checksums([memoryview(image)[layout.data_start :]], layout.block_bytes)
    image[: layout.data_start] = layout.header(
        version=GENERATION.at(step),
        global_rank=global_rank,
        world_size=world_size,
        checksums=checksums,
        objects_bytes=len(blob),
    )
    return bytes(image)


def catalog_of(images: Iterable[bytes]) -> Catalog:
    """A catalog over images of one version."""
    opened = []
    for number, image in enumerate(images):
        source = MemorySource(memoryview(image))
        opened.append(OpenImage(f"image {number}", read_header(source.read), source))
    return Catalog(opened)


def tensors_in(tree: Any, path: str = "") -> dict[str, Any]:
    """Every leaf of a nested state by its path; tensors cloned, DTensors as their local part."""
    if isinstance(tree, torch.Tensor):
        local = getattr(tree, "_local_tensor", tree)
        return {path: local.detach().clone()}
    if isinstance(tree, dict):
        return {k: v for key, item in tree.items() for k, v in tensors_in(item, f"{path}.{key}").items()}
    if isinstance(tree, list | tuple):
        return {k: v for key, item in enumerate(tree) for k, v in tensors_in(item, f"{path}.{key}").items()}
    return {path: tree}


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Paths at which two results of `tensors_in` are not the same bits."""
    found = sorted(a.keys() ^ b.keys())
    for path in a.keys() & b.keys():
        left, right = a[path], b[path]
        if isinstance(left, torch.Tensor) != isinstance(right, torch.Tensor):
            found.append(path)
        elif isinstance(left, torch.Tensor):
            if left.dtype != right.dtype or left.shape != right.shape or not _same_bits(left, right):
                found.append(path)
        elif left != right:
            found.append(path)
    return found


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bytes(tensor_bytes(a.contiguous())) == bytes(tensor_bytes(b.contiguous()))


def everything(models: Sequence[torch.nn.Module], optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Any]:
    """Weights, buffers, optimizer state, hyperparameters and generator states, for comparing two runs."""
    return tensors_in(
        {
            "models": [model.state_dict() for model in models],
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            "rng": read_rng(),
        }
    )
