"""What is coded of a version, and where each byte of it lies: the record that is kept with the parity (pure).

From the image to the parity, all in bytes:

    image      of one rank. Coded are its header, its objects and the pieces that fewer than m + 1 failure domains hold,
               rounded out to the blocks that its checksums verify (`coded_ranges`).
    stream     of one node: the coded ranges of its images one after the other, by global rank (`Stream`). A node
               without images has an empty one.
    shard      a stream is cut into k shards that begin on multiples of 64 bytes (`erasure.groups.chunk_ranges`).
    stripe     shards of k members of the group, and m parities on m others. Rotation: every member of a group of n
               nodes holds k shards of its own and m parities.
    parity     as long as the longest shard of its stripe. What the others lack counts as zeros, which never travel. The
               parities of a node lie one behind the other in one buffer (`CodedVersion.parities`).
    chunk      what travels at a time: a cut of a shard at multiples of `chunk_bytes`, the last one shorter.

`CodedVersion` is kept with the parity on every member. After a loss it is the truth about groups, owners and layouts:
today's ranks and groups may be other ones.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Final

import msgspec

from holdfast.checkpoint.version import Version
from holdfast.erasure.groups import CHUNK_ALIGNMENT, Group, chunk_ranges, needs_parity

CHUNK_BYTES: Final = 3 << 20
"""Each chunk that is under way takes as much memory beside the arena, and the caches of the node's processor hold those
of all connections. What a chunk costs beside its bytes (questions, wake-ups) is some 0.3 ms: with 2 MiB a twelfth more
of processor time for the whole."""


class Extent(msgspec.Struct, frozen=True):
    """A piece in an image, as `coded_ranges` looks at it."""

    start: int
    """Bytes from the start of the image."""
    stop: int
    nodes: tuple[int, ...] = ()
    """Node ranks whose images hold these bytes too, this node among them; empty where only this image does."""


class CodedImage(msgspec.Struct, frozen=True, kw_only=True):
    """One image of a stream."""

    global_rank: int
    size_bytes: int
    """Of the whole image."""
    header_digest: bytes = b""
    """`holdfast.checkpoint.image.header_digest`, where the shell has it."""
    ranges: tuple[tuple[int, int], ...]
    """What is coded: ``(start, stop)`` in bytes from the start of the image; ascending, disjoint."""
    copies: tuple[tuple[int, ...], ...] = ()
    """Of what is not coded: each set of node ranks that hold some piece of it."""

    @property
    def coded_bytes(self) -> int:
        """Bytes of the stream that are this image's."""
        return sum(stop - start for start, stop in self.ranges)


class Segment(msgspec.Struct, frozen=True):
    """Consecutive bytes of a stream, as they lie in an image."""

    global_rank: int
    offset: int
    """Bytes from the start of the image."""
    length: int


class Stream(msgspec.Struct, frozen=True):
    """The coded bytes of one node. The same on whoever computes it from the same images."""

    node_rank: int
    """In the generation of the version."""
    images: tuple[CodedImage, ...]
    """Ascending by global rank."""

    @property
    def size_bytes(self) -> int:
        """Length of the stream."""
        return sum(image.coded_bytes for image in self.images)

    def segments(self, start: int, stop: int) -> list[Segment]:
        """Where bytes ``start..stop`` of the stream lie; they must be within it."""
        found: list[Segment] = []
        at = 0
        for image in self.images:
            for first, last in image.ranges:
                begin, end = max(start, at), min(stop, at + last - first)
                if begin < end:
                    found.append(Segment(image.global_rank, first + begin - at, end - begin))
                at += last - first
        assert sum(segment.length for segment in found) == max(0, stop - start), (start, stop, at)
        return found

    def find(self, global_rank: int, offset: int, length: int) -> list[tuple[int, int, int]]:
        """Where bytes of an image lie in the stream.

        Returns:
            (offset in the image, offset in the stream, length), ascending; less what is not coded.
        """
        found: list[tuple[int, int, int]] = []
        at = 0
        for image in self.images:
            for first, last in image.ranges:
                begin, end = max(offset, first), min(offset + length, last)
                if image.global_rank == global_rank and begin < end:
                    found.append((begin, at + begin - first, end - begin))
                at += last - first
        return found


class Parity(msgspec.Struct, frozen=True):
    """One parity in a node's buffer."""

    stripe: int
    number: int
    """0..m-1: it is shard k + number of the stripe."""
    offset: int
    """Bytes from the start of the buffer."""
    size_bytes: int


class Chunk(msgspec.Struct, frozen=True, order=True):
    """What travels at a time: chunk `index` of shard `shard` of stripe `stripe`."""

    stripe: int
    index: int
    shard: int


