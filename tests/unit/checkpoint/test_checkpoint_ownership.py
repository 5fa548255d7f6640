from __future__ import annotations

from collections import defaultdict

import numpy as np
from checkpoint_images import slices
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.checkpoint.boxes import Box, flat_range_boxes, whole
from holdfast.checkpoint.ownership import MIN_CHUNK_BYTES, Shard, own
from holdfast.checkpoint.pieces import Piece


@st.composite
def jobs(draw: st.DrawFn) -> tuple[int, dict[int, int], dict[int, list[Shard]], dict[str, tuple[int, ...]]]:
    """A world, its nodes, what each rank holds, and the shapes: flat shards replicated over groups of ranks."""
    world = draw(st.integers(1, 8))
    nodes = {rank: draw(st.integers(0, 2)) for rank in range(world)}
    held: dict[int, list[Shard]] = {rank: [] for rank in range(world)}
    shapes: dict[str, tuple[int, ...]] = {}
    for i in range(draw(st.integers(1, 6))):
        shape = tuple(draw(st.lists(st.integers(0, 6), max_size=3)))
        # Now and then a large one, which is cut.
        if draw(st.integers(0, 3)) == 0:
            shape = (draw(st.integers(1, 3)), draw(st.integers(1, 3)), 400_000)
        shapes[f"t{i}"] = shape
        size = int(np.prod(shape))
        group_of = {rank: draw(st.integers(0, 2)) for rank in range(world)}
        groups = sorted(set(group_of.values()))
        cuts = [size * k // len(groups) for k in range(len(groups) + 1)]
        for k, group in enumerate(groups):
            holders = tuple(rank for rank in range(world) if group_of[rank] == group)
            boxes = flat_range_boxes(shape, cuts[k], cuts[k + 1])
            for rank in holders:
                held[rank].append(Shard(f"t{i}", "float32", shape, boxes, holders))
    return world, nodes, held, shapes


def counted(pieces: list[Piece], shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    counts = {name: np.zeros(shape, np.int8) for name, shape in shapes.items()}
    for piece in pieces:
        counts[piece.name][slices(piece.box)] += 1
    return counts


@settings(max_examples=60, deadline=None)
@given(jobs(), st.randoms())
def test_each_byte_has_one_owner_per_node_that_holds_it_and_one_in_the_job(
    job: tuple[int, dict[int, int], dict[int, list[Shard]], dict[str, tuple[int, ...]]], random: object
) -> None:
    world, nodes, held, shapes = job
    owned: dict[int, tuple[Piece, ...]] = {}
    for rank in range(world):
        shards = list(held[rank])
        random.shuffle(shards)  # type: ignore[attr-defined]
        owned[rank] = own(shards, global_rank=rank, node_of=nodes)
        assert owned[rank] == own(held[rank], global_rank=rank, node_of=nodes.__getitem__)
        for piece in owned[rank]:
            assert any((s.name == piece.name and (any(b.contains(piece.box) for b in s.boxes))) or 0 in piece.shape
                       for s in held[rank])  # fmt: skip
    in_job = counted([p for pieces in owned.values() for p in pieces if p.job], shapes)
    assert all((count == 1).all() for count in in_job.values())
    for node in set(nodes.values()):
        ranks = [rank for rank in range(world) if nodes[rank] == node]
        in_node = counted([p for rank in ranks for p in owned[rank]], shapes)
        held_here = counted(
            [Piece(s.name, s.dtype, s.shape, b) for rank in ranks for s in held[rank] for b in s.boxes], shapes
        )
        assert all(((in_node[name] == 1) == (held_here[name] > 0)).all() for name in shapes)
        assert all((in_node[name] <= 1).all() for name in shapes)
    for name, shape in shapes.items():
        if 0 in shape:
            assert any(p.name == name and p.job for pieces in owned.values() for p in pieces)


def _loads(world: int, nodes: dict[int, int], shards: list[Shard]) -> tuple[dict[int, int], dict[int, int]]:
    node_load: dict[int, int] = defaultdict(int)
    job_load: dict[int, int] = defaultdict(int)
    for rank in range(world):
        for piece in own(shards, global_rank=rank, node_of=nodes):
            node_load[rank] += piece.size_bytes
            job_load[rank] += piece.size_bytes if piece.job else 0
    return node_load, job_load


def test_work_is_balanced_over_the_holders_of_each_node_and_of_the_job() -> None:
    world = 8
    nodes = {rank: rank // 4 for rank in range(world)}
    sizes = [(50257, 768), *[(768, 768 * 4), (768,), (768, 768 * 3), (3072, 768)] * 12]
    shards = [Shard(f"w{i}", "float32", s, (whole(s),), tuple(range(world))) for i, s in enumerate(sizes)]
    total = sum(4 * int(np.prod(s)) for s in sizes)
    node_load, job_load = _loads(world, nodes, shards)
    assert sum(job_load.values()) == total
    assert max(node_load.values()) < 1.05 * total / 4
    assert max(job_load.values()) < 1.10 * total / 8


def test_nodes_of_different_sizes_share_the_job_by_rank() -> None:
    nodes = {0: 0, 1: 0, 2: 0, 3: 1}
    shards = [
        Shard(f"w{i}", "uint8", (MIN_CHUNK_BYTES,), (whole((MIN_CHUNK_BYTES,)),), (0, 1, 2, 3)) for i in range(40)
    ]
    node_load, job_load = _loads(4, nodes, shards)
    assert node_load[3] == 40 * MIN_CHUNK_BYTES
    assert sum(job_load.values()) == 40 * MIN_CHUNK_BYTES
    assert max(job_load.values()) <= 14 * MIN_CHUNK_BYTES


def test_many_small_groups_do_not_all_load_the_lowest_rank() -> None:
    taken: dict[int, int] = defaultdict(int)
    for i in range(200):
        shard = Shard(f"w{i}", "float32", (4,), (whole((4,)),), (0, 1))
        for rank in (0, 1):
            taken[rank] += len(own([shard], global_rank=rank, node_of={0: 0, 1: 0}))
    assert 60 < taken[0] < 140


def test_per_rank_state_is_copied_by_its_rank() -> None:
    shard = Shard("bn.mean", "float32", (4,), (whole((4,)),), (0, 1), rank=1)
    assert own([shard], global_rank=1, node_of={0: 0, 1: 0}) == (
        Piece("bn.mean", "float32", (4,), Box((0,), (4,)), 1, True),
    )
