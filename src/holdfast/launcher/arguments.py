"""The command line of ``holdfast run``: torch's own parser, plus the ``--hold-…`` flags.

torch's flags, both spellings, abbreviations and ``PET_*`` defaults are torch's because the parser is
`torch.distributed.run.get_args_parser`. Ours follow the same conventions: ``--hold-job`` and ``--hold_job``, defaults
from ``PET_HOLD_JOB``. Wrong usage is a `UsageError`, one line.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from holdfast.erasure.redundancy import Redundancy
from holdfast.errors import UsageError
from holdfast.faults import parse_schedule
from holdfast.launcher.limits import Limits
from holdfast.snapshot.control import MAX_LOCAL_RANKS

DEFAULT_PORT = 29400
"""torch's default port of a c10d endpoint."""
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", re.IGNORECASE)
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|min|m|h)?")
_SECONDS = {None: 1.0, "ms": 1e-3, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}

EPILOG = """example:
  holdfast run --nproc-per-node 2 --hold-faults 'kill:rank=1,step=20' train.py --lr 3e-4

Every flag of torchrun is accepted. A script without holdfast.Session runs as under torchrun."""


def parse_size(text: str) -> int:
    """Bytes of "8G", "512MiB", "1000000"; units are powers of 1024."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: expected something like 8G or 512M")
    return int(float(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " "))


def parse_duration(text: str) -> float:
    """Seconds of "30", "90s", "10m", "1.5h"."""
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no duration: expected something like 30, 90s or 10m")
    return float(match[1]) * _SECONDS[match[2]]


def _parse_timeout(text: str) -> float:
    seconds = parse_duration(text)
    if seconds <= 0:
        raise argparse.ArgumentTypeError(f"{text!r}: expected more than 0")
    return seconds


def _parse_health(text: str) -> str:
    if text not in ("off", "warn", "strict"):
        raise argparse.ArgumentTypeError(f"{text!r} is none of off, warn, strict")
    return text


def _parse_exit_code(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= 255:
        raise argparse.ArgumentTypeError(f"{text!r} is no exit code for an unfinished job: expected 1 to 255")
    return int(text)


def _parse_redundancy(text: str) -> str:
    try:
        return str(Redundancy.parse(text))
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _parse_encrypt(text: str) -> str:
    if text not in ("control", "all"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither control nor all")
    return text


def _parse_count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of nodes: expected 1 or more")
    return int(text)


def _parse_restarts(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of restarts: expected 1 or more")
    return int(text)


def _parse_switch(text: str) -> bool:
    if text not in ("0", "1"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither 0 nor 1")
    return text == "1"


def _parse_faults(text: str) -> str:
    try:
        parse_schedule(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


@dataclass(frozen=True, kw_only=True)
class HoldOptions:
    """The ``--hold-…`` flags."""

    job: str | None = None
    """Name of the job on this host; None: made from user, script and rendezvous id (or directory and arguments)."""
    run_dir: Path | None = None
    """Where events, worker logs and stacks go; None: a directory under the temporary directory, named once."""
    snapshot_memory: int | None = None
    """Most bytes of snapshots on this node; 0: no snapshot daemon, None: what the node has."""
    linger_s: float = 600.0
    """How long the snapshot daemon waits for a new agent when this one was killed."""
    faults: str = ""
    """Rehearsed failures (`holdfast.faults`)."""
    requeue_code: int | None = None
    """Exit code of a job that was stopped before its end; None: 1."""
    grace_s: float = 30.0
    """How long a job that is asked to stop may take."""
    heartbeat_s: float = 0.5
    """Interval of the agents' heartbeats."""
    dead_after_s: float = 2.0
    """Silence after which a node counts as lost."""
    node_multiple: int = 1
    """A world has a multiple of so many nodes."""
    grow_s: float = 600.0
    """Shortest time between two generations that only make the world larger."""
    claim_store: str | None = None
    """Place that all agents share, where generations are claimed; None: numbers of nodes decide who may go on."""
    no_progress: int = 3
    """Restarts without progress after which the job stops, where --max-restarts is not given."""
    redundancy: str = "auto"
    """Which nodes protect each other's snapshots (`holdfast.erasure.redundancy`)."""
    domain: str = ""
    """Failure domain of this node; "": its host."""
    iface: str = ""
    """Network interface for snapshots; "": that of GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME, else the way to the
    rendezvous endpoint."""
    bandwidth: float = 0.0
    """Most bytes per second that protecting snapshots sends from this node; 0: no limit."""
    encrypt: str = "control"
    """What is encrypted between nodes when there is a job token: control messages, or all."""
    job_token_file: Path | None = None
    """Holds the job token; None: HOLDFAST_TOKEN does, or there is none."""
    hang_timeout_s: float = 600.0
    """Silence of all ranks after which workers in a Session are restarted."""
    notice_file: Path | None = None
    """The job is asked to stop as soon as this file is there: how some clouds tell of a preemption."""
    health: str = "warn"
    """What happens to findings of `holdfast.launcher.health`: off, warn, or strict (a failed check keeps it out)."""
    standby: bool = True
    """Whether a warm process stands by, from which the workers of later generations are forked."""