class CodedVersion(msgspec.Struct, frozen=True, kw_only=True):
    """A version as one group has coded it. Kept with the parity on every member; equal on all of them."""

    version: Version
    world_size: int
    group: Group
    """Node ranks in the generation of the version."""
    streams: tuple[Stream, ...]
    """Parallel to ``group.members``."""
    chunk_bytes: int = CHUNK_BYTES

    def stream_of(self, node_rank: int) -> Stream:
        """The stream of a member."""
        return self.streams[self.group.members.index(node_rank)]

    def owner_of(self, global_rank: int) -> int | None:
        """The member that held the image of a rank, None where no member did."""
        for stream in self.streams:
            if any(image.global_rank == global_rank for image in stream.images):
                return stream.node_rank
        return None

    def shard_range(self, stripe: int, shard: int) -> range:
        """Data shard `shard` of a stripe, as a range of the stream of `shard_node`."""
        stream = self.stream_of(self.shard_node(stripe, shard))
        return chunk_ranges(stream.size_bytes, self.group.num_data)[shard]

    def shard_node(self, stripe: int, shard: int) -> int:
        """Which member holds a shard: data 0..k-1, parity k..k+m-1."""
        return self.group.members[(stripe + shard) % len(self.group.members)]

    def parity_bytes(self, stripe: int) -> int:
        """Length of the parities of a stripe."""
        return max(len(self.shard_range(stripe, shard)) for shard in range(self.group.num_data))

    def parities(self, node_rank: int) -> tuple[Parity, ...]:
        """What the buffer of a member holds, by stripe; each begins on a multiple of 64 bytes."""
        found: list[Parity] = []
        offset = 0
        for stripe in self.group.stripes():
            if node_rank in stripe.parity:
                size = self.parity_bytes(stripe.index)
                found.append(Parity(stripe.index, stripe.parity.index(node_rank), offset, size))
                offset += size + -size % CHUNK_ALIGNMENT
        return tuple(found)

    def buffer_bytes(self, node_rank: int) -> int:
        """Length of the buffer of a member."""
        return max((parity.offset + parity.size_bytes for parity in self.parities(node_rank)), default=0)

    def chunks(self, stripe: int, shard: int) -> int:
        """How many chunks a data shard has."""
        return -(-len(self.shard_range(stripe, shard)) // self.chunk_bytes)

    def chunk_range(self, chunk: Chunk) -> range:
        """A chunk as a range of its shard; where it goes in the parity, too."""
        start = chunk.index * self.chunk_bytes
        return range(start, min(start + self.chunk_bytes, len(self.shard_range(chunk.stripe, chunk.shard))))

    def find(self, global_rank: int, offset: int, length: int) -> list[Place]:
        """Where bytes of an image lie in shards; less what is not coded."""
        owner = self.owner_of(global_rank)
        if owner is None:
            return []
        stream = self.stream_of(owner)
        cuts = chunk_ranges(stream.size_bytes, self.group.num_data)
        found: list[Place] = []
        for at, start, size in stream.find(global_rank, offset, length):
            for shard, cut in enumerate(cuts):
                begin, end = max(start, cut.start), min(start + size, cut.stop)
                if begin < end:
                    stripe = self.group.stripe_of(owner, shard)
                    found.append(Place(at + begin - start, stripe, shard, begin - cut.start, end - begin))
        return found


class Place(msgspec.Struct, frozen=True):
    """Consecutive bytes of an image, as they lie in a shard."""

    offset: int
    """Bytes from the start of the image."""
    stripe: int
    shard: int
    shard_offset: int
    length: int


class HeldParity(msgspec.Struct, frozen=True, kw_only=True):
    """A whole parity buffer that a node holds, as it stands in its inventory."""

    coded: CodedVersion
    holder: int
    """Node rank of the holder in the generation of the version."""


def coded_ranges(
    pieces: Iterable[Extent],
    *,
    data_start: int,
    objects_offset: int,
    size_bytes: int,
    block_bytes: int,
    num_parity: int,
    domains: Mapping[int, str],
) -> tuple[tuple[tuple[int, int], ...], tuple[tuple[int, ...], ...]]:
    """What of an image is coded: its header, its objects, and each piece that fewer than m + 1 failure domains hold.
    Rounded out to blocks of verification: what is decoded can be checked without what is not.

    Args:
        pieces: of the image.
        data_start: length of the header.
        objects_offset: start of the objects.
        size_bytes: of the image.
        block_bytes: unit of verification, counted from `data_start`.
        num_parity: m.
        domains: node rank -> failure domain.

    Returns:
        `CodedImage.ranges` and `CodedImage.copies`.
    """
    wanted = [(0, data_start), (objects_offset, size_bytes)]
    left: set[tuple[int, ...]] = set()
    for piece in pieces:
        held = {domains[node] for node in piece.nodes if node in domains}
        if piece.start < piece.stop:
            if needs_parity(len(held), num_parity):
                wanted.append((piece.start, piece.stop))
            else:
                left.add(piece.nodes)
    rounded = [_round_out(start, stop, data_start, size_bytes, block_bytes) for start, stop in wanted if start < stop]
    return tuple(_merge(rounded)), tuple(sorted(left))


def _round_out(start: int, stop: int, data_start: int, size_bytes: int, block_bytes: int) -> tuple[int, int]:
    if start < data_start:
        return start, stop
    first = data_start + (start - data_start) // block_bytes * block_bytes
    last = data_start + -(-(stop - data_start) // block_bytes) * block_bytes
    return first, min(last, size_bytes)


def _merge(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return merged


def sources_of(coded: CodedVersion, node_rank: int) -> frozenset[int]:
    """The members from which the parities of `node_rank` take shards."""
    stripes = {parity.stripe for parity in coded.parities(node_rank)}
    k = coded.group.num_data
    return frozenset(coded.shard_node(stripe, shard) for stripe in stripes for shard in range(k)) - {node_rank}


def wire_bytes(coded: CodedVersion) -> dict[int, int]:
    """Bytes that each member receives for its parities; over the group m times the coded state."""
    return {
        node: sum(
            len(coded.shard_range(parity.stripe, shard))
            for parity in coded.parities(node)
            for shard in range(coded.group.num_data)
        )
        for node in coded.group.members
    }


# --- what is left of a version, for whoever reads it ----------------------------------------------------------------


class ShardAt(msgspec.Struct, frozen=True):
    """A shard that can be read."""

    shard: int
    """0..k+m-1."""
    node_rank: int
    """Who serves it, in today's generation; -1: nobody has to, it is empty (zeros)."""


class StripeSources(msgspec.Struct, frozen=True):
    """What is left of a stripe."""

    stripe: int
    shards: tuple[ShardAt, ...]
    """At least k, ascending."""


class Rebuild(msgspec.Struct, frozen=True, kw_only=True):
    """A lost image and what it is decoded from."""

    global_rank: int
    """In the generation of the version."""
    coded: CodedVersion
    stripes: tuple[StripeSources, ...]
    """Those that hold shards of the lost stream."""

    @property
    def image(self) -> CodedImage:
        """Its sizes and ranges."""
        owner = self.coded.owner_of(self.global_rank)
        assert owner is not None
        return next(one for one in self.coded.stream_of(owner).images if one.global_rank == self.global_rank)


class SourceRead(msgspec.Struct, frozen=True):
    """One shard of a `DegradedRead`."""

    shard: int
    node_rank: int
    """-1: nothing to read."""
    length: int
    """Bytes from the `DegradedRead.shard_offset` on that the shard has; it counts as followed by zeros."""


class DegradedRead(msgspec.Struct, frozen=True, kw_only=True):
    """Decode one range of one shard, by ``ReedSolomon.decode({shard: bytes read}, {shard: output})``."""

    offset: int
    """Bytes from the start of the lost image."""
    length: int
    stripe: int
    shard: int
    """The lost one."""
    shard_offset: int
    sources: tuple[SourceRead, ...]
    """k of them. A data shard's bytes are ``shard_range(stripe, shard)`` of its member's stream; those of a parity lie
    in the buffer at `Parity.offset`."""


def degraded_reads(
    rebuild: Rebuild, offset: int, length: int, *, failed: Collection[tuple[int, int]] = ()
) -> list[DegradedRead] | None:
    """How bytes of a lost image are decoded.

    Args:
        rebuild: of the image.
        offset: bytes from its start.
        length: bytes.
        failed: (stripe, shard) that could not be read or gave wrong bytes: others are taken.

    Returns:
        Ascending by offset, less what is not coded (other images hold it); None where fewer than k shards are left.
    """
    coded, k = rebuild.coded, rebuild.coded.group.num_data
    left = {one.stripe: [at for at in one.shards if (one.stripe, at.shard) not in failed] for one in rebuild.stripes}
    reads: list[DegradedRead] = []
    for place in coded.find(rebuild.global_rank, offset, length):
        shards = [at for at in left.get(place.stripe, ()) if at.shard != place.shard][:k]
        if len(shards) < k:
            return None
        sources = tuple(
            SourceRead(at.shard, at.node_rank, _left(coded, place.stripe, at.shard, place)) for at in shards
        )
        reads.append(
            DegradedRead(
                offset=place.offset,
                length=place.length,
                stripe=place.stripe,
                shard=place.shard,
                shard_offset=place.shard_offset,
                sources=sources,
            )
        )
    return reads


def _left(coded: CodedVersion, stripe: int, shard: int, place: Place) -> int:
    if shard < coded.group.num_data:
        size = len(coded.shard_range(stripe, shard))
    else:
        size = coded.parity_bytes(stripe)
    return max(0, min(place.length, size - place.shard_offset))
