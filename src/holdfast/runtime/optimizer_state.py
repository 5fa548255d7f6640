"""The state of optimizers as named tensors and objects.

Names are those of torch's ``get_optimizer_state_dict``: ``<prefix>.state.<fqn>.<key>``. What torch keeps beside tensors
goes into three objects: ``<prefix>.params`` (FQNs of every group), ``<prefix>.param_groups`` (their hyperparameters)
and ``<prefix>.state`` (`Leftovers`). Nothing here steps an optimizer: state that does not exist yet is absent.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from operator import is_
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer

from holdfast.checkpoint.flat import FlatRange
from holdfast.checkpoint.fsdp1 import FlatPart
from holdfast.checkpoint.objects import ObjectRecord, encode, split_tensors
from holdfast.checkpoint.tensors import dtype_name
from holdfast.errors import StateError
from holdfast.runtime.book import EntryBook
from holdfast.runtime.entries import Timing
from holdfast.runtime.layout import is_dtensor
from holdfast.runtime.reader import placeholder_names

if TYPE_CHECKING:
    from torch.distributed.tensor.placement_types import Placement

Flats = dict[int, list[tuple[str, FlatPart]]]
"""id() of a parameter that FSDP1 has flattened (or flattened others into) -> FQNs and parts."""

PLAIN = "plain"
"""Marks, in `Leftovers.placements`, a plain tensor in the state of a DTensor parameter of the same shape."""


@dataclass(slots=True)
class Leftovers:
    """What the names of an optimizer's tensors do not say."""

    values: dict[str, dict[str, Any]] = field(default_factory=dict)
    """fqn -> key -> value that is no plain tensor (Any: whatever the optimizer keeps; nested tensors: placeholders)."""
    shared: dict[str, Any] = field(default_factory=dict)
    """State under keys that are no parameters (Any: as above)."""
    empty: dict[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)
    """Name -> dtype and shape of tensors without elements, which no image can hold."""
    on_host: set[str] = field(default_factory=set)
    """Keys whose tensors are on the CPU although their parameter is not (Adam's step)."""
    absent: set[str] = field(default_factory=set)
    """FQNs of parameters that have no state on this rank, though they may have on another."""
    key_orders: list[list[Any]] = field(default_factory=list)
    """The different orders of keys that state has (Any: keys are what the optimizer uses)."""
    placements: dict[str, list[str] | str] = field(default_factory=dict)
    """Name -> placements of tensors that are not laid out as their parameter is (torch's short forms, or `PLAIN`)."""

    def as_tree(self) -> dict[str, Any]:  # Any: a tree for the object codec
        """For `encode`."""
        return {
            "values": self.values,
            "shared": self.shared,
            "empty": self.empty,
            "on_host": sorted(self.on_host),
            "placements": self.placements,
            "absent": sorted(self.absent),
            "key_orders": self.key_orders,
        }

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any]) -> Leftovers:
        """The inverse of `as_tree`."""
        return cls(
            values=tree["values"],
            shared=tree["shared"],
            empty={name: (dtype, tuple(shape)) for name, (dtype, shape) in tree["empty"].items()},
            on_host=set(tree["on_host"]),
            placements=tree["placements"],
            absent=set(tree.get("absent", ())),
            key_orders=list(tree.get("key_orders", ())),
        )

    def with_others(self, others: Iterable[Leftovers]) -> Leftovers:
        """Also what other ranks, which had other parameters, left about those; this rank's own counts first."""
        merged = replace(self)
        for other in others:
            merged = Leftovers(
                values={**other.values, **merged.values},
                shared={**other.shared, **merged.shared},
                empty={**other.empty, **merged.empty},
                on_host=merged.on_host | other.on_host,
                placements={**other.placements, **merged.placements},
                absent=merged.absent,
                key_orders=merged.key_orders + other.key_orders,
            )
        return merged

    def nested_names(self) -> set[str]:
        """Names of the tensors that stand as placeholders in `values` and `shared`."""
        return placeholder_names([self.values, self.shared])


