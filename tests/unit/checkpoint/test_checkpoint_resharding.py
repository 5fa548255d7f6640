"""Any tensors, saved under any sharding and loaded under any other, come back; every byte is owned and read once.

Everything but files and sockets is the real thing: ownership, images, index, planner, who reads what, scattering.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise, product
from math import prod

import hypothesis.strategies as st
import numpy
import pytest
import torch
from checkpoint_images import GENERATION
from hypothesis import HealthCheck, given, settings
from torch.distributed.tensor.placement_types import Placement, Replicate, _StridedShard
from torch.distributed.tensor.placement_types import Shard as ShardPlacement

from holdfast.checkpoint import ownership, wants
from holdfast.checkpoint.boxes import Box, flat_range_boxes, whole
from holdfast.checkpoint.catalog import Catalog
from holdfast.checkpoint.commit import image_record
from holdfast.checkpoint.dtypes import itemsize
from holdfast.checkpoint.image import ImageLayout, block_checksums
from holdfast.checkpoint.index import build_index, decode_index, encode_index, image_file_name, saved_tensors
from holdfast.checkpoint.layout import _boxes, shard_runs
from holdfast.checkpoint.ownership import Shard, own
from holdfast.checkpoint.pieces import Piece
from holdfast.checkpoint.sinks import Sink, in_place, scatter
from holdfast.checkpoint.source import MemorySource
from holdfast.checkpoint.tensors import empty_for, tensor_bytes
from holdfast.checkpoint.verified import OpenImage
from holdfast.checkpoint.wants import blocks_wanted, merged, units

_BLOCK_BYTES = 64
Held = tuple[tuple[Box, ...], ...]
"""For each rank, the boxes that it holds."""


@dataclass(frozen=True)
class Saved:
    name: str
    dtype: str
    shape: tuple[int, ...]


# --- shardings


@st.composite
def _grids(draw: st.DrawFn, shape: tuple[int, ...], world: int) -> Held:
    """Cells between arbitrary cuts; given out in turn, so that ranks are replicas or hold several cells."""
    edges = [[0, *sorted(draw(st.sets(st.integers(1, n - 1), max_size=2)) if n > 1 else ()), n] for n in shape]
    cells = [
        Box(tuple(a for a, _ in cell), tuple(b - a for a, b in cell)) for cell in product(*(pairwise(e) for e in edges))
    ]
    order = draw(st.permutations(range(len(cells))))
    if len(cells) <= world:
        return tuple((cells[order[rank % len(cells)]],) for rank in range(world))
    return tuple(tuple(cells[cell] for cell in order[rank::world]) for rank in range(world))


@st.composite
def _flat_ranges(draw: st.DrawFn, shape: tuple[int, ...], world: int) -> Held:
    """As ZeRO and FSDP1 cut; some ranks with nothing, groups of replicas."""
    parts = draw(st.integers(1, world))
    size = prod(shape)
    cuts = [0, *sorted(draw(st.lists(st.integers(0, size), min_size=parts - 1, max_size=parts - 1))), size]
    return tuple(flat_range_boxes(shape, cuts[rank % parts], cuts[rank % parts + 1]) for rank in range(world))


@st.composite
def _meshes(draw: st.DrawFn, shape: tuple[int, ...], world: int) -> Held:
    """As torch places DTensors, strided shards too."""
    rows = draw(st.sampled_from([n for n in range(1, world + 1) if world % n == 0]))
    mesh = (rows, world // rows)
    placements: list[Placement] = [Replicate(), Replicate()]
    for axis in range(2):
        if shape and draw(st.booleans()):
            placements[axis] = ShardPlacement(draw(st.integers(0, len(shape) - 1)))
    second = placements[1]
    if isinstance(second, ShardPlacement) and placements[0] == second and draw(st.booleans()):
        placements[0] = _StridedShard(second.dim, split_factor=mesh[1])
    held = []
    for rank in range(world):
        runs = shard_runs("t", shape, mesh, (rank // mesh[1], rank % mesh[1]), placements)
        held.append(() if any(not of_dim for of_dim in runs) else _boxes(runs)[0])
    return tuple(held)


def _shardings(shape: tuple[int, ...], world: int) -> st.SearchStrategy[Held]:
    if 0 in shape:
        return st.just(((),) * world)
    kinds: list[st.SearchStrategy[Held]] = [_grids(shape, world), _flat_ranges(shape, world), _meshes(shape, world)]
    return st.one_of(kinds)


_tensors = st.builds(
    Saved,
    name=st.just("t"),
    dtype=st.sampled_from(["float32", "bfloat16", "int64", "uint8", "complex128", "bool"]),
    shape=st.lists(st.integers(0, 7), max_size=4).map(tuple) | st.sampled_from([(), (33,), (1, 1, 9)]),
)


@st.composite
def _cases(draw: st.DrawFn) -> tuple[list[Saved], list[Held], list[Held]]:
    tensors = [Saved(f"t{i}", t.dtype, t.shape) for i, t in enumerate(draw(st.lists(_tensors, min_size=1, max_size=3)))]
    before, after = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    return (
        tensors,
        [draw(_shardings(tensor.shape, before)) for tensor in tensors],
        [draw(_shardings(tensor.shape, after)) for tensor in tensors],
    )


# --- saving and loading in memory


def _values(tensor: Saved, number: int) -> torch.Tensor:
    values = empty_for(tensor.dtype, tensor.shape)
    raw = tensor_bytes(values)
    limit = 2 if tensor.dtype == "bool" else 256
    raw[:] = bytes((i * 31 + i // 256 + number * 7) % limit for i in range(len(raw)))
    return values


def _bits(tensor: torch.Tensor, box: Box) -> bytes:
    part = tensor[tuple(slice(o, o + n) for o, n in zip(box.offsets, box.lengths, strict=True))]
    return bytes(tensor_bytes(part.contiguous()))


def _pieces(tensors: list[Saved], held: list[Held], rank: int) -> list[Piece]:
    shards = []
    for tensor, by_rank in zip(tensors, held, strict=True):
        mine = by_rank[rank]
        everyone = 0 in tensor.shape
        if mine or everyone:
            holders = tuple(r for r, boxes in enumerate(by_rank) if everyone or boxes == mine)
            shards.append(Shard(tensor.name, tensor.dtype, tensor.shape, mine, holders))
    return [piece for piece in own(shards, global_rank=rank, node_of=lambda rank: rank) if piece.job]


def _image(pieces: list[Piece], values: dict[str, torch.Tensor], rank: int, world: int) -> tuple[ImageLayout, bytes]:
    layout = ImageLayout.plan(pieces, objects_capacity=0, block_bytes=_BLOCK_BYTES)
    data = b"".join(_bits(values[piece.name], piece.box) for piece in layout.pieces)
    header = layout.header(
        version=GENERATION.at(1),
        global_rank=rank,
        world_size=world,
        checksums=block_checksums([data], _BLOCK_BYTES),
        objects_bytes=0,
    )
    return layout, header + data


def _save(tensors: list[Saved], held: list[Held], values: dict[str, torch.Tensor]) -> Catalog:
    world = len(held[0])
    counts = {tensor.name: numpy.zeros(tensor.shape, int) for tensor in tensors}
    images, records = [], []
    for rank in range(world):
        pieces = _pieces(tensors, held, rank)
        for piece in pieces:
            counts[piece.name][tuple(slice(a, b) for a, b in zip(piece.box.offsets, piece.box.ends, strict=True))] += 1
        _, image = _image(pieces, values, rank, world)
        images.append(OpenImage(f"image {rank}", None, MemorySource(memoryview(image))))
        records.append(image_record(image_file_name(GENERATION, rank, world), images[-1].meta, b""))
    assert all((count == 1).all() for count in counts.values()), "a byte has no owner or two"
    index = decode_index(encode_index(build_index(records, version=GENERATION.at(1), world_size=world)))
    return Catalog(
        images, saved=saved_tensors(index), ranks=range(world), version=GENERATION.at(1), world_size=world
    )  # fmt: skip


def _load(catalog: Catalog, tensors: list[Saved], held: list[Held]) -> list[dict[tuple[str, Box], torch.Tensor]]:
    """What `holdfast.checkpoint.loading` does on each rank; the regions that each gets."""
    world = len(held[0])
    filled: list[dict[tuple[str, Box], torch.Tensor]] = []
    runs: list[dict[int, list[tuple[int, int]]]] = []
    pulls = []
    for rank in range(world):
        got, mine, of_rank = {}, {}, []
        for tensor, by_rank in zip(tensors, held, strict=True):
            size = itemsize(tensor.dtype)
            for box in by_rank[rank]:
                # Rows in reverse: not contiguous wherever there are several dimensions.
                target = got[tensor.name, box] = empty_for(tensor.dtype, box.lengths[::-1])
                sink = Sink(
                    target.permute(tuple(reversed(range(target.dim())))), box, dtype=tensor.dtype, itemsize=size
                )
                for tile, image in catalog.tiles(tensor.name, box):
                    wanted = tile.intersection(box)
                    assert wanted is not None
                    start, meta = catalog.piece_start(tensor.name, tile, image), catalog.images[image].meta
                    mine.setdefault(image, []).extend(blocks_wanted(meta, tile, wanted, start=start, itemsize=size))
                    of_rank.append((image, sink, tile, wanted, start, size))
        filled.append(got)
        runs.append({image: merged(of_image) for image, of_image in mine.items()})
        pulls.append(of_rank)
    read: set[tuple[int, int]] = set()
    for rank in range(world):
        for image in runs[rank]:
            wanted_by = {other: runs[other][image] for other in range(world) if image in runs[other]}
            for unit in units(image, wanted_by, rank, block_bytes=_BLOCK_BYTES):
                meta = catalog.images[image].meta
                if unit.reader == rank:
                    blocks = {(image, block) for block in range(unit.first, unit.end)}
                    assert not blocks & read, "a block is read twice"
                    read |= blocks
                data = catalog.images[image].blocks(unit.first, unit.end)
                place = meta.data_start + unit.first * _BLOCK_BYTES
                for number, sink, tile, wanted, start, size in pulls[rank]:
                    if number == image:
                        scatter(
                            sink, tile, wanted, piece_start=start, data_start=place, data=data, itemsize=size
                        )  # fmt: skip
    wanted_blocks = {(i, b) for of_rank in runs for i, rs in of_rank.items() for f, e in rs for b in range(f, e)}
    assert read == wanted_blocks, "a block that is wanted is read by nobody"
    return filled


def _check(case: tuple[list[Saved], list[Held], list[Held]]) -> None:
    tensors, before, after = case
    values = {tensor.name: _values(tensor, i) for i, tensor in enumerate(tensors)}
    with _save(tensors, before, values) as catalog:
        catalog.check_complete()
        for got in _load(catalog, tensors, after):
            for (name, box), target in got.items():
                transposed = target.permute(tuple(reversed(range(target.dim()))))
                assert _bits(transposed, whole(box.lengths)) == _bits(values[name], box), (name, box)


@pytest.fixture(autouse=True, scope="module")
def _small_sizes() -> object:
    """So that small tensors are cut and lie in many blocks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ownership, "MIN_CHUNK_BYTES", 24)
        patch.setattr(wants, "UNIT_BYTES", 3 * _BLOCK_BYTES)
        yield


