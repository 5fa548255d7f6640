"""Who may go on after a split, and who may found an incarnation. Pure functions; the rules of the architecture.

A generation may be followed only by a side that holds more than half of its members, or exactly half with its lowest
node. Any two such sides share a member, and a member promises itself to one leader at a time: so of two successors at
most one ever runs. With a claim store one member is enough, because the store lets only one side have the next number.
In jobs of at most two nodes without a store the survivor goes on: the stated exception.

A member is an agent process: a restarted agent has another node id, so it has no vote in the generation it left.

Why two successors of one generation never both make progress
--------------------------------------------------------------
It is Paxos (Lamport, *Paxos Made Simple*), once for each generation: what is decided is its successor, its members are
the acceptors. Before it forms a generation, a leader has the promise of its nodes to its *ballot*. A member promises
each ballot once, accepts proposals of that one only, and tells the newest one that it has accepted with every promise.
The ballot is the generation's number, so numbers are used once.

A generation P that follows G is at first *proposed*. It runs only after a side of G that may go on has accepted it, and
members that learn of it from then on learn that it *stands*. Until then it carries the members of G as one of its
*bases*, and who knows it as proposed only may follow it with sides both of P and of all its bases, which have to accept
what comes next, too. Let P and Q both follow G, Q with the larger number. The side that accepted P and the side that
promised Q share a member x of G. If x accepted P first, it told the leader of Q, which has followed P instead. If it
promised Q first, it did not accept P afterwards, and P does not run.

Only its own leader ever lets a proposal run. So a leader that gives its own one up knows that it never ran, and heeds
it no more: what it proposes next has a larger number, and whoever follows the one given up needs the same bases.

With a claim store one claim comes after each other one, whatever it names, and only one side wins it
(`holdfast.launcher.claims`). A claim that founds an incarnation comes after the newest one like any other; as the
generation that it overtakes may still run where nobody of it is here, it does not start before that has read the claim,
nor does what follows it unless it has started.

What this does not cover: fresh agents, which know of no generation, found an incarnation when enough of them have been
called by nobody for the last-call time. Where ``--nnodes`` allows worlds of half of its largest number and less, or
there are spares, a generation that has shrunk so far may still run behind a cut cable, or with an agent that is
suspended for longer than that. Only a claim store tells.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from holdfast.launcher.limits import Limits
from holdfast.launcher.wire import Standing


def may_follow(standing: Standing, present: Collection[str], limits: Limits, *, store: bool) -> bool:
    """Whether the agents `present` (node ids) may form the successor of `standing`, or accept it.

    Args:
        standing: the newest generation that any of them knows; with a store, the newest claim. Where it is only
            proposed, they have to be a side of all its bases too.
        present: living agents that have promised themselves to one leader.
        limits: of the job.
        store: there is a claim store, which has to be won besides.
    """
    return all(_decides(members, present, limits, store=store) for members in (standing.members, *standing.bases))


def _decides(members: Sequence[str], present: Collection[str], limits: Limits, *, store: bool) -> bool:
    """Whether `present` are a side of `members` (by node rank) that may go on."""
    votes = sum(member in present for member in members)
    if store or limits.max_nodes <= 2:
        return votes > 0
    if 2 * votes == len(members):
        return members[0] in present
    return 2 * votes > len(members)


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
