"""``holdfast run``: one job from its command line to its exit code."""

from __future__ import annotations

import errno
import logging
import os
import secrets
import shutil
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
import zmq

from holdfast.environment import job_token, set_job_token, socket_interface
from holdfast.errors import HoldfastError, UsageError
from holdfast.launcher import events
from holdfast.launcher.agent import Agent, Ending
from holdfast.launcher.arguments import HoldOptions, Launch, Meeting, hold_options, launch_from, parse, settle
from holdfast.launcher.console import say
from holdfast.launcher.daemons import DaemonLink
from holdfast.launcher.processes import Guard
from holdfast.launcher.seats import RunRecord, Seat, Tenant, default_run_directory, job_key, private
from holdfast.launcher.signals import SignalPipe, parse_signals
from holdfast.launcher.timeline import describe_failure
from holdfast.snapshot.keys import JobKeys, read_token

logger = logging.getLogger(__name__)


def run(argv: Sequence[str]) -> int:
    """Run a job and return its exit code; what a person has to know was printed.

    Raises:
        ChildFailedError: a worker of this node failed and the job with it, as torchrun raises it.
        UsageError: the command line cannot work.
    """
    args = parse(argv)
    meeting = settle(args)
    hold = hold_options(args)
    share_token(hold.job_token_file, hold.encrypt, num_nodes=meeting.max_nodes)
    address = own_address(meeting, hold.iface)
    key = job_key(
        hold.job,
        script=args.training_script,
        rendezvous_id=meeting.rendezvous_id,
        arguments=args.training_script_args,
    )
    tenant = Tenant(pid=os.getpid(), endpoint=meeting.endpoint, node_rank=meeting.node_rank)
    handled = parse_signals(getattr(args, "signals_to_handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT"))
    # Signals are heeded before there is anything that would be left behind.
    with SignalPipe(handled) as signals, Seat(key, tenant, num_seats=_num_seats(meeting)) as seat:
        before = seat.record()
        run_id = before.run_id if before is not None else secrets.token_hex(6)
        run_dir = _make_run_dir(hold, before, seat, run_id)
        old = before or RunRecord(run_id=run_id, run_dir=str(run_dir))
        seat.write_record(msgspec.structs.replace(old, run_id=run_id, run_dir=str(run_dir)))
        launch, ending = _run_on_seat(args, meeting, seat, signals, run_id, run_dir, address)
        code = exit_code(ending, hold)
        if code == 0 and hold.run_dir is None and not _worth_keeping(run_dir):
            shutil.rmtree(run_dir, ignore_errors=True)
            _remove_empty(run_dir.parent)
        elif code == 0 and hold.run_dir is None:
            say(f"events and logs: {run_dir}")
    _explain(ending, launch, run_dir)
    return code


def _num_seats(meeting: Meeting) -> int:
    """Agents of one job that a host may have: where ranks are dealt out, spares may wait beside the largest world."""
    if meeting.max_nodes == 1 or meeting.node_rank is not None:
        return meeting.max_nodes
    return 2 * meeting.max_nodes + 6


def own_address(meeting: Meeting, iface: str = "") -> str:
    """Where other nodes reach this one's daemon.

    Args:
        meeting: where the agents of the job meet.
        iface: what ``--hold-iface`` says; "": the interface of GLOO or NCCL if the environment names one, else the
            address of this host on the way to the rendezvous endpoint.

    Raises:
        UsageError: ``--hold-iface`` names no interface with an address.
    """
    address = address_of(iface or socket_interface())
    if iface and address is None:
        import psutil

        there = psutil.net_if_addrs()
        problem = "it has no address" if iface in there else "no such interface"
        raise UsageError(f"--hold-iface {iface}: {problem} (this host has {', '.join(sorted(there))})")
    if meeting.max_nodes == 1:
        return "127.0.0.1"
    if address is not None:
        return address
    for host, port in meeting.endpoints or ((meeting.host, meeting.port),):
        try:
            for found in socket.getaddrinfo(host, port or 1, type=socket.SOCK_DGRAM):
                with socket.socket(*found[:3]) as probe:
                    probe.connect(found[4])  # sends nothing: only looks up the route
                    return str(probe.getsockname()[0])
        except OSError as error:
            logger.warning("no route to %s: %s", host, error)
    return socket.gethostname()


def address_of(iface: str) -> str | None:
    """The first address of a network interface, IPv4 before IPv6; None where there is none or `iface` is ""."""
    if not iface:
        return None
    import psutil

    found = psutil.net_if_addrs().get(iface, [])
    addresses = {one.family: one.address for one in reversed(found)}
    return addresses.get(socket.AF_INET) or addresses.get(socket.AF_INET6)


def share_token(path: Path | None, encrypt: str, *, num_nodes: int) -> None:
    """Hand the job token to the processes of this node; a job of several nodes without one is told once.

    Raises:
        UsageError: the token cannot be read or used.
    """
    token = read_token(path) if path is not None else job_token()
    JobKeys(token)
    set_job_token(token, encrypt_all=encrypt == "all")
    if not token and num_nodes > 1:
        say(
            "no job token: whoever reaches this node's ports can read its snapshots and steer the job "
            "(set --hold-job-token-file)"
        )


