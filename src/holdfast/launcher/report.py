"""``holdfast report RUN_DIR``: how a run went, from its events."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from holdfast.errors import UsageError
from holdfast.launcher.events import FILE_NAME, read_events
from holdfast.launcher.tool import human_seconds, put_json, put_table

EXAMPLE = "holdfast report runs/gpt/holdfast"
_PHASES = ("stopped", "agreed", "started", "opened", "restored", "first_step")

Event = dict[str, Any]  # Any: the fields of a JSON line, whose kinds `holdfast.launcher.events` lists


class RecoveryLine(msgspec.Struct, frozen=True, kw_only=True):
    """One recovery."""

    time: float
    generation: str
    cause: str
    tier: str
    step: int
    steps_lost: int
    seconds: float | None
    """From the failure to the first step that all ranks had finished again, None where that was not reached."""
    phases: dict[str, float]


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """What ``--json`` prints."""

    run_id: str
    command: str
    outcome: str
    """done, failed, stopped; running where the log has no end."""
    reason: str
    exit_code: int | None
    begun: float
    seconds: float
    generations: int
    world_sizes: tuple[int, ...]
    """One per generation."""
    recoveries: tuple[RecoveryLine, ...]
    worker_failures: int
    hangs: int
    steps_lost: int
    recovery_seconds: float
    found: dict[str, int]
    """What checksums found, by kind: damage, divergence."""
    warnings: tuple[str, ...]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare them."""
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="the run's directory (--hold-run-dir)")


def run(arguments: argparse.Namespace) -> int:
    """0; 1 where the run failed."""
    if not (arguments.run_dir / FILE_NAME).is_file():
        raise UsageError(f"{arguments.run_dir} holds no {FILE_NAME}: it is not the directory of a run")
    summary = summarise(read_events(arguments.run_dir), now=time.time())
    if arguments.json:
        put_json(msgspec.to_builtins(summary))
    else:
        _show(summary)
    return int(summary.outcome == "failed")


def summarise(events: Sequence[Event], *, now: float) -> Summary:
    """Pure: the events of one run directory, several launches and nodes included, as one summary.

    Raises:
        UsageError: there is no event.
    """
    events = sorted(events, key=lambda event: float(event.get("time", 0.0)))
    if not events:
        raise UsageError("the event log is empty")
    starts = _of(events, "run_started")
    ends = [event for event in _of(events, "run_ended") if not _began_after(starts, event)]
    generations = {event["generation"]: int(event["world_size"]) for event in _of(events, "generation_started")}
    recoveries = tuple(_recovery(event) for event in _of(events, "recovery"))
    last = ends[-1] if ends else {}
    until = float(last["time"]) if last else float(events[-1]["time"]) if _is_stale(events, now) else now
    return Summary(
        run_id=str(starts[0].get("run_id", "")) if starts else "",
        command=" ".join([str(starts[-1].get("command", "")), *starts[-1].get("arguments", ())]) if starts else "",
        outcome=str(last.get("outcome", "")) or ("unknown" if _is_stale(events, now) else "running"),
        reason=str(last.get("reason", "")),
        exit_code=last.get("exit_code"),
        begun=float(events[0]["time"]),
        seconds=round(until - float(events[0]["time"]), 3),
        generations=len(generations),
        world_sizes=tuple(generations.values()),
        recoveries=recoveries,
        worker_failures=len(_of(events, "worker_failed")),
        hangs=sum(event.get("change") == "hung" for event in _of(events, "hang")),
        steps_lost=sum(recovery.steps_lost for recovery in recoveries),
        recovery_seconds=round(sum(recovery.seconds or 0.0 for recovery in recoveries), 3),
        found=_found(events),
        warnings=tuple(dict.fromkeys(_warnings(events))),
    )


def _of(events: Sequence[Event], kind: str) -> list[Event]:
    return [event for event in events if event.get("kind") == kind]


def _began_after(starts: Sequence[Event], end: Event) -> bool:
    """Whether a launch began after this end: then it was not the end of the run."""
    return any(float(start["time"]) > float(end["time"]) for start in starts)


def _is_stale(events: Sequence[Event], now: float) -> bool:
    """Whether a run without an end has been silent for a day: its agents were killed."""
    return now - float(events[-1]["time"]) > 86400


def _recovery(event: Event) -> RecoveryLine:
    phases = {name: float(seconds) for name, seconds in event.get("phases", {}).items()}
    return RecoveryLine(
        time=float(event["time"]),
        generation=str(event.get("generation", "")),
        cause=str(event.get("cause", "")),
        tier=str(event.get("tier", "")),
        step=int(event.get("step", 0)),
        steps_lost=int(event.get("steps_lost", 0)),
        seconds=phases.get("first_step"),
        phases=phases,
    )


def _found(events: Sequence[Event]) -> dict[str, int]:
    """Agents count for themselves, each in ascending numbers."""
    counts: dict[tuple[str, str, int], int] = {}
    for event in _of(events, "notice"):
        if event.get("about"):
            key = (str(event["about"]), str(event.get("host", "")), int(event.get("agent", 0)))
            counts[key] = max(counts.get(key, 0), int(event.get("count", 0)))
    totals: Counter[str] = Counter()
    for (about, _, _), count in counts.items():
        totals[about] += count
    return dict(sorted(totals.items()))


def _warnings(events: Sequence[Event]) -> list[str]:
    found = []
    for event in events:
        kind, text = event.get("kind"), str(event.get("text", ""))
        told = (
            (kind == "notice" and event.get("severity") in ("warning", "error"))
            or (kind == "daemon" and event.get("change") in ("died", "failed"))
            or (kind == "hang" and event.get("change") in ("suspected", "hung"))
            or (kind == "standby" and event.get("change") == "failed")
            or (kind == "health" and event.get("status") != "ok")
            or (kind == "straggler" and event.get("slow", False))
        )
        if told and text:
            found.append(text)
    return found


def _show(summary: Summary) -> None:
    lost = summary.recovery_seconds
    share = f" ({100 * lost / summary.seconds:.1f} % of the time)" if summary.seconds > 0 else ""
    worlds = ", ".join(str(size) for size in dict.fromkeys(summary.world_sizes))
    rows = [
        ("run", f"{summary.run_id}: {summary.command}"),
        ("outcome", summary.outcome),
        ("reason", summary.reason),
        ("began", time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(summary.begun))),
        ("lasted", human_seconds(summary.seconds)),
        ("generations", f"{summary.generations} (ranks: {worlds})"),
        ("failures", f"{summary.worker_failures} workers, {summary.hangs} hangs"),
        ("recoveries", f"{len(summary.recoveries)}: {summary.steps_lost} steps lost, {human_seconds(lost)}{share}"),
        ("found", ", ".join(f"{count} {about}" for about, count in summary.found.items())),
    ]
    put_table("run", ("", ""), [row for row in rows if row[1]])
    if summary.recoveries:
        put_table("recoveries", _HEADER, [_row(recovery) for recovery in summary.recoveries])
    for warning in summary.warnings:
        sys.stdout.write(f"warning: {warning}\n")


_HEADER = ("at", "generation", "cause", "from", "step", "lost", *_PHASES)


def _row(recovery: RecoveryLine) -> tuple[str, ...]:
    return (
        time.strftime("%H:%M:%S", time.localtime(recovery.time)),
        recovery.generation,
        recovery.cause,
        recovery.tier or "-",
        str(recovery.step),
        str(recovery.steps_lost),
        *(f"{recovery.phases[name]:.2f} s" if name in recovery.phases else "-" for name in _PHASES),
    )
