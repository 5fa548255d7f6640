"""Gradients of learned projections: they belong to no DDP or FSDP module, so they are averaged here."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch.distributed as dist
from torch import Tensor, nn

from holdfast.errors import UsageError


def average_gradients(learned: nn.Module, model: nn.Module, process_group: dist.ProcessGroup | None) -> None:
    """Have gradients of `learned` averaged over the data-parallel ranks as they are accumulated.

    One blocking all-reduce per parameter and backward, at the same place of the graph on every rank.

    Args:
        learned: modules that are the same on all ranks.
        model: tells the ranks where it is wrapped by DDP or sharded by FSDP2.
        process_group: goes before what the model tells.

    Raises:
        UsageError: there are several ranks, and nothing says which of them share this model.
    """
    parameters = [parameter for parameter in learned.parameters() if parameter.requires_grad]
    if not parameters or not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return
    groups = [process_group] if process_group is not None else _groups_of(model)
    if not groups:
        raise UsageError(
            f"match is learned and there are {dist.get_world_size()} ranks: make LateToEarly after the model was "
            "wrapped (DDP) or sharded (FSDP2), or give process_group, the data-parallel ranks"
        )

    def average(parameter: Tensor) -> None:
        assert parameter.grad is not None
        for group in groups:
            dist.all_reduce(parameter.grad, group=group)
            parameter.grad /= dist.get_world_size(group)

    for parameter in parameters:
        register: Callable[[Callable[[Tensor], None]], object] = parameter.register_post_accumulate_grad_hook
        register(average)


def _groups_of(model: nn.Module) -> list[dist.ProcessGroup]:
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return [model.process_group]
    module = sys.modules.get("torch.distributed.tensor")  # importing it takes a second; without it nothing is sharded
    if module is None:
        return []
    for parameter in model.parameters():
        if isinstance(parameter, module.DTensor):
            return list(parameter.device_mesh.get_all_groups())
    return []
