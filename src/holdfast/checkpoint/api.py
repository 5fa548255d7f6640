"""`holdfast.checkpoint.save` and `load`: a state to a directory and back, without a Session.

The state is a nested mapping. Tensors and DTensors in it are saved as pieces: DTensors once per byte in the job, plain
tensors once per rank-0 copy (they are taken to be equal on all ranks). Everything else goes through `objects`. Objects
with ``state_dict`` and ``load_state_dict`` are asked for and given theirs.
"""

from __future__ import annotations

import secrets
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from holdfast.checkpoint.boxes import Box
from holdfast.checkpoint.catalog import Catalog
from holdfast.checkpoint.commit import open_checkpoint
from holdfast.checkpoint.objects import ObjectRecord, decode, encode, join_tensors, split_tensors
from holdfast.checkpoint.ownership import Shard, own
from holdfast.checkpoint.pieces import Piece
from holdfast.checkpoint.saving import Ranks, agree, save_pieces
from holdfast.checkpoint.steps import StepInfo
from holdfast.checkpoint.tensors import (
    contiguous_on_cpu,
    dtensor_shard,
    dtype_name,
    empty_for,
    plain_shard,
    tensor_bytes,
)
from holdfast.checkpoint.version import GenerationId
from holdfast.errors import MismatchError

_TREE = "state"
_calls: Counter[tuple[str, int]] = Counter()
"""Saves of this process by (path, world size): ranks that save together agree on the count. Main thread only."""


def save(
    state: Mapping[str, Any],
    path: str | Path,
    *,
    process_group: Any = None,
    timeout: timedelta = timedelta(minutes=30),
) -> StepInfo:
    """Save a state into the new directory `path`. Every rank of the group calls it.

    Args:
        state: nested; see the head of this module. Any: that is the point.
        path: becomes one checkpoint; saving to an existing one is an error.
        process_group: whose ranks save (None: the default group, or this process alone).
        timeout: how long to wait for the slowest rank.

    Raises:
        StateError: something in the state cannot be stored; names its key.
        StorageError: a rank could not write, or `path` holds a checkpoint.
        PeerTimeout: a rank did not come; named.
    """
    ranks = Ranks.of(process_group)
    _calls[str(path), ranks.world_size] += 1
    attempt = _calls[str(path), ranks.world_size]
    tree, tensors = split_tensors("", _state_of(state))
    local, shards = _local(tensors, ranks, process_group)
    pieces = own(shards, global_rank=ranks.rank, node_of=lambda rank: rank)
    nonce = agree(ranks, f"{path}/{attempt}", lambda: secrets.token_hex(4), timeout)
    generation = GenerationId(incarnation=1, nonce=nonce, generation=attempt)
    boxes = {shard.name: shard.boxes for shard in shards}
    return save_pieces(
        path,
        ranks=ranks,
        version=generation.at(0),
        pieces=pieces,
        data=lambda piece: tensor_bytes(_part(local[piece.name], boxes[piece.name], piece).contiguous()),
        objects={_TREE: ObjectRecord(encode(tree))},
        attempt=attempt,
        timeout=timeout,
    )


def load(state: Mapping[str, Any], path: str | Path, *, process_group: Any = None) -> dict[str, Any]:
    """Load a checkpoint into `state`: tensors and DTensors in place, whatever parallelism saved them.

    Args:
        state: nested, with the same keys as the saved one; its tensors are filled in place.
        path: the checkpoint.
        process_group: whose ranks load.

    Returns:
        A state like the saved one, which holds the tensors of `state` and the saved other values. Objects with
        ``load_state_dict`` have been given theirs and stand in it themselves.

    Raises:
        MismatchError: tensors are missing or unexpected, or have other shapes or dtypes; lists them. Nothing was
            loaded.
        CorruptError, StorageError: the checkpoint cannot be read; tensors of `state` may have been filled.
    """
    ranks = Ranks.of(process_group)
    tree, tensors = split_tensors("", _state_of(state))
    del tree
    local, shards = _local(tensors, ranks, process_group)
    with open_checkpoint(path) as catalog:
        _check_same(catalog, tensors)
        saved = decode(catalog.objects(ranks.rank)[_TREE])
        for shard in shards:
            for box in shard.boxes:
                _read_into(catalog, local[shard.name], shard, box)
    loaded = join_tensors(saved, lambda name: tensors[name])
    return {key: _give(value, loaded[key]) if key in loaded else value for key, value in state.items()}