_settings = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None}


@settings(max_examples=60, derandomize=True, **_settings)  # type: ignore[arg-type]
@given(_cases())
def test_what_any_sharding_saves_any_other_loads(case: tuple[list[Saved], list[Held], list[Held]]) -> None:
    _check(case)


@st.composite
def _parts(draw: st.DrawFn, shape: tuple[int, ...]) -> Box:
    """A box that is not empty."""
    starts = [draw(st.integers(0, n - 1)) for n in shape]
    return Box(tuple(starts), tuple(draw(st.integers(1, n - start)) for n, start in zip(shape, starts, strict=True)))


@st.composite
def _runs(draw: st.DrawFn) -> tuple[Box, Box, int, int]:
    """A tile, what is held here, and a run of elements: anywhere, or within the rows that both have."""
    shape = tuple(draw(st.lists(st.integers(1, 5), max_size=3)))
    tile = draw(_parts(shape))
    rows = draw(_parts(shape[:1]))
    some_rows = Box((*rows.offsets, *tile.offsets[1:]), (*rows.lengths, *tile.lengths[1:]))
    held = draw(st.one_of(st.just(tile), st.just(whole(shape)), st.just(some_rows), _parts(shape)))
    wanted = tile.intersection(held)
    if wanted is None or not shape or draw(st.booleans()):
        return tile, held, draw(st.integers(-2, tile.volume)), draw(st.integers(1, tile.volume + 2))
    row = prod(tile.lengths[1:])
    before = draw(st.integers(0, wanted.lengths[0] * row - 1))
    count = draw(st.integers(1, wanted.lengths[0] * row - before))
    return tile, held, (wanted.offsets[0] - tile.offsets[0]) * row + before, count