@dataclass(frozen=True)
class _Flag:
    name: str
    convert: Callable[[str], object]
    metavar: str
    help: str


_FLAGS = (
    _Flag("job", str, "NAME", "name of the job on this host (default: from user, script and rendezvous id)"),
    _Flag("run_dir", Path, "DIR", "directory for events, worker logs and stacks"),
    _Flag("snapshot_memory", parse_size, "SIZE", "most memory for snapshots on this node; 0: no snapshots in memory"),
    _Flag("linger", parse_duration, "TIME", "how long snapshots outlive a killed launcher (default 10m)"),
    _Flag("faults", _parse_faults, "SCHEDULE", "rehearsed failures, such as 'kill:rank=1,step=20'"),
    _Flag("requeue_code", _parse_exit_code, "CODE", "exit code of a job stopped before its end (default 1)"),
    _Flag("grace", parse_duration, "TIME", "how long a job that is asked to stop may take (default 30s)"),
    _Flag("heartbeat", parse_duration, "TIME", "interval of heartbeats between nodes (default 0.5s)"),
    _Flag("dead_after", parse_duration, "TIME", "silence after which a node counts as lost (default 2s)"),
    _Flag("hang_timeout", _parse_timeout, "TIME", "silence of all ranks after which a job hangs (default 10m)"),
    _Flag("notice_file", Path, "FILE", "asks this node to leave the job as soon as it is there"),
    _Flag(
        "health",
        _parse_health,
        "off|warn|strict",
        "checks of this host before the start and after a failure; strict: it does not start, or leaves (default warn)",
    ),
    _Flag(
        "redundancy",
        _parse_redundancy,
        "auto|K+M|mirror|none",
        "how nodes protect each other's snapshots: K+M survives the loss of any M nodes of a group (default auto)",
    ),
    _Flag("domain", str, "NAME", "failure domain of this node, such as its rack (default: its host)"),
    _Flag("iface", str, "NAME", "network interface for snapshots (default: GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME)"),
    _Flag("bandwidth", parse_size, "SIZE", "most bytes per second that protecting snapshots sends from this node"),
    _Flag("encrypt", _parse_encrypt, "control|all", "what is encrypted between nodes, given a token (default control)"),
    _Flag("job_token_file", Path, "FILE", "file with the token of the job (default: HOLDFAST_TOKEN)"),
    _Flag("node_multiple", _parse_count, "K", "shrink to a multiple of K nodes (default 1)"),
    _Flag("grow", parse_duration, "TIME", "shortest time between two growths of the world (default 10m)"),
    _Flag(
        "claim_store",
        str,
        "URL",
        "directory or object store that all nodes share: after a split, the side that claims the next generation there "
        "goes on (default: the side with more than half of the nodes)",
    ),
    _Flag(
        "standby",
        _parse_switch,
        "0|1",
        "whether a process that has imported what the script imports stands by for restarts, "
        "which costs 0.2 GB of memory and more (default 1)",
    ),
    _Flag(
        "no_progress",
        _parse_restarts,
        "N",
        "restarts without progress that end the job without --max-restarts (default 3)",
    ),
)


