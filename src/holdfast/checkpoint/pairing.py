"""Compares the state that is loaded into with the saved one, place by place. Pure.

Mappings and sequences that hold tensors, and the state itself, must have the same keys; values without tensors are
taken as they were saved. A tensor that stands in several places of the state needs only one of them: other formats save
tied tensors under one name.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from holdfast.checkpoint.objects import TensorRef

Tree = Any
"""A state with `TensorRef` in the place of tensors; Any: that is the point."""


@dataclass
class Pairing:
    """What came of a comparison."""

    tensors: dict[str, str] = field(default_factory=dict)
    """Name in the state -> saved name."""
    others: set[tuple[str, str]] = field(default_factory=set)
    """Name in the state and another saved name than `tensors` gives for it: tied now, but not when they were saved."""
    missing: list[str] = field(default_factory=list)
    """Places of the state for which nothing is saved."""
    unexpected: list[str] = field(default_factory=list)
    """Saved places that the state does not have."""


def pair(mine: Tree, saved: Tree) -> tuple[Pairing, Tree]:
    """Compare, and make the tree that results: the shape of `mine`, its tensors, the saved values.

    Returns:
        What was found, and the tree, in which places for which nothing is saved are as in `mine`.
    """
    found = Pairing()
    absent: list[_Place] = []
    tree = _walk("", mine, saved, found, absent, is_top=True)
    found.missing = [place.path for place in absent if place.tensor not in found.tensors]
    return found, tree


class _Place(NamedTuple):
    """Where something stands in a state."""

    path: str
    tensor: str | None
    """Its name, where it is one."""


def _walk(path: str, mine: Tree, saved: Tree, found: Pairing, absent: list[_Place], *, is_top: bool = False) -> Tree:
    if isinstance(mine, TensorRef) and isinstance(saved, TensorRef):
        if found.tensors.setdefault(mine.name, saved.name) != saved.name:
            found.others.add((mine.name, saved.name))
        return mine
    mine_holds, saved_holds = _holds(mine), _holds(saved)
    if not (is_top or mine_holds or saved_holds):
        return saved
    ours, theirs = _items(mine), _items(saved)
    if ours is None or theirs is None:
        if mine_holds or not saved_holds:
            absent += _places(path, mine)
        if saved_holds or not mine_holds:
            found.unexpected += [place.path for place in _places(path, saved)]
        return mine
    theirs = _with_keys_of(theirs, ours)
    for key, value in theirs.items():
        if key not in ours:
            found.unexpected += [place.path for place in _places(_below(path, key), value)]

    def child(key: Any, value: Tree) -> Tree:
        below = _below(path, key)
        if key in theirs:
            return _walk(below, value, theirs[key], found, absent)
        absent.extend(_places(below, value))
        return value

    return _rebuilt(mine, child)


def _with_keys_of(theirs: Mapping[Any, Tree], ours: Mapping[Any, Tree]) -> Mapping[Any, Tree]:
    """Other formats have only texts as keys: what came through one matches the numbers that it was."""
    spelled = {str(key): key for key in ours if key not in theirs}
    return {spelled.get(key, key) if key not in ours else key: value for key, value in theirs.items()}


def _items(tree: Tree) -> Mapping[Any, Tree] | None:
    """What a container holds; None where it is none."""
    if type(tree) in (dict, OrderedDict, defaultdict):
        items: Mapping[Any, Tree] = tree
        return items
    return dict(enumerate(tree)) if type(tree) in (list, tuple, deque) else None


def _rebuilt(tree: Tree, change: Callable[[Any, Tree], Tree]) -> Tree:
    items = _items(tree)
    assert items is not None
    changed = {key: change(key, value) for key, value in items.items()}
    if type(tree) is defaultdict:
        return defaultdict(tree.default_factory, changed)
    if type(tree) is deque:
        return deque(changed.values(), tree.maxlen)
    return type(tree)(changed.values() if type(tree) in (list, tuple) else changed)


def _holds(tree: Tree) -> bool:
    """Whether there are tensors in it."""
    if isinstance(tree, TensorRef):
        return True
    items = _items(tree)
    return items is not None and any(map(_holds, items.values()))


def _places(path: str, tree: Tree) -> list[_Place]:
    """The tensors in it; itself where there are none."""
    if isinstance(tree, TensorRef):
        return [_Place(path, tree.name)]
    items = _items(tree)
    if items is None or not _holds(tree):
        return [_Place(path, None)]
    return [place for key, value in items.items() if _holds(value) for place in _places(_below(path, key), value)]


def _below(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)
