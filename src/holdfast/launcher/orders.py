"""What the command line and the leader's plan mean for this node's workers and its snapshot daemon. Pure."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from holdfast import environment
from holdfast.checkpoint.version import new_nonce
from holdfast.environment import WorkerEnvironment
from holdfast.launcher.arguments import Launch
from holdfast.launcher.seats import Seat
from holdfast.launcher.wire import NodeInfo, Place, Plan
from holdfast.launcher.workers import WorkerSpec
from holdfast.snapshot.messages import StartGeneration
from holdfast.snapshot.records import Member

OURS = (environment.DAEMON, environment.ARENA, environment.RUN_DIR, environment.RUN_ID, environment.GENERATION)
"""Variables that a worker never inherits from the agent's own environment."""


def worker_spec(launch: Launch) -> WorkerSpec:
    """What every generation of this node runs."""
    config = launch.config
    return WorkerSpec(
        command=launch.command,
        arguments=launch.arguments,
        num_workers=config.nproc_per_node,
        role=config.role,
        run_id=config.run_id,
        max_restarts=config.max_restarts,
        virtual_local_rank=getattr(config, "virtual_local_rank", False),
        signals_to_handle=getattr(config, "signals_to_handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT"),
        log_prefix=config.log_line_prefix_template,
        logs_specs=config.logs_specs,
        numa_options=getattr(config, "numa_options", None),
        stdout_filters=tuple(getattr(config, "duplicate_stdout_filters", None) or ()),
        stderr_filters=tuple(getattr(config, "duplicate_stderr_filters", None) or ()),
    )


def node_info(launch: Launch, address: str = "") -> NodeInfo:
    """Who this agent is to the others; `address`: host:port where it hears them."""
    return NodeInfo(
        node_id=f"{socket.gethostname()}-{os.getpid()}-{new_nonce()}",
        job=launch.meeting.rendezvous_id or "",
        host=socket.gethostname(),
        pid=os.getpid(),
        role=launch.config.role,
        num_workers=launch.config.nproc_per_node,
        rank_hint=launch.meeting.node_rank,
        address=address,
    )


def start_message(plan: Plan, place: Place) -> StartGeneration:
    """What the snapshot daemon is told of a generation."""
    assert plan.generation is not None, "a run without a generation"
    return StartGeneration(
        generation=plan.generation,
        run_id=plan.run_id,
        members=tuple(
            Member(
                node_rank=other.node_rank,
                daemon=other.daemon,
                first_global_rank=other.first_global_rank,
                num_ranks=other.num_ranks,
            )
            for other in plan.places
        ),
        node_rank=place.node_rank,
        leader=0,
        fresh=plan.fresh,
    )


def holdfast_variables(
    plan: Plan, place: Place, local_rank: int, *, seat: Seat, run_dir: Path, daemon: str, faults: str
) -> dict[str, str]:
    """The HOLDFAST_* variables of one worker; without a daemon ("") only those that name the run."""
    assert plan.generation is not None, "workers belong to a generation"
    where = WorkerEnvironment(
        daemon=daemon,
        arena=seat.arena,
        run_dir=run_dir,
        run_id=plan.run_id,
        generation=plan.generation,
        global_rank=place.first_global_rank + local_rank,
        local_rank=local_rank,
        node_rank=place.node_rank,
        world_size=sum(other.num_ranks for other in plan.places),
        local_world_size=place.num_ranks,
        ranks_per_node=tuple(other.num_ranks for other in sorted(plan.places, key=lambda other: other.node_rank)),
    )
    variables = where.variables()
    if not daemon:
        variables = {name: variables[name] for name in (environment.RUN_ID, environment.RUN_DIR)}
    return variables | ({environment.FAULTS: faults} if faults else {})
