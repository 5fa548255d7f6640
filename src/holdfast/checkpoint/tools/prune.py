"""``prune``: delete what a policy does not keep."""

from __future__ import annotations

import argparse
import sys

from holdfast.checkpoint.places import place
from holdfast.checkpoint.retention import Retention
from holdfast.checkpoint.root import ROOT_NAME
from holdfast.checkpoint.steps import StepInfo, list_steps
from holdfast.checkpoint.storage import storage_of
from holdfast.checkpoint.tools.units import argument, human, put_json
from holdfast.errors import UsageError

EXAMPLE = "holdfast ckpt prune checkpoints --last 3 --every-steps 10000 --best 2 --by loss --dry-run"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare them."""
    parser.add_argument("directory", type=argument(place), help="checkpoint directory")
    parser.add_argument("--last", type=int, metavar="N", help="keep the newest N")
    parser.add_argument("--every-steps", type=int, metavar="N", help="keep multiples of N")
    parser.add_argument("--every-seconds", type=float, metavar="N", help="keep one in N seconds")
    parser.add_argument("--best", type=int, default=0, metavar="N", help="keep the N best by a metric")
    parser.add_argument("--by", metavar="METRIC", help="which metric; less is better")
    parser.add_argument("--higher-is-better", action="store_true", help="more is better")
    parser.add_argument("--drop-tagged", action="store_true", help="delete tagged ones too")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be deleted")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    """0."""
    if not arguments.directory.is_dir():
        raise UsageError(f"{arguments.directory} is no directory")
    if (arguments.directory / ROOT_NAME).exists():
        raise UsageError(f"{arguments.directory} is one checkpoint: give the directory that holds it")
    policy = Retention(
        last=arguments.last,
        every_steps=arguments.every_steps,
        every_s=arguments.every_seconds,
        best=arguments.best,
        best_by=arguments.by,
        lower_is_better=not arguments.higher_is_better,
        tagged=not arguments.drop_tagged,
    )
    if not (arguments.last or arguments.every_steps or arguments.every_seconds or arguments.best):
        raise UsageError("what to keep: give --last, --every-steps, --every-seconds or --best")
    steps = list_steps(arguments.directory)
    if policy.best_by is not None:
        _check_metric(policy.best_by, steps)
    found = policy.find(arguments.directory)
    if not arguments.dry_run:
        found.carry_out(storage_of(arguments.directory), policy)
    if arguments.json:
        paths = {name: [str(path) for path in getattr(found, name)] for name in ("left_over", "abandoned")}
        put_json({"deleted": [str(info.path) for info in found.steps], **paths, "dry_run": arguments.dry_run})
        return 0
    if not steps:
        sys.stderr.write(
            f"holdfast ckpt: {arguments.directory} holds no steps (folders named step-00000100 and so on)\n"
        )
    done = "would be deleted" if arguments.dry_run else "deleted"
    sys.stdout.write("".join(f"{info.path} {done} ({human(info.size_bytes)})\n" for info in found.steps))
    sys.stdout.write("".join(f"{path} {done} (an interrupted save left it)\n" for path in found.left_over))
    sys.stdout.write("".join(f"{path} {done} (set aside, and passed since)\n" for path in found.abandoned))
    sys.stdout.write(f"{len(found.steps)} {done}, {human(sum(info.size_bytes for info in found.steps))}\n")
    return 0


def _check_metric(name: str, steps: list[StepInfo]) -> None:
    """A name that no checkpoint knows would keep none: that is a slip of the pen, not a wish."""
    complete = [info for info in steps if info.complete]
    known = sorted({metric for info in complete for metric in info.metrics})
    if complete and name not in known:
        raise UsageError(f"--by {name}: no checkpoint has this metric (known: {', '.join(known) or 'none'})")
