"""The snapshot daemon: one process per node that keeps the arena, whoever else dies.

    python -m holdfast.snapshot.daemon --arena DIR --socket-dir DIR --key KEY --seat N [--address HOST]

An agent starts it (in a session of its own: it outlives agent and workers) and says `Hello`. It imports no torch and
answers within a fraction of a second. A successor started on the same arena adopts it. When its agent is gone it
lingers, so that a restarted launcher finds the memory; then it writes the newest complete version to storage and goes.
`Shutdown` ends it at once. In every case but a kill it leaves nothing behind: no process, socket or shared memory.

One thread runs everything but blocking work (`holdfast.snapshot.lanes`); the decisions are those of the ledgers.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import fcntl
import logging
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from holdfast.checkpoint.places import place
from holdfast.checkpoint.verified import OpenImage
from holdfast.checkpoint.version import GenerationId, Version
from holdfast.environment import encrypts_all, job_token
from holdfast.errors import CorruptError, HoldfastError
from holdfast.snapshot import ledger
from holdfast.snapshot.arena import Arena
from holdfast.snapshot.bulk import BulkServer
from holdfast.snapshot.ending import Ending
from holdfast.snapshot.keys import JobKeys
from holdfast.snapshot.lanes import Lanes
from holdfast.snapshot.leading import Leading
from holdfast.snapshot.messages import (
    Ack,
    AnyMessage,
    AskNode,
    Bye,
    DaemonMoved,
    EndGeneration,
    Hello,
    Inventory,
    LeaderOrders,
    LeaderRestore,
    NodeReport,
    Notice,
    OpenSession,
    PersistEnded,
    PersistOrder,
    PersistPart,
    RanksOpened,
    Refused,
    RequestRegroup,
    RequestStop,
    RestoreFailed,
    Shutdown,
    StartGeneration,
    StreamTold,
    StreamWanted,
    Welcome,
)
from holdfast.snapshot.node import Node
from holdfast.snapshot.persister import LIMIT_S, Part, write_part
from holdfast.snapshot.records import ImageLocation
from holdfast.snapshot.reports import Request
from holdfast.snapshot.shelf import Shelf
from holdfast.snapshot.transport import Peer, Transport

_log = logging.getLogger(__name__)
_TICK_S: Final = 0.02
"""How often published steps are looked at while nothing else happens; the longest that a grant may lag behind."""
_IDLE_TICK_S: Final = 0.2
_REPEAT_S: Final = 0.5
_KEPT_PARTS: Final = 4
_LOCK: Final = "daemon.lock"
_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
"""Of malloc.h."""
_KEPT_BYTES: Final = 64 << 20


class Daemon:
    """All parts of the process; `run` returns its exit code.

    Args:
        arena_dir: the arena; adopted where it exists.
        socket_dir: private directory of the ipc socket.
        address: at which other nodes reach this one.
        keys: of the job.
    """

    def __init__(self, arena_dir: Path, socket_dir: Path, address: str, keys: JobKeys) -> None:
        self.socket_dir = socket_dir
        self._keys = keys
        self.arena = Arena.open(arena_dir)
        self.arena.control.new_epoch()
        self.lanes = Lanes()
        state = self.arena.state
        self.transport = Transport(socket_dir, address, state.endpoint, keys)
        self.shelf = Shelf(self.arena.directory)
        self.bulk = BulkServer(
            self.transport.context,
            address,
            state.bulk,
            keys=keys,
            read=self.shelf.read,
            idle=self.shelf.forget,
            damaged=lambda text: self.lanes.post(lambda: self.node.damage.found(text)),
        )
        self.bulk.limit(state.bandwidth)
        self.bulk.start()
        endpoints = {"endpoint": self.transport.endpoint, "bulk": self.bulk.endpoint}
        self.arena.save_state(msgspec.structs.replace(state, **endpoints))
        self.transport.watch(self.lanes.wakeup, self.lanes.deliver)
        self.node = Node(
            self.arena,
            self.transport,
            self.lanes,
            keys=keys,
            shelf=self.shelf,
            to_agent=self.to_agent,
            stop_persist=self._stop_persist,
        )
        self.leading: Leading | None = None
        self.ending = Ending(self)
        self._agent: Peer | None = None
        self._agent_pidfd: int | None = None
        self._parts: dict[Version, Part] = {}
        self._written: dict[tuple[Version, int, tuple[int, ...]], PersistPart] = {}  # the newest, to be given again
        self._stop = False
        self._repeated = 0.0
        self._requests = 0

    # --- life

    def run(self) -> int:
        """The event loop, until the end."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: setattr(self, "_stop", True))
        self._adopt()
        while not self.ending.over:
            self._turn()
        self._close()
        return 0

    def _turn(self) -> None:
        busy = self.arena.state.running or self.lanes.busy("persist")
        for peer, message in self.transport.receive(_TICK_S if busy else _IDLE_TICK_S):
            try:
                self._dispatch(peer, message)
            except HoldfastError as error:
                _log.warning("%s could not be handled: %s", type(message).__name__, error)
        now = time.monotonic()
        self.lanes.expire(now)
        self.node.poll_page()
        if self.leading is not None:
            self.leading.tick(now)
        if self.arena.state.running and now - self._repeated > _REPEAT_S:
            self._repeated = now
            self._repeat()
        self.node.flush(now)
        if self._stop:
            self._stop = False
            self.ending.stop_now()
        self.ending.tick(now)

    def _repeat(self) -> None:
        """What may have been lost with a connection to the leader's daemon."""
        start = self.node.start
        if start is None:
            return
        if self._has_moved(start):
            self._say_where(start)
        if start.leader == start.node_rank:
            return
        if self.node.restore is None:
            self.transport.send_node(start.leader, self.node.inventory())
        else:
            self.node.repeat_report()

    def _has_moved(self, start: StartGeneration) -> bool:
        """Whether other nodes know another endpoint of ours."""
        known = self.node.restore.restore.bulk.get(start.node_rank) if self.node.restore is not None else None
        elsewhere = known is not None and known != self.bulk.endpoint
        return elsewhere or self.node.member(start.node_rank).daemon != self.transport.endpoint

    def _say_where(self, start: StartGeneration) -> None:
        """We could not take over the endpoint of our predecessor, and the other nodes know no other."""
        moved = DaemonMoved(
            generation=start.generation,
            node_rank=start.node_rank,
            daemon=self.transport.endpoint,
            bulk=self.bulk.endpoint,
        )
        for member in start.members:
            if member.node_rank != start.node_rank:
                self.transport.send_node(member.node_rank, moved)

    def _adopt(self) -> None:
        state = self.arena.state
        self.node.adopt()
        if state.start is not None and state.running:
            _log.info("adopted generation %s with %d slots", state.start.generation, state.num_slots)
            if state.start.leader == state.start.node_rank:
                self._lead(state.start)
        if state.agent_pid:
            self._watch_agent(state.agent_pid)
        else:
            self.ending.agent_went()  # who started us may be dead by now, and nobody ever say Hello

    def _lead(self, start: StartGeneration) -> None:
        self.leading = Leading(
            start,
            self.arena.control.daemon_epoch,
            self.lanes,
            send=self.transport.send_node,
            to_agent=self.to_agent,
            redundancy=self.arena.state.redundancy,
        )
        state = self.arena.state
        if state.restore is not None and state.restore.generation == start.generation and state.config is not None:
            self.leading.resume(state.restore, state.config)

    def _close(self) -> None:
        for part in self._parts.values():
            part.cancelled.set()
        if not self.ending.keep_arena:
            self.node.end_generation()
            self.arena.remove()
        self.node.protector.close()
        self.lanes.close(2.0)
        self.bulk.close()
        self.transport.close()
        if not self.ending.keep_arena:
            remove_socket_dir(self.socket_dir)

    # --- messages

    def to_agent(self, message: AnyMessage) -> None:
        """Send to the agent, if there is one."""
        if self._agent is not None:
            self.transport.send(self._agent, message)

    def _dispatch(self, peer: Peer, message: AnyMessage) -> None:
        match message:
            case Hello() | StartGeneration() | EndGeneration() | Shutdown() | RequestStop() | RequestRegroup():
                self._from_agent(peer, message)
            case LeaderRestore() | LeaderOrders() | AskNode() | PersistOrder() | PersistEnded() | Refused() | Bye():
                self._from_leader(message)
            case Inventory() | RanksOpened() | NodeReport() | PersistPart():
                self._for_leader(message)
            case RestoreFailed():
                self._restore_failed(peer, message)
            case DaemonMoved():
                self.node.moved(message)
                if self.leading is not None and self.node.start is not None:
                    self.leading.start = self.node.start
            case StreamTold() | StreamWanted():
                self.node.protector.receive(message)
            case OpenSession():
                self.node.open_session(peer, message)
            case _:
                self.node.from_worker(peer, message)

    def _from_agent(self, peer: Peer, message: AnyMessage) -> None:
        match message:
            case Hello():
                self._agent = peer
                changes = {
                    "agent_pid": message.agent_pid,
                    "linger_s": message.linger_s,
                    "memory_limit_bytes": message.memory_limit_bytes,
                    "redundancy": message.redundancy,
                    "domain": message.domain or socket.gethostname(),
                    "bandwidth": message.bandwidth,
                }
                self.bulk.limit(message.bandwidth)
                self.arena.save_state(msgspec.structs.replace(self.arena.state, **changes))
                self.ending.agent_came()
                self._watch_agent(message.agent_pid)
                self.transport.send(peer, self._welcome())
            case StartGeneration():
                self._start_generation(peer, message)
            case EndGeneration():
                if self.node.start is not None and self.node.start.generation == message.generation:
                    self.node.end_generation()
                self.transport.send(peer, Ack())
            case RequestStop():
                persist = message.persist and self.ending.persist_wanted(message.grace_s)
                self.node.request(Request(id=self._request_id(), kind="stop", persist=persist))
                self.transport.send(peer, Ack())
            case RequestRegroup():
                if self.node.start is not None and self.node.start.generation == message.generation:
                    request = Request(id=self._request_id(), kind="regroup", persist=False, leaves=message.leaves)
                    self.node.request(request)
                self.transport.send(peer, Ack())
            case Shutdown():
                self._agent = peer
                self.ending.shutdown(persist=message.persist)

    def _request_id(self) -> str:
        self._requests += 1
        return f"agent-{self.arena.state.agent_pid}-{self.arena.control.daemon_epoch}-{self._requests}"

    def _welcome(self) -> Welcome:
        state = self.arena.state
        clean = [image.version for image in self.node.ledger.clean()]
        known = [*state.generations, *(version.generation for version in clean)]
        return Welcome(
            daemon=self.transport.endpoint,
            pid=os.getpid(),
            newest_incarnation=max((generation.incarnation for generation in known), default=0),
            run_id=state.run_id,
            newest=max(clean, key=_age, default=None),
        )

    def _start_generation(self, peer: Peer, message: StartGeneration) -> None:
        now = self.arena.state.start
        if now is not None and now.generation == message.generation and self.arena.state.running:
            self.transport.send(peer, Ack())
            return
        if now is not None and _number(message.generation) <= _number(now.generation):
            reason = f"generation {message.generation} is not newer than {now.generation}, which this daemon knows"
            self.transport.send(peer, Refused(reason=reason, kind="fence"))
            return
        if self.leading is not None:
            self.leading.close()
            self.leading = None
        if message.leader == message.node_rank:
            self._lead(message)
        self.node.start_generation(message)
        self.transport.send(peer, Ack())

    def _from_leader(self, message: AnyMessage) -> None:
        start = self.node.start
        match message:
            case LeaderRestore():
                config = message.config or self.arena.state.config
                self.arena.save_state(msgspec.structs.replace(self.arena.state, config=config))
                self.node.decided(message)
            case LeaderOrders(orders=orders):
                self.node.orders(ledger.OrdersReceived(orders=orders))
            case AskNode(generation=generation):
                if start is not None and start.generation == generation:
                    self.transport.send_node(start.leader, self.node.inventory())
                    self.transport.send_node(start.leader, self.node.opened())
            case PersistOrder():
                self._persist(message)
            case PersistEnded():
                self._persist_ended(message)
            case Bye():
                self.ending.leader_said(message)
            case Refused():
                self.node.to_workers(message)
                self.to_agent(Notice(severity="error", text=message.reason))

    def _for_leader(self, message: AnyMessage) -> None:
        if self.leading is not None:
            self.leading.receive(message)
        self.ending.receive(message)

    def _restore_failed(self, peer: Peer, message: RestoreFailed) -> None:
        start = self.node.start
        if start is None or start.generation != message.generation:
            self.transport.send(peer, Refused(reason=f"generation {message.generation} is over", kind="fence"))
        elif self.leading is not None:
            self.leading.receive(message)
        else:
            self.transport.send_node(start.leader, message)

    # --- persisting

    def _persist(self, order: PersistOrder) -> None:
        """Write our part. An order may come again: what is being written goes on, what is written is reported again."""
        part = Part(
            order.version,
            order.attempt,
            place(order.directory),
            self.node.slots_of(order.version),
            tuple(self._opener(order, one) for one in order.lost),
            tuple(one.global_rank for one in order.lost),
        )
        start = self.node.start
        if part.key in self._written and start is not None:
            self.transport.send_node(start.leader, self._written[part.key])
            return
        if order.version in self._parts and self._parts[order.version].key == part.key:
            return
        self._stop_persist(order.version)  # an attempt of a former leader
        self._parts[order.version] = part
        count = len(part.slots) + len(part.lost)
        _log.info("persisting %s into %s (%d images)", order.version, order.directory, count)
        self.lanes.submit(
            "persist", lambda: write_part(part), lambda result: self._part_ended(part, result), limit_s=LIMIT_S
        )

    def _opener(self, order: PersistOrder, location: ImageLocation) -> Callable[[], OpenImage]:
        """What opens a lost image, in the lane that writes it."""
        context, keys = self.transport.context, self._keys

        def opened() -> OpenImage:
            from holdfast.snapshot.lost import open_lost  # late: it needs numpy

            return open_lost(context, location, order.version, keys, images=order.images, bulk=order.bulk)

        return opened

    def _part_ended(self, part: Part, result: tuple[bytes, ...] | Exception) -> None:
        part.cancelled.set()  # a write that hangs, and was given up, must not read slots that are free by then
        if self._parts.get(part.version) is part:
            del self._parts[part.version]
        if isinstance(result, CorruptError):
            self.node.damage.found(str(result))
        start = self.node.start
        if start is None:
            return
        if isinstance(result, Exception) and not isinstance(result, HoldfastError):
            _log.error("%s was not persisted", part.version, exc_info=result)
        answer = PersistPart(
            version=part.version,
            node_rank=start.node_rank,
            attempt=part.attempt,
            records=() if isinstance(result, Exception) else result,
            error=str(result) if isinstance(result, Exception) else None,
        )
        self._written[part.key] = answer
        while len(self._written) > _KEPT_PARTS:
            del self._written[next(iter(self._written))]
        self.transport.send_node(start.leader, answer)

    def _stop_persist(self, version: Version) -> None:
        part = self._parts.pop(version, None)
        if part is not None:
            part.cancelled.set()

    def _persist_ended(self, message: PersistEnded) -> None:
        self.node.persist_ended(message)
        self.ending.leader_said(message)

    # --- the agent

    def _watch_agent(self, pid: int) -> None:
        if self._agent_pidfd is not None:
            self.transport.unwatch(self._agent_pidfd)
            os.close(self._agent_pidfd)
            self._agent_pidfd = None
        try:
            self._agent_pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            self._agent_gone()
        else:
            self.transport.watch(self._agent_pidfd, self._agent_gone)

    def _agent_gone(self) -> None:
        if self._agent_pidfd is not None:
            self.transport.unwatch(self._agent_pidfd)
            os.close(self._agent_pidfd)
            self._agent_pidfd = None
        self._agent = None
        _log.info("the agent is gone; lingering for %.0f s", self.arena.state.linger_s)
        self.ending.agent_went()


