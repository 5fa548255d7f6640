"""Who may go on after a split, and who may found an incarnation. Pure functions; the rules of the architecture.

A generation may be followed only by a side that holds more than half of its members, or exactly half with its lowest
node. Any two such sides share a member, a member promises itself to one leader at a time, and a version needs all
members: so of two successors at most one ever makes progress. With
a claim store one member is enough, because the store lets only one side have the next number. In jobs of at most two
nodes without a store the survivor goes on: the stated exception.

A member is an agent process: a restarted agent has another node id, so it has no vote in the generation it left.

Why two successors of one generation never both make progress
--------------------------------------------------------------
Before it forms a generation, a leader has the promise of its nodes to its *ballot*. A member promises each ballot once
and starts nothing of an older one; the ballot is the generation's number. Let P and P' be two successors of G. The
sides that formed them share a member x of G (any two sides that may go on do). Say x promised P first. Either x had
started P, or heard of it as one who has a vote and no place, when it promised P': then it told the leader of P', which
would have followed P instead of G. Or it never starts P: then P never completes a version, because that takes all its
members. So numbers are used once, and what was seen as newest by a side that may go on is the newest there is.

With a claim store the number is that of the claim, which only one side wins.
"""

from __future__ import annotations

from collections.abc import Collection

from holdfast.launcher.limits import Limits
from holdfast.launcher.wire import Standing


def may_follow(standing: Standing, present: Collection[str], limits: Limits, *, store: bool) -> bool:
    """Whether the agents `present` (node ids) may form the successor of `standing`.

    Args:
        standing: the newest generation that any of them knows; with a store, the newest claim.
        present: living agents that have promised themselves to one leader.
        limits: of the job.
        store: there is a claim store, which has to be won besides.
    """
    votes = sum(member in present for member in standing.members)
    if store or limits.max_nodes <= 2:
        return votes > 0
    if 2 * votes == len(standing.members):
        return standing.members[0] in present
    return 2 * votes > len(standing.members)


def founders_needed(limits: Limits, *, endpoint: int, remembered: int, store: bool) -> int:
    """How many agents that never had a place it takes to found an incarnation, among enough for a world.

    Args:
        limits: of the job.
        endpoint: number of the endpoint that the leader serves, -1 for none.
        remembered: nodes of the largest generation that any of the agents, or its seat, remembers: its other nodes may
            be alive behind a cut cable.
        store: there is a claim store: what still runs elsewhere reads the claim, and yields.
    """
    if store or limits.max_nodes <= 2 or (endpoint == 0 and remembered <= 1):
        return 1
    return limits.max_nodes // 2 + 1


def lone_upper(standing: Standing, present: Collection[str], limits: Limits) -> bool:
    """Whether this is the upper one of two nodes that lost each other: it skips a number, so that both differ."""
    return limits.max_nodes <= 2 and len(standing.members) == 2 and standing.members[0] not in present
