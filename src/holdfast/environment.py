"""The one place where holdfast reads the environment, and the names of what it finds there.

The launcher sets these variables for the workers that it starts; `worker_environment` reads them back. A script that
runs under plain ``python`` or ``torchrun`` has none of them, and `worker_environment` returns None.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from holdfast.checkpoint.version import GenerationId
from holdfast.errors import UsageError

DAEMON = "HOLDFAST_DAEMON"
ARENA = "HOLDFAST_ARENA"
RUN_DIR = "HOLDFAST_RUN_DIR"
RUN_ID = "HOLDFAST_RUN_ID"
GENERATION = "HOLDFAST_GENERATION"
FAULTS = "HOLDFAST_FAULTS"
TOKEN = "HOLDFAST_TOKEN"
ENCRYPT = "HOLDFAST_ENCRYPT"
ISAL = "HOLDFAST_ISAL"
NODES = "HOLDFAST_NODES"


@dataclass(frozen=True, kw_only=True)
class WorkerEnvironment:
    """What a worker under ``holdfast run`` knows about its place."""

    daemon: str
    """ZeroMQ endpoint (ipc://) of the node's snapshot daemon."""
    arena: Path
    """Directory under /dev/shm that holds the control page and the slots of this node."""
    run_dir: Path
    """Directory of the run: events, stacks, fired faults."""
    run_id: str
    """Stable over restarts."""
    generation: GenerationId
    """Incarnation, nonce and generation that this worker belongs to."""
    global_rank: int
    local_rank: int
    node_rank: int
    world_size: int
    local_world_size: int
    ranks_per_node: tuple[int, ...] = ()
    """Number of ranks on each node, by node rank; () where all nodes have `local_world_size`."""

    def node_of(self, global_rank: int) -> int:
        """Node rank of a global rank."""
        first = 0
        for node_rank, count in enumerate(self.ranks_per_node):
            if global_rank < first + count:
                return node_rank
            first += count
        return (global_rank - first) // self.local_world_size + len(self.ranks_per_node)

    def variables(self) -> dict[str, str]:
        """The HOLDFAST_* part of the environment of this worker (torchrun's own variables are the launcher's)."""
        return {
            DAEMON: self.daemon,
            ARENA: str(self.arena),
            RUN_DIR: str(self.run_dir),
            RUN_ID: self.run_id,
            GENERATION: str(self.generation),
            **({NODES: ",".join(map(str, self.ranks_per_node))} if self.ranks_per_node else {}),
        }


def worker_environment(environ: Mapping[str, str] = os.environ) -> WorkerEnvironment | None:
    """Read the worker's place from the environment; None where no ``holdfast run`` started this process.

    Raises:
        UsageError: HOLDFAST_* variables are there but incomplete.
    """
    if DAEMON not in environ:
        return None
    try:
        return WorkerEnvironment(
            daemon=environ[DAEMON],
            arena=Path(environ[ARENA]),
            run_dir=Path(environ[RUN_DIR]),
            run_id=environ[RUN_ID],
            generation=GenerationId.parse(environ[GENERATION]),
            global_rank=int(environ["RANK"]),
            local_rank=int(environ["LOCAL_RANK"]),
            node_rank=int(environ["GROUP_RANK"]),
            world_size=int(environ["WORLD_SIZE"]),
            local_world_size=int(environ["LOCAL_WORLD_SIZE"]),
            ranks_per_node=_ranks_per_node(environ.get(NODES, ""), int(environ["WORLD_SIZE"])),
        )
    except KeyError as error:
        raise UsageError(
            f"{DAEMON} is set but {error.args[0]} is not: start the script with `holdfast run`, or unset {DAEMON}"
        ) from error


def _ranks_per_node(text: str, world_size: int) -> tuple[int, ...]:
    try:
        counts = tuple(int(count) for count in text.split(",")) if text else ()
    except ValueError as error:
        raise UsageError(f"{NODES}={text!r}: give the number of ranks of each node, as in 8,8,4") from error
    if counts and (sum(counts) != world_size or min(counts) < 1):
        raise UsageError(f"{NODES}={text!r} does not add up to WORLD_SIZE={world_size}")
    return counts


def fault_schedule(environ: Mapping[str, str] = os.environ) -> str:
    """The schedule of rehearsed faults, "" where there is none."""
    return environ.get(FAULTS, "")


def socket_interface(environ: Mapping[str, str] = os.environ) -> str:
    """The network interface that gloo or NCCL is told to use, "" where none is named (or several are)."""
    name = environ.get("GLOO_SOCKET_IFNAME") or environ.get("NCCL_SOCKET_IFNAME", "")
    return name.lstrip("=") if name and not set(name) & set(",^") else ""


def set_job_token(token: str, *, encrypt_all: bool) -> None:
    """Hand the token to the processes that this one starts."""
    if token:
        os.environ[TOKEN] = token
    os.environ[ENCRYPT] = "all" if encrypt_all else "control"


def job_token(environ: Mapping[str, str] = os.environ) -> str:
    """The token that the processes of the job share, "" where there is none."""
    return environ.get(TOKEN, "")


def encrypts_all(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether bulk data between nodes is encrypted too (``--hold-encrypt all``)."""
    return environ.get(ENCRYPT, "control") == "all"


def spool_folder(environ: Mapping[str, str] = os.environ) -> str:
    """Where large temporary files go: TMPDIR, else /var/tmp, which is on a disk where /tmp may be memory."""
    return environ.get("TMPDIR") or "/var/tmp"


def isal_library(environ: Mapping[str, str] = os.environ) -> str | None:
    """Path of the ISA-L library that the user asks for, ``"none"`` for the numpy kernel, None to search for one."""
    return environ.get(ISAL) or None


def announced_world_size(environ: Mapping[str, str] = os.environ) -> int:
    """WORLD_SIZE as torchrun and `holdfast run` set it; 1 where there is none."""
    try:
        return int(environ.get("WORLD_SIZE", "1"))
    except ValueError as error:
        raise UsageError(f"WORLD_SIZE={environ['WORLD_SIZE']!r} is no number") from error
