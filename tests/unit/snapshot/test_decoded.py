"""Lost images are read by range from any k shards; a shard that fails is passed over."""

from __future__ import annotations

import random
from collections.abc import Iterator
from datetime import timedelta

import pytest
import zmq

from holdfast.checkpoint.version import GenerationId
from holdfast.erasure import ReedSolomon
from holdfast.erasure.groups import Group
from holdfast.errors import CorruptError, HoldfastError, PeerError
from holdfast.snapshot.bulk import BulkServer, ParityRange, Range, StreamRange
from holdfast.snapshot.coding import CodedImage, CodedVersion, Rebuild, ShardAt, Stream, StripeSources
from holdfast.snapshot.decoded import DecodedSource
from holdfast.snapshot.keys import JobKeys

VERSION = GenerationId(incarnation=1, nonce="7f3a9c02", generation=4).at(7)
GROUP = Group((0, 1, 2, 3), 2, 2)
SIZES = (3 << 20, 700_001, (3 << 20) + 17, 0)
"""Of the streams: unequal, odd, empty."""
LOST = 2


class Nodes:
    """Four nodes with one image each, of which a hole is not coded, and the parities of all stripes."""

    def __init__(self) -> None:
        self.context, self.keys = zmq.Context(), JobKeys()
        self.streams = [random.Random(node).randbytes(size) for node, size in enumerate(SIZES)]
        self.coded = CodedVersion(
            version=VERSION,
            world_size=4,
            group=GROUP,
            streams=tuple(
                Stream(node, (CodedImage(global_rank=node, size_bytes=size + 1000, ranges=self._ranges(size)),))
                for node, size in enumerate(SIZES)
            ),
        )
        self.broken: dict[int, HoldfastError] = {}
        self.servers = {node: self._serve(node) for node in GROUP.members if node != LOST}

    @staticmethod
    def _ranges(size: int) -> tuple[tuple[int, int], ...]:
        half = size // 2
        return ((0, half), (half + 1000, size + 1000)) if size else ()

    def image(self, node: int) -> bytes:
        half = SIZES[node] // 2
        return self.streams[node][:half] + bytes(1000) + self.streams[node][half:]

    def parity(self, stripe: int, number: int) -> bytes:
        data = [self.shard(stripe, shard) for shard in range(2)]
        parities = [bytearray(self.coded.parity_bytes(stripe)) for _ in range(2)]
        ReedSolomon(2, 2).encode(data, parities)
        return bytes(parities[number])

    def shard(self, stripe: int, shard: int) -> bytes:
        cut = self.coded.shard_range(stripe, shard)
        return self.streams[self.coded.shard_node(stripe, shard)][cut.start : cut.stop]

    def _serve(self, node: int) -> BulkServer:
        held = {(one.stripe, one.number): self.parity(one.stripe, one.number) for one in self.coded.parities(node)}

        def read(range_: Range) -> bytes:
            if node in self.broken:
                raise self.broken[node]
            assert isinstance(range_, StreamRange | ParityRange)
            if isinstance(range_, StreamRange):
                assert range_.node_rank == node
                data = self.streams[node]
            else:
                data = held[range_.stripe, range_.number]
            assert range_.offset + range_.length <= len(data)
            return data[range_.offset : range_.offset + range_.length]

        server = BulkServer(self.context, "127.0.0.1", "", keys=self.keys, read=read)
        server.start()
        return server

    def source(self) -> DecodedSource:
        stripes = sorted({GROUP.stripe_of(LOST, shard) for shard in range(2)})
        shards = [
            tuple(ShardAt(shard, node) for shard in range(4) if (node := self.coded.shard_node(stripe, shard)) != LOST)
            for stripe in stripes
        ]
        sources = tuple(StripeSources(stripe, left) for stripe, left in zip(stripes, shards, strict=True))
        rebuild = Rebuild(global_rank=LOST, coded=self.coded, stripes=sources)
        endpoints = {node: server.endpoint for node, server in self.servers.items()}
        return DecodedSource(self.context, rebuild, endpoints, keys=self.keys, timeout=timedelta(seconds=120))


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    made = Nodes()
    yield made
    for server in made.servers.values():
        server.close()
    made.context.term()


def test_any_coded_range_is_decoded_and_no_other(nodes: Nodes) -> None:
    source, image, half = nodes.source(), nodes.image(LOST), SIZES[LOST] // 2
    generator = random.Random(1)
    for _ in range(12):
        start = generator.randrange(half)
        length = generator.randrange(1, half - start + 1)
        for at in (start, start + half + 1000):
            assert source.read(at, length) == image[at : at + length]
    for at in (half - 1, half, half + 999):
        with pytest.raises(PeerError, match="not coded"):
            source.read(at, 2)
    assert source.read(5, 0) == b""
    assert not source.failed
    source.close()


@pytest.mark.parametrize("node", [0, 1, 3])
def test_a_shard_that_fails_is_passed_over_and_named(nodes: Nodes, node: int) -> None:
    source = nodes.source()
    nodes.broken[node] = CorruptError("a flipped bit")
    assert source.read(0, SIZES[LOST] // 2) == nodes.image(LOST)[: SIZES[LOST] // 2]
    assert all(nodes.coded.shard_node(stripe, shard) == node for stripe, shard in source.failed)
    nodes.broken |= {other: PeerError("gone") for other in (0, 1, 3)}
    with pytest.raises(HoldfastError, match="fewer than 2 shards"):
        source.read(0, SIZES[LOST] // 2)
    source.close()
