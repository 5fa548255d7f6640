"""What to do about copies of a version that do not agree (`holdfast.checkpoint.replicas` finds them)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from holdfast.checkpoint.catalog import Catalog
from holdfast.checkpoint.replicas import divergences


@dataclass(frozen=True)
class Settled:
    """What was found, the same on all ranks that read the same images."""

    texts: tuple[str, ...]
    """One line for each region whose copies differ."""
    undecided: str
    """The first of them where no copy has a majority: the version is not to be used. "" where there is none."""


def settle(catalog: Catalog, nodes: Sequence[int]) -> Settled:
    """Compare the copies in a catalog; from now on it reads those of the majority.

    Args:
        catalog: over the images of a version in memory.
        nodes: node rank of each image.
    """
    places = [f"rank {rank} on node {node}" for rank, node in zip(catalog.ranks, nodes, strict=True)]
    found = divergences(catalog.images)
    for divergence in found:
        if divergence.has_majority:
            catalog.leave_out(divergence.name, divergence.box, divergence.outvoted)
    undecided = next((one.describe(places) for one in found if not one.has_majority), "")
    return Settled(tuple(one.describe(places) for one in found), undecided)
