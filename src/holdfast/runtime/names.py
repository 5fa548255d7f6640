"""The tensors of a model under the names that ``torch.distributed.checkpoint.state_dict`` gives them.

Torch's helpers are not called: on a fresh optimizer they step it, and ``state_dict`` runs hooks that may communicate.
The walk here visits modules in the order of ``state_dict`` (parameters, persistent buffers, extra state, children) and
skips the prefixes of wrappers (DDP, torch.compile, activation checkpointing, ``_fqn_modifiers``) as torch's does.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from holdfast.checkpoint.flat import FlatRange
from holdfast.checkpoint.fsdp1 import FLAT_PARAMETER, FlatHandle, FlatPart, flat_handles, is_fsdp1
from holdfast.errors import StateError

Shards = dict[tuple[int, str], Any]
"""By a module's dict and key: FSDP2's record of a parameter (private to torch, hence Any), or a `FlatPart`."""
_CHECKPOINT_WRAPPED = "_checkpoint_wrapped_module"


@dataclass(frozen=True, slots=True)
class Named:
    """A tensor of a model under one of its names."""

    name: str
    tensor: torch.Tensor | FlatRange
    is_buffer: bool
    home: dict[str, Any]
    """The module's dict that holds it (Any: as torch declares it; FSDP may show an unsharded parameter there)."""
    key: str
    part: FlatPart | None = None
    """Of FSDP1's flat parameter, where the tensor is such a part."""

    @property
    def owned(self) -> Any:
        """The tensor that an optimizer owns (Any: may be of a kind that is private to torch)."""
        return self.tensor if self.part is None else self.part.parameter

    @property
    def live(self) -> torch.Tensor | FlatRange:
        """The tensor now: a buffer may have been replaced since the tree was read."""
        live: torch.Tensor | FlatRange = self.home[self.key] if self.is_buffer else self.tensor
        return live


@dataclass(slots=True)
class ModuleTree:
    """All tensors of one model, and what is needed to notice cheaply that the tree has changed."""

    prefix: str
    """Put before every name, "" or "key."."""
    model: nn.Module
    tensors: list[Named] = field(default_factory=list)
    """In the order of ``state_dict``, tied tensors once under each name."""
    extra_states: list[tuple[str, nn.Module]] = field(default_factory=list)
    """Names that end in ``_extra_state``, and the modules that have one."""
    sharded: list[Any] = field(default_factory=list)
    """FSDPParam objects (private to torch, hence Any) whose `sharded_param` is the state, whatever the module shows."""
    sharded_values: list[torch.Tensor] = field(default_factory=list)
    fsdp_modules: list[Any] = field(default_factory=list)
    """FSDPModule (a mix-in that nn.Module's type does not show, hence Any)."""
    flat_handles: list[FlatHandle] = field(default_factory=list)
    """FSDP1's flat parameters."""
    volatile: set[int] = field(default_factory=set)
    """Positions in `_values` of tensors that may be replaced at any time."""
    _slots: dict[tuple[int, str], int] = field(default_factory=dict)
    _dicts: list[dict[str, Any]] = field(default_factory=list)
    _keys: list[str] = field(default_factory=list)
    _values: list[Any] = field(default_factory=list)
    _managed: set[int] = field(default_factory=set)
    _non_persistent: list[set[str]] = field(default_factory=list)
    _num_non_persistent: int = 0

    def is_current(self) -> bool:
        """Whether every module holds the objects that it held when the tree was read; about 0.1 us per tensor.

        Parameters that FSDP swaps between sharded and unsharded, and tensors in `volatile`, do not count.
        """
        if list(chain.from_iterable(self._dicts)) != self._keys:
            return False
        if sum(map(len, self._non_persistent)) != self._num_non_persistent:
            return False
        if not all(map(is_, self.sharded_values, [param.sharded_param for param in self.sharded])):
            return False
        if not all(handle.is_current() for handle in self.flat_handles):
            return False
        values = list(chain.from_iterable(map(dict.values, self._dicts)))
        if all(map(is_, values, self._values)):
            return True
        changed = (i for i, (new, old) in enumerate(zip(values, self._values, strict=True)) if new is not old)
        return all(i in self._managed or (i in self.volatile and values[i] is not None) for i in changed)

    def mark_volatile(self, named: Named) -> None:
        """From now on the tensor in this place may be replaced at any time; the caller reads it from `named.home`."""
        self.volatile.add(self._slots[id(named.home), named.key])


