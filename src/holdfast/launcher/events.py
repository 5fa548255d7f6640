"""The event log of a run: ``events.jsonl`` in the run directory, one JSON object per line, appended, never rewritten.

Schema version 1
----------------
Every line has these fields:

    schema      1
    kind        one of the kinds below
    time        seconds since 1970 (time.time()) at the agent that wrote the line
    host        host name of that agent
    agent       its process id
    node        node rank in the generation, -1 before there is one
    generation  "i01-7f3a9c02-g0004", "" before there is one

Kinds, and the fields that each one adds (fields that have their default are left out):

    run_started         run_id, command, arguments, nproc, job
    generation_started  members (hosts by node rank), world_size, restart_count, store, pids (of this node),
                        forked (how many of them the standby gave)
    worker_failed       global_rank, local_rank, pid, exit_code (negative: signal), signal (name), message, step
    membership          text, change (node_joined, node_lost, node_left, forming, running, stopping, stopped,
                        asked_to_stop, asked_to_grow, asked_to_drain, waiting, claim_lost, leader_lost, leads, yielded)
    recovery            cause, tier (memory, peers, storage, none, ""), step, steps_lost, restart_count, and `phases`:
                        seconds since the failure was detected at which the job had: stopped (no old worker left
                        anywhere), agreed (new generation named), started (all workers spawned), opened (all Sessions
                        opened), restored, first_step (all ranks finished one). Phases that were not reached are absent;
                        without a Session only the first three are there. Written by the leader's agent only.
    daemon              change (started, adopted, died, failed), pid, text
    standby             change (ready, failed), pid, modules (that it has imported), text
    notice              severity (info, warning, error), text; about and count where it is counted: divergence,
                        damage
    health              check (as in `holdfast doctor`), status (ok: well again, warn, fail), text
    hang                change (dump, suspected, resumed, hung), global_rank (that stopped first), step, text
    straggler           global_rank, slow (false: it has caught up), text
    stop_requested      signal (name, "notice file" or "health check"), urgent, node_only (only this node leaves)
    fault               fault (the entry of the schedule that this agent is about to carry out), step
    run_ended           outcome (done, failed, stopped, drained: this node only), exit_code, reason, persisted (version
                        in storage), path

Agents of several nodes that share the run directory append to the same file.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType

import msgspec

from holdfast.errors import DECODE_ERRORS
from holdfast.launcher.console import say

SCHEMA = 1
FILE_NAME = "events.jsonl"


class Event(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", omit_defaults=True):
    """What stands in every line."""

    time: float = 0.0
    host: str = ""
    agent: int = 0
    node: int = -1
    generation: str = ""


class RunStarted(Event, frozen=True, kw_only=True, tag="run_started", omit_defaults=True):
    """An agent begins."""

    run_id: str
    command: str
    arguments: tuple[str, ...]
    nproc: int
    job: str


class GenerationStarted(Event, frozen=True, kw_only=True, tag="generation_started", omit_defaults=True):
    """The workers of a generation were spawned on this node."""

    members: tuple[str, ...]
    world_size: int
    restart_count: int
    store: str
    pids: tuple[int, ...]
    forked: int = 0


class WorkerFailed(Event, frozen=True, kw_only=True, tag="worker_failed", omit_defaults=True):
    """A worker of this node ended with a code other than 0, before anybody asked it to."""

    global_rank: int
    local_rank: int
    pid: int
    exit_code: int
    signal: str = ""
    message: str = ""
    step: int = -1


class Membership(Event, frozen=True, kw_only=True, tag="membership", omit_defaults=True):
    """A decision of the leader, or the loss of it."""

    change: str
    text: str


class Recovery(Event, frozen=True, kw_only=True, tag="recovery", omit_defaults=True):
    """A generation that follows a failure is on its way again."""

    cause: str
    restart_count: int
    tier: str
    step: int
    steps_lost: int
    phases: dict[str, float]
    reason: str = ""
    """Why the state came from there: what was decoded, or why memory could not give it."""


class DaemonChanged(Event, frozen=True, kw_only=True, tag="daemon", omit_defaults=True):
    """Something happened to this node's snapshot daemon."""

    change: str
    pid: int = 0
    text: str = ""


class StandbyEvent(Event, frozen=True, kw_only=True, tag="standby", omit_defaults=True):
    """This node's standby can fork workers, or cannot any more."""

    change: str
    pid: int = 0
    modules: int = 0
    text: str = ""


class Noticed(Event, frozen=True, kw_only=True, tag="notice", omit_defaults=True):
    """A line for people, from the snapshot daemon."""

    severity: str
    text: str
    about: str = ""
    """What is counted: divergence (copies that should agree do not), damage (bytes in memory or between nodes that did
    not match their checksums)."""
    count: int = 0
    """How many of that this agent has heard of, those of this line too."""


