"""``export``: a state for other programs."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from holdfast.checkpoint.places import UrlPath, place
from holdfast.checkpoint.tools.building import buffer_bytes
from holdfast.checkpoint.tools.exported import Export, cast_dtype
from holdfast.checkpoint.tools.parallel import share_of, workers_within
from holdfast.checkpoint.tools.states import open_states
from holdfast.checkpoint.tools.units import Progress, argument, human, parse_size
from holdfast.errors import UsageError

EXAMPLE = "holdfast ckpt export checkpoints/step-00000100 exported/ --format hf --only model --cast bf16"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare them."""
    parser.add_argument("source", help="a checkpoint in any of the formats")
    parser.add_argument("destination", type=argument(_file), help="a new directory (hf, dcp) or file (torch)")
    parser.add_argument("--format", choices=("hf", "dcp", "torch"), default="hf", help="default hf: safetensors, index")
    parser.add_argument("--only", metavar="PREFIX", help="what stands below it, under its names there: `model`")
    parser.add_argument("--cast", metavar="DTYPE", help="floating point tensors in this type: bf16, fp16, fp32, …")
    parser.add_argument(
        "--shard-size",
        metavar="SIZE",
        type=argument(parse_size),
        default="5GB",
        help="hf: most bytes in a file (default 5GB)",
    )
    parser.add_argument("--workers", type=int, default=2, help="hf: files written at the same time (default 2)")
    parser.add_argument(
        "--max-memory", metavar="SIZE", type=argument(parse_size), default="2GiB", help="bound (default 2GiB)"
    )


def run(arguments: argparse.Namespace) -> int:
    """0."""
    cast = None if arguments.cast is None else cast_dtype(arguments.cast)
    workers = workers_within(arguments.workers, arguments.max_memory) if arguments.format == "hf" else 1
    states = open_states(arguments.source, workers)
    max_bytes = buffer_bytes(share_of(arguments.max_memory, workers)) // 8
    try:
        exports = [Export.of(state, only=arguments.only, cast=cast, max_bytes=max_bytes) for state in states]
        export = exports[0]
        with Progress("exporting", export.size_bytes) as progress:
            for one in exports:
                one.progress = progress
            _write(exports, arguments)
    finally:
        for state in states:
            state.close()
    sys.stdout.write(f"{arguments.destination}: {len(export.items)} tensors, {human(export.size_bytes)}\n")
    return 0


def _file(text: str) -> Path:
    """
    Raises:
        UsageError: it is a URL.
    """
    path = place(text)
    if isinstance(path, UrlPath):
        raise UsageError(f"{text}: exports are written as files only")
    return Path(os.path.normpath(path)) if ".." in path.parts else path


def _write(exports: list[Export], arguments: argparse.Namespace) -> None:
    export = exports[0]
    if arguments.format == "hf":
        from holdfast.checkpoint.tools.export_hf import export_hf

        export_hf(exports, arguments.destination, arguments.shard_size)
    elif arguments.format == "dcp":
        from holdfast.checkpoint.tools.export_dcp import export_dcp

        export_dcp(export, arguments.destination)
    else:
        from holdfast.checkpoint.tools.export_torch import export_torch

        export_torch(export, arguments.destination)