def _number(generation: GenerationId) -> tuple[int, int]:
    return (generation.incarnation, generation.generation)


def _age(version: Version) -> tuple[int, int, int]:
    return (version.generation.incarnation, version.generation.generation, version.step)


def remove_socket_dir(directory: Path) -> None:
    """Remove the socket directory unless a living process holds a lock on a file in it (a new agent's seat). Others may
    remove what lies in it at the same time."""
    with contextlib.suppress(OSError):
        descriptors = []
        try:
            for path in directory.iterdir():
                if path.is_file() and path.name != _LOCK:
                    with contextlib.suppress(FileNotFoundError):
                        descriptors.append(os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW))
                        fcntl.flock(descriptors[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(directory, ignore_errors=True)
        except BlockingIOError:
            (directory / _LOCK).unlink(missing_ok=True)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)


def _keep_freed_memory() -> None:
    """Have glibc hand out the memory of the last message for the next one: else each message of a megabyte and more is
    mapped anew, and touching its pages costs as much as sending them. Other C libraries decide for themselves."""
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES // 2)
        library.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="holdfast.snapshot.daemon", description=__doc__)
    parser.add_argument("--arena", type=Path, required=True, help="directory of the arena, under /dev/shm")
    parser.add_argument("--socket-dir", type=Path, required=True, help="private directory for the ipc socket")
    parser.add_argument("--key", default="", help="job key, for the process list")
    parser.add_argument("--seat", type=int, default=0, help="seat of the agent on this host")
    parser.add_argument("--address", default="127.0.0.1", help="address at which other nodes reach this one")
    parser.add_argument("--verbose", action="store_true", help="log at level DEBUG")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run a daemon until it is told to go."""
    arguments = _arguments(argv)
    logging.basicConfig(
        level=logging.DEBUG if arguments.verbose else logging.INFO,
        format="%(asctime)s holdfast daemon %(levelname)s %(message)s",
        stream=sys.stderr,
    )
    _keep_freed_memory()
    os.makedirs(arguments.socket_dir, mode=0o700, exist_ok=True)
    lock = os.open(arguments.socket_dir / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        _log.error("another daemon runs in %s", arguments.socket_dir)
        return 1
    try:
        keys = JobKeys(job_token(), encrypt_all=encrypts_all())
        return Daemon(arguments.arena, arguments.socket_dir, arguments.address, keys).run()
    except HoldfastError as error:
        _log.error("%s", error)
        return 1
    finally:
        os.close(lock)


if __name__ == "__main__":
    sys.exit(main())
