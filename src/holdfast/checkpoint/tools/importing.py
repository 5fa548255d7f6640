"""``import``: a state in another format as one of our checkpoints, which `holdfast.checkpoint.load` reads."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

from holdfast.checkpoint.boxes import Box
from holdfast.checkpoint.objects import ObjectRecord, TensorRef, encode
from holdfast.checkpoint.pieces import Piece
from holdfast.checkpoint.places import place
from holdfast.checkpoint.steps import step_of
from holdfast.checkpoint.tools.building import Build, Read, build_checkpoint
from holdfast.checkpoint.tools.layouts import check_world
from holdfast.checkpoint.tools.native import TREE, NativeState
from holdfast.checkpoint.tools.parallel import workers_within
from holdfast.checkpoint.tools.reshard import shares
from holdfast.checkpoint.tools.states import SavedState, open_states
from holdfast.checkpoint.tools.units import argument, human, parse_size
from holdfast.errors import UsageError

EXAMPLE = "holdfast ckpt import Llama-3-8B/ imported/step-00000000 --prefix model --world 8"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare them."""
    parser.add_argument("source", help="safetensors file or folder, DCP directory, or file of torch.save")
    parser.add_argument(
        "destination", type=argument(place), help="a new directory or URL; step-… in its name is the step"
    )
    parser.add_argument(
        "--prefix", default="", help="nest all below this key: `model` is what InitFrom and --only model look for"
    )
    parser.add_argument("--world", type=int, default=1, help="number of images (default 1)")
    parser.add_argument("--workers", type=int, default=2, help="images made at the same time (default 2)")
    parser.add_argument(
        "--max-memory", metavar="SIZE", type=argument(parse_size), default="2GiB", help="bound (default 2GiB)"
    )


def run(arguments: argparse.Namespace) -> int:
    """0."""
    check_world(arguments.world)
    workers = workers_within(arguments.workers, arguments.max_memory, arguments.destination)
    states = open_states(arguments.source, min(workers, arguments.world))
    state = states[0]
    try:
        if isinstance(state, NativeState):
            raise UsageError(f"{arguments.source} is in our form already: `holdfast ckpt copy` or `reshard` it")
        info = build_checkpoint(_plan(states, arguments))
    finally:
        for opened in states:
            opened.close()
    sys.stdout.write(
        f"{arguments.destination}: {len(state.tensors)} tensors of {state.format}, {human(info.size_bytes)}\n"
    )
    return 0


def _plan(states: list[SavedState], arguments: argparse.Namespace) -> Build:
    state = states[0]
    prefix = arguments.prefix.rstrip(".")
    dotted = f"{prefix}." if prefix else ""
    saved = {dotted + tensor.name: tensor for tensor in state.tensors}
    images: list[list[Piece]] = [[] for _ in range(arguments.world)]
    for name, tensor in saved.items():
        for rank, box in enumerate(shares(tensor.shape, arguments.world)):
            if box is not None:
                images[rank].append(Piece(name, tensor.dtype, tensor.shape, box))

    def reader(state: SavedState) -> Read:
        def read(piece: Piece, box: Box, out: memoryview) -> None:
            state.read(saved[piece.name], box, out)

        return read

    tree = renamed_refs(state.nested(), lambda name: dotted + name)
    record = ObjectRecord(encode({prefix: tree} if prefix else tree))
    return Build(
        directory=arguments.destination,
        images=images,
        objects=[{TREE: record}] * arguments.world,
        readers=[reader(state) for state in states],
        identity=f"import {state.fingerprint} {prefix} {arguments.world}",
        step=step_of(arguments.destination),
        max_memory_bytes=arguments.max_memory,
    )


def renamed_refs(tree: Any, rename: Callable[[str], str]) -> Any:
    """The same nested state with its tensors under other names. Any: whatever was saved."""
    if type(tree) is TensorRef:
        return TensorRef(rename(tree.name))
    if isinstance(tree, dict):
        return {key: renamed_refs(item, rename) for key, item in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(renamed_refs(item, rename) for item in tree)
    return tree
