"""``holdfast status``: the jobs of this user on this host, from their seats and control pages. Reads only."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import sys
import time
from pathlib import Path

import msgspec

from holdfast.checkpoint.version import GenerationId
from holdfast.errors import DECODE_ERRORS, HoldfastError
from holdfast.launcher.seats import RunRecord, Tenant, runtime_directory
from holdfast.launcher.tool import human_seconds, put_json, put_table
from holdfast.snapshot.control import MAX_LOCAL_RANKS, ControlPage, Phase, generation_word

EXAMPLE = "holdfast status --json"


class RankStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One worker that is in a Session."""

    local_rank: int
    pid: int
    step: int
    phase: str
    silent_s: float
    """Since its newest sign of life."""


class JobStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One seat of a job on this host."""

    job: str
    seat: int
    state: str
    """running; lingering: the launcher has gone and its snapshots wait for the next one."""
    agent: int
    """Process id of the launcher, 0 where it has gone."""
    run_id: str = ""
    run_dir: str = ""
    generation: str = ""
    ranks: tuple[RankStatus, ...] = ()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare them."""
    parser.add_argument("job", nargs="?", help="only this job (--hold-job)")


def run(arguments: argparse.Namespace) -> int:
    """0; 1 where the job that was named is not there, or a job has lost its launcher."""
    jobs = [job for job in find_jobs() if arguments.job in (None, job.job)]
    if arguments.json:
        put_json([msgspec.to_builtins(job) for job in jobs])
    elif jobs:
        put_table("jobs on this host", _HEADER, [_row(job) for job in jobs])
    else:
        sys.stdout.write("no job of this user runs on this host\n")
    missing = arguments.job is not None and not jobs
    return int(missing or any(job.state != "running" for job in jobs))


def find_jobs() -> list[JobStatus]:
    """All seats of this user on this host, by name and number."""
    try:
        base = runtime_directory(make=False)
    except HoldfastError:
        return []
    found = [_read_seat(path) for path in sorted(base.iterdir())] if base.is_dir() else []
    return [job for job in found if job is not None]


def _read_seat(path: Path) -> JobStatus | None:
    job, _, number = path.name.rpartition("-")
    if not (job and number.isdigit() and path.is_dir()):
        return None
    agent = _holder(path / "agent.lock")
    record = None
    with contextlib.suppress(OSError, *DECODE_ERRORS):
        record = msgspec.json.decode((path / "run.json").read_bytes(), type=RunRecord)
    if agent == 0 and record is None:
        return None
    generation = record.generation if record is not None else None
    arena = Path("/dev/shm", f"holdfast-{os.getuid()}-{job}-{number}")
    return JobStatus(
        job=job,
        seat=int(number),
        state="running" if agent else "lingering",
        agent=agent,
        run_id=record.run_id if record is not None else "",
        run_dir=record.run_dir if record is not None else "",
        generation=str(generation or ""),
        ranks=_ranks(arena, generation),
    )


def _holder(lock: Path) -> int:
    """Process id of the launcher that holds the seat, 0 where none does."""
    try:
        with lock.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return msgspec.json.decode(file.read(), type=Tenant).pid
    except (OSError, *DECODE_ERRORS):
        return 0
    return 0


def _ranks(arena: Path, generation: GenerationId | None) -> tuple[RankStatus, ...]:
    if generation is None:
        return ()
    try:
        page = ControlPage.open(arena / "control")
    except (OSError, HoldfastError):
        return ()
    word, found = generation_word(generation), []
    with page:
        for local_rank in range(MAX_LOCAL_RANKS):
            part = page.rank(local_rank)
            if part.generation != word:
                break
            silent_s = max(0, time.monotonic_ns() - part.beat_ns) / 1e9
            phase, silent_s = Phase(part.phase).name.lower(), round(silent_s, 3)
            found.append(
                RankStatus(local_rank=local_rank, pid=part.pid, step=part.step, phase=phase, silent_s=silent_s)
            )
        del part
    return tuple(found)


_HEADER = ("job", "state", "launcher", "generation", "ranks", "step", "silent", "run directory")


def _row(job: JobStatus) -> tuple[str, ...]:
    steps = [rank.step for rank in job.ranks]
    span = "-" if not steps else str(min(steps)) if min(steps) == max(steps) else f"{min(steps)} to {max(steps)}"
    silent = human_seconds(min(rank.silent_s for rank in job.ranks)) if job.ranks else "-"
    name = job.job if job.seat == 0 else f"{job.job} (seat {job.seat})"
    agent = str(job.agent) if job.agent else "-"
    return (name, job.state, agent, job.generation, str(len(job.ranks)), span, silent, job.run_dir)
