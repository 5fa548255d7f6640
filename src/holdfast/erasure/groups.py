"""Which nodes protect each other, and where each chunk and each parity lies. Pure: no I/O, no clock.

**Groups.** Nodes are dealt into groups like cards, one failure domain after the other, largest domain first: a domain
with no more nodes than there are groups never has two in one, and sizes differ by at most one.

* ``auto``: 1 node none; 2 nodes 1+1; 3 and 4 nodes n-1 + 1; more nodes: groups of up to 8, two parities each. Where a
  domain has more nodes than that makes groups, there are as many groups as it takes to separate its nodes, if each can
  have two members; groups of two and three then have one parity.
* ``K+M``: groups of at most K + M nodes with M parities; a smaller group has fewer data shards. Where the remainder
  would leave a group without M + 1 nodes, there is one group less, of more than K + M nodes, in which each stripe still
  spans K + M of them. So nothing is ever weaker than asked, except where fewer than M + 1 nodes exist.

**Rotation** (RAID-5/6 over memory; the layout of SCR's Reed-Solomon scheme). A group of n members has n stripes. Each
member cuts its state into k chunks. With members at positions 0..n-1, stripe s has its data shard j at position s + j
and its parity p at position s + k + p (mod n). So chunk j of the member at position i is shard j of stripe i - j, and
every member holds k chunks of its own and m parities: m / k of its state where members are alike.

Members may differ in size: a parity is as long as the longest chunk of its stripe, shorter ones count as zeros.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence

import msgspec

from holdfast.erasure.redundancy import Redundancy, Scheme

MAX_AUTO_GROUP = 8
CHUNK_ALIGNMENT = 64
"""Bytes: chunks begin on cache lines, as kernels like best."""


class Stripe(msgspec.Struct, frozen=True):
    """One code word: a chunk each of k members, parities on m others."""

    index: int
    data: tuple[int, ...]
    """Node ranks; shard j is chunk j of ``data[j]``."""
    parity: tuple[int, ...]
    """Node ranks; shard k + p lies on ``parity[p]``."""


class Group(msgspec.Struct, frozen=True):
    """Nodes that protect each other. Stored with each version: after a loss it cannot be derived again."""

    members: tuple[int, ...]
    """Node ranks, ascending; the position in this tuple is the one of the rotation."""
    num_data: int
    """k."""
    num_parity: int
    """m; 0 where nothing is protected."""

    def stripes(self) -> tuple[Stripe, ...]:
        """All stripes, one per member; none without parity."""
        if self.num_parity == 0:
            return ()
        size, width = len(self.members), self.num_data + self.num_parity
        turned = [tuple(self.members[(index + shard) % size] for shard in range(width)) for index in range(size)]
        return tuple(
            Stripe(index, nodes[: self.num_data], nodes[self.num_data :]) for index, nodes in enumerate(turned)
        )

    def stripe_of(self, node_rank: int, chunk: int) -> int:
        """Index of the stripe in which chunk number `chunk` (0..k-1) of a member is shard number `chunk`.

        Raises:
            ValueError: no such member.
        """
        assert 0 <= chunk < self.num_data, (chunk, self.num_data)
        return (self.members.index(node_rank) - chunk) % len(self.members)

    def survives(self, lost: Collection[int]) -> bool:
        """Whether every byte of the members can still be had when the nodes `lost` are gone."""
        gone = set(lost)
        if self.num_parity == 0:
            return gone.isdisjoint(self.members)
        return all(
            gone.isdisjoint(stripe.data) or len(gone.intersection((*stripe.data, *stripe.parity))) <= self.num_parity
            for stripe in self.stripes()
        )

    def parity_bytes(self, state_bytes: Mapping[int, int]) -> dict[int, int]:
        """Bytes of one generation of parity on each member.

        Args:
            state_bytes: node rank -> bytes of coded state.
        """
        held = dict.fromkeys(self.members, 0)
        chunks = {node: chunk_ranges(state_bytes[node], self.num_data) for node in self.members}
        for stripe in self.stripes():
            longest = max(len(chunks[node][shard]) for shard, node in enumerate(stripe.data))
            for node in stripe.parity:
                held[node] += longest
        return held


class Grouping(msgspec.Struct, frozen=True):
    """All nodes in groups."""

    groups: tuple[Group, ...]
    notes: tuple[str, ...] = ()
    """Lines for people: where the result is less than one would wish."""

    def group_of(self, node_rank: int) -> Group:
        """The group of a node.

        Raises:
            KeyError: no such node.
        """
        for group in self.groups:
            if node_rank in group.members:
                return group
        raise KeyError(node_rank)

    def survives(self, lost: Collection[int]) -> bool:
        """Whether every byte of every node can still be had when the nodes `lost` are gone."""
        return all(group.survives(lost) for group in self.groups)


def form_groups(domains: Mapping[int, str], redundancy: Redundancy) -> Grouping:
    """Group nodes over failure domains, the same way on whoever computes it.

    Args:
        domains: node rank -> name of its failure domain (a host, a rack).
        redundancy: what the user asked for.
    """
    if not domains:
        return Grouping(())
    num_nodes = len(domains)
    if redundancy.scheme is Scheme.NONE or num_nodes == 1:
        note = "one node: nothing in memory survives its loss"
        unprotected = tuple(Group((node,), 1, 0) for node in sorted(domains))
        return Grouping(unprotected, (note,) if redundancy.scheme is Scheme.CODE else ())
    num_groups = _number_of_groups(domains, redundancy)
    groups = tuple(_make_group(members, num_nodes, redundancy) for members in _deal(domains, num_groups))
    return Grouping(groups, (*_notes_on_parity(groups, redundancy), *_notes_on_domains(groups, domains)))


def lower_parity(grouping: Grouping, num_parity: int) -> Grouping:
    """The same groups with at most `num_parity` parities each: what they no longer hold as parity is data, so stripes
    span as many members as before, and each member holds less.

    Args:
        grouping: as formed.
        num_parity: at least 1.
    """
    assert num_parity >= 1, num_parity
    groups = tuple(
        Group(group.members, group.num_data + group.num_parity - num_parity, num_parity)
        if group.num_parity > num_parity
        else group
        for group in grouping.groups
    )
    return Grouping(groups, grouping.notes)


def chunk_ranges(size_bytes: int, num_data: int) -> tuple[range, ...]:
    """Cut a member's state into k chunks that begin on multiples of 64 bytes.

    Returns:
        k ranges of byte offsets; the last ones are shorter or empty where the state does not divide.
    """
    chunk_bytes = -(-size_bytes // num_data)
    chunk_bytes += -chunk_bytes % CHUNK_ALIGNMENT
    starts = (min(chunk * chunk_bytes, size_bytes) for chunk in range(num_data))
    return tuple(range(start, min(start + chunk_bytes, size_bytes)) for start in starts)


def needs_parity(num_domains: int, num_parity: int) -> bool:
    """Whether a piece must be coded that `num_domains` failure domains hold anyway: m + 1 copies survive m losses."""
    return num_domains < num_parity + 1


def _number_of_groups(domains: Mapping[int, str], redundancy: Redundancy) -> int:
    num_nodes = len(domains)
    if redundancy.scheme is Scheme.CODE:
        width = redundancy.num_data + redundancy.num_parity
        return max(1, min(-(-num_nodes // width), num_nodes // (redundancy.num_parity + 1)))
    largest_domain = max(Counter(domains.values()).values())
    by_size = -(-num_nodes // MAX_AUTO_GROUP)
    return max(by_size, largest_domain) if num_nodes // largest_domain >= 2 else by_size


def _deal(domains: Mapping[int, str], num_groups: int) -> list[tuple[int, ...]]:
    """Neighbours in the order of domains go to different groups."""
    sizes = Counter(domains.values())
    order = sorted(domains, key=lambda node: (-sizes[domains[node]], domains[node], node))
    return sorted(tuple(sorted(order[group::num_groups])) for group in range(num_groups))


def _make_group(members: tuple[int, ...], num_nodes: int, redundancy: Redundancy) -> Group:
    size = len(members)
    if redundancy.scheme is Scheme.CODE:
        num_parity = min(redundancy.num_parity, size - 1)
        return Group(members, min(redundancy.num_data, size - num_parity), num_parity)
    num_parity = 1 if num_nodes <= 4 or size <= 3 else 2
    return Group(members, size - num_parity, num_parity)


def _notes_on_parity(groups: Sequence[Group], redundancy: Redundancy) -> list[str]:
    least = min(group.num_parity for group in groups)
    if redundancy.scheme is Scheme.CODE and least < redundancy.num_parity:
        return [f"redundancy {redundancy} needs {redundancy.num_parity + 1} nodes: only {least} may be lost at a time"]
    return []


def _notes_on_domains(groups: Sequence[Group], domains: Mapping[int, str]) -> list[str]:
    """Name the domain whose loss would hurt most, if one has several members in a group."""
    if len(set(domains.values())) == 1:
        return [f"all {len(domains)} nodes are in failure domain {domains[min(domains)]!r}: its loss takes all memory"]
    shares = [
        (count - group.num_parity, count, domain, group.num_parity)
        for group in groups
        for domain, count in sorted(Counter(domains[node] for node in group.members).items())
        if count > 1
    ]
    if not shares:
        return []
    excess, count, domain, num_parity = max(shares)
    outcome = "would lose state" if excess > 0 else "is survived"
    return [
        f"failure domain {domain!r} has {count} nodes in one group, which may lose {num_parity}: its loss {outcome}"
    ]
