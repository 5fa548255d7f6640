"""Rehearsed failures: one schedule of what breaks, where and when, and the injector that makes it happen, once.

A schedule is text, entries separated by ``;``, each one ``kind:key=value,...``::

    kill:rank=1,step=20,when=copy;raise:rank=0,step=31

It comes from ``holdfast run --hold-faults``, from the variable HOLDFAST_FAULTS, or from a test (`holdfast.testing`).

``step`` is `Session.step` (completed steps) at the instant: with ``when=begin`` the number that ``steps()`` yields,
with ``when=copy`` the number of the version that is being copied. A fault fires at the first such instant at or after
its step, once per run: what fired is written to ``faults.jsonl`` in the run's directory, and synced, before anything
breaks, so that no restart repeats it.

This module imports neither torch nor anything above `holdfast.environment`.
"""

from __future__ import annotations

import dataclasses
import enum
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from holdfast.environment import WorkerEnvironment, fault_schedule
from holdfast.errors import DECODE_ERRORS, UsageError

RECORD_NAME = "faults.jsonl"
"""File in the run's directory that lists what fired."""


class Kind(enum.StrEnum):
    """What breaks."""

    KILL = "kill"
    """SIGKILL of the worker."""
    RAISE = "raise"
    """`RehearsedFault` is raised in the worker."""
    EXIT = "exit"
    """The worker ends at once with exit code ``code``."""
    HANG = "hang"
    """SIGSTOP of the worker: every thread of it stands still."""
    PYHANG = "pyhang"
    """The calling thread of the worker sleeps for ``seconds``; its other threads go on."""
    SLOW = "slow"
    """The worker sleeps for ``seconds`` at this instant of ``steps`` steps."""
    CORRUPT = "corrupt"
    """One bit of the worker's slot flips after its checksums were taken."""
    KILL_AGENT = "kill-agent"
    """SIGKILL of the node's agent."""
    KILL_DAEMON = "kill-daemon"
    """SIGKILL of the node's snapshot daemon."""


class When(enum.StrEnum):
    """The instant of a step at which it breaks."""

    BEGIN = "begin"
    """Start of the loop body."""
    FORWARD = "forward"
    """In the middle of the forward pass."""
    LOSS = "loss"
    """After the forward pass of the whole model, before backward."""
    BACKWARD = "backward"
    """In the middle of the backward pass."""
    OPTIMIZER = "optimizer"
    """Just before an optimizer updates."""
    UPDATED = "updated"
    """Just after an optimizer updated."""
    BOUNDARY = "boundary"
    """At the session boundary, before anything is copied."""
    COPY = "copy"
    """In the middle of a copy into a slot."""
    COPIED = "copied"
    """All bytes are in the slot, which does not say clean yet."""
    COMMIT = "commit"
    """The slot is clean, the daemon has not been told."""
    RESTORE = "restore"
    """While state is restored after an earlier failure; ``step`` may be left out."""


HOOK_INSTANTS = (When.FORWARD, When.LOSS, When.BACKWARD, When.OPTIMIZER, When.UPDATED)
"""Instants inside the user's code, which `holdfast.testing.install_hooks` reaches; the others are in our own code."""
NODE_KINDS = frozenset({Kind.KILL_AGENT, Kind.KILL_DAEMON})
"""Kinds that the agent carries out; all others happen in a worker."""
_SLEEPING_KINDS = frozenset({Kind.SLOW, Kind.PYHANG})


class RehearsedFault(RuntimeError):
    """The exception of a ``raise`` fault. Outside the error tree of holdfast: it stands for an error of the user's."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One entry of a schedule."""

    kind: Kind
    step: int | None = None
    """`Session.step` from which on it is due; None (``when=restore`` only): any."""
    rank: int | None = None
    """Global rank of the worker; None for the kinds of a node."""
    node: int | None = None
    """Node rank of the agent or daemon; None for the kinds of a worker."""
    when: When = When.BEGIN
    seconds: float | None = None
    """Length of the sleep: slow (default 1) and pyhang (default 3600)."""
    code: int = 1
    """Exit code: exit only, 0 to 255."""
    steps: int = 1
    """Of how many steps: slow only."""
    generation: int | None = None
    """Only in the generation of this number; None: any."""

    def __post_init__(self) -> None:
        """Check the combination.

        Raises:
            UsageError: the fields do not fit each other.
        """
        problem = _problem(self)
        if problem is not None:
            raise UsageError(f"fault {self}: {problem}")

    def __str__(self) -> str:
        """The entry as a schedule writes it; `parse_schedule` reads it back."""
        pairs = [
            f"{field.name}={getattr(self, field.name)}"
            for field in dataclasses.fields(self)
            if field.name != "kind" and getattr(self, field.name) != field.default
        ]
        return f"{self.kind}:{','.join(pairs)}" if pairs else str(self.kind)

    @property
    def sleep_s(self) -> float:
        """Length of the sleep in seconds, the kind's default where none was given."""
        if self.seconds is not None:
            return self.seconds
        return 3600.0 if self.kind is Kind.PYHANG else 1.0


