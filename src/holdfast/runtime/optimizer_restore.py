"""Puts saved optimizer state into live optimizers without stepping them.

State that is saved and missing here is created as the optimizer itself would have: in the saved dtype, on the device
that torch's ``Optimizer._process_value_according_to_param_policy`` chooses, laid out as the parameter is.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from holdfast.checkpoint.catalog import TensorRecord
from holdfast.checkpoint.fsdp1 import FlatPart
from holdfast.checkpoint.objects import encode, join_tensors
from holdfast.checkpoint.tensors import dtype_name, torch_dtype
from holdfast.runtime.layout import is_dtensor, local_part, shard_runs
from holdfast.runtime.optimizer_state import Leftovers, OptimizerPart, flat_state_range, placements_of
from holdfast.runtime.reader import StateReader, placeholder_names

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.placement_types import Placement

Group = dict[str, Any]  # Any: hyperparameters, as torch declares them


@dataclass(frozen=True)
class SavedGroup:
    """One saved parameter group."""

    names: frozenset[str]
    """FQNs of its parameters, as the live state knows them."""
    values: Group
    rank: int
    """Which rank saved it so."""


@dataclass(frozen=True)
class OptimizerPlan:
    """What the saved state says about one optimizer, checked against it."""

    leftovers: Leftovers
    tensors: Mapping[str, Mapping[str, str]]
    """fqn -> key -> saved name, for state that is a plain tensor."""
    groups: list[SavedGroup]
    """Saved hyperparameters in the order of the live groups."""


def plan_restore(
    part: OptimizerPart, reader: StateReader, resolve: Callable[[str], str], *, uneven: bool
) -> OptimizerPlan | None:
    """Note what does not fit; None where the optimizer is not in the saved state at all.

    Args:
        resolve: gives the FQN under which the live state knows a parameter, whichever of its names is saved.
        uneven: the ranks that saved the state trained different parts.
    """
    state_tree = reader.object(f"{part.prefix}.state")
    params = reader.object(f"{part.prefix}.params")
    groups = reader.object(f"{part.prefix}.param_groups")
    if state_tree is None or params is None or groups is None:
        return None
    leftovers = Leftovers.from_tree(state_tree)
    saved = _saved_groups(params, groups, reader.session_rank % reader.catalog.world_size, resolve)
    if uneven:
        others = [rank for rank in reader.old_ranks() if reader.has_object_of(f"{part.prefix}.state", rank)][1:]
        leftovers = leftovers.with_others(
            Leftovers.from_tree(reader.object_of(f"{part.prefix}.state", rank)) for rank in others
        )
        for rank in others:
            of_rank = [reader.object_of(f"{part.prefix}.{name}", rank) for name in ("params", "param_groups")]
            saved += _saved_groups(of_rank[0], of_rank[1], rank, resolve)
    matched = _match_groups(part, reader, saved, uneven=uneven)
    live = {fqn for names in part.params for fqn in names}
    if uneven:
        leftovers.values = {fqn: values for fqn, values in leftovers.values.items() if resolve(fqn) in live}
    nested = leftovers.nested_names()
    lifted = placeholder_names([group.values for group in matched])
    reader.use((nested | lifted) - leftovers.empty.keys())
    tensors = _plan_tensors(part, reader, resolve, leftovers, live)
    return OptimizerPlan(leftovers, tensors, matched)


def _plan_tensors(
    part: OptimizerPart,
    reader: StateReader,
    resolve: Callable[[str], str],
    leftovers: Leftovers,
    live: set[str],
) -> dict[str, dict[str, str]]:
    prefix = f"{part.prefix}.state."
    absent = set() if reader.resized else set(map(resolve, leftovers.absent))
    nested = leftovers.nested_names()
    tensors: dict[str, dict[str, str]] = defaultdict(dict)
    for name in [*reader.catalog.tensors, *leftovers.empty]:
        if name in nested or not name.startswith(prefix):
            continue
        fqn, _, key = name[len(prefix) :].rpartition(".")
        if resolve(fqn) in live:
            if resolve(fqn) not in absent:  # else only other ranks had it
                tensors[resolve(fqn)][key] = name
            if name not in leftovers.empty:
                reader.use([name])
    return tensors


def _saved_groups(
    params: list[list[str]], groups: list[Group], rank: int, resolve: Callable[[str], str]
) -> list[SavedGroup]:
    return [
        SavedGroup(frozenset(map(resolve, names)), group, rank) for names, group in zip(params, groups, strict=True)
    ]


def _match_groups(
    part: OptimizerPart, reader: StateReader, saved: list[SavedGroup], *, uneven: bool
) -> list[SavedGroup]:
    """The saved groups in the order of the live ones, matched by the parameters that they hold."""
    left, matched = list(saved), []
    for names in map(frozenset, part.params):
        found = next((group for group in left if group.names == names), None)
        if found is not None:
            left.remove(found)
        elif uneven or part.uneven:
            found = _covering(names, saved)
        if found is None:
            here = [len(names) for names in part.params]
            there = [len(group.names) for group in saved]
            reader.wrong(
                f"the parameter groups of {part.prefix} hold other parameters (groups of {here} here, of {there} there)"
            )
            return []
        matched.append(found)
    if left and not uneven and not part.uneven:
        reader.wrong(f"{part.prefix} has {len(saved)} parameter groups there and {len(part.params)} here")
    return matched


def _covering(names: frozenset[str], saved: list[SavedGroup]) -> SavedGroup | None:
    """What a group becomes whose parameters lay in a larger group, or in several that agree."""
    larger = next((group for group in saved if group.names >= names), None)
    if larger is not None:
        return larger
    parts = [group for group in saved if group.names and group.names < names]
    if frozenset().union(*(group.names for group in parts)) != names:
        return None
    agree = all(encode(group.values) == encode(parts[0].values) for group in parts)
    return parts[0] if agree else None


class OptimizerFiller:
    """Carries out an `OptimizerPlan`."""

    def __init__(self, part: OptimizerPart, plan: OptimizerPlan, reader: StateReader) -> None:
        self._part = part
        self._plan = plan
        self._reader = reader
        self._groups: list[Group] = []
        """Saved hyperparameters, from `begin` on."""

    def begin(self) -> None:
        """Make state where there is none, and ask the reader for what belongs into it and into hyperparameters."""
        for optimizer in self._part.optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    self._restore_parameter(optimizer.state, parameter, group)
        self._restore_shared()
        self._groups = [self._group(saved.values, saved.rank) for saved in self._plan.groups]

    def end(self) -> None:
        """All is read: set hyperparameters, in place where they exist."""
        for live, saved in zip(self._part.groups(), self._groups, strict=True):
            _restore_group(live, saved)

    def _restore_parameter(self, states: dict[Any, Any], parameter: torch.Tensor, group: Group) -> None:
        if self._part.flat_parts(parameter):
            self._restore_flat(states, parameter, group)
            return
        fqn = self._part.fqn(parameter)
        tensors = self._plan.tensors.get(fqn, {})
        values = self._values_of(fqn)
        if not tensors and not values:
            states.pop(parameter, None)  # not yet routed when it was saved: absent, as it was then
            return
        state = states.setdefault(parameter, {})
        for key in [key for key in state if key not in tensors and key not in values]:
            del state[key]
        for key, name in tensors.items():
            state[key] = self._tensor(name, key, state.get(key), parameter, group)
        made: dict[str, torch.Tensor] = {}

        def get(name: str) -> torch.Tensor:
            if name not in made:
                made[name] = self._tensor(name, None, None, parameter, group)
            return made[name]

        for key, tree in values.items():
            state[key] = join_tensors(tree, get)
        self._put_in_order(state)

    def _restore_flat(self, states: dict[Any, Any], parameter: torch.Tensor, group: Group) -> None:
        """State of what FSDP1 has flattened: of the elements that are here."""
        parts = [(fqn, part) for fqn, part in self._part.flat_parts(parameter) if part.range.numel()]
        keys = dict.fromkeys(
            key for fqn, _ in parts for key in (*self._plan.tensors.get(fqn, ()), *self._values_of(fqn))
        )
        if not keys:
            states.pop(parameter, None)
            return
        state = states.setdefault(parameter, {})
        for key in [key for key in state if key not in keys]:
            del state[key]
        for key in keys:
            names = {fqn: self._plan.tensors[fqn][key] for fqn, _ in parts if key in self._plan.tensors.get(fqn, ())}
            if names:
                here = [(names[fqn], part) for fqn, part in parts if fqn in names]
                state[key] = self._flat_tensor(key, here, state.get(key), parameter, group)
            else:
                state[key] = next(self._values_of(fqn)[key] for fqn, _ in parts if key in self._values_of(fqn))
        self._put_in_order(state)

    def _flat_tensor(
        self, key: str, here: list[tuple[str, FlatPart]], live: object, parameter: torch.Tensor, group: Group
    ) -> torch.Tensor:
        name, first = here[0]
        record = self._reader.record(name)
        if record.shape != first.range.shape:
            return self._tensor(name, key, live, parameter, group)
        dtype = torch_dtype(record.dtype)
        tensor = live
        if not isinstance(tensor, torch.Tensor) or tensor.numel() != first.total or tensor.dtype != dtype:
            # Zeros, as in the padding of the parameter itself.
            shape = tuple(parameter.shape) if parameter.numel() == first.total else (first.total,)
            tensor = torch.zeros(shape, dtype=dtype, device=self._device(key, parameter, group))
        for name, part in here:
            shard = flat_state_range(tensor, part)
            assert shard is not None, (name, part.total)
            self._reader.fill(name, shard)
        return tensor

    def _put_in_order(self, state: dict[Any, Any]) -> None:
        """As the optimizer itself had made it, so that what goes through the keys sees them as it always would."""
        keys = set(state)
        order = next((order for order in self._plan.leftovers.key_orders if set(order) == keys), None)
        if order is not None and order != list(state):
            ordered = {key: state[key] for key in order}
            state.clear()
            state.update(ordered)

    def _values_of(self, fqn: str) -> dict[str, Any]:
        values: dict[str, Any] = self._plan.leftovers.values.get(fqn, {})
        return values

    def _restore_shared(self) -> None:
        for key, tree in self._plan.leftovers.shared.items():
            states: dict[Any, Any] = self._part.optimizers[0].state
            states[key] = join_tensors(tree, self._reader.whole)

    def _tensor(self, name: str, key: str | None, live: object, parameter: torch.Tensor, group: Group) -> torch.Tensor:
        empty = self._plan.leftovers.empty.get(name)
        record = TensorRecord(empty[0], empty[1], False) if empty is not None else self._reader.record(name)
        reusable = (
            isinstance(live, torch.Tensor)
            and tuple(live.shape) == tuple(record.shape)
            and dtype_name(live.dtype) == record.dtype
        )
        tensor = live if reusable else self._create(name, key, record, parameter, group)
        assert isinstance(tensor, torch.Tensor)
        if empty is None:
            self._reader.fill(name, tensor)
        return tensor

    def _create(
        self, name: str, key: str | None, record: TensorRecord, parameter: torch.Tensor, group: Group
    ) -> torch.Tensor:
        dtype = torch_dtype(record.dtype)
        device = self._device(key, parameter, group)
        like_parameter = record.shape == tuple(parameter.shape) and record.shape != ()
        note = self._plan.leftovers.placements.get(name)
        if is_dtensor(parameter):
            placements = parameter.placements if note is None and like_parameter else placements_of(note or "plain")
            if placements is not None and len(placements) == parameter.device_mesh.ndim:
                return _empty_dtensor(name, record.shape, dtype, parameter, placements)
            return torch.empty(record.shape, dtype=dtype, device=device)
        if like_parameter:
            return torch.empty_like(parameter, dtype=dtype, device=device, requires_grad=False)
        return torch.empty(record.shape, dtype=dtype, device=device)

    def _device(self, key: str | None, parameter: torch.Tensor, group: Group) -> torch.device:
        """Torch's policy, and the CPU for other keys too that were on the CPU beside a parameter that was not."""
        on_host = key == "step" or key in self._plan.leftovers.on_host
        if on_host and not group.get("capturable") and not group.get("fused"):
            return torch.device("cpu")
        return parameter.device

    def _group(self, saved: Group, rank: int) -> Group:
        joined: Group = join_tensors(saved, lambda name: self._reader.whole(name, rank=rank))
        return joined


def _restore_group(live: Group, saved: Group) -> None:
    for key, value in saved.items():
        ours = live.get(key)
        if isinstance(ours, torch.Tensor):
            # kept as the same tensor: captured graphs and schedulers hold on to it
            with torch.no_grad():
                ours.copy_(torch.as_tensor(value))
        elif isinstance(value, torch.Tensor) and isinstance(ours, float):
            live[key] = value.item()
        else:
            live[key] = value


def _empty_dtensor(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, parameter: DTensor, placements: tuple[Placement, ...]
) -> DTensor:
    from torch.distributed.tensor import DTensor

    mesh = parameter.device_mesh
    if placements == parameter.placements and shape == tuple(parameter.shape):
        local = torch.empty_like(local_part(parameter), dtype=dtype, requires_grad=False)
    else:
        coordinate = mesh.get_coordinate()
        assert coordinate is not None, "a rank outside the mesh owns no parameter of it"
        runs = shard_runs(name, shape, tuple(mesh.shape), coordinate, placements)
        local_shape = tuple(sum(length for _, length in of_dim) for of_dim in runs)
        local = torch.empty(local_shape, dtype=dtype, device=local_part(parameter).device)
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)
