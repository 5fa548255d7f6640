"""The order in which DDP reduces gradients, kept over a resume.

DDP puts its parameters into buckets twice: by their order in the model when it is made, and by the order in which their
gradients were ready in the first backward pass before the second forward one. The bits of a sum of three or more ranks
depend on where in a bucket a gradient lies, so a resumed run has to begin with the second buckets. `BucketOrders` notes
the order in the first backward pass and replays it after a restore: each gradient is marked ready in that order, with
zeros, and DDP builds its buckets at the next forward pass as it did then.

Nothing is noted for two ranks, whose sum has one order only, and where DDP builds no buckets anew or does not do so by
this rule: `find_unused_parameters`, a static graph, communication hooks, mixed precision, sparse gradients.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

_FEWEST_RANKS = 3


class BucketOrders:
    """The orders of all DDP modules of a training state. Training thread only."""

    def __init__(self, models: Iterable[tuple[str, nn.Module]], ranks: tuple[int, ...]) -> None:
        """Find the DDP modules.

        Args:
            models: prefix of the names, module.
            ranks: global ranks of the Session, which restore together.
        """
        self._modules = {
            f"{prefix}{path}": _Module(module)
            for prefix, model in models
            for path, module in model.named_modules()
            if isinstance(module, DistributedDataParallel) and _has_order(module, ranks)
        }
        self._restored: Mapping[str, bytes] = {}

    def record(self) -> dict[str, bytes]:
        """Name of a DDP module -> indices of its parameters (little-endian uint32) by when their gradients were ready.

        A module is missing until its first backward pass has ended.
        """
        return {name: module.encoded for name, module in self._modules.items() if module.encoded}

    def restored(self, record: Mapping[str, bytes] | None) -> None:
        """Take what `record` gave in the run that is resumed; None where it is not known."""
        self._restored = record or {}

    def begin(self) -> None:
        """Replay what was restored and note what is not known.

        Every rank calls it, once, before training: DDP communicates in it.
        """
        for name, module in self._modules.items():
            order = np.frombuffer(self._restored.get(name, b""), dtype="<u4")
            if sorted(order.tolist()) == list(range(module.size)) and module.size:
                module.replay(order.tolist())
            else:
                module.watch()

    def close(self) -> None:
        """Take hooks back that have not fired."""
        for module in self._modules.values():
            module.close()


class _Module:
    """One DDP module."""

    def __init__(self, module: DistributedDataParallel) -> None:
        self._module = module
        self._parameters = [
            parameter
            for name, parameter in module.module.named_parameters()
            if parameter.requires_grad and name not in module.parameters_to_ignore
        ]
        self._order: dict[int, None] = {}
        self._hooks: list[RemovableHandle] = []
        self.encoded = b""
        """The order, once it is known."""

    @property
    def size(self) -> int:
        """Number of parameters."""
        return len(self._parameters)

    def watch(self) -> None:
        """Note the order of the first backward pass that reduces."""
        for index, parameter in enumerate(self._parameters):
            self._hooks.append(parameter.register_post_accumulate_grad_hook(lambda _, i=index: self._ready(i)))

    def replay(self, order: list[int]) -> None:
        """Have DDP see gradients become ready in `order`; gradients stay as they are."""
        gradients = [parameter.grad for parameter in self._parameters]
        for parameter in self._parameters:
            parameter.grad = None
        with torch.enable_grad():
            self._module.reducer.prepare_for_backward([])
            for index in order:
                parameter = self._parameters[index]
                torch.autograd.backward(parameter.view_as(parameter), torch.zeros_like(parameter))
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient
        self._know(order)

    def close(self) -> None:
        """Take hooks back that have not fired."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _ready(self, index: int) -> None:
        if not self._module.require_forward_param_sync or not self._hooks:
            return  # gradients are only accumulated in this pass
        self._order[index] = None
        if len(self._order) == len(self._parameters):
            self.close()
            self._know(list(self._order))

    def _know(self, order: list[int]) -> None:
        self.encoded = np.asarray(order, dtype="<u4").tobytes()


def _has_order(module: DistributedDataParallel, ranks: tuple[int, ...]) -> bool:
    """Whether its buckets follow the first backward pass, in which all its ranks are ranks of the Session."""
    group = dist.get_process_group_ranks(module.process_group)
    sparse = any(getattr(part, "sparse", False) for part in module.modules())
    return (
        len(group) >= _FEWEST_RANKS
        and set(group) <= set(ranks)
        and not module.find_unused_parameters
        and not module.static_graph
        and not module._comm_hooks
        and module.mixed_precision is None
        and not sparse
    )
