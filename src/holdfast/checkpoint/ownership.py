"""Which rank copies which bytes: worked out on every rank alone, with no communication.

Rules:

- Each rank knows only the shards that it holds, and for each the ranks that hold exactly the same bytes, its *holders*.
  All ranks of a holder set therefore know the same shards of that set, and nothing of other sets is used: balance is
  within groups of equal holders.
- NODE scope: each byte has one owner among its holders on each node. JOB scope: one owner in the whole job, which is
  one of its NODE owners (so what goes to storage is always in the owner's image).
- Within a group, large boxes are cut in row chunks by a rule that depends on bytes only; then units go, largest first,
  to the least loaded holder (LPT: at most 4/3 of the optimum; Graham 1969). In JOB scope the least loaded of the
  NODE owners takes the unit.
- The order of `shards` does not matter. Ties are broken from a position that depends on the group's names, so that many
  small groups do not all load their lowest rank.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import msgspec
import xxhash

from holdfast.checkpoint.boxes import Box, split_rows, whole
from holdfast.checkpoint.dtypes import itemsize
from holdfast.checkpoint.pieces import Piece

MIN_CHUNK_BYTES = 1 << 20
"""Boxes are not cut smaller than this for balance."""
_CHUNKS_PER_HOLDER = 16
"""A group is cut so that a chunk is at most 1/16 of a holder's fair part: at most about 6 % out of balance."""


class Shard(msgspec.Struct, frozen=True):
    """What this rank holds of one global tensor."""

    name: str
    dtype: str
    """torch's name without ``torch.``."""
    shape: tuple[int, ...]
    """Of the global tensor, in elements."""
    boxes: tuple[Box, ...]
    holders: tuple[int, ...]
    """Global ranks that hold exactly these boxes of this tensor, this rank among them."""
    rank: int | None = None
    """Set for per-rank state: this rank."""


class _Unit(msgspec.Struct, frozen=True):
    """A box of a shard, or a row chunk of one: goes to one owner."""

    shard: Shard
    box: Box
    size_bytes: int


def own(
    shards: Sequence[Shard], *, global_rank: int, node_of: Callable[[int], int] | Mapping[int, int]
) -> tuple[Piece, ...]:
    """The pieces that rank `global_rank` copies in NODE scope; ``job`` marks those that it also owns in JOB scope.

    Args:
        shards: what this rank holds, in any order, one per tensor.
        global_rank: this rank.
        node_of: node rank of a global rank, at least for all holders.

    Returns:
        Pieces sorted by name and box; the same bytes on each call. `Piece.nodes` says which nodes hold them.

    Raises:
        ValueError: this rank is not among the holders of a shard.
    """
    node = node_of.__getitem__ if isinstance(node_of, Mapping) else node_of
    groups: dict[tuple[int, ...], list[Shard]] = {}
    for shard in shards:
        holders = shard.holders if shard.rank is None else (global_rank,)
        groups.setdefault(tuple(sorted(set(holders))), []).append(shard)
    pieces: list[Piece] = []
    for holders, members in groups.items():
        if global_rank not in holders:
            raise ValueError(f"rank {global_rank} is not among the holders {holders} of {members[0].name}")
        pieces += _own_in_group(members, holders, global_rank, node)
    return tuple(sorted(pieces, key=lambda piece: (piece.name, piece.box)))


def own_of_all(
    shards: Sequence[Shard], *, holders: Sequence[int], node_of: Callable[[int], int]
) -> dict[int, tuple[Piece, ...]]:
    """For each holder: its pieces in JOB scope, as `own` finds them there. For whoever plans for ranks not there.

    Args:
        shards: all that one of the ranks holds together with exactly these others.
        holders: those ranks.
        node_of: node rank of each.
    """
    group = tuple(sorted(set(holders)))
    if len(group) == 1:
        return {group[0]: tuple(_piece(u.shard, u.box, True, ()) for shard in shards for u in _boxes_of(shard))}
    assigned = _assign(list(shards), group, node_of)
    found: dict[int, list[Piece]] = {rank: [] for rank in group}
    for unit, owner in zip(assigned.units, assigned.job_owners, strict=True):
        found[owner].append(_piece(unit.shard, unit.box, True, assigned.held_by))
    return {rank: tuple(pieces) for rank, pieces in found.items()}