def exit_code(ending: Ending, hold: HoldOptions) -> int:
    """0 done, 1 failed; a job that was stopped before its end: 1 or the requeue code."""
    match ending.verdict.kind:
        case "done":
            return 0
        case "stopped" | "drained":
            return hold.requeue_code or 1
        case _:
            return 1


def _make_run_dir(hold: HoldOptions, before: RunRecord | None, seat: Seat, run_id: str) -> Path:
    run_dir = hold.run_dir
    if run_dir is None and before is not None:
        run_dir = Path(before.run_dir)
    if run_dir is None:
        run_dir = default_run_directory(seat.key, run_id)
        private(run_dir.parent)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        if not os.access(run_dir, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, "this user cannot write there")
    except OSError as error:
        if before is None:
            seat.clear()
        raise UsageError(f"--hold-run-dir {run_dir}: {error.strerror}") from error
    return run_dir.absolute()


def _run_on_seat(
    args: object, meeting: Meeting, seat: Seat, signals: SignalPipe, run_id: str, run_dir: Path, address: str
) -> tuple[Launch, Ending]:
    import argparse

    assert isinstance(args, argparse.Namespace), "what `parse` returned"
    hold = hold_options(args)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    link: DaemonLink | None = None
    begun, ended = False, False
    try:
        if hold.snapshot_memory != 0:
            link = DaemonLink(
                seat,
                context,
                run_dir=run_dir,
                address=address,
                linger_s=hold.linger_s,
                memory_limit_bytes=hold.snapshot_memory,
                redundancy=hold.redundancy,
                domain=hold.domain,
                bandwidth=hold.bandwidth,
            )
            link.start()  # it comes up while torch's configuration is made
        launch = launch_from(args, meeting, log_dir=run_dir / "logs")
        with events.EventLog(run_dir, os.uname().nodename) as log, Guard() as guard:
            log.write(_started(launch, run_id, seat.key), time.time())
            agent = Agent(
                launch,
                seat=seat,
                run_id=run_id,
                run_dir=run_dir,
                log=log,
                guard=guard,
                signals=signals,
                link=link,
                context=context,
                address=address,
            )
            begun = True
            ending = agent.run()
            ended = True
            log.write(_ended(ending, exit_code(ending, hold)), time.time())
        return launch, ending
    finally:
        if ended:
            seat.clear()
        elif not begun and not (link is not None and link.adopted):
            if link is not None:
                link.shut_down(persist=False)
                link.finish(5.0)
            seat.clear()
        # else: an error of ours, or of this command line; the daemon lingers with what it holds, as after a kill
        context.destroy(linger=1000)


def _started(launch: Launch, run_id: str, key: str) -> events.RunStarted:
    return events.RunStarted(
        run_id=run_id,
        command=launch.script,
        arguments=launch.script_arguments,
        nproc=launch.config.nproc_per_node,
        job=key,
    )


def _ended(ending: Ending, code: int) -> events.RunEnded:
    bye = ending.bye
    return events.RunEnded(
        outcome=ending.verdict.kind,
        exit_code=code,
        reason=ending.verdict.reason,
        persisted=str(bye.persisted) if bye is not None and bye.persisted is not None else "",
        path=(bye.path or "") if bye is not None else "",
    )


def _worth_keeping(run_dir: Path) -> bool:
    """Whether a run without a directory of its own left anything that a person may want to read."""
    quiet = {"health", "run_started", "generation_started", "membership", "run_ended", "daemon", "standby"}
    return any(
        event.get("kind") not in quiet or (event.get("kind") == "daemon" and event.get("change") == "died")
        for event in events.read_events(run_dir)
    )


def _remove_empty(directory: Path) -> None:
    try:
        directory.rmdir()
    except OSError:
        logger.debug("%s holds other runs", directory)


def _explain(ending: Ending, launch: Launch, run_dir: Path) -> None:
    """Say how the job ended; a failed worker of this node is torch's exception."""
    verdict, bye = ending.verdict, ending.bye
    if bye is not None and bye.persisted is not None and verdict.kind == "failed":
        say(f"step {bye.persisted.step} is in storage: {bye.path}")
    if bye is not None and bye.error:
        say(f"the newest snapshot could not be written: {bye.error}")
    if verdict.kind == "done":
        return
    if verdict.kind == "drained":
        say(f"this node has left the job: {verdict.reason}")
        return
    what = f"{describe_failure(verdict.failure)}; " if verdict.failure is not None else ""
    say(
        f"the job {'failed' if verdict.kind == 'failed' else 'was stopped'}: {what}{verdict.reason} (events: {run_dir})"
    )
    if verdict.kind == "failed" and ending.failures:
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

        raise ChildFailedError(name=launch.script, failures=dict(ending.failures))


def main(argv: Sequence[str] | None = None) -> int:
    """``holdfast run`` and ``python -m holdfast.launcher``: print errors in one line and return the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, record
    except ImportError as error:
        say(f"error: torch cannot be imported: {error}")
        return 1
    try:
        return record(run)(arguments) or 0
    except UsageError as error:
        say(f"error: {error}")
        return 2
    except HoldfastError as error:
        say(f"error: {error}")
        return 1
    except ChildFailedError as error:
        sys.stderr.write(f"{error}\n")
        return 1
