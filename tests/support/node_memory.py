"""What lies in the memory of nodes: the headers of slots and parities, read from outside of their namespaces."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from holdfast.checkpoint.version import Version
from holdfast.snapshot.arena import SlotHeader, SlotState, read_header_of
from support.nodes import Node


def headers(node: Node, pattern: str) -> Iterator[SlotHeader]:
    """Of each slot (``slot-*``) or parity buffer (``parity-?``) of a node; none of a node that is off."""
    for path in Path(f"/proc/{node.init}/root/dev/shm").glob(f"holdfast-*/{pattern}"):
        try:
            yield read_header_of(path)[0]
        except OSError:  # dropped meanwhile, or the node is going off
            continue


def whole_versions(node: Node, pattern: str) -> set[Version]:
    """Versions of which the node holds something whole."""
    found = [one for one in headers(node, pattern) if one.state is SlotState.CLEAN]
    return {one.version for one in found if one.version is not None}


def whole(node: Node, pattern: str) -> set[int]:
    """Their steps."""
    return {one.step for one in whole_versions(node, pattern)}


def protected_versions(nodes: Sequence[Node]) -> set[Version]:
    """Versions of which every node that is on holds its image and its parity whole."""
    held = [whole_versions(node, "slot-*") & whole_versions(node, "parity-?") for node in nodes if node.is_on]
    return set.intersection(*held) if held else set()


def protected(nodes: Sequence[Node]) -> int:
    """The newest step of them; 0 where there is none."""
    return max((one.step for one in protected_versions(nodes)), default=0)


def exchanging(nodes: Sequence[Node]) -> bool:
    """Whether some node fills a parity buffer at this moment."""
    return any(one.state is SlotState.FILLING for node in nodes for one in headers(node, "parity-?"))
