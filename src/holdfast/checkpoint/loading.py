"""`load`: a checkpoint into a state, by all ranks together (`holdfast.checkpoint.joint` says how)."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import xxhash

from holdfast.checkpoint.boxes import cut_rows
from holdfast.checkpoint.catalog import Catalog
from holdfast.checkpoint.dtypes import itemsize
from holdfast.checkpoint.held import Held, StateTensor, hold
from holdfast.checkpoint.joint import JointReading, Want
from holdfast.checkpoint.meeting import Ranks
from holdfast.checkpoint.objects import decode, join_tensors
from holdfast.checkpoint.pairing import Pairing, pair
from holdfast.checkpoint.sinks import Sink
from holdfast.errors import MismatchError

TREE = "state"
"""The object that holds the state, with `TensorRef` in the place of tensors."""
_SHOWN = 10
_COMPARED_BYTES = 8 << 20
"""Of each of two tensors at once."""
_calls: Counter[tuple[str, int]] = Counter()
"""Loads of this process by (path, world size): ranks that load together agree on the count. Main thread only."""


def load_tree(
    tree: Any,
    tensors: Mapping[str, StateTensor],
    path: str | Path,
    *,
    strict: bool,
    cast: bool,
    process_group: Any,
    timeout: timedelta,
) -> Any:
    """Fill tensors from a checkpoint; the saved tree with them in their places. Every rank of the group calls it.

    Args:
        tree: the state without its tensors (`split_tensors`). Any: that is the point.
        tensors: those, by name; filled in place.
        path: of the checkpoint.
        strict: whether what is only here or only there is an error.
        cast: whether other dtypes are converted.
        process_group: as `load` takes it.
        timeout: how long to wait for the slowest rank.

    Raises:
        MismatchError, CorruptError, StorageError, PeerTimeout, PeerError: as `load` says.
    """
    ranks = Ranks.of(process_group)
    _calls[str(path), ranks.world_size] += 1
    place = xxhash.xxh3_64_hexdigest(os.fsencode(str(path)))
    name = f"load/{place}/{_calls[str(path), ranks.world_size]}"
    with JointReading(
        path, ranks, name=name, what="the load", timeout=timeout, more=lambda catalog: _saved_tree(path, catalog)
    ) as reading:
        held = hold(tensors, ranks, process_group)
        saved = decode(reading.more)
        comparison = _Comparison(path, reading.catalog, dict(zip(tensors, held, strict=True)))
        filled, wants = comparison.compare(tree, saved, strict=strict, cast=cast)
        reading.fill(wants)
    return join_tensors(filled, tensors.__getitem__)


def _saved_tree(path: str | Path, catalog: Catalog) -> bytes:
    tree = catalog.objects(0).get(TREE)
    if tree is None:
        raise MismatchError(
            f"{path} was not written by holdfast.checkpoint.save: load it with the Session or the HoldfastReader "
            f"that its writer belongs to, or bring it into this form with `holdfast ckpt export` and `import`"
        )
    return tree


class _Comparison:
    """What is saved beside what this rank holds."""

    def __init__(self, path: str | Path, catalog: Catalog, held: Mapping[str, Held]) -> None:
        self._path = path
        self._catalog = catalog
        self._held = held

    def compare(self, tree: Any, saved: Any, *, strict: bool, cast: bool) -> tuple[Any, list[Want]]:
        """Check that what is saved fits; the resulting tree, and what is to be read.

        Raises:
            MismatchError: it does not; lists the keys.
        """
        pairing, filled = pair(tree, saved)
        problems = list(self._differences(pairing.tensors.items(), cast=cast))
        if strict:
            problems += [f"{place} is not saved" for place in pairing.missing]
            problems += [f"{place} is saved but not in the state" for place in pairing.unexpected]
        if strict and not problems:
            problems = self._untied(pairing, cast=cast)
        if problems:
            more = f" and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
            raise MismatchError(
                f"{self._path} is a checkpoint of another state: {'; '.join(sorted(problems)[:_SHOWN])}{more}"
            )
        return filled, [want for name, there in pairing.tensors.items() for want in self._wants(name, there)]

    def _wants(self, name: str, saved: str) -> Iterator[Want]:
        dtype, part = self._catalog.tensors[saved].dtype, self._held[name]
        for box in part.boxes:
            if not box.is_empty:
                yield Want(saved, Sink(part.view(box), box, dtype=dtype, itemsize=itemsize(dtype)))

    def _untied(self, pairing: Pairing, *, cast: bool) -> list[str]:
        """What differs between saved tensors that are one tensor in the state: only one of them can be loaded."""
        problems = []
        for name, other in sorted(pairing.others):
            taken = pairing.tensors[name]
            tied = f"{taken} and {other} are one tensor in the state"
            differences = list(self._differences([(name, other)], cast=cast))
            if differences:
                problems.append(f"{tied}, but of the second, {differences[0]}")
            elif not self._are_equal(name, taken, other):
                problems.append(f"{tied}, but not the same as saved: untie them, or take the first with strict=False")
        return problems

    def _are_equal(self, name: str, saved: str, other: str) -> bool:
        """Whether two saved tensors are the same to the bit, where this rank holds something of `name`."""
        dtypes = {self._catalog.tensors[tensor].dtype for tensor in (saved, other)}
        if len(dtypes) > 1:
            return False
        size = itemsize(dtypes.pop())
        for part in (part for box in self._held[name].boxes for part in cut_rows(box, max(_COMPARED_BYTES // size, 1))):
            read = [bytearray(part.volume * size) for _ in range(2)]
            for tensor, data in zip((saved, other), read, strict=True):
                self._catalog.read(tensor, part, data)
            if read[0] != read[1]:
                return False
        return True

    def _differences(self, names: Iterable[tuple[str, str]], *, cast: bool) -> Iterator[str]:
        for name, saved in names:
            record, shard = self._catalog.tensors.get(saved), self._held[name].shard
            if record is None:
                yield f"{name} is named in the saved state, but no image holds it"
                continue
            if record.shape != shard.shape or (record.dtype != shard.dtype and not cast):
                yield (
                    f"{name} is saved as {record.dtype}{list(record.shape)}, "
                    f"in the state it is {shard.dtype}{list(shard.shape)}"
                )
                continue
            missing = [gap for box in shard.boxes for gap in self._catalog.missing(saved, box)]
            if missing:
                yield f"no image holds {name}{missing[0]}"