def _problem(fault: Fault) -> str | None:
    """What is wrong with the combination of fields, in one clause."""
    if fault.kind in NODE_KINDS:
        if fault.rank is not None:
            return "takes node=, not rank="
        if fault.node is None or fault.node < 0:
            return "needs node=, a number from 0 on"
        if fault.when is not When.BEGIN:
            return "takes no when=: the agent acts as soon as a worker of its node has finished the step"
    elif fault.node is not None:
        return "takes rank=, not node="
    elif fault.rank is None or fault.rank < 0:
        return "needs rank=, a number from 0 on"
    if fault.step is None and fault.when is not When.RESTORE:
        return "needs step="
    if fault.step is not None and fault.step < 0:
        return "step= must not be negative"
    return _problem_of_details(fault)


def _problem_of_details(fault: Fault) -> str | None:
    if fault.seconds is not None and (fault.kind not in _SLEEPING_KINDS or not 0 < fault.seconds < float("inf")):
        return "seconds= belongs to slow and pyhang, and must be positive"
    if not 0 <= fault.code <= 255 or (fault.code != 1 and fault.kind is not Kind.EXIT):
        return "code= belongs to exit, and must be 0 to 255"
    if fault.steps < 1 or (fault.steps != 1 and fault.kind is not Kind.SLOW):
        return "steps= belongs to slow, and must be positive"
    if fault.kind is Kind.CORRUPT and fault.when is not When.COMMIT:
        return "can only happen with when=commit"
    return None


_INTEGERS = frozenset({"step", "rank", "node", "code", "steps", "generation"})
_KEYS = tuple(field.name for field in dataclasses.fields(Fault) if field.name != "kind")


def parse_schedule(text: str) -> tuple[Fault, ...]:
    """The faults that `text` lists; empty text lists none.

    Args:
        text: ``kind:key=value,...`` entries separated by ``;``.

    Raises:
        UsageError: `text` is no schedule; one line that names the entry and what was expected.
    """
    return tuple(_parse_entry(entry.strip()) for entry in text.split(";") if entry.strip())


def format_schedule(faults: Iterable[Fault]) -> str:
    """The text that `parse_schedule` reads back into `faults`."""
    return ";".join(str(fault) for fault in faults)


def _parse_entry(entry: str) -> Fault:
    name, _, rest = entry.partition(":")
    try:
        kind = Kind(name.strip())
    except ValueError as error:
        raise UsageError(f"fault {entry!r}: unknown kind {name!r}, expected one of {', '.join(Kind)}") from error
    pairs: dict[str, object] = {}
    for pair in filter(None, (part.strip() for part in rest.split(","))):
        key, equals, value = (part.strip() for part in pair.partition("="))
        if key not in _KEYS or not equals:
            raise UsageError(f"fault {entry!r}: {pair!r} is no key=value with one of the keys {', '.join(_KEYS)}")
        if key in pairs:
            raise UsageError(f"fault {entry!r}: {key}= is given twice")
        pairs[key] = _parse_value(entry, key, value)
    if kind in NODE_KINDS and "rank" not in pairs:
        pairs.setdefault("node", 0)
    if kind is Kind.CORRUPT:
        pairs.setdefault("when", When.COMMIT)
    return Fault(kind=kind, **pairs)  # type: ignore[arg-type]  # each value was made by the parser of its key


def _parse_value(entry: str, key: str, value: str) -> object:
    try:
        if key == "when":
            return When(value)
        return int(value) if key in _INTEGERS else float(value)
    except ValueError as error:
        expected = f"one of {', '.join(When)}" if key == "when" else "a number"
        raise UsageError(f"fault {entry!r}: {key}={value!r} is not {expected}") from error


class Fired(msgspec.Struct, frozen=True, kw_only=True):
    """One line of ``faults.jsonl``: a fault that was about to happen."""

    index: int
    """Position in the schedule, from 0."""
    fault: str
    """The entry's text."""
    step: int
    generation: int | None
    pid: int
    time: float
    """time.time() just before it fired."""


def read_fired(run_dir: Path) -> tuple[Fired, ...]:
    """What has fired in the run, oldest first; a line torn by a crash is left out."""
    try:
        lines = (run_dir / RECORD_NAME).read_bytes().splitlines()
    except FileNotFoundError:
        return ()
    fired = []
    for line in lines:
        try:
            fired.append(msgspec.json.decode(line, type=Fired))
        except DECODE_ERRORS:
            continue
    return tuple(fired)


