"""What is left of a version in memory: which images lie where, which are decoded from what, how much more may be lost.

A pure function of the inventories of the living daemons. Nothing of today's membership counts: who held which image and
which parity, and in which group, stands in the records that were kept with the parity (`coding.CodedVersion`).

A lost image can be decoded where each stripe with a part of it has k shards left, data or parity, and where of its
pieces that were not coded (m + 1 failure domains held them) some copy is left.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

from holdfast.checkpoint.version import Version
from holdfast.snapshot.coding import CodedVersion, HeldParity, Rebuild, ShardAt, StripeSources
from holdfast.snapshot.messages import Inventory
from holdfast.snapshot.records import CleanImage


@dataclass(frozen=True, kw_only=True)
class Restoration:
    """How a version is had from memory."""

    version: Version
    images: dict[int, tuple[int, CleanImage]] = field(default_factory=dict)
    """By global rank of the world that wrote it: a node rank of today that holds the image, and the image."""
    rebuilds: tuple[Rebuild, ...] = ()
    """The lost images, by global rank."""
    coded: bool = False
    """There is parity of it."""
    spare: int = 0
    """How many more nodes may be lost, whichever they are."""


@dataclass(frozen=True, kw_only=True)
class Irretrievable:
    """A version of which memory does not hold enough."""

    version: Version
    reason: str
    missing: int
    """Images that cannot be had."""


def restoration(
    version: Version,
    ranks: Sequence[int],
    inventories: Iterable[Inventory],
    *,
    bad_images: Collection[int] = (),
) -> Restoration | Irretrievable:
    """What is left of `version`.

    Args:
        version: in question.
        ranks: global ranks whose images make it whole (`chain.writers`).
        inventories: of the living daemons.
        bad_images: global ranks whose image failed its checks: as if it were lost.
    """
    return _Remains(version, tuple(inventories), frozenset(bad_images)).judge(ranks)


class _Remains:
    """All that the living daemons hold of one version."""

    def __init__(self, version: Version, inventories: tuple[Inventory, ...], bad: frozenset[int]) -> None:
        self.version = version
        self.images: dict[int, tuple[int, CleanImage]] = {}
        parities: list[tuple[int, HeldParity]] = []
        for inventory in sorted(inventories, key=lambda one: one.node_rank):
            for image in inventory.clean:
                if image.version == version and image.global_rank not in bad:
                    self.images.setdefault(image.global_rank, (inventory.node_rank, image))
            parities += [(inventory.node_rank, held) for held in inventory.parity if held.coded.version == version]
        votes = Counter(held.coded for _, held in parities)
        self.records: dict[tuple[int, ...], CodedVersion] = {}
        """By the members of the group. Members that disagree with most others are not believed."""
        for coded, _ in sorted(votes.items(), key=lambda one: -one[1]):
            self.records.setdefault(coded.group.members, coded)
        self.parity_at = {
            held.holder: node_rank
            for node_rank, held in parities
            if self.records[held.coded.group.members] == held.coded
        }
        """Node rank then -> node rank today."""

    def judge(self, ranks: Sequence[int]) -> Restoration | Irretrievable:
        lost = [rank for rank in ranks if rank not in self.images]
        rebuilds: list[Rebuild] = []
        problems: list[str] = []
        for rank in lost:
            answer = self._rebuild(rank)
            if isinstance(answer, Rebuild):
                rebuilds.append(answer)
            else:
                problems.append(answer)
        if problems:
            more = f" ({len(problems)} missing)" if self.records == {} else f" ({len(problems)} cannot be had)"
            return Irretrievable(version=self.version, reason=problems[0] + more, missing=len(problems))
        return Restoration(
            version=self.version,
            images={rank: self.images[rank] for rank in ranks if rank in self.images},
            rebuilds=tuple(rebuilds),
            coded=bool(self.records),
            spare=self._spare(ranks),
        )

    def _rebuild(self, rank: int) -> Rebuild | str:
        coded = next((one for one in self.records.values() if one.owner_of(rank) is not None), None)
        if coded is None:
            return f"the image of rank {rank} is nowhere"
        owner = coded.owner_of(rank)
        assert owner is not None
        stripes = []
        for shard in range(coded.group.num_data):
            stripe = coded.group.stripe_of(owner, shard)
            if not coded.shard_range(stripe, shard):
                continue
            left = self._shards(coded, stripe)
            if len(left) < coded.group.num_data:
                gone = [coded.shard_node(stripe, one) for one in range(_width(coded))]
                gone = [node for one, node in enumerate(gone) if all(at.shard != one for at in left)]
                return (
                    f"the image of rank {rank} is lost, and of its group {list(coded.group.members)} too many nodes "
                    f"({_listed(gone)}): {coded.group.num_data} shards are needed, {len(left)} are left"
                )
            stripes.append(StripeSources(stripe, left))
        for nodes in next(image for image in coded.stream_of(owner).images if image.global_rank == rank).copies:
            if not any(self._whole(node) for node in nodes):
                return f"pieces of rank {rank} were held by nodes {_listed(nodes)} only, and none of them is left"
        return Rebuild(global_rank=rank, coded=coded, stripes=tuple(stripes))

    def _shards(self, coded: CodedVersion, stripe: int) -> tuple[ShardAt, ...]:
        """What can be read of a stripe."""
        found = []
        for shard in range(_width(coded)):
            node = self._data_at(coded, stripe, shard) if shard < coded.group.num_data else None
            if shard >= coded.group.num_data:
                node = self.parity_at.get(coded.shard_node(stripe, shard))
            if node is not None:
                found.append(ShardAt(shard, node))
        return tuple(found)

    def _data_at(self, coded: CodedVersion, stripe: int, shard: int) -> int | None:
        """Today's node that serves a data shard; -1 where it is empty."""
        cut = coded.shard_range(stripe, shard)
        segments = coded.stream_of(coded.shard_node(stripe, shard)).segments(cut.start, cut.stop)
        nodes = {self.images[one.global_rank][0] if one.global_rank in self.images else None for one in segments}
        if not nodes:
            return -1
        return nodes.pop() if len(nodes) == 1 else None

    def _whole(self, node: int) -> bool:
        """Whether every image of a node of the version's generation is left."""
        for coded in self.records.values():
            if node in coded.group.members:
                return all(image.global_rank in self.images for image in coded.stream_of(node).images)
        return False

    def _spare(self, ranks: Sequence[int]) -> int:
        """Each node holds at most one shard of a stripe, so each further loss costs a stripe at most one."""
        covered = {
            image.global_rank for one in self.records.values() for stream in one.streams for image in stream.images
        }
        if not covered.issuperset(ranks):
            return 0
        spare: list[int] = []
        for coded in self.records.values():
            for stripe in coded.group.stripes():
                if coded.parity_bytes(stripe.index):
                    spare.append(len(self._shards(coded, stripe.index)) - coded.group.num_data)
            sets = {nodes for stream in coded.streams for image in stream.images for nodes in image.copies}
            spare += [sum(self._whole(node) for node in nodes) - 1 for nodes in sets]
        return max(0, min(spare, default=0))


def _width(coded: CodedVersion) -> int:
    return coded.group.num_data + coded.group.num_parity


def _listed(nodes: Iterable[int]) -> str:
    return ", ".join(map(str, nodes))