class _Assigned(NamedTuple):
    """Who takes what of a group."""

    units: list[_Unit]
    nodes: dict[int, list[int]]
    """Holders by node."""
    places: dict[int, list[int]]
    """See `_place_units`."""
    job_owners: list[int]
    """By unit."""
    held_by: tuple[int, ...]


def _own_in_group(
    shards: list[Shard], holders: tuple[int, ...], global_rank: int, node: Callable[[int], int]
) -> list[Piece]:
    if len(holders) == 1:
        return [_piece(u.shard, u.box, True, ()) for shard in shards for u in _boxes_of(shard)]
    assigned = _assign(shards, holders, node)
    mine = assigned.nodes[node(global_rank)]
    my_place = assigned.places[len(mine)]
    return [
        _piece(unit.shard, unit.box, assigned.job_owners[i] == global_rank, assigned.held_by)
        for i, unit in enumerate(assigned.units)
        if mine[my_place[i]] == global_rank
    ]


def _assign(shards: list[Shard], holders: tuple[int, ...], node: Callable[[int], int]) -> _Assigned:
    units = _units(shards, len(holders))
    names = min(shard.name for shard in shards)
    turn = xxhash.xxh3_64_intdigest(names.encode()) % len(holders)
    turned = (*holders[turn:], *holders[:turn])
    nodes: dict[int, list[int]] = {}
    for rank in turned:
        nodes.setdefault(node(rank), []).append(rank)
    places = _place_units(units, sorted({len(ranks) for ranks in nodes.values()}))
    job_owners = _job_owners(units, nodes, places, {rank: order for order, rank in enumerate(turned)})
    return _Assigned(units, nodes, places, job_owners, tuple(sorted(nodes)) if len(nodes) > 1 else ())


def _piece(shard: Shard, box: Box, job: bool, nodes: tuple[int, ...]) -> Piece:
    return Piece(shard.name, shard.dtype, shard.shape, box, shard.rank, job, nodes)


def _boxes_of(shard: Shard) -> list[_Unit]:
    """One unit per box. A tensor without elements is one empty unit, so that it is saved at all."""
    if 0 in shard.shape:
        return [_Unit(shard, whole(shard.shape), 0)]
    size = itemsize(shard.dtype)
    return [_Unit(shard, box, box.volume * size) for box in shard.boxes if not box.is_empty]


def _units(shards: list[Shard], num_holders: int) -> list[_Unit]:
    """Boxes, the large ones cut, in the order in which they are given out: largest first, then by name and box."""
    units = [unit for shard in shards for unit in _boxes_of(shard)]
    total = sum(unit.size_bytes for unit in units)
    limit = max(MIN_CHUNK_BYTES, total // (_CHUNKS_PER_HOLDER * num_holders))
    cut: list[_Unit] = []
    for unit in units:
        if unit.size_bytes <= limit:
            cut.append(unit)
            continue
        size = itemsize(unit.shard.dtype)
        chunks = split_rows(unit.box, -(-unit.size_bytes // limit))
        cut += [_Unit(unit.shard, box, box.volume * size) for box in chunks]
    return sorted(cut, key=lambda unit: (-unit.size_bytes, unit.shard.name, unit.box))


def _place_units(units: list[_Unit], counts: list[int]) -> dict[int, list[int]]:
    """For each number of holders on a node: the position among them that takes each unit.

    Nodes with as many holders give units out in the same way, so the work does not grow with the number of nodes.
    """
    places: dict[int, list[int]] = {}
    for count in counts:
        loads = [(0, position) for position in range(count)]
        taken: list[int] = []
        for unit in units:
            load, position = loads[0]
            heapq.heapreplace(loads, (load + unit.size_bytes, position))
            taken.append(position)
        places[count] = taken
    return places


def _job_owners(
    units: list[_Unit], nodes: dict[int, list[int]], place: dict[int, list[int]], order: dict[int, int]
) -> list[int]:
    """The JOB owner of each unit: the least loaded of its NODE owners."""
    waiting: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
    for ranks in nodes.values():
        for position, rank in enumerate(ranks):
            waiting.setdefault((len(ranks), position), []).append((0, order[rank], rank))
    for heap in waiting.values():
        heapq.heapify(heap)
    owners: list[int] = []
    for i, unit in enumerate(units):
        heap = min((waiting[count, place[count][i]] for count in place), key=lambda heap: heap[0])
        load, tie, rank = heap[0]
        heapq.heapreplace(heap, (load + unit.size_bytes, tie, rank))
        owners.append(rank)
    return owners
