"""FSDP1 (FullyShardedDataParallel): flat parameters as ranges of the parameters that they are made of.

Worked out from the handles' own records, without communication: torch's ways to these names (``state_dict_type``)
gather over the ranks. What is private in torch is touched in this module only.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from holdfast.checkpoint.flat import FlatRange

FLAT_PARAMETER = "_flat_param"
"""Under which a module shows its flat parameter where ``use_orig_params=False``."""
_WRAPPERS = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod")


@dataclass(frozen=True, eq=False, slots=True)
class FlatPart:
    """One original parameter of a flat one, as far as it lies in this rank's shard."""

    places: tuple[tuple[nn.Module, str], ...]
    """Modules and attributes that it is: more than one where it is tied."""
    parameter: torch.Tensor
    """What an optimizer owns: the original parameter, or the flat one (``use_orig_params=False``)."""
    range: FlatRange
    offset: int
    """Where the range begins in the local elements of `parameter`."""
    total: int
    """Local elements of `parameter`, padding included."""


@dataclass(frozen=True, eq=False)
class FlatHandle:
    """One flat parameter of a model."""

    parts: tuple[FlatPart, ...]
    _handle: Any
    """torch's FlatParamHandle (private, hence Any)."""
    _place: int

    def is_current(self) -> bool:
        """Whether this rank's shard lies where it lay."""
        return bool(_shard_of(self._handle).data_ptr() == self._place)

    def reshard(self) -> None:
        """Let go of an unsharded copy (after a forward without a backward): it does not see what the shard becomes."""
        handle = self._handle
        flat = handle.flat_param
        if handle.uses_sharded_strategy and flat.data_ptr() != self._place:
            handle.reshard(True)
            handle.post_reshard()
            handle._prefetched = False


def is_fsdp1(module: object) -> bool:
    """Whether it is a FullyShardedDataParallel, without importing that."""
    home = sys.modules.get("torch.distributed.fsdp.fully_sharded_data_parallel")
    return home is not None and isinstance(module, home.FullyShardedDataParallel)


def flat_handles(model: nn.Module) -> list[FlatHandle]:
    """All flat parameters of a model, in the order of its modules."""
    found: list[FlatHandle] = []
    for module in model.modules():
        handle = getattr(module, "_handle", None) if is_fsdp1(module) else None
        if handle is not None:
            parts = tuple(_parts(handle, _holders(module, handle)))
            found.append(FlatHandle(parts, handle, _shard_of(handle).data_ptr()))
    return found


def flat_state(model: nn.Module) -> dict[str, FlatRange | torch.Tensor]:
    """What ``state_dict`` of a model with FSDP1 in it would hold, with ranges in the place of flat parameters; no
    communication. Tied parameters stand under each of their names, as one object."""
    parts = {(id(m), key): part.range for h in flat_handles(model) for part in h.parts for m, key in part.places}
    state: dict[str, FlatRange | torch.Tensor] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        prefix = "".join(f"{step}." for step in path.split(".") if step and step not in _WRAPPERS)
        keys = [key for owner, key in parts if owner == id(module)]
        for key, parameter in module._parameters.items():
            if parameter is not None and key != FLAT_PARAMETER and key not in keys:
                state[prefix + key] = parameter
        state.update((prefix + key, parts[id(module), key]) for key in keys)
        for key, buffer in module._buffers.items():
            if buffer is not None and key not in module._non_persistent_buffers_set:
                state[prefix + key] = buffer
    return state


def _shard_of(handle: Any) -> torch.Tensor:
    """This rank's elements, wherever the flat parameter points now."""
    flat = handle.flat_param
    # torch sets it in the first forward; until then the parameter is the shard.
    shard: torch.Tensor = getattr(flat, "_local_shard", flat) if handle.uses_sharded_strategy else flat
    return shard.detach()


def _parts(handle: Any, holders: tuple[int, ...] | None) -> Iterator[FlatPart]:
    flat, shard = handle.flat_param, _shard_of(handle)
    originals = flat._params if flat._params is not None else [None] * len(flat._param_infos)
    tied: dict[tuple[int, str], list[tuple[nn.Module, str]]] = {}
    for info in flat._shared_param_infos:
        tied.setdefault((id(info.prim_module), info.prim_param_name), []).append((info.module, info.param_name))
    for info, shape, part, original in zip(
        flat._param_infos, flat._shapes, flat._shard_param_infos, originals, strict=True
    ):
        begin, length = (part.offset_in_shard, part.numel_in_shard) if part.in_shard else (0, 0)
        start = part.intra_param_start_idx if part.in_shard else 0
        yield FlatPart(
            places=((info.module, info.param_name), *tied.get((id(info.module), info.param_name), ())),
            parameter=flat if original is None else original,
            range=FlatRange(shard[begin : begin + length], tuple(shape), start, holders),
            offset=begin if original is None else 0,
            total=int(shard.numel()) if original is None else length,
        )


def _holders(module: Any, handle: Any) -> tuple[int, ...] | None:
    """Global ranks with the same shard."""
    import torch.distributed as dist

    group = getattr(module, "_inter_node_pg", None)
    ranks: set[int] = set() if group is None else set(dist.get_process_group_ranks(group))
    if not handle.uses_sharded_strategy:
        ranks |= set(dist.get_process_group_ranks(module.process_group))
    return tuple(sorted(ranks)) or None
