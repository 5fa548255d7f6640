"""Who shall lead when there is no leader. Pure.

Leading is no power: a leader can do nothing without the promises of its members (`holdfast.launcher.quorum`), and of
two that hear each other one yields (`authority`). So this only has to see that somebody leads soon.

Rules
-----
1. Agents that know a generation come before those that never had a place. Among them the newer generation decides, then
   the lower node rank. The lowest survivor leads at once; others a heartbeat later, if they hear of no better one.
2. Who is asked to leave the job does not lead any more.
3. New agents lead only where they serve an endpoint: the first one at once, a later one after the last call.
"""

from __future__ import annotations

from dataclasses import dataclass

from holdfast.launcher.limits import Limits
from holdfast.launcher.wire import Drain, Report, Standing

_RECENT_BEATS = 2.5
"""A seeker that was not heard for so many heartbeats is no candidate any more."""


@dataclass(frozen=True)
class _Peer:
    report: Report
    heard: float


class Election:
    """One per agent, used by one thread; heeded only while the agent has no leader."""

    def __init__(self, *, node_id: str, limits: Limits) -> None:
        self._node_id = node_id
        self._limits = limits
        self._peers: dict[str, _Peer] = {}

    def heard(self, report: Report, now: float) -> None:
        """An agent reported; one that follows a leader is no candidate."""
        if report.leader_id:
            self._peers.pop(report.node.node_id, None)
        else:
            self._peers[report.node.node_id] = _Peer(report, now)

    def addresses(self, now: float) -> set[str]:
        """host:port of agents that were heard seeking lately."""
        return {peer.report.node.address for peer in self._recent(now)}

    def reports(self, now: float) -> list[Report]:
        """Newest reports of agents that were heard seeking lately."""
        return [peer.report for peer in self._recent(now)]

    def should_lead(self, own: Report, *, since: float, lost: str, endpoint: int, now: float) -> bool:
        """Whether this agent is to lead.

        Args:
            own: this agent's report.
            since: when it began to seek.
            lost: node id of the leader that it lost, "" for none.
            endpoint: number of the rendezvous endpoint that it serves, -1 for none.
            now: time.monotonic().
        """
        if own.drain is not Drain.NONE:
            return False
        if any(_key(peer.report) > _key(own) for peer in self._recent(now) if peer.report.drain is Drain.NONE):
            return False
        if own.standing is not None:
            alive = [member for member in own.standing.members if member != lost]
            at_once = bool(alive) and alive[0] == self._node_id
            return at_once or now - since >= self._limits.heartbeat_s
        if endpoint == 0:
            return True
        return endpoint > 0 and now - since >= self._limits.last_call_s

    def _recent(self, now: float) -> list[_Peer]:
        limit_s = _RECENT_BEATS * self._limits.heartbeat_s
        return [peer for peer in self._peers.values() if now - peer.heard <= limit_s]


def _key(report: Report) -> tuple[int, int, int, str]:
    """Larger is better. New agents are equal here: their endpoints decide, which only they themselves know."""
    standing = report.standing
    if standing is None:
        return (0, 0, 0, "")
    return (standing.generation.incarnation, standing.generation.generation, -_rank(standing, report.node.node_id), "")


def _rank(standing: Standing, node_id: str) -> int:
    return standing.members.index(node_id) if node_id in standing.members else len(standing.members)
