"""``ls``: the steps of a checkpoint directory."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import msgspec

from holdfast.checkpoint.belongings import missing_part
from holdfast.checkpoint.places import place
from holdfast.checkpoint.retention import Retention
from holdfast.checkpoint.root import ROOT_NAME
from holdfast.checkpoint.steps import StepInfo, list_steps, read_step_info
from holdfast.checkpoint.storage import storage_of
from holdfast.checkpoint.tools.units import argument, human, put_json, table
from holdfast.errors import UsageError

EXAMPLE = "holdfast ckpt ls checkpoints --latest"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare them."""
    parser.add_argument("directory", type=argument(place), help="checkpoint directory, or one checkpoint")
    parser.add_argument("--latest", action="store_true", help="print the path of the newest complete one only")
    parser.add_argument("--keep", metavar="POLICY", help="JSON of a Retention: show what it would keep, and why")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    """0; 1 where ``--latest`` finds nothing."""
    if not arguments.directory.is_dir():
        raise UsageError(f"{arguments.directory} is no directory")
    steps = _steps(arguments.directory)
    if arguments.latest:
        return _latest(arguments.directory, steps)
    policy = Retention.decode(arguments.keep) if arguments.keep else Retention()
    kept = {info.step: reasons(policy, info, steps) for info in steps if info.complete}
    if arguments.json:
        put_json([_as_json(info, kept.get(info.step, [])) for info in steps])
    elif steps:
        sys.stdout.write(table([_HEADING, *(_row(info, kept.get(info.step, [])) for info in steps)]))
    else:
        sys.stderr.write(
            f"holdfast ckpt: {arguments.directory} holds no steps (folders named step-00000100 and so on)\n"
        )
    return 0


_HEADING = ("STEP", "SIZE", "WRITTEN", "RANKS", "STATE", "TAG", "METRICS", "KEPT BECAUSE")


def _steps(directory: Path) -> list[StepInfo]:
    """Those in it, or itself where it is a checkpoint, whatever its name. Where files are missing or cut short, it is
    not complete, though its root is sound."""
    found = [read_step_info(directory)] if (directory / ROOT_NAME).exists() else list_steps(directory)
    return [_looked_into(info) for info in found]


def _looked_into(info: StepInfo) -> StepInfo:
    problem = missing_part(storage_of(info.path), info) if info.complete else ""
    return msgspec.structs.replace(info, complete=False, problem=problem) if problem else info


def _latest(directory: Path, steps: list[StepInfo]) -> int:
    complete = [info for info in steps if info.complete]
    if not complete:
        sys.stderr.write(f"holdfast ckpt: {directory} holds no complete checkpoint\n")
        return 1
    sys.stdout.write(f"{complete[-1].path}\n")
    return 0


def reasons(policy: Retention, info: StepInfo, steps: list[StepInfo]) -> list[str]:
    """Which rules of a policy keep a complete step; none where it would be deleted."""
    complete = [other for other in steps if other.complete]
    found = ["newest"] if info is complete[-1] else []
    rules = {
        "last": Retention(last=policy.last, tagged=False) if policy.last else None,
        "every_steps": Retention(every_steps=policy.every_steps, tagged=False) if policy.every_steps else None,
        "every_s": Retention(every_s=policy.every_s, tagged=False) if policy.every_s else None,
        "best": Retention(
            best=policy.best, best_by=policy.best_by, lower_is_better=policy.lower_is_better, tagged=False
        )
        if policy.best
        else None,
    }
    named = [(name, rule) for name, rule in rules.items() if rule is not None]
    # Every rule keeps the newest one, whatever it says.
    found += [name for name, rule in named if info is not complete[-1] and info in rule.choose(complete)[0]]
    if policy.tagged and info.is_tagged:
        found.append("tagged")
    if not named and not found:
        found.append("no policy")
    return found


def _row(info: StepInfo, kept: list[str]) -> tuple[str, ...]:
    state = "complete" if info.complete else f"incomplete: {info.problem}"
    metrics = " ".join(f"{name}={value:g}" for name, value in sorted(info.metrics.items()))
    try:
        written = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(info.time))
    except (OverflowError, ValueError, OSError):
        written = "?"  # whoever wrote the root had no clock
    return (
        str(info.step),
        human(info.size_bytes) if info.complete else "",
        written,
        str(info.world_size or ""),
        state,
        info.tag or "",
        metrics,
        ", ".join(kept),
    )


def _as_json(info: StepInfo, kept: list[str]) -> dict[str, object]:
    return {
        "step": info.step,
        "path": str(info.path),
        "complete": info.complete,
        "problem": info.problem,
        "size_bytes": info.size_bytes,
        "world_size": info.world_size,
        "time": info.time,
        "tag": info.tag,
        "metrics": info.metrics,
        "version": None if info.version is None else str(info.version),
        "kept_because": kept,
    }