def _state_of(state: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: dict(value.state_dict()) if hasattr(value, "state_dict") and hasattr(value, "load_state_dict") else value
        for key, value in state.items()
    }


def _give(value: Any, loaded: Any) -> Any:
    if hasattr(value, "state_dict") and hasattr(value, "load_state_dict"):
        value.load_state_dict(loaded)
        return value
    return loaded


def _local(
    tensors: Mapping[str, torch.Tensor], ranks: Ranks, process_group: Any
) -> tuple[dict[str, torch.Tensor], list[Shard]]:
    """The local parts of all tensors, and what of the global ones they are."""
    # Importing it takes seconds; where it was not imported there is no DTensor.
    module = sys.modules.get("torch.distributed.tensor")
    everyone = tuple(range(ranks.world_size))
    local: dict[str, torch.Tensor] = {}
    shards: list[Shard] = []
    for name, tensor in tensors.items():
        if module is not None and isinstance(tensor, module.DTensor):
            shard = dtensor_shard(name, tensor)
            local[name] = tensor.to_local().detach()
            shards.append(_in_group(shard, ranks, process_group))
        else:
            local[name] = tensor.detach()
            shards.append(plain_shard(name, tensor, holders=everyone))
    return local, shards


def _in_group(shard: Shard, ranks: Ranks, process_group: Any) -> Shard:
    """A DTensor's shard with holders counted in the process group."""
    if process_group is None:
        return shard
    import torch.distributed as dist

    holders = tuple(sorted(dist.get_group_rank(process_group, rank) for rank in shard.holders))
    return Shard(shard.name, shard.dtype, shard.shape, shard.boxes, holders, shard.rank)


def _part(local: torch.Tensor, boxes: tuple[Box, ...], piece: Piece) -> torch.Tensor:
    """The elements of `piece` out of the local tensor, on the CPU."""
    if not boxes:
        return empty_for(piece.dtype, piece.box.lengths)
    inner = piece.box.relative_to(boxes[0])
    for dim, (offset, length) in enumerate(zip(inner.offsets, inner.lengths, strict=True)):
        local = local.narrow(dim, offset, length)
    return contiguous_on_cpu(local)


def _read_into(catalog: Catalog, local: torch.Tensor, shard: Shard, box: Box) -> None:
    if box.is_empty:
        return
    if local.device.type == "cpu" and local.is_contiguous():
        catalog.read(shard.name, box, tensor_bytes(local))
        return
    staging = empty_for(shard.dtype, box.lengths)
    catalog.read(shard.name, box, tensor_bytes(staging))
    with torch.no_grad():
        local.copy_(staging)


def _check_same(catalog: Catalog, tensors: Mapping[str, torch.Tensor]) -> None:
    problems = list(_differences(catalog, tensors))
    if problems:
        more = f" and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise MismatchError(f"the checkpoint is of another state: {'; '.join(problems[:10])}{more}")


def _differences(catalog: Catalog, tensors: Mapping[str, torch.Tensor]) -> Iterator[str]:
    for name in sorted(tensors.keys() - catalog.tensors.keys()):
        yield f"{name} is not saved"
    for name in sorted(catalog.tensors.keys() - tensors.keys()):
        yield f"{name} is saved but not in the state"
    for name in sorted(tensors.keys() & catalog.tensors.keys()):
        saved, tensor = catalog.tensors[name], tensors[name]
        if (saved.dtype, saved.shape) != (dtype_name(tensor.dtype), tuple(tensor.shape)):
            yield (
                f"{name} is saved as {saved.dtype}{list(saved.shape)}, "
                f"in the state it is {dtype_name(tensor.dtype)}{list(tensor.shape)}"
            )
