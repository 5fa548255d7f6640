"""The workers of one node in one generation: started, watched and ended through torch's log and error-file classes.

`WorkerGroup` is torch's `PContext` (log directories, redirects, tee with prefixes, filters, error files) with our own
spawning and ending. It never blocks: `signal_all` and `tick` move it on, and the agent's loop watches `descriptors`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import Template
from typing import IO, Any

from torch.distributed.elastic.multiprocessing.api import LogsSpecs, PContext, RunProcsResult
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.utils.api import macros

from holdfast.launcher.processes import Child, Guard, groups_in_use
from holdfast.launcher.standby import Standby
from holdfast.launcher.wire import Place, Plan, plain_text

logger = logging.getLogger(__name__)

LEFTOVER_POLL_S = 0.02
"""How often the process table is read while a worker's own children are given time to end."""
LEFTOVER_GRACE_S = 1.0
"""What they get between SIGTERM and SIGKILL."""
SURVIVED_S = 15.0
"""A worker that is still there so long after SIGKILL is in an uninterruptible sleep: nobody waits for it any longer."""


@dataclass(frozen=True, kw_only=True)
class WorkerSpec:
    """What every generation of this node runs."""

    command: str
    arguments: tuple[str, ...]
    num_workers: int
    role: str
    run_id: str
    """Rendezvous id, for TORCHELASTIC_RUN_ID and the log directory."""
    max_restarts: int
    virtual_local_rank: bool
    signals_to_handle: str
    log_prefix: str | None
    logs_specs: LogsSpecs
    numa_options: Any
    """torch.numa.binding.NumaOptions, which some supported releases of torch lack; None: no binding."""
    stdout_filters: tuple[str, ...] = ()
    stderr_filters: tuple[str, ...] = ()


def worker_variables(spec: WorkerSpec, plan: Plan, place: Place, local_rank: int) -> dict[str, str]:
    """torchrun's variables of one worker."""
    host, _, port = plan.store.rpartition(":")
    world_size = sum(other.num_ranks for other in plan.places)
    variables = {
        "RANK": str(place.first_global_rank + local_rank),
        "GROUP_RANK": str(place.node_rank),
        "ROLE_RANK": str(place.first_role_rank + local_rank),
        "ROLE_NAME": spec.role,
        "LOCAL_WORLD_SIZE": str(spec.num_workers),
        "WORLD_SIZE": str(world_size),
        "GROUP_WORLD_SIZE": str(len(plan.places)),
        "ROLE_WORLD_SIZE": str(place.role_world_size),
        "MASTER_ADDR": host,
        "MASTER_PORT": port,
        "TORCHELASTIC_RESTART_COUNT": str(plan.restart_count),
        "TORCHELASTIC_MAX_RESTARTS": str(spec.max_restarts),
        "TORCHELASTIC_RUN_ID": spec.run_id,
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_SIGNALS_TO_HANDLE": spec.signals_to_handle,
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1"),
    }
    return variables | _device_variables(spec, local_rank)


def _device_variables(spec: WorkerSpec, local_rank: int) -> dict[str, str]:
    if not spec.virtual_local_rank:
        return {"LOCAL_RANK": str(local_rank)}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible is not None else [str(rank) for rank in range(spec.num_workers)]
    if local_rank >= len(devices):
        raise ValueError(f"local rank {local_rank} has no device in CUDA_VISIBLE_DEVICES={visible}")
    return {"LOCAL_RANK": "0", "CUDA_VISIBLE_DEVICES": devices[local_rank].strip()}


@dataclass(frozen=True)
class WorkerExit:
    """One worker has ended."""

    local_rank: int
    pid: int
    exit_code: int