def read_tree(model: nn.Module, prefix: str = "") -> ModuleTree:
    """Walk a model.

    Raises:
        StateError: parameters that do not exist yet (lazy modules).
    """
    tree = ModuleTree(prefix, model)
    shards: Shards = _fsdp_parameters(tree)
    tree.flat_handles = flat_handles(model)
    for part in (part for handle in tree.flat_handles for part in handle.parts):
        shards.update({(id(module._parameters), key): part for module, key in part.places})
    for module in model.modules():
        _watch(tree, module, shards)
    tree._num_non_persistent = sum(map(len, tree._non_persistent))
    _walk(tree, model, prefix, shards)
    return tree


def _watch(tree: ModuleTree, module: nn.Module, shards: Shards) -> None:
    for values in (module._parameters, module._buffers, module._modules):
        for key, value in values.items():
            tree._slots[id(values), key] = len(tree._values)
            if (id(values), key) in shards:
                tree._managed.add(len(tree._values))
            tree._keys.append(key)
            tree._values.append(value)
        tree._dicts.append(values)
    tree._non_persistent.append(module._non_persistent_buffers_set)


def _walk(tree: ModuleTree, module: nn.Module, prefix: str, shards: Shards, *, is_hidden: bool = False) -> None:
    """Add what is in `module`; `is_hidden`: it is what a checkpoint_wrapper wraps."""
    home: dict[str, Any] = module._parameters
    # What FSDP1 has taken into a flat parameter may stand in the module's dict or not, as it is sharded now or not.
    flat = {key: part for (owner, key), part in shards.items() if owner == id(home) and isinstance(part, FlatPart)}
    for name in dict.fromkeys([*home, *flat]):
        parameter = home.get(name)
        if name in flat:
            tree.tensors.append(Named(prefix + name, flat[name].range, False, home, name, flat[name]))
            continue
        if parameter is None or (name == FLAT_PARAMETER and tree.flat_handles):
            continue
        if is_lazy(parameter):
            raise StateError(f"model parameter {prefix}{name} is not initialised yet; run a forward pass first")
        shard = shards.get((id(home), name))
        tree.tensors.append(
            Named(prefix + name, parameter if shard is None else shard.sharded_param, False, home, name)
        )
    for name, buffer in module._buffers.items():
        if buffer is not None and name not in module._non_persistent_buffers_set:
            tree.tensors.append(Named(prefix + name, buffer, True, module._buffers, name))
    if type(module).get_extra_state is not nn.Module.get_extra_state:
        tree.extra_states.append((prefix + "_extra_state", module))
    for name, child in module._modules.items():
        if child is not None:
            below = prefix if _is_transparent(module, name, is_hidden) else f"{prefix}{name}."
            _walk(tree, child, below, shards, is_hidden=name == _CHECKPOINT_WRAPPED)


def _is_transparent(module: nn.Module, child: str, is_hidden: bool) -> bool:
    """Whether the name of a child is left out of names: it is there only because of a wrapper.

    Torch does not see DDP and torch.compile directly inside a checkpoint_wrapper and keeps their prefixes; so do we.
    """
    if child == _CHECKPOINT_WRAPPED:
        return True
    if child == "_fsdp_wrapped_module" and is_fsdp1(module):
        return True
    if child == "module" and isinstance(module, DistributedDataParallel):
        return not is_hidden
    if child == "_orig_mod" and isinstance(module, _optimized_modules()):
        return not is_hidden
    modifiers = getattr(module, "_fqn_modifiers", None)
    return modifiers is not None and child in modifiers().values()


def _optimized_modules() -> tuple[type, ...]:
    """torch.compile's wrapper, without importing the compiler where nothing was compiled."""
    eval_frame = sys.modules.get("torch._dynamo.eval_frame")
    return () if eval_frame is None else (eval_frame.OptimizedModule,)


def _fsdp_parameters(tree: ModuleTree) -> Shards:
    """FSDP2's record of every parameter that it manages, by the module's dict and key.

    Between a forward without a backward and the next step a module shows unsharded parameters, which are not the state.
    """
    found: Shards = {}
    for module in tree.model.modules():
        if not hasattr(module, "_get_fsdp_state"):
            continue
        tree.fsdp_modules.append(module)
        for param in _managed_parameters(module):
            info = param._module_info
            owners = chain([info.module], info.shared_modules)
            attributes = chain([info.param_name], info.shared_param_names)
            tree.sharded.append(param)
            tree.sharded_values.append(param.sharded_param)
            for owner, attribute in zip(owners, attributes, strict=True):
                found[id(owner._parameters), attribute] = param
    return found


def _managed_parameters(module: Any) -> Iterator[Any]:  # Any: FSDP2's private state
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:  # torch < 2.11 has at most one
        groups = [] if state._fsdp_param_group is None else [state._fsdp_param_group]
    for group in groups:
        yield from group.fsdp_params
