"""Which tensors nothing keeps equal on the ranks that hold them.

DDP adds up gradients, and the placements of a DTensor say what is replicated: replicas of these are equal bit for bit,
and where they are not, something is broken. Of other trainable tensors only the script knows: it may add up gradients
by itself, or let norms beside tensor-parallel layers go their own ways. The list goes with each image, for whoever
compares copies (`holdfast.snapshot.divergence`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from holdfast.runtime.layout import is_dtensor
from holdfast.runtime.names import ModuleTree

_MODEL = "model."


def unsynchronised(
    models: Sequence[nn.Module], trees: Sequence[ModuleTree], parameters: Mapping[str, str | None]
) -> list[str]:
    """The names of these tensors.

    Args:
        models: of the state.
        trees: of the models.
        parameters: name of every tensor of the state -> the parameter that it is state of.
    """
    kept = {
        id(parameter)
        for model in models
        for module in model.modules()
        if isinstance(module, DistributedDataParallel)
        for parameter in module.parameters()
    }
    free = [
        named
        for tree in trees
        for named in tree.tensors
        if not named.is_buffer
        and isinstance(named.tensor, torch.Tensor)
        and not is_dtensor(named.tensor)
        and id(named.tensor) not in kept
    ]
    if not any(named.owned.requires_grad for named in free):
        return []  # frozen ones, and an EMA, follow those that train
    names = {_MODEL + named.name for named in free}
    return sorted(names | {name for name, parameter in parameters.items() if parameter in names})