class WorkerGroup(PContext):
    """See the module's head. Made, used and ended by the agent's main thread."""

    def __init__(
        self,
        spec: WorkerSpec,
        plan: Plan,
        place: Place,
        *,
        guard: Guard,
        extra_variables: Mapping[int, Mapping[str, str]],
        inherited: Mapping[str, str],
        standby: Standby | None = None,
    ) -> None:
        """Lay out logs and environments.

        Args:
            spec: what runs.
            plan: the generation.
            place: this node's place in it.
            guard: ends groups that outlive the agent.
            extra_variables: by local rank, variables beside torchrun's.
            inherited: the environment that workers inherit.
            standby: forks workers once it is ready; until then it is told what they import.
        """
        local_ranks = range(spec.num_workers)
        self._spec = spec
        self._guard = guard
        self._inherited = inherited
        self._standby = standby
        self.num_forked = 0
        """Workers that came from the standby."""
        self._place = place
        self._children: dict[int, Child] = {}
        self._exits: dict[int, WorkerExit] = {}
        self._asked = False
        self._deadline: float | None = None
        self._killed = False
        self._killed_at = 0.0
        self._next_look = 0.0
        self._stopper: threading.Thread | None = None
        filters: dict[str, Any] = {}  # keyword arguments that older releases of torch lack
        if spec.stdout_filters:
            filters["duplicate_stdout_filters"] = list(spec.stdout_filters)
        if spec.stderr_filters:
            filters["duplicate_stderr_filters"] = list(spec.stderr_filters)
        super().__init__(
            spec.role,
            spec.command,
            {rank: tuple(macros.substitute(list(spec.arguments), str(rank))) for rank in local_ranks},
            {
                rank: worker_variables(spec, plan, place, rank) | dict(extra_variables.get(rank, {}))
                for rank in local_ranks
            },
            spec.logs_specs,
            _prefixes(spec, place),
            **filters,
        )

    # --- torch's interface

    def start(self) -> None:
        """Spawn all workers, then tail their logs. Unlike torch's, it installs no signal handlers.

        Raises:
            OSError: the command cannot be executed; workers already spawned are killed.
        """
        assert threading.current_thread() is threading.main_thread(), "workers would die with this thread"
        try:
            self._start()
        except BaseException:
            self._close(signal.SIGKILL)
            raise
        for tail in self._tail_logs:
            tail.start()

    def _start(self) -> None:
        for local_rank in range(self.nprocs):
            with contextlib.ExitStack() as files:
                stdout, stderr = (_open(files, paths[local_rank]) for paths in (self.stdouts, self.stderrs))
                child = self._forked(local_rank, stdout, stderr)
                self.num_forked += child is not None
                self._children[local_rank] = child or self._spawned(local_rank, stdout, stderr)

    def _variables(self, local_rank: int) -> dict[str, str]:
        return {**self._inherited, **self.envs[local_rank]}

    def _forked(self, local_rank: int, stdout: IO[str] | None, stderr: IO[str] | None) -> Child | None:
        if self._standby is None or not self._standby.ready:
            return None
        return self._standby.fork(self.args[local_rank], self._variables(local_rank), stdout=stdout, stderr=stderr)

    def _spawned(self, local_rank: int, stdout: IO[str] | None, stderr: IO[str] | None) -> Child:
        arguments = self.args[local_rank]
        if self._standby is not None and local_rank == 0:
            arguments = self._standby.recorded(arguments)
        return Child.spawn(
            self._bound((self._spec.command, *arguments), local_rank),
            environment=self._variables(local_rank),
            guard=self._guard,
            stdout=stdout,
            stderr=stderr,
        )

    def _bound(self, command: tuple[str, ...], local_rank: int) -> Sequence[str]:
        if self._spec.numa_options is None:
            return command
        from torch.numa.binding import _maybe_wrap_command_args_with_numa_binding as bind

        return bind(command, gpu_index=local_rank, numa_options=self._spec.numa_options)

    def _poll(self) -> RunProcsResult | None:
        if self.running():
            return None
        return RunProcsResult(failures=self.failures(), stdouts=self.stdouts, stderrs=self.stderrs)

    def common_variables(self) -> dict[str, str]:
        """The environment as far as all workers share it."""
        environments = [self._variables(local_rank).items() for local_rank in range(self.nprocs)]
        return dict(set(environments[0]).intersection(*environments[1:]))

    def pids(self) -> dict[int, int]:
        """Process ids by local rank."""
        return {local_rank: child.pid for local_rank, child in self._children.items()}

    def _close(self, death_sig: signal.Signals, timeout: int = 30) -> None:
        """End everything and wait; only the way out of an error, the agent's loop uses `signal_all` and `tick`."""
        for child in self._children.values():
            child.signal_group(signal.SIGKILL)
        for local_rank, child in self._children.items():
            os.waitid(os.P_PIDFD, child.pidfd, os.WEXITED | os.WNOWAIT)
            self._note_exit(local_rank)
        self._reap()

    # --- the agent's interface

    def descriptors(self) -> dict[int, int]:
        """pidfd by local rank, of workers that run."""
        return {rank: child.pidfd for rank, child in self._children.items() if rank not in self._exits}

    def running(self) -> bool:
        """Whether any worker runs."""
        return len(self._exits) < len(self._children)

    @property
    def stopping(self) -> bool:
        """Whether the workers were asked to end."""
        return self._asked

    def global_rank(self, local_rank: int) -> int:
        """Global rank of a worker of this node."""
        return self._place.first_global_rank + local_rank

    def collect(self) -> list[WorkerExit]:
        """Exits since the last call; what a signal killed stands before what it took along."""
        new = [exit_ for rank in self.descriptors() if (exit_ := self._note_exit(rank)) is not None]
        return sorted(new, key=lambda exit_: exit_.exit_code >= 0)

    def _note_exit(self, local_rank: int) -> WorkerExit | None:
        child = self._children[local_rank]
        code = child.exit_code()
        if code is None:
            return None
        return self._exits.setdefault(local_rank, WorkerExit(local_rank, child.pid, code))

    def signal_all(self, number: int) -> None:
        """Signal every worker's group."""
        for child in self._children.values():
            child.signal_group(number)

    def begin_stop(self, number: int, grace_s: float, now: float) -> None:
        """End all workers: the signal now, SIGKILL after the grace. Called again, the earlier deadline holds."""
        self._asked = True
        self._end(number, now + grace_s)

    def _end(self, number: int, deadline: float) -> None:
        if self._deadline is None:
            self.signal_all(number)
            self._deadline = deadline
        self._deadline = min(self._deadline, deadline)

    def tick(self, now: float) -> bool:
        """Move on; True once every worker and what it started has ended and was reaped."""
        if not self._children:
            return True
        if self._deadline is not None and now >= self._deadline and not self._killed:
            self._killed, self._killed_at = True, now
            self.signal_all(signal.SIGKILL)
        if self.running():
            return False
        if not self._killed and now >= self._next_look:
            self._next_look = now + LEFTOVER_POLL_S
            groups = frozenset(child.pid for child in self._children.values())
            if groups_in_use(groups):
                if self._deadline is None:
                    self._end(signal.SIGTERM, now + LEFTOVER_GRACE_S)
                return False
        elif not self._killed:
            return False
        self._reap()
        return True

    def survivors(self, now: float) -> dict[int, int]:
        """Workers that have outlived SIGKILL for too long: process id by local rank."""
        if not self._killed or now - self._killed_at < SURVIVED_S:
            return {}
        return {rank: child.pid for rank, child in self._children.items() if rank not in self._exits}

    def abandon(self) -> None:
        """Wait for nobody any longer: what has ended is reaped, the rest stays as it is."""
        self._children = {rank: child for rank, child in self._children.items() if rank in self._exits}
        self._reap()

    def next_wake(self, now: float) -> float | None:
        """Seconds until `tick` has something to do, None where only an exit can move it on."""
        if not self._children:
            return None
        if not self.running():
            return max(0.0, self._next_look - now)
        if self._deadline is not None and not self._killed:
            return max(0.0, self._deadline - now)
        return None

    def _reap(self) -> None:
        for child in self._children.values():
            child.reap()
        self._children.clear()
        self._stopper = threading.Thread(target=self._stop_tails, name="holdfast-tails", daemon=True)
        self._stopper.start()

    def _stop_tails(self) -> None:
        """Read the logs to their ends: up to a tenth of a second, or as long as a slow console takes."""
        for tail in self._tail_logs:
            tail.stop()
        for file in (self.filtered_stdout, self.filtered_stderr):
            if file is not None:
                file.close()

    def finish_logs(self, timeout_s: float) -> None:
        """Wait until everything that workers printed has been passed on."""
        if self._stopper is not None:
            self._stopper.join(timeout_s)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or never opened, by who started us
                stream.flush()

    def failure(self, exit_: WorkerExit) -> ProcessFailure:
        """torch's record of a failed worker, with its error file; without one that was cut short.

        A worker that is killed while it writes the file, or finds the disk full, leaves what torch cannot read.
        """
        path = self.error_files[exit_.local_rank]
        try:
            return _failure(exit_, path if _is_json(path) else "")
        except Exception:  # noqa: BLE001 - whatever torch makes of a file that a script may have written; told in the log
            logger.warning("%s is no error file", path)
            return _failure(exit_, "")

    def failures(self) -> dict[int, ProcessFailure]:
        """By global rank, in the order in which they were noticed."""
        first = self._place.first_global_rank
        return {first + e.local_rank: self.failure(e) for e in self._exits.values() if e.exit_code != 0}