@dataclass(frozen=True, kw_only=True)
class Meeting:
    """Where the agents of the job meet."""

    host: str
    port: int
    """Of the first endpoint."""
    endpoints: tuple[tuple[str, int], ...] = ()
    """Host and port of all of them."""
    max_nodes: int
    rendezvous_id: str | None
    """As given by the user; None where there was none."""
    node_rank: int | None
    """Given under static rendezvous only."""

    @property
    def endpoint(self) -> str:
        """One string for the place; "" for a job of one node."""
        return f"{self.host}:{self.port}" if self.max_nodes > 1 else ""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Everything that ``holdfast run`` was asked to do."""

    hold: HoldOptions
    meeting: Meeting
    config: Any
    """torch.distributed.launcher.api.LaunchConfig; torch is not imported for the type alone."""
    command: str
    arguments: tuple[str, ...]
    script: str
    """What the user named: script, module or program."""
    script_arguments: tuple[str, ...]
    may_lead: bool | None
    """`is_host` of --rdzv-conf; None: whoever can serve the endpoint."""
    max_restarts: int | None
    """None: not given."""
    stop_grace_s: float
    """From SIGTERM to SIGKILL after a failure."""
    limits: Limits


class _Parser(argparse.ArgumentParser):
    """Errors in one line, with a suggestion for a mistyped flag."""

    def error(self, message: str) -> NoReturn:
        unknown = re.search(r"unrecognized arguments: (--?[\w-]+)", message)
        if unknown:
            known = [option for option in self._option_string_actions if option.startswith("--")]
            close = difflib.get_close_matches(unknown[1].replace("_", "-"), known, n=1)
            message = f"unknown option {unknown[1]}" + (f" (did you mean {close[0]}?)" if close else "")
        raise UsageError(message)


def make_parser() -> argparse.ArgumentParser:
    """torch's parser with our flags; the defaults of --max-restarts tells whether it was given."""
    from torch.distributed.argparse_util import env
    from torch.distributed.run import get_args_parser

    parser = get_args_parser()
    parser.__class__ = _Parser
    parser.prog = "holdfast run"
    parser.description = "Run a training script under holdfast; takes every flag of torchrun."
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    ours = parser.add_argument_group("holdfast")
    for flag in _FLAGS:
        dashed = f"--hold-{flag.name.replace('_', '-')}"
        spellings = dict.fromkeys((dashed, dashed.replace("-", "_").replace("__", "--", 1)))
        ours.add_argument(*spellings, action=env, type=flag.convert, default=None, metavar=flag.metavar, help=flag.help)
    for abbreviation in ("--h", "--he", "--hel"):  # unique in torch's parser, ambiguous beside --hold
        parser._option_string_actions[abbreviation] = parser._option_string_actions["--help"]
    if "PET_MAX_RESTARTS" not in os.environ:
        parser.set_defaults(max_restarts=None)
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line.

    Raises:
        UsageError: it is wrong.
        SystemExit: ``--help`` was asked for and printed.
    """
    parser = make_parser()
    try:
        return parser.parse_args(list(argv))
    except argparse.ArgumentError as error:
        raise UsageError(str(error)) from error


def settle(args: argparse.Namespace) -> Meeting:
    """Check the parsed command line, and fill in what torch.distributed.run fills in before it starts.

    Raises:
        UsageError: a combination or value that cannot work.
    """
    rendezvous_id = None if args.standalone or args.rdzv_id == "none" else str(args.rdzv_id)
    _settle_rendezvous(args)
    _check(args)
    is_static = args.rdzv_backend == "static"
    endpoint = args.rdzv_endpoint or (f"{args.master_addr}:{args.master_port}" if is_static else "")
    endpoints = tuple(_endpoint(part) for part in endpoint.split(","))
    return Meeting(
        host=endpoints[0][0],
        port=endpoints[0][1],
        endpoints=endpoints,
        max_nodes=_nnodes(args.nnodes)[1],
        rendezvous_id=rendezvous_id,
        node_rank=int(args.node_rank) if is_static else None,
    )


def launch_from(args: argparse.Namespace, meeting: Meeting, *, log_dir: Path) -> Launch:
    """Turn the settled command line into a `Launch`; torch makes its log directory.

    Args:
        args: what `parse` returned, settled.
        meeting: what `settle` returned.
        log_dir: where workers' logs go when --log-dir is not given.

    Raises:
        UsageError: a combination or value that cannot work.
    """
    given_restarts = args.max_restarts
    args.max_restarts = given_restarts or 0
    explicit_grace = args.shutdown_timeout is not None or "TORCH_ELASTIC_SHUTDOWN_TIMEOUT" in os.environ
    if args.log_dir is None:
        args.log_dir = str(log_dir)
    config, command, arguments = _torch_config(args)
    hold = hold_options(args)
    if config.nproc_per_node > MAX_LOCAL_RANKS and hold.snapshot_memory != 0:
        raise UsageError(
            f"--nproc-per-node {config.nproc_per_node}: snapshots in memory take at most {MAX_LOCAL_RANKS} workers on "
            "one node; give --hold-snapshot-memory 0, or start several agents on it"
        )
    return Launch(
        hold=hold,
        meeting=meeting,
        config=config,
        command=command,
        arguments=tuple(arguments),
        script=args.training_script,
        script_arguments=tuple(args.training_script_args),
        may_lead=_is_host(config.rdzv_configs.get("is_host")),
        max_restarts=given_restarts,
        stop_grace_s=float(config.shutdown_timeout) if explicit_grace else min(1.0, float(config.shutdown_timeout)),
        limits=_limits(args, config),
    )


def hold_options(args: argparse.Namespace) -> HoldOptions:
    """Our part of the command line."""
    values = {flag.name: getattr(args, f"hold_{flag.name}") for flag in _FLAGS}
    seconds = {name: f"{name}_s" for name in ("linger", "grace", "heartbeat", "dead_after", "hang_timeout", "grow")}
    return HoldOptions(**{seconds.get(name, name): value for name, value in values.items() if value is not None})


def _settle_rendezvous(args: argparse.Namespace) -> None:
    """What torch.distributed.run does before it makes its configuration."""
    alone = args.rdzv_backend == "static" and not args.rdzv_endpoint and args.master_port is None
    if args.standalone or (alone and _nnodes(args.nnodes)[1] == 1):
        args.rdzv_backend, args.rdzv_endpoint, args.rdzv_id = "c10d", "localhost:0", str(uuid.uuid4())
    if args.master_port is None:
        args.master_port = 29500


def _nnodes(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)(?::(\d+))?", text)
    if match is None or not 0 < int(match[1]) <= int(match[2] or match[1]):
        raise UsageError(f"--nnodes {text}: expected N or MIN:MAX with 0 < MIN <= MAX")
    return int(match[1]), int(match[2] or match[1])


def _check(args: argparse.Namespace) -> None:
    low, high = _nnodes(args.nnodes)
    if args.rdzv_backend not in ("static", "c10d"):
        raise UsageError(
            f"--rdzv-backend {args.rdzv_backend}: holdfast's agents meet at --rdzv-endpoint by themselves, "
            "use c10d (or static with --node-rank)"
        )
    if args.rdzv_backend == "static" and not 0 <= int(args.node_rank) < high:
        raise UsageError(f"--node-rank {args.node_rank} is not among the {high} nodes of --nnodes")
    if args.rdzv_backend == "static" and low != high:
        raise UsageError(
            f"--nnodes {args.nnodes}: static rendezvous takes one number; give --rdzv-backend c10d for a range"
        )
    if args.max_restarts is not None and args.max_restarts < 0:
        raise UsageError(f"--max-restarts {args.max_restarts}: expected 0 or more")
    if str(args.nproc_per_node).lstrip("-").isdigit() and int(args.nproc_per_node) < 1:
        raise UsageError(f"--nproc-per-node {args.nproc_per_node}: expected at least 1")
    if args.no_python and args.module:
        raise UsageError("--no-python and --module exclude each other")
    is_file = args.run_path or not (args.module or args.no_python)
    if is_file and not os.path.exists(args.training_script):
        raise UsageError(f"{args.training_script}: no such script (python -m modules need --module)")


def _torch_config(args: argparse.Namespace) -> tuple[Any, str, list[str]]:
    """torch's configuration, with its ways of saying that a value is wrong in one line."""
    from torch.distributed.run import config_from_args

    try:
        config, command, arguments = config_from_args(args)
    except (ValueError, RuntimeError, AssertionError, OSError) as error:
        raise UsageError(str(error)) from error
    if not isinstance(command, str):  # --run-path: torch hands out a function
        return config, os.getenv("PYTHON_EXEC", sys.executable), ["-u", "-m", "holdfast.launcher._run_path", *arguments]
    return config, command, arguments