class HealthEvent(Event, frozen=True, kw_only=True, tag="health", omit_defaults=True):
    """A check of this host found something that is not well, or well again."""

    check: str
    status: str
    text: str


class HangEvent(Event, frozen=True, kw_only=True, tag="hang", omit_defaults=True):
    """The job is silent, goes on after all, or hangs; written by the leader's agent."""

    change: str
    text: str
    global_rank: int = -1
    step: int = -1


class StragglerEvent(Event, frozen=True, kw_only=True, tag="straggler", omit_defaults=True):
    """A rank is persistently slower than the others, or no longer; written by the leader's agent."""

    global_rank: int
    slow: bool
    text: str


class StopRequested(Event, frozen=True, kw_only=True, tag="stop_requested", omit_defaults=True):
    """A signal asked this agent to end the job, or to leave it."""

    signal: str
    urgent: bool = False
    node_only: bool = False


class FaultFired(Event, frozen=True, kw_only=True, tag="fault", omit_defaults=True):
    """A rehearsed fault that the agent carries out."""

    fault: str
    step: int


class RunEnded(Event, frozen=True, kw_only=True, tag="run_ended", omit_defaults=True):
    """An agent leaves."""

    outcome: str
    exit_code: int
    reason: str
    persisted: str = ""
    path: str = ""


AnyEvent = (
    RunStarted
    | GenerationStarted
    | WorkerFailed
    | Membership
    | Recovery
    | DaemonChanged
    | StandbyEvent
    | Noticed
    | HealthEvent
    | HangEvent
    | StragglerEvent
    | StopRequested
    | FaultFired
    | RunEnded
)


class EventLog:
    """Appends to the event log; one write per line, so that agents that share it do not tear each other's lines.

    A log that cannot be written (a full disk, a file server that is away) is no reason to end a job: the line is lost,
    which is said once, and counted in a line of its own as soon as there is room again.
    """

    def __init__(self, run_dir: Path, host: str) -> None:
        self._path = run_dir / FILE_NAME
        self._host = host
        self._descriptor: int | None = None
        self._lost = 0
        self._torn = False
        """The newest line was cut short."""
        self._node = -1
        self._generation = ""

    def __enter__(self) -> EventLog:
        self._descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def enter(self, node: int, generation: str) -> None:
        """Lines from here on belong to this generation."""
        self._node, self._generation = node, generation

    def write(self, event: AnyEvent, time_s: float) -> None:
        """Append `event` as having happened at `time_s` (time.time())."""
        if self._lost and self._append(self._line(_lost_lines(self._lost), time_s)):
            self._lost = 0
        if self._lost or not self._append(self._line(event, time_s)):
            self._lost += 1

    def _line(self, event: AnyEvent, time_s: float) -> bytes:
        full = msgspec.structs.replace(
            event,
            time=round(time_s, 4),
            host=event.host or self._host,
            agent=event.agent or os.getpid(),
            node=event.node if event.node >= 0 else self._node,
            generation=event.generation or self._generation,
        )
        fields = {"schema": SCHEMA, **msgspec.to_builtins(full)}
        try:
            return msgspec.json.encode(fields) + b"\n"
        except UnicodeEncodeError:  # an argument or a path that is not UTF-8
            return json.dumps(fields, ensure_ascii=False).encode(errors="replace") + b"\n"

    def _append(self, line: bytes) -> bool:
        """Whether the whole line is there."""
        assert self._descriptor is not None, "the event log is not open"
        data = b"\n" + line if self._torn else line
        try:
            written = os.write(self._descriptor, data)
        except OSError as error:
            self._complain(error.strerror or str(error))
            return False
        self._torn = written < len(data) and (self._torn or written > 0)
        if written < len(data):
            self._complain("there is room for a part of a line only")
        return written == len(data)

    def _complain(self, reason: str) -> None:
        if not self._lost:
            say(f"{self._path} cannot be written: {reason}; the job goes on without it")


def _lost_lines(count: int) -> Noticed:
    return Noticed(severity="warning", text=f"{count} events could not be written, and are lost")


def read_events(run_dir: Path) -> list[dict[str, object]]:
    """All complete lines of a run's event log, oldest first; none where there is no log yet."""
    events: list[dict[str, object]] = []
    path = run_dir / FILE_NAME
    if not path.exists():
        return events
    for line in path.read_bytes().splitlines():
        try:
            events.append(msgspec.json.decode(line, type=dict[str, object]))
        except DECODE_ERRORS:
            continue
    return events
