"""Rehearsed failures of this node's agent and daemon, and the workers' steps that they wait for."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path

from holdfast.checkpoint.version import GenerationId
from holdfast.errors import HoldfastError
from holdfast.faults import NODE_KINDS, Injector, Kind, parse_schedule
from holdfast.launcher.events import AnyEvent, FaultFired
from holdfast.snapshot.control import ControlPage


class StepReader:
    """The newest finished step of each worker, from the node's control page. One thread."""

    def __init__(self, arena: Path) -> None:
        self._path = arena / "control"
        self._page: ControlPage | None = None

    def step(self, local_rank: int, pid: int) -> int:
        """Newest finished step that the process published at this seat, -1 where there is none."""
        if self._page is None:
            with contextlib.suppress(OSError, HoldfastError):
                self._page = ControlPage.open(self._path)
        if self._page is None:
            return -1
        part = self._page.rank(local_rank)
        return part.step if part.pid == pid else -1

    def close(self) -> None:
        """Unmap the page."""
        if self._page is not None:
            self._page.close()


class Rehearsal:
    """Carries out ``kill-agent`` and ``kill-daemon`` of a schedule; the other kinds are the workers' own."""

    def __init__(self, schedule: str, run_dir: Path, write: Callable[[AnyEvent], None]) -> None:
        self._schedule = parse_schedule(schedule)
        self._run_dir = run_dir
        self._write = write
        self._injector: Injector | None = None

    @property
    def due(self) -> bool:
        """Whether steps have to be watched."""
        return self._injector is not None

    def begin(self, generation: GenerationId, node_rank: int) -> None:
        """A generation starts."""
        self._injector = None
        if any(fault.kind in NODE_KINDS and fault.node == node_rank for fault in self._schedule):
            self._injector = Injector(self._schedule, self._run_dir, node=node_rank, generation=generation.generation)

    def fire(self, pids: Mapping[int, int], steps: StepReader | None, daemon_pid: int) -> None:
        """Carry out what is due; `pids`: the workers by local rank, `daemon_pid`: 0 where there is no daemon."""
        if self._injector is None or steps is None:
            return
        step = max((steps.step(local_rank, pid) for local_rank, pid in pids.items()), default=-1)
        fault = self._injector.node_fault(step) if step >= 0 else None
        if fault is None:
            return
        self._write(FaultFired(fault=str(fault), step=step))
        if fault.kind is Kind.KILL_AGENT:
            os.kill(os.getpid(), signal.SIGKILL)
        elif daemon_pid:
            os.kill(daemon_pid, signal.SIGKILL)