def _failure(exit_: WorkerExit, error_file: str) -> ProcessFailure:
    return ProcessFailure(local_rank=exit_.local_rank, pid=exit_.pid, exitcode=exit_.exit_code, error_file=error_file)


def _is_json(path: str) -> bool:
    """Whether there is a file that torch can read: it would tell of another one with a traceback of its own."""
    try:
        with open(path, "rb") as file:
            json.load(file)
    except (OSError, ValueError, RecursionError):
        return False
    return True


def _open(files: contextlib.ExitStack, path: str) -> IO[str] | None:
    return files.enter_context(open(path, "w")) if path else None


def _prefixes(spec: WorkerSpec, place: Place) -> dict[int, str] | None:
    if not spec.log_prefix:
        return None
    return {
        rank: Template(spec.log_prefix).safe_substitute(
            role_name=spec.role, rank=place.first_global_rank + rank, local_rank=rank
        )
        for rank in range(spec.num_workers)
    }


def message_of(failure: ProcessFailure) -> str:
    """The exception of a failed worker in one line, "" where it left no error file."""
    message: Any = failure.error_file_data.get("message") if failure.error_file != "<N/A>" else ""
    if isinstance(message, Mapping):
        message = message.get("message", "")
    lines = str(message or "").strip().splitlines()
    return plain_text(lines[0]) if lines else ""


def cannot_run(command: str, error: OSError | ValueError) -> str:
    """One line for workers that could not be started, with the file that the system named."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    name = error.filename if isinstance(error, OSError) else None
    return plain_text(f"{command} cannot be run: {reason}" + (f" ({name})" if name not in (None, command) else ""))