class OptimizerPart:
    """One optimizer, or a sequence of optimizers over different parameters that counts as one.

    Args:
        prefix: "optimizer" or "optimizer.<key>".
        optimizers: at least one.
        fqns: id(parameter) -> FQN, for every parameter of every model.
        flats: id(parameter) -> what it is made of, where FSDP1 has flattened it.
        num_ranks: of the session.

    Raises:
        StateError: a parameter that no model owns, or one that two of `optimizers` own.
    """

    def __init__(
        self,
        prefix: str,
        optimizers: tuple[Optimizer, ...],
        fqns: Mapping[int, str],
        flats: Flats | None = None,
        *,
        num_ranks: int = 1,
    ) -> None:
        self.prefix = prefix
        self.uneven = False
        """Whether other ranks train other parameters: what is said about groups is this rank's own then."""
        self._num_ranks = num_ranks
        self.optimizers = optimizers
        self.params: list[list[str]] = []
        self._set_names(fqns, flats or {})
        self._states: list[dict[Any, Any]] = []
        self._values: list[Any] = []
        self._nested: list[tuple[str, dict[Any, Any], Any, list[torch.Tensor]]] = []
        self._plain_slots: list[tuple[str, dict[Any, Any], Any]] = []
        self._shared: list[tuple[str, dict[Any, Any]]] = []
        self._leftovers = Leftovers()
        self._groups_tree: list[Any] = []
        self._group_tensors: dict[str, torch.Tensor] = {}

    def _set_names(self, fqns: Mapping[int, str], flats: Flats) -> None:
        self._flats = flats
        self._parameters = list(self._walk_parameters())
        self._fqn_of: dict[int, str] = {}
        self.params = []
        for at, group in enumerate(self.groups()):
            names = []
            for index, parameter in enumerate(group["params"]):
                parts = [fqn for fqn, _ in flats.get(id(parameter), ())]
                fqn = parts[0] if parts else fqns.get(id(parameter))
                if fqn is None:
                    raise StateError(
                        f"{self.prefix}: parameter {index} of group {at}, of shape {tuple(parameter.shape)}, belongs "
                        "to no model given; build the optimizer after wrapping the model, or give its model too"
                    )
                if id(parameter) in self._fqn_of:
                    raise StateError(
                        f"{self.prefix}: two of its optimizers (or groups) own {fqn}; use a mapping instead"
                    )
                self._fqn_of[id(parameter)] = fqn
                names += parts or [fqn]
            self.params.append(names)
        self._params_data = encode(self.params, path=f"{self.prefix}.params")

    def groups(self) -> list[dict[str, Any]]:
        """The live parameter groups of all optimizers, in order (Any: as torch declares them)."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def owned(self) -> set[int]:
        """id() of every parameter that these optimizers own."""
        return set(self._fqn_of)

    def fqn(self, parameter: torch.Tensor) -> str:
        """The name of a parameter of these optimizers."""
        return self._fqn_of[id(parameter)]

    def has_other_parameters(self) -> bool:
        """Whether the groups hold other parameters than when names were given (`rename` is due)."""
        now = list(self._walk_parameters())
        return len(now) != len(self._parameters) or not all(map(is_, now, self._parameters))

    def flat_parts(self, parameter: torch.Tensor) -> list[tuple[str, FlatPart]]:
        """FQNs and parts of what FSDP1 has flattened; none for other parameters."""
        return self._flats.get(id(parameter), [])

    def rename(self, fqns: Mapping[int, str], flats: Flats) -> None:
        """Give names again. Raises as the constructor does."""
        self._set_names(fqns, flats)

    def is_current(self) -> bool:
        """Whether all state tensors are the objects that `read` saw; about 0.1 us per tensor."""
        states = [state for optimizer in self.optimizers for state in optimizer.state.values()]
        if len(states) != len(self._states) or not all(map(is_, states, self._states)):
            return False
        values = list(chain.from_iterable(map(dict.values, states)))
        if len(values) != len(self._values):
            return False
        if not all(map(is_, values, self._values)):
            pairs = enumerate(zip(values, self._values, strict=True))
            changed = [i for i, (new, old) in pairs if new is not old]
            if any(_is_structure(values[i]) or _is_structure(self._values[i]) for i in changed):
                return False
            self._values = values
        return all(_same(list(split_tensors(n, s[k])[1].values()), old) for n, s, k, old in self._nested)

    def read(self, book: EntryBook) -> None:
        """Put every tensor of the optimizers' state (not of the groups) into the book.

        Raises:
            StateError: a tensor or a state of an unknown kind.
        """
        self._states, self._nested, self._plain_slots = [], [], []
        self._leftovers = Leftovers()
        self._shared = []
        for optimizer in self.optimizers:
            for key, state in optimizer.state.items():
                self._states.append(state)
                owner: object = key  # torch declares the keys to be tensors, but some optimizers use strings too
                if isinstance(owner, torch.Tensor):
                    fqn = self._fqn_of.get(id(key))
                    if fqn is not None:  # else: left behind by a parameter that the optimizer no longer updates
                        self._read_state(book, fqn, key, state)
                else:
                    self._read_shared(book, str(key), state)
        self._values = list(chain.from_iterable(map(dict.values, self._states)))
        orders = dict.fromkeys(map(tuple, self._states))
        self._leftovers.key_orders = [list(order) for order in orders]
        having = {
            fqn for optimizer in self.optimizers for fqn in map(self._fqn_of.get, map(id, optimizer.state)) if fqn
        }
        # FSDP1 leaves a parameter without state where none of its elements are: that says nothing about it.
        flat = {fqn for parts in self._flats.values() for fqn, _ in parts}
        self._leftovers.absent = {fqn for names in self.params for fqn in names} - having - flat

    def _read_flat_state(self, book: EntryBook, parameter: torch.Tensor, state: dict[Any, Any]) -> None:
        for fqn, part in self._flats[id(parameter)]:
            if not part.range.numel():
                continue
            for key, value in state.items():
                name = f"{self.prefix}.state.{fqn}.{key}"
                if not isinstance(value, torch.Tensor):
                    if _is_structure(value):
                        raise StateError(
                            f"{name} is a {type(value).__name__}; over FSDP1's flat parameters an optimizer's state "
                            "can be tensors and numbers: use fully_shard (FSDP2), where it can be anything"
                        )
                    self._plain_slots.append((fqn, state, key))
                    continue
                if not parameter.is_cpu and value.is_cpu:
                    self._leftovers.on_host.add(key)
                live = flat_state_range(value, part) or value
                book.put(name, live, timing=Timing.OVERLAP, has_fixed_size=True, parameter=f"model.{fqn}")

    def _read_state(self, book: EntryBook, fqn: str, parameter: torch.Tensor, state: dict[Any, Any]) -> None:
        if id(parameter) in self._flats:
            self._read_flat_state(book, parameter, state)
            return
        prefix = f"{self.prefix}.state.{fqn}."
        for key, value in state.items():
            name = f"{prefix}{key}"
            if isinstance(value, torch.Tensor) and isinstance(key, str) and "." not in key:
                self._put(book, name, key, value, parameter)
            elif _is_structure(value) or not isinstance(key, str) or "." in key:
                _, tensors = split_tensors(name, value)
                for nested_name, tensor in tensors.items():
                    self._put(book, nested_name, None, tensor, parameter)
                self._nested.append((name, state, key, list(tensors.values())))
                self._plain_slots.append((fqn, state, key))
            else:
                self._plain_slots.append((fqn, state, key))

    def _read_shared(self, book: EntryBook, key: str, state: dict[Any, Any]) -> None:
        name = f"{self.prefix}.shared.{key}"
        for nested_name, tensor in split_tensors(name, state)[1].items():
            book.put(nested_name, tensor, timing=Timing.OVERLAP, of_part=True)
        self._shared.append((key, state))

    def _put(self, book: EntryBook, name: str, key: str | None, value: torch.Tensor, parameter: torch.Tensor) -> None:
        if value.numel() == 0:
            self._leftovers.empty[name] = (dtype_name(value.dtype), tuple(value.shape))
        else:
            owner = f"model.{self.fqn(parameter)}"
            book.put(name, value, timing=Timing.OVERLAP, has_fixed_size=True, parameter=owner)
        if key is not None and not parameter.is_cpu and value.is_cpu:
            self._leftovers.on_host.add(key)
        placements = _placements_note(value, parameter)
        if placements is not None:
            self._leftovers.placements[name] = placements

    def read_groups(self, book: EntryBook) -> None:
        """Put the tensors among the hyperparameters (a tensor lr) into the book; also keeps the tree for `objects`."""
        self._groups_tree, self._group_tensors = self._split_groups()
        for name, tensor in self._group_tensors.items():
            book.put(name, tensor, timing=Timing.BOUNDARY, stage=True, of_part=True)

    def refresh_groups(self, book: EntryBook) -> bool:
        """Read the hyperparameters again, outside a reading of the book; False where their tensors are others."""
        self._groups_tree, tensors = self._split_groups()
        if tensors.keys() != self._group_tensors.keys():
            return False
        return all(book.refresh(name, tensor) for name, tensor in tensors.items())

    def _split_groups(self) -> tuple[list[Any], dict[str, torch.Tensor]]:
        trees, tensors = [], {}
        for at, group in enumerate(self.groups()):
            values = {key: value for key, value in group.items() if key not in ("params", "param_names")}
            if any(map(_is_structure, values.values())):
                values, lifted = split_tensors(f"{self.prefix}.param_groups.{at}", values)
                tensors.update(lifted)
            trees.append(values)
        return trees, tensors

    def objects(self) -> dict[str, ObjectRecord]:
        """The non-tensor state, encoded now; after `read` and `read_groups` or `refresh_groups`.

        Raises:
            StateError: a value without a codec.
        """
        values: dict[str, dict[str, Any]] = {}
        for fqn, state, key in self._plain_slots:
            value = state[key]
            if _is_structure(value):
                value = split_tensors(f"{self.prefix}.state.{fqn}.{key}", value)[0]
            values.setdefault(fqn, {})[key] = value
        self._leftovers.values = values
        shared = {key: split_tensors(f"{self.prefix}.shared.{key}", state)[0] for key, state in self._shared}
        self._leftovers.shared = shared
        state_name, groups_name = f"{self.prefix}.state", f"{self.prefix}.param_groups"
        return {
            f"{self.prefix}.params": ObjectRecord(data=self._params_data, per_rank=self.uneven),
            groups_name: ObjectRecord(data=encode(self._groups_tree, path=groups_name), per_rank=self.uneven),
            # per rank: LBFGS keeps the last loss, which differs between ranks
            state_name: ObjectRecord(
                data=encode(self._leftovers.as_tree(), path=state_name), per_rank=self._num_ranks > 1
            ),
        }

    @property
    def object_names(self) -> tuple[str, ...]:
        """Of the records that `objects` gives."""
        return tuple(f"{self.prefix}.{name}" for name in ("params", "param_groups", "state"))

    def _walk_parameters(self) -> Iterator[torch.Tensor]:
        for group in self.groups():
            yield from group["params"]


def flat_state_range(value: torch.Tensor, part: FlatPart) -> FlatRange | None:
    """What state that is laid out as FSDP1's flat parameter (or its part) holds of one parameter; None for other
    state."""
    if value.dim() == 0 or value.numel() != part.total:
        return None
    flat, shard = value.detach().view(-1), part.range
    return FlatRange(flat[part.offset : part.offset + shard.numel()], shard.shape, shard.start, shard.holders)


def placements_of(note: list[str] | str) -> tuple[Placement, ...] | None:
    """What `Leftovers.placements` says; None for a plain tensor.

    Raises:
        StateError: a form that this version does not know.
    """
    if isinstance(note, str):
        return None
    return tuple(map(_placement, note))


def _placement(text: str) -> Placement:
    from torch.distributed.tensor.placement_types import Replicate, Shard, _StridedShard

    match text.split(":"):
        case ["R"]:
            return Replicate()
        case ["S", dim]:
            return Shard(int(dim))
        case ["SS", dim, split_factor]:
            return _StridedShard(int(dim), split_factor=int(split_factor))
    raise StateError(f"{text!r} is no placement that this version knows")


def _placements_note(value: Any, parameter: Any) -> list[str] | str | None:
    """None where the state is laid out as `same_layout` would."""
    if is_dtensor(value):
        if is_dtensor(parameter) and value.shape == parameter.shape and value.placements == parameter.placements:
            return None
        return [_short(placement) for placement in value.placements]
    if is_dtensor(parameter) and value.shape == parameter.shape and value.dim() > 0:
        return PLAIN
    return None


def _short(placement: Placement) -> str:
    from torch.distributed.tensor.placement_types import Replicate, Shard, _StridedShard

    if isinstance(placement, _StridedShard):
        return f"SS:{placement.dim}:{int(placement.split_factor)}"
    if isinstance(placement, Shard):
        return f"S:{placement.dim}"
    return "R" if isinstance(placement, Replicate) else str(placement)


def _is_structure(value: object) -> bool:
    """Whether tensors may be inside."""
    return not isinstance(value, str | bytes | int | float | bool | complex | None)


def _same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(map(is_, a, b))
