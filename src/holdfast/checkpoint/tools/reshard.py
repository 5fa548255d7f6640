"""``reshard``: the same state in the images of another number of ranks, cut as they will load it.

``--world`` cuts every tensor along its first dimension as `torch.chunk` does it, and so FSDP2; ``--layout`` cuts as a
file says (`layouts`). A load by ranks of that layout reads each image from start to end. State that each rank has of
its own goes to rank r from old rank r mod old world size, as a load does it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

from holdfast.checkpoint.boxes import Box, whole
from holdfast.checkpoint.objects import ObjectRecord, decode, encode
from holdfast.checkpoint.pieces import Piece
from holdfast.checkpoint.places import place
from holdfast.checkpoint.tools.building import Build, Read, build_checkpoint
from holdfast.checkpoint.tools.layouts import Layout, check_world
from holdfast.checkpoint.tools.native import DCP_MAPPINGS, DCP_OBJECTS, NativeState, open_several
from holdfast.checkpoint.tools.parallel import workers_within
from holdfast.checkpoint.tools.states import SavedTensor
from holdfast.checkpoint.tools.units import argument, human, parse_size

EXAMPLE = "holdfast ckpt reshard checkpoints/step-00000100 resharded/step-00000100 --world 8"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare them."""
    parser.add_argument("source", help="one of our checkpoints")
    parser.add_argument("destination", type=argument(place), help="a new directory or URL")
    layout = parser.add_mutually_exclusive_group(required=True)
    layout.add_argument(
        "--world", type=int, metavar="N", help="number of ranks that will load it, with FSDP2's sharding"
    )
    layout.add_argument("--layout", type=Path, metavar="FILE", help="JSON: mesh, and which axis cuts which dim of what")
    parser.add_argument("--workers", type=int, default=2, help="images made at the same time (default 2)")
    parser.add_argument(
        "--max-memory", metavar="SIZE", type=argument(parse_size), default="2GiB", help="bound (default 2GiB)"
    )


def run(arguments: argparse.Namespace) -> int:
    """0."""
    layout = None if arguments.layout is None else Layout.read(arguments.layout)
    world = check_world(arguments.world if layout is None else layout.world_size)
    workers = workers_within(min(arguments.workers, world), arguments.max_memory, arguments.destination)
    states = open_several(arguments.source, workers)
    try:
        info = build_checkpoint(_plan(states, world, layout, arguments))
    finally:
        for state in states:
            state.close()
    sys.stdout.write(f"{arguments.destination}: {world} images, {human(info.size_bytes)}\n")
    return 0


def _plan(states: list[NativeState], world: int, layout: Layout | None, arguments: argparse.Namespace) -> Build:
    state = states[0]
    old_world = state.catalog.world_size
    saved = {(tensor.name, tensor.rank): tensor for tensor in state.tensors}
    shared = [tensor for tensor in state.tensors if tensor.rank is None]
    images = _cut(shared, world) if layout is None else layout.images(shared)
    for tensor in state.tensors:
        for rank in range(tensor.rank, world, old_world) if tensor.rank is not None else ():
            images[rank].append(Piece(tensor.name, tensor.dtype, tensor.shape, whole(tensor.shape), rank))

    def reader(state: NativeState) -> Read:
        def read(piece: Piece, box: Box, out: memoryview) -> None:
            rank = None if piece.rank is None else piece.rank % old_world
            state.read(saved[piece.name, rank], box, out)

        return read

    return Build(
        directory=arguments.destination,
        images=images,
        objects=_objects(state, world),
        readers=[reader(state) for state in states],
        identity=f"reshard {state.fingerprint} {world} {layout}",
        step=state.step,
        tag=state.info.tag,
        metrics=state.info.metrics,
        history=state.info.history,
        max_memory_bytes=arguments.max_memory,
    )


def _cut(tensors: list[SavedTensor], world: int) -> list[list[Piece]]:
    images: list[list[Piece]] = [[] for _ in range(world)]
    for tensor in tensors:
        for rank, box in enumerate(shares(tensor.shape, world)):
            if box is not None:
                images[rank].append(Piece(tensor.name, tensor.dtype, tensor.shape, box))
    return images


def shares(shape: tuple[int, ...], world: int) -> list[Box | None]:
    """The box of each rank, None where it gets nothing. What cannot be cut is rank 0's."""
    if not shape or 0 in shape:
        return [whole(shape), *[None] * (world - 1)]
    rows = -(-shape[0] // world)
    boxes: list[Box | None] = []
    for rank in range(world):
        start, end = min(rank * rows, shape[0]), min((rank + 1) * rows, shape[0])
        box = Box((start, *(0,) * (len(shape) - 1)), (end - start, *shape[1:]))
        boxes.append(None if box.is_empty else box)
    return boxes


def _objects(state: NativeState, world: int) -> list[Mapping[str, ObjectRecord]]:
    old = state.objects()
    new: list[Mapping[str, ObjectRecord]] = [old[rank % len(old)] for rank in range(world)]
    if DCP_OBJECTS not in old[0]:
        return new
    # What HoldfastWriter stored is spread over the ranks, each object once.
    merged = {
        name: ObjectRecord(encode({k: v for records in old for k, v in decode(records[name].data).items()}), True)
        for name in (DCP_OBJECTS, DCP_MAPPINGS)
    }
    empty = {name: ObjectRecord(encode({}), True) for name in (DCP_OBJECTS, DCP_MAPPINGS)}
    return [merged, *[empty] * (world - 1)]
