"""Node ranks and global ranks of a generation, pure.

Survivors keep their node rank where the world allows; newcomers take the vacant ones, in the order in which they
joined. Under static rendezvous the ranks that the user gave decide. Nodes may have different numbers of workers and
different roles; role ranks follow node ranks, as under torchrun.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from holdfast.launcher.wire import NodeInfo, Place


def node_ranks(nodes: Sequence[NodeInfo], previous: Mapping[str, int]) -> dict[str, int]:
    """The node rank of each of `nodes` (in order of joining), by node id; `previous`: those of the last generation."""
    if all(node.rank_hint is not None for node in nodes):
        ordered = sorted(nodes, key=lambda node: node.rank_hint or 0)
        return {node.node_id: rank for rank, node in enumerate(ordered)}
    kept = {
        node.node_id: previous[node.node_id] for node in nodes if previous.get(node.node_id, len(nodes)) < len(nodes)
    }
    vacant = iter(sorted(set(range(len(nodes))) - set(kept.values())))
    return {node.node_id: kept[node.node_id] if node.node_id in kept else next(vacant) for node in nodes}


def places(nodes: Sequence[NodeInfo], ranks: Mapping[str, int], daemons: Mapping[str, str]) -> tuple[Place, ...]:
    """The places of a generation, by node rank. `daemons`: daemon endpoint by node id."""
    ordered = sorted(nodes, key=lambda node: ranks[node.node_id])
    role_sizes: dict[str, int] = {}
    for node in ordered:
        role_sizes[node.role] = role_sizes.get(node.role, 0) + node.num_workers
    result = []
    first, role_first = 0, dict.fromkeys(role_sizes, 0)
    for node in ordered:
        result.append(
            Place(
                node_id=node.node_id,
                node_rank=ranks[node.node_id],
                host=node.host,
                daemon=daemons.get(node.node_id, ""),
                role=node.role,
                num_ranks=node.num_workers,
                first_global_rank=first,
                first_role_rank=role_first[node.role],
                role_world_size=role_sizes[node.role],
                address=node.address,
            )
        )
        first += node.num_workers
        role_first[node.role] += node.num_workers
    return tuple(result)
