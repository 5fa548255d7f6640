"""``diff``: what two states have in common, and where their values begin to differ."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import chain
from typing import TYPE_CHECKING

import msgspec

from holdfast.checkpoint.boxes import Box
from holdfast.checkpoint.objects import encode
from holdfast.checkpoint.tools.building import buffer_bytes
from holdfast.checkpoint.tools.native import NativeState
from holdfast.checkpoint.tools.parallel import in_parallel, share_of, workers_within
from holdfast.checkpoint.tools.safetensors_format import SafetensorsState
from holdfast.checkpoint.tools.states import SavedState, SavedTensor, leaves, open_states, parts, shown
from holdfast.checkpoint.tools.units import Progress, argument, parse_size, plain, put_json
from holdfast.errors import StateError

if TYPE_CHECKING:
    import torch

EXAMPLE = "holdfast ckpt diff checkpoints/step-00000100 exported/"


class Difference(msgspec.Struct, frozen=True, omit_defaults=True):
    """One tensor, or another value, that is not the same in both."""

    name: str
    what: str
    """only in A, only in B; of a tensor: shape, dtype, values; of another value: value."""
    a: str = ""
    b: str = ""
    largest: float | None = None
    """Largest absolute difference of elements that are numbers in both."""
    first: tuple[int, ...] | None = None
    """Index of the first element whose bytes differ."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare them."""
    parser.add_argument("a", help="a checkpoint in any of the formats")
    parser.add_argument("b", help="another one")
    parser.add_argument("--strip-a", metavar="PREFIX", default="", help="compare A's names that start so, without it")
    parser.add_argument("--strip-b", metavar="PREFIX", default="", help="the same for B")
    parser.add_argument("--workers", type=int, default=2, help="tensors compared at the same time (default 2)")
    parser.add_argument(
        "--max-memory", metavar="SIZE", type=argument(parse_size), default="2GiB", help="bound (default 2GiB)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    """0 where they are equal, 1 where they differ."""
    workers = workers_within(arguments.workers, arguments.max_memory)
    max_bytes = max(buffer_bytes(share_of(arguments.max_memory, workers)) // 32, 1 << 16)
    strip = (arguments.strip_a, arguments.strip_b)
    with ExitStack() as opened:
        states = [open_states(path, workers) for path in (arguments.a, arguments.b)]
        for state in chain.from_iterable(states):
            opened.callback(state.close)
        found, same = differences(list(zip(*states, strict=True)), strip=strip, max_bytes=max_bytes)
        others, same_others = differing_values(states[0][0], states[1][0], strip=strip)
    if arguments.json:
        listed = [msgspec.to_builtins(difference) for difference in found + others]
        put_json({"equal": same, "equal_values": same_others, "differences": listed})
    else:
        for difference in found + others:
            sys.stdout.write(f"{plain(_line(difference))}\n")
        sys.stdout.write(f"{same} tensors are equal, {len(found)} are not; ")
        sys.stdout.write(f"of other values {same_others} are equal, {len(others)} are not\n")
    return int(bool(found or others))


def differences(
    pairs: Sequence[tuple[SavedState, SavedState]], *, strip: tuple[str, str] = ("", ""), max_bytes: int
) -> tuple[list[Difference], int]:
    """What differs, by name, and how many tensors are equal to the bit.

    Args:
        pairs: A and B, once for each thread.
        strip: prefixes of the names of either that are compared, without it.
        max_bytes: of a part in memory.
    """
    in_a, in_b = _by_label(pairs[0][0], strip[0]), _by_label(pairs[0][1], strip[1])
    found = [Difference(label, "only in A") for label in in_a.keys() - in_b.keys()]
    found += [Difference(label, "only in B") for label in in_b.keys() - in_a.keys()]
    both = sorted(in_a.keys() & in_b.keys())
    differing: list[Difference] = []
    with Progress("comparing", sum(tensor.size_bytes for tensor in in_a.values())) as progress:

        def compare(label: str, pair: tuple[SavedState, SavedState]) -> None:
            difference = _difference(label, pair[0], in_a[label], pair[1], in_b[label], max_bytes)
            progress.add(in_a[label].size_bytes)
            if difference is not None:
                differing.append(difference)

        in_parallel(compare, both, pairs, "diff", progress)
    found += differing
    return sorted(found, key=lambda difference: difference.name), len(both) - len(differing)


def differing_values(
    a: SavedState, b: SavedState, *, strip: tuple[str, str] = ("", "")
) -> tuple[list[Difference], int]:
    """Of what is no tensor (steps, learning rates, random generators, strings): what differs, by its path in the state,
    and how many are equal. Of what each rank has of its own, rank 0's. safetensors files hold tensors only: beside one
    nothing is compared. Objects of a codec that is not registered here are compared as the bytes that were saved, or
    beside another format not at all, which is said.

    Raises:
        CorruptError: it cannot be read.
    """
    if SafetensorsState.format in (a.format, b.format):
        return [], 0
    try:
        values = [dict(leaves(state.nested())) for state in (a, b)]
    except StateError as error:
        if not (isinstance(a, NativeState) and isinstance(b, NativeState)):
            sys.stderr.write(f"holdfast ckpt diff: what is no tensor cannot be compared: {error}\n")
            return [], 0
        values = [dict(state.catalog.objects(0)) for state in (a, b)]
    in_a, in_b = (
        {name.removeprefix(prefix): value for name, value in of_one.items() if name.startswith(prefix)}
        for of_one, prefix in zip(values, strip, strict=True)
    )
    found = [Difference(name, "only in A", a=shown(in_a[name])) for name in in_a.keys() - in_b.keys()]
    found += [Difference(name, "only in B", b=shown(in_b[name])) for name in in_b.keys() - in_a.keys()]
    both = in_a.keys() & in_b.keys()
    differing = [name for name in both if encode(in_a[name]) != encode(in_b[name])]
    found += [Difference(name, "value", shown(in_a[name]), shown(in_b[name])) for name in differing]
    return sorted(found, key=lambda difference: difference.name), len(both) - len(differing)


def _by_label(state: SavedState, strip: str) -> dict[str, SavedTensor]:
    return {t.label.removeprefix(strip): t for t in state.tensors if t.name.startswith(strip)}


def _difference(
    label: str, a: SavedState, in_a: SavedTensor, b: SavedState, in_b: SavedTensor, max_bytes: int
) -> Difference | None:
    if in_a.shape != in_b.shape:
        return Difference(label, "shape", str(list(in_a.shape)), str(list(in_b.shape)))
    if in_a.dtype != in_b.dtype:
        return Difference(label, "dtype", in_a.dtype, in_b.dtype)
    first: tuple[int, ...] | None = None
    largest: float | None = None
    for box in parts(in_a, max_bytes):
        compared = _compare(a, in_a, b, in_b, box)
        if compared is not None:
            largest = compared[0] if largest is None else max(largest, compared[0] or 0.0)
            first = compared[1] if first is None else first
    return None if first is None else Difference(label, "values", largest=largest, first=first)


def _compare(
    a: SavedState, in_a: SavedTensor, b: SavedState, in_b: SavedTensor, box: Box
) -> tuple[float | None, tuple[int, ...]] | None:
    """(largest difference, None where they are no numbers; index of the first); None where all bytes are equal."""
    import numpy

    from holdfast.checkpoint.tensors import empty_for, tensor_bytes

    left, right = empty_for(in_a.dtype, box.lengths), empty_for(in_b.dtype, box.lengths)
    a.read(in_a, box, tensor_bytes(left))
    b.read(in_b, box, tensor_bytes(right))
    raw = [numpy.frombuffer(tensor_bytes(t), numpy.uint8).reshape(-1, left.element_size()) for t in (left, right)]
    differing = (raw[0] != raw[1]).any(axis=1)
    if not differing.any():
        return None
    inner = numpy.unravel_index(int(differing.argmax()), box.lengths) if box.lengths else ()
    place = tuple(int(i) + o for i, o in zip(inner, box.offsets, strict=True))
    return _largest_gap(left, right), place


def _largest_gap(left: torch.Tensor, right: torch.Tensor) -> float | None:
    import numpy
    import torch

    from holdfast.checkpoint.tensors import as_numbers

    if left.dtype in (torch.int64, torch.uint64):  # float64 cannot tell neighbours apart
        a, b = left.numpy(), right.numpy()
        return float((numpy.maximum(a, b).view("u8") - numpy.minimum(a, b).view("u8")).max())
    a_numbers, b_numbers = as_numbers(left), as_numbers(right)
    if a_numbers is None or b_numbers is None:
        return None
    gaps = (a_numbers - b_numbers).abs()
    gaps = gaps[gaps.isfinite()]
    return float(gaps.max()) if gaps.numel() else 0.0


def _line(difference: Difference) -> str:
    if difference.what == "values":
        largest = "" if difference.largest is None else f" largest difference {difference.largest:.6g},"
        return f"{difference.name}: values,{largest} first at {list(difference.first or ())}"
    if difference.what.startswith("only"):
        value = difference.a or difference.b
        return f"{difference.name}: {difference.what}{': ' if value else ''}{value}"
    return f"{difference.name}: {difference.what} {difference.a} in A, {difference.b} in B"
