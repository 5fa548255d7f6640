"""Planning and index for very large jobs, without the jobs: ``python benchmarks/planning.py``.

Ranks are simulated: what each would hold is worked out, and the very functions that a save and a load call plan it.

* 400B: 126 layers of width 16384 under tensor (8) x pipeline (16) x data parallelism, with Adam, at 1k, 4k, 10k ranks.
* FSDP2: 80 layers of width 8192 with Adam at 512 and 4k ranks: each tensor in a row shard per rank.

First plan: what a rank does at its first save (ownership, image layout). Cached: finding that again at every later one,
by names, shapes, dtypes and placements of its tensors, here DTensors without memory.
What ranks have written goes up a tree of 16 to one and is put together on the way: *inner* is the longest that a rank
below the root takes for that, *root* what rank 0 takes to put the last together, find all tilings and encode the index.
Load: reading that index, finding the pieces that one rank wants. Peak: of this process, which plays all ranks.
"""

from __future__ import annotations

import gc
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache

import torch
import torch.distributed as dist
from measure import Bar, Estimate, as_json, estimate, exit_code, keep, lines_of, options_of, table
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as Cut
from torch.testing._internal.distributed.fake_pg import FakeStore

from holdfast.checkpoint.boxes import Box, whole
from holdfast.checkpoint.catalog import Saved
from holdfast.checkpoint.held import hold_again, signature
from holdfast.checkpoint.image import pack_pieces
from holdfast.checkpoint.index import (
    ImageRecord,
    build_index,
    decode_index,
    encode_index,
    image_file_name,
    saved_tensors,
)
from holdfast.checkpoint.layout import layout_of
from holdfast.checkpoint.meeting import FANOUT, Ranks
from holdfast.checkpoint.ownership import Shard, own, own_of_all
from holdfast.checkpoint.pieces import Piece
from holdfast.checkpoint.saving import _Plans
from holdfast.checkpoint.share import Share, join_shares
from holdfast.checkpoint.tensors import torch_dtype
from holdfast.checkpoint.version import GenerationId

GENERATION = GenerationId(incarnation=1, nonce="0badcafe", generation=1)
STATES = (
    ("model.", "", "bfloat16"),
    ("optimizer.state.", ".exp_avg", "float32"),
    ("optimizer.state.", ".exp_avg_sq", "float32"),
)
GPUS_PER_NODE = 8


@dataclass(frozen=True)
class Layout:
    """A job: who holds what."""

    name: str
    ranks: int
    shards: Callable[[int], list[Shard]]
    """Of one rank."""
    alike: Callable[[int], int]
    """The lowest rank that holds the same as this one."""


def _layer(width: int, hidden: int, kv: int) -> list[tuple[str, tuple[int, ...], int | None]]:
    """Name, shape and the dimension that tensor parallelism cuts."""
    return [
        ("attention.q.weight", (width, width), 0),
        ("attention.k.weight", (kv, width), 0),
        ("attention.v.weight", (kv, width), 0),
        ("attention.o.weight", (width, width), 1),
        ("mlp.gate.weight", (hidden, width), 0),
        ("mlp.up.weight", (hidden, width), 0),
        ("mlp.down.weight", (width, hidden), 1),
        ("norm1.weight", (width,), None),
        ("norm2.weight", (width,), None),
    ]


