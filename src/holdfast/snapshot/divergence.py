"""What to do about copies of a version that do not agree (`holdfast.checkpoint.replicas` finds them).

Copies that something keeps equal (DDP, the placements of a DTensor) and that differ are silent corruption: the majority
decides, and without one the version is not used. Of tensors that nothing is known to keep equal (`UNSYNCHRONISED` in
the images lists them: norms beside tensor-parallel layers, gradients that a script adds up by itself) a difference may
be how this training works. As with buffers, each node then goes on with its own copy, as it would have done without a
failure; in another world all take that of the lowest rank, as from storage.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from holdfast.checkpoint.catalog import Catalog
from holdfast.checkpoint.objects import decode
from holdfast.checkpoint.replicas import UNSYNCHRONISED, Divergence, divergences
from holdfast.errors import HoldfastError


@dataclass(frozen=True)
class Settled:
    """What was found, the same on all ranks that read the same images."""

    texts: tuple[str, ...]
    """One line for each region whose copies differ: corruption."""
    drifted: tuple[str, ...]
    """One line for each region that nothing keeps equal, and that differs."""
    undecided: str
    """The first of `texts` where no copy has a majority: the version is not to be used. "" where there is none."""


def settle(catalog: Catalog, nodes: Sequence[int], is_own: Callable[[int], bool] = lambda rank: False) -> Settled:
    """Compare the copies in a catalog; from now on it reads those of the majority, or of this node.

    Args:
        catalog: over the images of a version in memory.
        nodes: node rank of each image.
        is_own: whether a rank of the world that wrote them is of this node now; never where the world is another one.
    """
    places = [f"rank {rank} on node {node}" for rank, node in zip(catalog.ranks, nodes, strict=True)]
    found = divergences(catalog.images)
    free = _unsynchronised(catalog) if found else frozenset()
    drifted = [one for one in found if one.name in free]
    corrupt = [one for one in found if one.name not in free]
    for divergence in corrupt:
        if divergence.has_majority:
            catalog.leave_out(divergence.name, divergence.box, divergence.outvoted)
    for divergence in drifted:
        _take_own(catalog, divergence, is_own)
    undecided = next((one.describe(places) for one in corrupt if not one.has_majority), "")
    return Settled(
        tuple(one.describe(places) for one in corrupt), tuple(one.describe_drift(places) for one in drifted), undecided
    )


def _take_own(catalog: Catalog, divergence: Divergence, is_own: Callable[[int], bool]) -> None:
    numbers = sorted((number for copies in divergence.copies for number in copies), key=catalog.ranks.__getitem__)
    own = next((number for number in numbers if is_own(catalog.ranks[number])), numbers[0])
    catalog.leave_out(divergence.name, divergence.box, [number for number in numbers if number != own])


def _unsynchronised(catalog: Catalog) -> frozenset[str]:
    """What any image lists. One that cannot be read lists nothing: the stricter rule then counts."""
    names: set[str] = set()
    for rank in catalog.ranks:
        try:
            record = catalog.objects(rank).get(UNSYNCHRONISED)
            names |= set(decode(record)) if record is not None else set()
        except (HoldfastError, TypeError):
            continue
    return frozenset(names)
