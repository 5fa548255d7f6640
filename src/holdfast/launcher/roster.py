"""The nodes that report to a leader: who they are, what they said last, and when. Pure; used by `Leader` only."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from holdfast.checkpoint.version import GenerationId
from holdfast.launcher.limits import Limits
from holdfast.launcher.wire import PROTOCOL, NodeInfo, Report


@dataclass
class Node:
    """What the leader knows of one member."""

    report: Report
    heard: float
    joined: int
    """Order of joining."""
    since: float


class Roster:
    """See the module's head."""

    def __init__(self, *, job: str, limits: Limits) -> None:
        self._job = job
        self._limits = limits
        self._joined = 0
        self._asking: dict[str, float] = {}
        """Since when agents ask for a node rank that another one holds."""
        self.nodes: dict[str, Node] = {}
        """Living ones by node id, in the order of joining."""

    def heard(self, report: Report, now: float) -> str | None:
        """Take in a report.

        Returns:
            None where a node has joined, "" for a node that is known or shall ask again, else why it cannot belong.
        """
        node_id = report.node.node_id
        node = self.nodes.get(node_id)
        if node is not None:
            if report.sequence > node.report.sequence:
                node.report, node.heard = report, now
            return ""
        reason = self._objection(report.node, now)
        if reason is None:
            self._joined += 1
            self.nodes[node_id] = Node(report=report, heard=now, joined=self._joined, since=now)
        return reason

    def silent(self, now: float) -> list[str]:
        """Node ids of those that count as lost."""
        return [node_id for node_id, node in self.nodes.items() if now - node.heard > self._limits.dead_after_s]

    def _objection(self, node: NodeInfo, now: float) -> str | None:
        if node.protocol != PROTOCOL:
            return f"this agent speaks protocol {node.protocol}, the leader {PROTOCOL}: use one release on all nodes"
        if node.job != self._job:
            return (
                f"the leader at this endpoint serves job {self._job!r}, not {node.job!r}: use another --rdzv-endpoint"
            )
        for other in self.nodes.values():
            if node.rank_hint is not None and other.report.node.rank_hint == node.rank_hint:
                return self._same_rank(node, other.report.node, now)
        return None

    def _same_rank(self, node: NodeInfo, other: NodeInfo, now: float) -> str:
        """Two agents of one rank: the older may be dead and not yet missed, so the newer asks for a while."""
        since = self._asking.setdefault(node.node_id, now)
        if now - since < 2 * self._limits.dead_after_s:
            return ""
        return f"node rank {node.rank_hint} is taken by agent {other.pid} on {other.host}"


def newest_incarnation(nodes: Iterable[Node], *, other_than: str = "") -> int:
    """The largest incarnation that any of `nodes` has seen, now or before; without those of one nonce, where given."""
    seen = [found for node in nodes for found in _seen_by(node.report) if found.nonce != other_than]
    known = [] if other_than else [node.report.daemon.newest_incarnation for node in nodes]
    return max([found.incarnation for found in seen] + known, default=-1 if other_than else 0)


def remembered_run(nodes: Iterable[Node]) -> str | None:
    """The run that the newest memory of `nodes` belongs to."""
    newest = max(nodes, key=lambda n: (n.report.daemon.run_id is not None, n.report.daemon.newest_incarnation))
    return newest.report.daemon.run_id


def _seen_by(report: Report) -> list[GenerationId]:
    """Newest generations that the node knows, under this agent and before."""
    standing = report.standing.generation if report.standing is not None else None
    return [seen for seen in (report.generation, report.daemon.generation, standing) if seen is not None]