class Injector:
    """Fires the faults of one worker, or of one node's agent.

    `at` may be called from any thread of the process; a fault still fires once. Without faults it costs one comparison.
    """

    def __init__(
        self,
        schedule: Iterable[Fault],
        run_dir: Path | None,
        *,
        rank: int | None = None,
        node: int | None = None,
        generation: int | None = None,
    ) -> None:
        """Keep the faults of this rank (or node) that may still fire in this generation.

        Args:
            schedule: all faults of the run, in order.
            run_dir: directory of ``faults.jsonl``; None: remember in this process only.
            rank: this worker's global rank.
            node: this agent's node rank.
            generation: number of the current generation.
        """
        self._run_dir = run_dir
        self._generation = generation
        self._lock = threading.Lock()
        done = {fired.index for fired in read_fired(run_dir)} if run_dir is not None else set()
        # Guarded by _lock once threads exist.
        self._pending: dict[int, Fault] = {
            index: fault
            for index, fault in enumerate(schedule)
            if index not in done
            and (fault.rank == rank if fault.node is None else fault.node == node)
            and fault.generation in (None, generation)
        }
        self._repeats: dict[int, int] = {}
        """Steps that a slow fault, already recorded, still has to slow, by index."""

    @classmethod
    def for_worker(cls, environment: WorkerEnvironment | None, *, global_rank: int = 0) -> Injector:
        """The injector of this worker, from HOLDFAST_FAULTS; under plain ``python`` or ``torchrun`` too.

        Args:
            environment: where ``holdfast run`` placed this worker; None under other launchers.
            global_rank: this worker's rank where `environment` is None.

        Raises:
            UsageError: HOLDFAST_FAULTS is no schedule.
        """
        schedule = parse_schedule(fault_schedule())
        if environment is None:
            return cls(schedule, None, rank=global_rank)
        return cls(
            schedule,
            environment.run_dir,
            rank=environment.global_rank,
            generation=environment.generation.generation,
        )

    def wants(self, *instants: When) -> bool:
        """Whether a fault at one of these instants may still fire: hooks are installed only then."""
        return any(fault.when in instants and fault.kind not in NODE_KINDS for fault in self._pending.values())

    def at(self, when: When | str, step: int, *, buffer: memoryview | None = None) -> None:
        """Fire what is due at this instant of a worker. It may not return.

        Args:
            when: the instant.
            step: `Session.step` now; for copy and commit the step of the version.
            buffer: the image in the slot (bytes, writable), which ``corrupt`` damages; it is not due without one.

        Raises:
            RehearsedFault: a ``raise`` fault is due.
        """
        if not self._pending:
            return
        for fault in self._due(When(when), step, has_buffer=buffer is not None):
            self._fire(fault, step, buffer)

    def node_fault(self, step: int) -> Fault | None:
        """The kill-agent or kill-daemon that is due, recorded as fired; the agent that calls this carries it out.

        Args:
            step: the newest step that a worker of this node has finished.
        """
        if not self._pending:
            return None
        with self._lock:
            for index, fault in self._pending.items():
                if fault.kind in NODE_KINDS and fault.step is not None and step >= fault.step:
                    del self._pending[index]
                    self._record(index, fault, step)
                    return fault
        return None

    def _due(self, when: When, step: int, *, has_buffer: bool) -> list[Fault]:
        """Take and record what fires now; a fault is handed out to one thread only."""
        due = []
        with self._lock:
            for index, fault in list(self._pending.items()):
                if fault.when is not when or fault.kind in NODE_KINDS or (fault.step is not None and step < fault.step):
                    continue
                if fault.kind is Kind.CORRUPT and not has_buffer:
                    continue
                left = self._repeats.get(index)
                if left is None:
                    self._record(index, fault, step)
                    left = fault.steps
                self._repeats[index] = left - 1
                if left == 1:
                    del self._pending[index]
                due.append(fault)
        return due

    def _record(self, index: int, fault: Fault, step: int) -> None:
        """Write down, durably, that the fault fires: a worker that dies of it must not meet it again."""
        if self._run_dir is None:
            return
        fired = Fired(
            index=index, fault=str(fault), step=step, generation=self._generation, pid=os.getpid(), time=time.time()
        )
        descriptor = os.open(self._run_dir / RECORD_NAME, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.write(descriptor, msgspec.json.encode(fired) + b"\n")
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _fire(self, fault: Fault, step: int, buffer: memoryview | None) -> None:
        match fault.kind:
            case Kind.KILL:
                os.kill(os.getpid(), signal.SIGKILL)
            case Kind.HANG:
                os.kill(os.getpid(), signal.SIGSTOP)
            case Kind.EXIT:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(fault.code)
            case Kind.RAISE:
                raise RehearsedFault(f"rehearsed failure of rank {fault.rank} at step {step} ({fault})")
            case Kind.SLOW | Kind.PYHANG:
                time.sleep(fault.sleep_s)
            case Kind.CORRUPT:
                assert buffer is not None, "corrupt was due without a buffer"
                flip_bit(buffer)
            case Kind.KILL_AGENT | Kind.KILL_DAEMON:
                raise AssertionError(f"{fault.kind} is the agent's to carry out, not a worker's")


def flip_bit(image: memoryview) -> None:
    """Flip one bit in the middle of an image's data (what follows the first 4096 bytes, where there is that much)."""
    data = image.cast("B")
    start = 4096 if len(data) > 4096 else 0
    position = start + (len(data) - start) // 2
    data[position] ^= 1
