"""``export``: a state for other programs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from holdfast.checkpoint.tools.building import buffer_bytes
from holdfast.checkpoint.tools.exported import Export, cast_dtype
from holdfast.checkpoint.tools.states import open_state
from holdfast.checkpoint.tools.units import Progress, human, parse_size

EXAMPLE = "holdfast ckpt export checkpoints/step-00000100 exported/ --format hf --only model --cast bf16"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare them."""
    parser.add_argument("source", help="a checkpoint in any of the formats")
    parser.add_argument("destination", type=Path, help="a new directory (hf, dcp) or file (torch)")
    parser.add_argument("--format", choices=("hf", "dcp", "torch"), default="hf", help="default hf: safetensors, index")
    parser.add_argument("--only", metavar="PREFIX", help="what stands below it, under its names there: `model`")
    parser.add_argument("--cast", metavar="DTYPE", help="floating point tensors in this type: bf16, fp16, fp32, …")
    parser.add_argument(
        "--shard-size", metavar="SIZE", type=parse_size, default="5GB", help="hf: most bytes in a file (default 5GB)"
    )
    parser.add_argument("--max-memory", metavar="SIZE", type=parse_size, default="2GiB", help="bound (default 2GiB)")


def run(arguments: argparse.Namespace) -> int:
    """0."""
    cast = None if arguments.cast is None else cast_dtype(arguments.cast)
    state = open_state(arguments.source)
    try:
        export = Export.of(state, only=arguments.only, cast=cast, max_bytes=buffer_bytes(arguments.max_memory) // 8)
        with Progress("exporting", export.size_bytes) as progress:
            export.progress = progress
            _write(export, arguments)
    finally:
        state.close()
    sys.stdout.write(f"{arguments.destination}: {len(export.items)} tensors, {human(export.size_bytes)}\n")
    return 0


def _write(export: Export, arguments: argparse.Namespace) -> None:
    if arguments.format == "hf":
        from holdfast.checkpoint.tools.export_hf import export_hf

        export_hf(export, arguments.destination, arguments.shard_size)
    elif arguments.format == "dcp":
        from holdfast.checkpoint.tools.export_dcp import export_dcp

        export_dcp(export, arguments.destination)
    else:
        from holdfast.checkpoint.tools.export_torch import export_torch

        export_torch(export, arguments.destination)