def three_dimensional(ranks: int, tp: int, pp: int, layers: int) -> Layout:
    """Tensor x pipeline x data parallelism; ranks of one node are a tensor-parallel group."""
    dp = ranks // (tp * pp)

    def shards(rank: int) -> list[Shard]:
        t, d, p = rank % tp, rank // tp % dp, rank // (tp * dp)
        assert d < dp
        group = tuple(t + tp * (other + dp * p) for other in range(dp))
        every_t = tuple(sorted(u + tp * (other + dp * p) for other in range(dp) for u in range(tp)))
        found = []
        for layer in range(layers * p // pp, layers * (p + 1) // pp):
            for name, shape, dim in _layer(16384, 53248, 1024):
                lengths, offsets = list(shape), [0] * len(shape)
                if dim is not None:
                    lengths[dim] //= tp
                    offsets[dim] = t * lengths[dim]
                box = Box(tuple(offsets), tuple(lengths))
                holders = group if dim is not None else every_t
                found += [
                    Shard(f"{prefix}layers.{layer}.{name}{suffix}", dtype, shape, (box,), holders)
                    for prefix, suffix, dtype in STATES
                ]
        return found

    return Layout(f"400B TP{tp} PP{pp} DP{dp}", ranks, shards, lambda rank: rank % tp + rank // (tp * dp) * tp * dp)


def fully_sharded(ranks: int, layers: int) -> Layout:
    """FSDP2: rows of every tensor over all ranks."""

    def shards(rank: int) -> list[Shard]:
        found = []
        for layer in range(layers):
            for name, shape, _ in _layer(8192, 28672, 1024):
                chunk = -(-shape[0] // ranks)
                begin = min(rank * chunk, shape[0])
                length = min(chunk, shape[0] - begin)
                boxes = (Box((begin, *(0,) * (len(shape) - 1)), (length, *shape[1:])),) if length else ()
                found += [
                    Shard(f"{prefix}layers.{layer}.{name}{suffix}", dtype, shape, boxes, (rank,))
                    for prefix, suffix, dtype in STATES
                ]
        return found

    return Layout(f"FSDP2 {layers} layers", ranks, shards, lambda rank: rank)


def _node_of(rank: int) -> int:
    return rank // GPUS_PER_NODE


def _pieces(shards: Sequence[Shard], rank: int) -> tuple[Piece, ...]:
    held = [shard for shard in shards if shard.boxes]
    return tuple(piece for piece in own(held, global_rank=rank, node_of=_node_of) if piece.job)


def _pieces_of_all(layout: Layout) -> Iterator[tuple[int, list[Piece]]]:
    """What each rank writes, the last rank first. Ranks that hold the same are planned for together: one by one, ten
    thousand would take minutes."""
    planned: dict[int, list[Piece]] = {}
    known: set[int] = set()
    groups: set[tuple[int, ...]] = set()
    for rank in reversed(range(layout.ranks)):
        if layout.alike(rank) not in known:
            known.add(layout.alike(rank))
            held: dict[tuple[int, ...], list[Shard]] = {}
            for shard in layout.shards(rank):
                if shard.boxes and shard.holders not in groups:
                    held.setdefault(shard.holders, []).append(shard)
            groups.update(holders for holders in held if len(holders) > 1)
            for holders, shards in held.items():
                for owner, pieces in own_of_all(shards, holders=holders, node_of=_node_of).items():
                    planned.setdefault(owner, []).extend(pieces)
        yield rank, planned.pop(rank, [])


def _share(layout: Layout, rank: int, pieces: Sequence[Piece]) -> bytes:
    record = ImageRecord(
        name=image_file_name(GENERATION, rank, layout.ranks),
        size_bytes=1,
        header_digest=bytes(16),
        version=GENERATION.at(1),
        global_rank=rank,
        world_size=layout.ranks,
        pieces=pack_pieces(pieces),
    )
    return Share.of(record).encode()


@dataclass(frozen=True)
class Merge:
    """What it took to make the index."""

    index: bytes
    inner_s: float
    root_s: float


def _merge(layout: Layout) -> Merge:
    """The ranks' shares go up the tree in which they meet, as `Meeting.collect` has it."""
    said: dict[int, bytes] = {}
    inner_s = 0.0
    for rank, pieces in _pieces_of_all(layout):
        children = range(rank * FANOUT + 1, min((rank + 1) * FANOUT + 1, layout.ranks))
        shares = [_share(layout, rank, pieces), *(said.pop(child) for child in children)]
        if rank and len(shares) > 1:
            gc.collect()
            start = time.perf_counter()
            shares = [join_shares(shares)]
            inner_s = max(inner_s, time.perf_counter() - start)
        if rank:
            said[rank] = shares[0]
    gc.collect()
    start = time.perf_counter()
    share = Share.decode(join_shares(shares))
    data = encode_index(build_index(share, version=GENERATION.at(1), world_size=layout.ranks))
    return Merge(data, inner_s, time.perf_counter() - start)


@dataclass(frozen=True)
class Result:
    """What was measured of one layout."""

    layout: str
    ranks: int
    pieces: int
    first_s: Estimate
    cached_s: Estimate
    inner_merge_s: float
    root_merge_s: float
    index_bytes: int
    load_s: Estimate
    peak_bytes: int


def measure(layout: Layout, repeats: int) -> Result:
    """All numbers of one layout."""
    sample = [layout.ranks * i // repeats for i in range(repeats)]
    first, cached = [], []
    for rank in sample:
        shards, plans = layout.shards(rank), _Plans()
        start = time.perf_counter()
        pieces = _pieces(shards, rank)
        plans.of(pieces, 1000)
        first.append(time.perf_counter() - start)
        cached.append(_cached(shards, plans, pieces, Ranks(rank, layout.ranks, None)))
    merge = _merge(layout)
    data = merge.index
    loads = [_plan_load(data, layout, rank) for rank in sample[:3]]
    num_pieces = sum(_count(entry) for entry in saved_tensors(decode_index(data)))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Result(
        layout=layout.name,
        ranks=layout.ranks,
        pieces=num_pieces,
        first_s=estimate(first),
        cached_s=estimate(cached),
        inner_merge_s=merge.inner_s,
        root_merge_s=merge.root_s,
        index_bytes=len(data),
        load_s=estimate(loads),
        peak_bytes=peak,
    )


def _cached(shards: Sequence[Shard], plans: _Plans, pieces: tuple[Piece, ...], ranks: Ranks) -> float:
    """Seconds until a save knows that it saves what the last one did, and has that one's plan."""
    mesh = _mesh()
    held = [shard for shard in shards if shard.boxes]
    tensors = {
        shard.name: DTensor.from_local(
            torch.empty(shard.boxes[0].lengths, dtype=torch_dtype(shard.dtype), device="meta"), mesh, [Cut(0)]
        )
        for shard in held
    }
    before = [(layout_of(shard.name, tensors[shard.name]), shard) for shard in held]
    known = {signature(tensors, ranks, None): (before, pieces)}
    start = time.perf_counter()
    layouts_and_shards, found = known[signature(tensors, ranks, None)]
    hold_again(tensors, layouts_and_shards)
    plans.of(found, 1000)
    return time.perf_counter() - start


@cache
def _mesh() -> DeviceMesh:
    """Of ranks that nobody has started."""
    dist.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
    return DeviceMesh("cpu", list(range(8)))


def _count(entry: Saved) -> int:
    return sum(1 for _ in entry.placement.overlapping(whole(entry.shape)))


def _plan_load(data: bytes, layout: Layout, rank: int) -> float:
    """Seconds to read the index and find what a rank wants."""
    shards = layout.shards(rank)
    start = time.perf_counter()
    saved = {entry.name: entry for entry in saved_tensors(decode_index(data))}
    found = 0
    for shard in shards:
        for box in shard.boxes:
            found += sum(1 for _ in saved[shard.name].placement.overlapping(box))
    assert found
    return time.perf_counter() - start


def layouts(*, quick: bool) -> list[Layout]:
    if quick:
        return [three_dimensional(64, 4, 4, 16), three_dimensional(256, 4, 4, 16), fully_sharded(32, 8)]
    return [
        *(three_dimensional(ranks, 8, 16, 126) for ranks in (1024, 4096, 10240)),
        fully_sharded(512, 80),
        fully_sharded(4096, 80),
    ]


FSDP2_PIECES = 1_105_920
"""Of 80 layers with Adam on 512 ranks: their index may take 5 MB, one of fewer pieces as much less."""


def bars_of(results: Sequence[Result]) -> list[Bar]:
    largest = max((result for result in results if "400B" in result.layout), key=lambda result: result.ranks)
    sharded = next(result for result in results if "FSDP2" in result.layout)
    size, limit = float(sharded.index_bytes), 5e6 * sharded.pieces / FSDP2_PIECES
    return [
        Bar(f"first plan per rank at {largest.ranks} ranks", largest.first_s, 1.0, " s"),
        Bar(f"cached plan at {largest.ranks} ranks", largest.cached_s, 0.001, " s"),
        Bar(f"index read and one rank's plan at {largest.ranks} ranks", largest.load_s, 5.0, " s"),
        Bar(f"index of FSDP2 at {sharded.ranks} ranks", Estimate(size, size, size, 1), limit, " bytes", counts=True),
    ]


def main() -> int:
    parser = options_of(__doc__, quick="jobs of at most 256 ranks; bars of time are not judged")
    parser.add_argument("--repeats", type=int, default=7, help="ranks that are timed, at least 7 (default 7)")
    arguments = parser.parse_args()
    if arguments.repeats < 7:
        parser.error("--repeats must be at least 7")
    results = []
    for layout in layouts(quick=arguments.quick):
        results.append(measure(layout, arguments.repeats))
        print(f"{layout.name} at {layout.ranks} ranks: done", file=sys.stderr)
    bars = bars_of(results)
    everything = {"layouts": [asdict(result) for result in results]}
    keep(as_json(everything, bars, quick=arguments.quick), arguments.json)
    header = [
        "layout",
        "ranks",
        "pieces",
        "first plan s",
        "cached s",
        "inner s",
        "root s",
        "index MB",
        "read + plan s",
        "peak GB",
    ]
    rows = [
        [r.layout, str(r.ranks), str(r.pieces), str(r.first_s), str(r.cached_s), f"{r.inner_merge_s:.3g}",
         f"{r.root_merge_s:.3g}", f"{r.index_bytes / 1e6:.3g}", str(r.load_s), f"{r.peak_bytes / 1e9:.2f}"]
        for r in results
    ]  # fmt: skip
    if arguments.json != "-":
        print(table(header, rows))
        print(lines_of(bars, quick=arguments.quick))
    return exit_code(bars, quick=arguments.quick)


if __name__ == "__main__":
    sys.exit(main())
