"""``inspect``: what a checkpoint holds."""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter

from holdfast.checkpoint.tools.building import buffer_bytes
from holdfast.checkpoint.tools.native import NativeState
from holdfast.checkpoint.tools.parallel import in_parallel, share_of, workers_within
from holdfast.checkpoint.tools.states import SavedState, SavedTensor, leaves, open_states, parts, shown
from holdfast.checkpoint.tools.units import Progress, argument, human, parse_size, plain, put_json, table
from holdfast.errors import StateError

EXAMPLE = "holdfast ckpt inspect checkpoints/step-00000100 --stats --only model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare them."""
    parser.add_argument("path", help="a checkpoint in any of the formats")
    parser.add_argument("--only", metavar="PREFIX", default="", help="tensors whose names start so")
    parser.add_argument("--stats", action="store_true", help="least, largest, mean, norm, NaN and Inf of every tensor")
    parser.add_argument("--workers", type=int, default=2, help="of --stats: tensors read at the same time (default 2)")
    parser.add_argument(
        "--max-memory", metavar="SIZE", type=argument(parse_size), default="2GiB", help="bound (default 2GiB)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    """0; 1 where ``--stats`` finds NaN or Inf."""
    workers = workers_within(arguments.workers, arguments.max_memory) if arguments.stats else 1
    states = open_states(arguments.path, workers)
    state = states[0]
    try:
        tensors = [tensor for tensor in state.tensors if tensor.name.startswith(arguments.only)]
        rows = [_described(state, tensor) for tensor in tensors]
        if arguments.stats:
            _add_stats(states, tensors, rows, buffer_bytes(share_of(arguments.max_memory, workers)))
        head = _head(state)
        values = {name: value for name, value in _values(state) if name.startswith(arguments.only)}
    finally:
        for opened in states:
            opened.close()
    if arguments.json:
        put_json({**head, "tensors": rows, "values": values})
    else:
        _print(head, rows, arguments.stats)
        if values:
            sys.stdout.write("\n" + "".join(f"{plain(name)} = {plain(value)}\n" for name, value in values.items()))
    return int(any(row.get("nan") or row.get("inf") for row in rows))


def _head(state: SavedState) -> dict[str, object]:
    sizes: Counter[str] = Counter()
    for tensor in state.tensors:
        sizes[tensor.dtype] += tensor.size_bytes
    head: dict[str, object] = {
        "format": state.format,
        "step": state.step,
        "num_tensors": len(state.tensors),
        "size_bytes": sum(sizes.values()),
        "dtypes": dict(sizes.most_common()),
    }
    if isinstance(state, NativeState):
        head |= {
            "version": str(state.info.version),
            "world_size": state.catalog.world_size,
            "tag": state.info.tag,
            "metrics": state.info.metrics,
            "images": [image.name for image in state.catalog.images],
            "objects": {name: len(data) for name, data in sorted(state.catalog.objects(0).items())},
            "divergence": list(state.catalog.divergence),
        }
    return head


def _values(state: SavedState) -> list[tuple[str, str]]:
    """What is no tensor, shortened; of what each rank has of its own, rank 0's."""
    try:
        return sorted((name, shown(value)) for name, value in leaves(state.nested(), whole_lists=True))
    except StateError as error:  # of a codec that only the training script registers
        sys.stderr.write(f"holdfast ckpt inspect: what is no tensor cannot be shown: {error}\n")
        return []


def _described(state: SavedState, tensor: SavedTensor) -> dict[str, object]:
    row: dict[str, object] = {
        "name": tensor.name,
        "rank": tensor.rank,
        "dtype": tensor.dtype,
        "shape": list(tensor.shape),
        "size_bytes": tensor.size_bytes,
    }
    if isinstance(state, NativeState):
        row["pieces"] = len(set(state.catalog.boxes(tensor.name, rank=tensor.rank)))
        row["written_by"] = state.writers(tensor)
    return row


def _add_stats(
    states: list[SavedState], tensors: list[SavedTensor], rows: list[dict[str, object]], max_bytes: int
) -> None:
    with Progress("reading", sum(tensor.size_bytes for tensor in tensors)) as progress:

        def add(number: int, state: SavedState) -> None:
            # float64 copies of a part take up to eight times its bytes.
            rows[number].update(_stats(state, tensors[number], max(max_bytes // 16, 1 << 16), progress))

        in_parallel(add, range(len(tensors)), states, "inspect", progress)


def _stats(state: SavedState, tensor: SavedTensor, max_bytes: int, progress: Progress) -> dict[str, object]:
    from holdfast.checkpoint.tensors import as_numbers, empty_for, tensor_bytes

    least, largest, total, squares = math.inf, -math.inf, 0.0, 0.0
    nan = inf = count = 0
    for box in parts(tensor, max_bytes):
        part = empty_for(tensor.dtype, box.lengths)
        state.read(tensor, box, tensor_bytes(part))
        values = as_numbers(part)
        if values is None:
            return {}
        values = values.abs() if values.is_complex() else values
        nan += int(values.isnan().sum())
        inf += int(values.isinf().sum())
        values = values[values.isfinite()]
        if values.numel():
            least, largest = min(least, float(values.min())), max(largest, float(values.max()))
            total += float(values.sum())
            squares += float(values.square().sum())
            count += values.numel()
        progress.add(part.numel() * part.element_size())
    if not count:
        return {"nan": nan, "inf": inf}
    return {
        "min": least, "max": largest, "mean": total / count, "norm": math.sqrt(squares), "nan": nan, "inf": inf,
    }  # fmt: skip


def _print(head: dict[str, object], rows: list[dict[str, object]], stats: bool) -> None:
    for name, value in head.items():
        if name == "dtypes" and isinstance(value, dict):
            sys.stdout.write(f"dtypes: {', '.join(f'{dtype} {human(size)}' for dtype, size in value.items())}\n")
        elif name == "images" and isinstance(value, list):
            sys.stdout.write("".join(f"image: {plain(image)}\n" for image in value))
        elif name == "size_bytes" and isinstance(value, int):
            sys.stdout.write(f"size: {human(value)}\n")
        elif value not in (None, [], {}):
            sys.stdout.write(f"{name}: {plain(str(value))}\n")
    columns = [
        "name",
        "dtype",
        "shape",
        "size_bytes",
        *(["pieces", "written_by"] if rows and "pieces" in rows[0] else []),
    ]
    columns += ["min", "max", "mean", "norm", "nan", "inf"] if stats else []
    body = [[_cell(column, row) for column in columns] for row in rows]
    if rows:
        sys.stdout.write(
            "\n" + table([[column.removesuffix("_bytes").replace("_", " ").upper() for column in columns], *body])
        )


def _cell(column: str, row: dict[str, object]) -> str:
    value = row.get(column, "")
    if column == "name" and row["rank"] is not None:
        return f"{value}@rank{row['rank']}"
    if column == "size_bytes" and isinstance(value, int):
        return human(value)
    if column == "written_by" and isinstance(value, list):
        return ranges(value)
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def ranges(numbers: list[int]) -> str:
    """``0-3,7`` of ordered numbers."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1] = (runs[-1][0], number)
        else:
            runs.append((number, number))
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
