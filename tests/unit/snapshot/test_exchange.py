"""The exchange and the records of coded versions, step by step."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from holdfast.checkpoint.version import GenerationId
from holdfast.erasure import ReedSolomon
from holdfast.erasure.groups import form_groups
from holdfast.erasure.redundancy import Redundancy
from holdfast.snapshot import exchange_events as events
from holdfast.snapshot.coding import (
    Chunk,
    CodedImage,
    CodedVersion,
    Extent,
    HeldParity,
    Stream,
    coded_ranges,
    degraded_reads,
    sources_of,
    wire_bytes,
)
from holdfast.snapshot.exchange import Exchange
from holdfast.snapshot.messages import Inventory
from holdfast.snapshot.records import CleanImage
from holdfast.snapshot.recovery import Irretrievable, Restoration, restoration

GENERATION = GenerationId(incarnation=1, nonce="0badcafe", generation=3)
VERSION = GENERATION.at(7)


def record(redundancy: str, sizes: list[int], chunk_bytes: int = 64) -> CodedVersion:
    """A version of nodes with one image each, as their one group has coded it."""
    grouping = form_groups({node: f"host{node}" for node in range(len(sizes))}, Redundancy.parse(redundancy))
    (group,) = grouping.groups
    streams = tuple(stream(node, sizes[node]) for node in group.members)
    return CodedVersion(version=VERSION, world_size=len(sizes), group=group, streams=streams, chunk_bytes=chunk_bytes)


def stream(node: int, size: int) -> Stream:
    ranges = ((0, size),) if size else ()
    return Stream(node, (CodedImage(global_rank=node, size_bytes=size, ranges=ranges),))


def inventory(coded: CodedVersion, then: int, today: int) -> Inventory:
    """What the node that had rank `then` says, now that it has rank `today`."""
    images = [
        CleanImage(
            version=VERSION, global_rank=one.global_rank, world_size=coded.world_size, path="", offset=0, size_bytes=1
        )
        for one in coded.stream_of(then).images
    ]
    return Inventory(
        generation=GENERATION,
        node_rank=today,
        clean=tuple(images),
        parents=(),
        history=None,
        newest_step=7,
        parity=(HeldParity(coded=coded, holder=then),),
    )


@pytest.mark.parametrize("redundancy", ["mirror", "2+1", "3+1", "2+2", "4+2", "1+2"])
def test_each_byte_of_the_coded_state_travels_once_per_parity(redundancy):
    num_nodes = sum(map(int, redundancy.split("+"))) if "+" in redundancy else 2
    coded = record(redundancy, [1000 + 17 * node for node in range(num_nodes)])
    state = sum(one.size_bytes for one in coded.streams)
    assert sum(wire_bytes(coded).values()) == coded.group.num_parity * state
    for node in coded.group.members:
        assert node not in sources_of(coded, node)
        assert len(coded.parities(node)) == coded.group.num_parity


def test_the_buffer_reaches_to_the_end_of_the_longest_parity_behind_empty_ones():
    coded = record("1+2", [63, 0, 200])
    parities = coded.parities(0)
    assert [parity.size_bytes for parity in parities] == [0, 200]
    assert coded.buffer_bytes(0) == 200


def test_headers_objects_and_rare_pieces_are_coded_in_whole_blocks():
    pieces = [Extent(4096, 5000, (0, 1)), Extent(5000, 9000), Extent(9000, 20000, (0, 1, 2))]
    ranges, copies = coded_ranges(
        pieces,
        data_start=4096,
        objects_offset=20000,
        size_bytes=20100,
        block_bytes=1000,
        num_parity=1,
        domains={0: "a", 1: "b", 2: "b"},
    )
    assert ranges == ((0, 9096), (19096, 20100))
    assert copies == ((0, 1), (0, 1, 2))


def test_copies_in_one_domain_are_one_copy():
    ranges, copies = coded_ranges(
        [Extent(4096, 5096, (0, 1))],
        data_start=4096,
        objects_offset=5096,
        size_bytes=5096,
        block_bytes=1000,
        num_parity=1,
        domains={0: "rack", 1: "rack"},
    )
    assert ranges == ((0, 5096),)
    assert copies == ()


def start(exchange: Exchange, coded: CodedVersion, node: int, finished: tuple[events.Finished, ...] = ()) -> None:
    exchange.handle(
        events.ExchangeStarted(
            generation=GENERATION, node_rank=node, group=coded.group, world_size=coded.world_size, finished=finished
        )
    )


def filling(coded: CodedVersion, node: int) -> tuple[Exchange, list[events.Fetch]]:
    """An exchange that has sent its first requests."""
    exchange = Exchange(chunk_bytes=coded.chunk_bytes, window=4)
    start(exchange, coded, node)
    exchange.handle(events.ProtectWanted(version=VERSION, stream=coded.stream_of(node)))
    out = []
    for one in coded.streams:
        if one.node_rank != node:
            out = exchange.handle(events.StreamReceived(version=VERSION, stream=one))
    assert [type(one) for one in out] == [events.ReserveParity]
    return exchange, exchange.handle(events.ParityReserved(version=VERSION))


def test_a_chunk_of_another_version_or_that_nobody_asked_for_is_dropped():
    coded = record("2+1", [500, 500, 500])
    exchange, fetches = filling(coded, 0)
    wrong = GENERATION.at(8)
    assert exchange.handle(events.ChunkArrived(version=wrong, chunk=fetches[0].chunk)) == []
    assert exchange.handle(events.ChunkArrived(version=VERSION, chunk=Chunk(0, 99, 0))) == []
    assert exchange.handle(events.ChunkArrived(version=VERSION, chunk=Chunk(77, 0, 0))) == []
    assert exchange.counters.absorbed == 0
    exchange.handle(events.ChunkArrived(version=VERSION, chunk=fetches[0].chunk))
    assert exchange.handle(events.ChunkArrived(version=VERSION, chunk=fetches[0].chunk)) == []
    assert (exchange.counters.absorbed, exchange.counters.dropped) == (1, 4)


def test_a_new_generation_drops_what_is_unfinished_and_asks_nobody_by_the_old_ranks():
    coded = record("2+1", [500, 500, 500])
    exchange, fetches = filling(coded, 0)
    assert exchange.handle(events.ExchangeFenced()) == [events.DropParity(buffer=0, version=VERSION)]
    assert exchange.handle(events.ChunkArrived(version=VERSION, chunk=fetches[0].chunk)) == []
    assert exchange.handle(events.SourceReset(node_rank=fetches[0].node_rank)) == []
    assert exchange.handle(events.ProtectWanted(version=VERSION, stream=coded.stream_of(0))) == []


def restarted(coded: CodedVersion) -> Exchange:
    """An exchange whose daemon had finished the parity of `coded` before it was killed."""
    exchange = Exchange(chunk_bytes=coded.chunk_bytes)
    start(exchange, coded, 0, (events.Finished(buffer=0, coded=coded),))
    return exchange


def test_parity_that_was_whole_before_a_restart_outlives_orders_that_do_not_name_it_yet():
    # The leader has heard that it is whole, and may declare the version protected while older orders are under way.
    coded = record("2+1", [500, 500, 500])
    exchange = restarted(coded)
    assert exchange.handle(events.KeepParity(version=None)) == []
    out = exchange.handle(events.ProtectWanted(version=VERSION, stream=coded.stream_of(0)))
    assert out[-1] == events.DeclareDone(version=VERSION)
    assert exchange.handle(events.KeepParity(version=VERSION)) == []


def test_parity_that_was_whole_before_a_restart_goes_when_a_newer_version_is_being_protected():
    coded = record("2+1", [500, 500, 500])
    exchange = restarted(coded)
    exchange.handle(events.KeepParity(version=None))
    out = exchange.handle(events.ProtectWanted(version=GENERATION.at(8), stream=coded.stream_of(0)))
    assert out[0] == events.DropParity(buffer=0, version=VERSION)


def test_parity_of_an_older_generation_goes_when_nothing_of_it_is_protected():
    old = msgspec.structs.replace(GENERATION, generation=2).at(5)
    exchange = restarted(msgspec.structs.replace(record("2+1", [500, 500, 500]), version=old))
    assert exchange.handle(events.KeepParity(version=None)) == [events.DropParity(buffer=0, version=old)]


def test_what_did_not_come_is_asked_for_again():
    coded = record("2+1", [500, 500, 500])
    exchange, fetches = filling(coded, 0)
    node = fetches[0].node_rank
    asked = [one for one in fetches if one.node_rank == node]
    assert exchange.handle(events.SourceReset(node_rank=node)) == asked
    exchange.handle(events.ChunkRefused(version=VERSION, chunk=asked[0].chunk))
    assert asked[0] in exchange.handle(events.Nudged())


def test_a_version_that_can_never_be_coded_leaves_the_buffer():
    exchange, _ = filling(record("2+1", [500, 500, 500]), 0)
    assert exchange.handle(events.VersionFailed(version=VERSION)) == [events.DropParity(buffer=0, version=VERSION)]
    assert exchange.running is None


def test_a_node_without_an_image_holds_parity_for_the_others():
    coded = record("2+1", [300, 0, 300])
    _, fetches = filling(coded, 1)
    assert {one.node_rank for one in fetches} == {0, 2}


@pytest.mark.parametrize("lost", [(0,), (2,), (1, 3)])
def test_lost_images_are_decoded_by_the_record_of_the_version_not_by_todays_ranks(lost):
    coded = record("2+2", [1000, 700, 0, 333])
    data = {
        node: np.random.default_rng(node).integers(0, 256, one.size_bytes, np.uint8)
        for node, one in enumerate(coded.streams)
    }
    code = ReedSolomon(2, 2)
    parity: dict[tuple[int, int], np.ndarray] = {}
    for stripe in coded.group.stripes():
        blocks = [
            data[node][coded.shard_range(stripe.index, j).start : coded.shard_range(stripe.index, j).stop]
            for j, node in enumerate(stripe.data)
        ]
        rows = [np.zeros(coded.parity_bytes(stripe.index), np.uint8) for _ in range(2)]
        code.encode(blocks, rows)
        parity |= {(stripe.index, 2 + number): row for number, row in enumerate(rows)}
    survivors = [node for node in range(4) if node not in lost]
    today = {node: 10 + number for number, node in enumerate(reversed(survivors))}
    answer = restoration(VERSION, range(4), [inventory(coded, node, today[node]) for node in survivors])
    assert isinstance(answer, Restoration)
    assert answer.spare == 2 - len(lost)
    assert {one.global_rank for one in answer.rebuilds} == set(lost)
    then = {rank: node for node, rank in today.items()}
    for rebuild in answer.rebuilds:
        size = rebuild.image.size_bytes
        out = np.zeros(size, np.uint8)
        for read in degraded_reads(rebuild, 0, size) or ():
            shards = {}
            for one in read.sources:
                if one.node_rank < 0:
                    block = np.zeros(0, np.uint8)
                elif one.shard < 2:
                    cut = coded.shard_range(read.stripe, one.shard)
                    block = data[then[one.node_rank]][cut.start : cut.stop]
                else:
                    assert coded.shard_node(read.stripe, one.shard) == then[one.node_rank]
                    block = parity[read.stripe, one.shard]
                shards[one.shard] = block[read.shard_offset : read.shard_offset + one.length]
            code.decode(shards, {read.shard: out[read.offset : read.offset + read.length]})
        assert bytes(out) == bytes(data[rebuild.global_rank])


def test_too_many_losses_are_refused_with_the_group_and_the_nodes():
    coded = record("2+1", [300, 300, 300])
    answer = restoration(VERSION, range(3), [inventory(coded, 1, 0)])
    assert isinstance(answer, Irretrievable)
    assert answer.missing == 2
    assert "of its group [0, 1, 2] too many nodes" in answer.reason


def test_pieces_that_only_lost_nodes_held_make_a_version_irretrievable():
    coded = record("2+1", [300, 300, 300])
    streams = tuple(
        Stream(one.node_rank, tuple(msgspec.structs.replace(image, copies=((0, 9),)) for image in one.images))
        for one in coded.streams
    )
    coded = msgspec.structs.replace(coded, streams=streams)
    answer = restoration(VERSION, range(3), [inventory(coded, 1, 1), inventory(coded, 2, 2)])
    assert isinstance(answer, Irretrievable)
    assert "held by nodes 0, 9 only" in answer.reason


def test_an_image_that_failed_its_checks_is_decoded_like_a_lost_one():
    coded = record("2+1", [300, 300, 300])
    everything = [inventory(coded, node, node) for node in range(3)]
    answer = restoration(VERSION, range(3), everything, bad_images=[1])
    assert isinstance(answer, Restoration)
    assert [one.global_rank for one in answer.rebuilds] == [1]


def test_a_degraded_read_takes_other_shards_where_some_failed():
    coded = record("2+2", [400, 400, 400, 400])
    answer = restoration(VERSION, range(4), [inventory(coded, node, node) for node in (1, 2, 3)])
    assert isinstance(answer, Restoration)
    (rebuild,) = answer.rebuilds
    (first,) = degraded_reads(rebuild, 10, 50) or ()
    bad = (first.stripe, first.sources[0].shard)
    (second,) = degraded_reads(rebuild, 10, 50, failed=[bad]) or ()
    assert bad[1] not in [one.shard for one in second.sources]
    every = [(first.stripe, shard) for shard in range(4)]
    assert degraded_reads(rebuild, 10, 50, failed=every) is None
