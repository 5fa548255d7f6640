"""``edit``: a checkpoint under other names, or without some of its state, as a new one."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from holdfast.checkpoint.boxes import Box
from holdfast.checkpoint.objects import ObjectRecord, TensorRef, decode, encode
from holdfast.checkpoint.pieces import Piece
from holdfast.checkpoint.places import place
from holdfast.checkpoint.tools.building import Build, Read, build_checkpoint
from holdfast.checkpoint.tools.native import ALIASES, DCP_MAPPINGS, DCP_OBJECTS, TREE, NativeState, open_several
from holdfast.checkpoint.tools.parallel import workers_within
from holdfast.checkpoint.tools.units import argument, human, parse_size
from holdfast.errors import MismatchError, UsageError

EXAMPLE = (
    "holdfast ckpt edit checkpoints/step-00000100 edited --rename model.encoder=model.backbone --drop 'optimizer.*'"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare them."""
    parser.add_argument("source", help="one of our checkpoints")
    parser.add_argument("destination", type=argument(place), help="a new directory or URL")
    parser.add_argument(
        "--rename",
        action="append",
        default=[],
        metavar="OLD=NEW",
        help="give OLD, and all below it (OLD.…), another name; of several the longest fitting one counts",
    )
    parser.add_argument(
        "--drop",
        action="append",
        default=[],
        metavar="NAME",
        help="leave out a tensor or object, all below it, or all that match a pattern with *",
    )
    parser.add_argument("--workers", type=int, default=2, help="images made at the same time (default 2)")
    parser.add_argument(
        "--max-memory", metavar="SIZE", type=argument(parse_size), default="2GiB", help="bound (default 2GiB)"
    )


def run(arguments: argparse.Namespace) -> int:
    """0."""
    changes = Changes.parse(arguments.rename, arguments.drop)
    workers = workers_within(arguments.workers, arguments.max_memory, arguments.destination)
    states = open_several(arguments.source, workers)
    try:
        changes = changes.with_optimizers(states[0])
        build = _plan(states, changes, arguments)
        info = build_checkpoint(build)
    finally:
        for state in states:
            state.close()
    names = {piece.name for pieces in build.images for piece in pieces}
    sys.stdout.write(f"{arguments.destination}: {len(names)} tensors, {human(info.size_bytes)}\n")
    return 0


@dataclass(frozen=True)
class Changes:
    """New names and what to leave out."""

    rename: Mapping[str, str]
    drop: tuple[str, ...]

    @classmethod
    def parse(cls, rename: list[str], drop: list[str]) -> Changes:
        """
        Raises:
            UsageError: a rule is not of the form OLD=NEW, or there is none at all.
        """
        rules: dict[str, str] = {}
        for rule in rename:
            old, equals, new = rule.partition("=")
            if not equals or not old or not new:
                raise UsageError(f"--rename {rule!r}: write OLD=NEW")
            rules[old.rstrip(".")] = new.rstrip(".")
        if "" in drop:
            raise UsageError("--drop '': give a name")
        if not rules and not drop:
            raise UsageError("nothing to edit: give --rename OLD=NEW or --drop NAME")
        return cls(rules, tuple(drop))

    def with_optimizers(self, state: NativeState) -> Changes:
        """For a Session's checkpoint: parameters that get other names take their optimizer state along."""
        names = {tensor.name for tensor in state.tensors}
        follow = {
            f"optimizer.state.{old.removeprefix('model.')}": f"optimizer.state.{new.removeprefix('model.')}"
            for old, new in self.rename.items()
            if old.startswith("model.") and new.startswith("model.")
        }
        there = {o: n for o, n in follow.items() if any(name.startswith(f"{o}.") for name in names)}
        return Changes({**there, **self.rename}, self.drop)

    def drops(self, name: str) -> bool:
        """Whether to leave out what stands under a name."""
        return any(name == p or name.startswith(f"{p}.") or fnmatchcase(name, p) for p in self.drop)

    def new(self, name: str) -> str:
        """The new name; the old one where no rule fits."""
        fitting = [old for old in self.rename if name == old or name.startswith(f"{old}.")]
        if not fitting:
            return name
        old = max(fitting, key=len)
        return self.rename[old] + name[len(old) :]


def _plan(states: list[NativeState], changes: Changes, arguments: argparse.Namespace) -> Build:
    state = states[0]
    kept = [tensor for tensor in state.tensors if not changes.drops(tensor.name)]
    saved = {(changes.new(tensor.name), tensor.rank): tensor for tensor in kept}
    _check(state, changes, len(kept), len(saved))

    def reader(state: NativeState) -> Read:
        def read(piece: Piece, box: Box, out: memoryview) -> None:
            state.read(saved[piece.name, piece.rank], box, out)

        return read

    return Build(
        directory=arguments.destination,
        images=[
            [
                Piece(changes.new(piece.name), piece.dtype, piece.shape, piece.box, piece.rank)
                for piece in pieces
                if not changes.drops(piece.name)
            ]
            for pieces in state.pieces()
        ],
        objects=[edited_objects(records, changes) for records in state.objects()],
        readers=[reader(state) for state in states],
        identity=f"edit {state.fingerprint} {sorted(changes.rename.items())} {sorted(changes.drop)}",
        step=state.step,
        tag=state.info.tag,
        metrics=state.info.metrics,
        history=state.info.history,
        max_memory_bytes=arguments.max_memory,
    )