@settings(max_examples=300, derandomize=True, **_settings)  # type: ignore[arg-type]
@given(_runs())
def test_what_is_read_in_place_is_what_would_have_been_scattered(case: tuple[Box, Box, int, int]) -> None:
    tile, held, first, count = case
    wanted = tile.intersection(held)
    if wanted is None:
        return
    data = bytes(1 + i % 251 for i in range(4 * count))
    there, expected = (torch.zeros(held.lengths, dtype=torch.int32) for _ in range(2))
    sinks = [Sink(tensor, held, dtype="int32", itemsize=4) for tensor in (there, expected)]
    piece = {"piece_start": 40, "data_start": 40 + 4 * first, "itemsize": 4}
    scatter(sinks[1], tile, wanted, data=memoryview(data), **piece)
    place = in_place(sinks[0], tile, wanted, length=len(data), **piece)
    if place is not None:
        place[:] = data
        assert torch.equal(there, expected)
    elif tile.lengths:
        assert held != tile or first < 0 or first + count > tile.volume


@pytest.mark.campaign
@pytest.mark.timeout(3600)
@settings(max_examples=10_000, **_settings)  # type: ignore[arg-type]
@given(_cases())
def test_ten_thousand_pairs_of_shardings(case: tuple[list[Saved], list[Held], list[Held]]) -> None:
    _check(case)
