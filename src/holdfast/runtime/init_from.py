"""Start from the weights of another run: `InitFrom`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from holdfast.checkpoint.catalog import Catalog
from holdfast.checkpoint.commit import newest_step
from holdfast.checkpoint.places import place
from holdfast.errors import HoldfastError, MismatchError, UsageError
from holdfast.runtime.entries import TensorEntry
from holdfast.runtime.huddle import Huddle
from holdfast.runtime.reader import Fetcher, Region

_PREFIX = "model."
_SHOWN = 5


class _Beginning(msgspec.Struct, frozen=True):
    """What one rank tells the others."""

    named: str | None = None
    """The path that it gave; None: it begins from nothing."""
    step: str | None = None
    """The step directory that lies there."""
    problem: str = ""


@dataclass(frozen=True, kw_only=True)
class InitFrom:
    """Which weights a new run begins with. Optimizer, RNG and `extra` begin afresh.

    Ignored when there is something to resume.
    """

    path: str | os.PathLike[str]
    """A step directory, or a checkpoint directory (its newest step)."""
    rename: Mapping[str, str] = field(default_factory=dict)
    """Prefixes of this run's names and what stands for them in the checkpoint: ``{"backbone.": "encoder."}``. The
    longest prefix wins. Names are those of ``model.state_dict()``."""
    skip: Sequence[str] = ()
    """Prefixes of this run's names that keep their fresh values, for example ``["head."]``."""
    strict: bool = True
    """Whether a name of this run that the checkpoint lacks is an error; names that only the checkpoint has are not."""

    def source_name(self, name: str) -> str | None:
        """Name in the checkpoint for this run's `name`, None where it keeps its value."""
        if any(name.startswith(prefix) for prefix in self.skip):
            return None
        prefix = max((old for old in self.rename if name.startswith(old)), key=len, default=None)
        return name if prefix is None else self.rename[prefix] + name[len(prefix) :]


def agree_on(init_from: InitFrom | None, huddle: Huddle) -> tuple[Path | None, bool]:
    """The step directory that this rank begins from, and whether all ranks read the same one. All of a Session's ranks
    make this call, also those that begin from nothing.

    Where all name one path, it is what the first rank found there: a step that is saved meanwhile must not part them.

    Raises:
        UsageError: there is no checkpoint at the path that some rank names; said on all of them.
        PeerTimeout: a rank did not come; named.
    """
    mine = _Beginning() if init_from is None else _find(os.fspath(init_from.path))
    said = [msgspec.json.decode(text, type=_Beginning) for text in huddle.gather(msgspec.json.encode(mine).decode())]
    problem = next((one.problem for one in said if one.problem), "")
    if problem:
        raise UsageError(problem)
    same = all(one.named == mine.named for one in said)
    step = said[0].step if same else mine.step
    return (None if step is None else place(step)), same


def init_weights(
    init_from: InitFrom, entries: Sequence[TensorEntry], path: Path, catalog: Catalog, fetcher: Fetcher
) -> None:
    """Read the model's tensors among `entries` from the checkpoint, in place; converted to their dtypes.

    Args:
        init_from: which they are.
        entries: of this rank.
        path: of the checkpoint, for messages.
        catalog: of it.
        fetcher: reads it.

    Raises:
        MismatchError: `strict` and names are missing, or a shape differs.
        CorruptError: bytes that do not match their checksum.
    """
    pairs, missing = _pair(init_from, entries, catalog)
    if missing and init_from.strict:
        raise MismatchError(
            f"init_from {path}: {len(missing)} tensors of the model are not there: {', '.join(missing[:_SHOWN])}"
            f"{', …' if len(missing) > _SHOWN else ''}; "
            "map them with rename, leave them with skip, or give strict=False"
        )
    fetcher.fetch([region for entry, name in pairs for region in _regions(entry, name, catalog, path)])


def _find(named: str) -> _Beginning:
    try:
        return _Beginning(named=named, step=str(_step_path(place(named))))
    except HoldfastError as error:
        return _Beginning(named=named, problem=str(error))


def _step_path(path: Path) -> Path:
    if (path / "root").exists():
        return path
    newest = newest_step(path) if path.is_dir() else None
    if newest is None:
        raise UsageError(f"init_from {str(path)!r}: there is no complete checkpoint")
    return newest.path


def _pair(
    init_from: InitFrom, entries: Sequence[TensorEntry], catalog: Catalog
) -> tuple[list[tuple[TensorEntry, str]], list[str]]:
    pairs, missing = [], []
    for entry in entries:
        if not entry.name.startswith(_PREFIX):
            continue
        name = init_from.source_name(entry.name.removeprefix(_PREFIX))
        if name is None:
            continue
        if _PREFIX + name in catalog.tensors:
            pairs.append((entry, _PREFIX + name))
        else:
            missing.append(name)
    return pairs, missing


def _regions(entry: TensorEntry, name: str, catalog: Catalog, path: Path) -> list[Region]:
    record = catalog.tensors[name]
    if record.shape != entry.shape:
        raise MismatchError(f"init_from {path}: {name} has shape {record.shape}, the model wants {entry.shape}")
    rank = (entry.rank or 0) if record.per_rank else None
    return [Region(name, box, entry.view(box), rank) for box in entry.boxes]
