"""Start from the weights of another run: `InitFrom`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from holdfast.checkpoint.catalog import Catalog
from holdfast.checkpoint.commit import newest_step, open_checkpoint
from holdfast.checkpoint.places import place
from holdfast.checkpoint.tensors import empty_for, tensor_bytes
from holdfast.errors import MismatchError, UsageError
from holdfast.runtime.entries import TensorEntry

_PREFIX = "model."
_SHOWN = 5


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


def init_weights(init_from: InitFrom, entries: Sequence[TensorEntry]) -> Path:
    """Read the model's tensors among `entries` from the checkpoint, in place. Each rank calls it and waits for nobody.

    Returns:
        The step directory that was read.

    Raises:
        UsageError: there is no checkpoint at the path.
        MismatchError: `strict` and names are missing, or a shape differs.
        CorruptError: bytes that do not match their checksum.
    """
    path = _step_path(place(init_from.path))
    with open_checkpoint(path) as catalog:
        pairs, missing = _pair(init_from, entries, catalog)
        if missing and init_from.strict:
            raise MismatchError(
                f"init_from {path}: {len(missing)} tensors of the model are not there: {', '.join(missing[:_SHOWN])}"
                f"{', …' if len(missing) > _SHOWN else ''}; "
                "map them with rename, leave them with skip, or give strict=False"
            )
        for entry, name in pairs:
            _read(entry, name, catalog, path)
    return path


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


def _read(entry: TensorEntry, name: str, catalog: Catalog, path: Path) -> None:
    record = catalog.tensors[name]
    if record.shape != entry.shape:
        raise MismatchError(f"init_from {path}: {name} has shape {record.shape}, the model wants {entry.shape}")
    rank = entry.rank or 0
    for box in entry.boxes:
        read = empty_for(record.dtype, box.lengths)
        catalog.read(name, box, tensor_bytes(read), rank=rank if record.per_rank else None)
        with torch.no_grad():
            entry.view(box).copy_(read)