def _endpoint(text: str) -> tuple[str, int]:
    from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

    try:
        return parse_rendezvous_endpoint(text.strip(), default_port=DEFAULT_PORT)
    except ValueError as error:
        raise UsageError(f"--rdzv-endpoint {text}: {error}") from error


def _is_host(value: str | None) -> bool | None:
    return None if value is None else value.strip("'\"").lower() in ("1", "true", "t", "yes", "y")


def _limits(args: argparse.Namespace, config: Any) -> Limits:
    """Torch's rendezvous settings and ours as one set of numbers."""
    hold = hold_options(args)
    settings = config.rdzv_configs

    def seconds(key: str, default: float) -> float:
        try:
            return float(str(settings.get(key, default)).strip("'\""))
        except ValueError as error:
            raise UsageError(f"--rdzv-conf {key}={settings[key]}: expected seconds") from error

    join_s = seconds("join_timeout", seconds("timeout", 900.0) if args.rdzv_backend == "static" else 600.0)
    try:
        return Limits(
            min_nodes=config.min_nodes,
            max_nodes=config.max_nodes,
            join_timeout_s=join_s,
            last_call_s=seconds("last_call_timeout", 30.0),
            heartbeat_s=hold.heartbeat_s,
            dead_after_s=hold.dead_after_s,
            grace_s=hold.grace_s,
            grow_s=hold.grow_s,
            node_multiple=hold.node_multiple,
        )
    except ValueError as error:
        raise UsageError(f"--nnodes, --hold-heartbeat, --hold-dead-after: {error}") from error