def _check(state: NativeState, changes: Changes, num_kept: int, num_named: int) -> None:
    if num_named < num_kept:
        raise UsageError("two tensors would have one name: rename one of them to another")
    names = {tensor.name for tensor in state.tensors} | {name for records in state.objects() for name in records}
    names |= {name for records in state.objects() for name in _names_in(records)}
    for old in changes.rename:
        if not any(name == old or name.startswith(f"{old}.") for name in names):
            raise MismatchError(f"--rename {old}: nothing has that name")
    for pattern in changes.drop:
        if not any(Changes({}, (pattern,)).drops(name) for name in names):
            raise MismatchError(f"--drop {pattern}: nothing has that name")


def _names_in(records: Mapping[str, ObjectRecord]) -> Iterator[str]:
    """Names that stand inside of the objects which hold a nested state."""
    if TREE in records:
        yield from _paths(decode(records[TREE].data), "")
    if DCP_OBJECTS in records:
        yield from decode(records[DCP_OBJECTS].data)


# Any: whatever was saved.
def _paths(tree: Any, path: str) -> Iterator[str]:
    yield path
    if isinstance(tree, dict):
        for key, item in tree.items():
            yield from _paths(item, f"{path}.{key}" if path else str(key))


def edited_objects(records: Mapping[str, ObjectRecord], changes: Changes) -> dict[str, ObjectRecord]:
    """The objects of a rank after the changes: those that name tensors name them as they are called now."""
    found: dict[str, ObjectRecord] = {}
    for name, record in records.items():
        if name == TREE:
            data = encode(_edited_tree(decode(record.data), changes, "", ""))
        elif name in (DCP_OBJECTS, DCP_MAPPINGS):
            data = encode(_edited_dcp(decode(record.data), changes, paths=name == DCP_MAPPINGS))
        elif name == ALIASES:
            aliases: dict[str, str] = decode(record.data)
            data = encode({changes.new(a): changes.new(t) for a, t in aliases.items() if not changes.drops(t)})
        elif changes.drops(name):
            continue
        elif name.partition(".")[0] == "optimizer":
            data = encode(_edited_names(decode(record.data), changes))
        else:
            data = record.data
        new_name = changes.new(name) if name not in (TREE, DCP_OBJECTS, DCP_MAPPINGS, ALIASES) else name
        _check_free(new_name in found, new_name)
        found[new_name] = ObjectRecord(data, record.per_rank)
    return found


# Any, here and below: whatever was saved.
def _edited_tree(tree: Any, changes: Changes, path: str, new_path: str) -> Any:
    if type(tree) is TensorRef:
        return TensorRef(changes.new(tree.name))
    if isinstance(tree, dict):
        return _edited_dict(tree, changes, path, new_path)
    if type(tree) in (list, tuple):
        return type(tree)(_edited_item(item, changes, f"{path}.{i}") for i, item in enumerate(tree))
    return tree


def _edited_item(item: Any, changes: Changes, path: str) -> Any:
    if changes.drops(path) or changes.new(path).rpartition(".")[2] != path.rpartition(".")[2]:
        raise UsageError(f"{path} is an item of a list, whose place is its name: edit the whole list")
    return _edited_tree(item, changes, path, changes.new(path))


def _edited_dict(tree: dict[Any, Any], changes: Changes, path: str, new_path: str) -> dict[Any, Any]:
    edited: dict[Any, Any] = {}
    for key, item in tree.items():
        below = f"{path}.{key}" if path else str(key)
        if changes.drops(below) or (type(item) is TensorRef and changes.drops(item.name)):
            continue
        new_below = changes.new(below)
        new_key = _key(key, below, new_below, new_path)
        _check_free(new_key in edited, new_below)
        edited[new_key] = _edited_tree(item, changes, below, new_below)
    return edited


def _check_free(taken: bool, name: str) -> None:
    if taken:
        raise UsageError(f"two things would be named {name}: rename one of them to another")


def _key(key: Any, below: str, new_below: str, new_path: str) -> Any:
    if below == new_below:
        return key
    if new_path and not new_below.startswith(f"{new_path}."):
        raise UsageError(f"{below} cannot become {new_below}: it stands in {new_path}, so its name must start so")
    return new_below[len(new_path) + 1 :] if new_path else new_below


def _edited_names(value: Any, changes: Changes) -> Any:
    """An optimizer's object, which names parameters (without ``model.``) and tensors, as keys and as values."""
    if type(value) is str:
        new = changes.new(f"model.{value}")
        return new.removeprefix("model.") if new != f"model.{value}" else changes.new(value)
    if type(value) is TensorRef:
        return TensorRef(changes.new(value.name))
    if type(value) is dict:
        return {_edited_names(key, changes): _edited_names(item, changes) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_edited_names(item, changes) for item in value)
    return value


def _edited_dcp(values: dict[str, Any], changes: Changes, *, paths: bool) -> dict[str, Any]:
    edited: dict[str, Any] = {}
    for name, value in values.items():
        if not changes.drops(name):
            _check_free(changes.new(name) in edited, changes.new(name))
            edited[changes.new(name)] = _edited_path(value, changes) if paths else value
    return edited


def _edited_path(path: tuple[str | int, ...], changes: Changes) -> tuple[str | int, ...]:
    new: list[str | int] = []
    below = new_below = ""
    for key in path:
        parent, below = new_below, f"{below}.{key}" if below else str(key)
        new_below = changes.new(below)
        new.append(key if below == new_below else _key(key, below, new_below, parent))
    return tuple(new)
