"""The daemon's sockets: one ROUTER for the node (ipc), one for other daemons (tcp), a DEALER to each other daemon.

Messages to the node's own rank loop back in process, so that one node and several run the same code. What does not
decode is counted and dropped. Only the event loop's thread touches anything here.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import zmq

from holdfast.errors import PeerError, UsageError
from holdfast.snapshot.keys import Gate, JobKeys
from holdfast.snapshot.messages import MAX_MESSAGE_BYTES, AnyMessage, decode, encode
from holdfast.snapshot.records import Member

_log = logging.getLogger(__name__)
_BATCH: Final = 256
_LOGGED_GARBAGE: Final = 10
_MAX_IPC_BYTES: Final = 107
"""sun_path of unix(7), less its final zero."""


@dataclass(frozen=True)
class Peer:
    """Whom to answer: a connection of one of the two ROUTER sockets."""

    router: str
    """node or net."""
    identity: bytes


LOOPBACK: Final = Peer("loopback", b"")


class Transport:
    """All sockets of one daemon.

    Args:
        socket_dir: directory (0700) of the ipc socket.
        address: host name or address at which other nodes reach this one; the tcp socket listens there.
        endpoint: what a predecessor listened at, "" where there was none; taken over if it can be.
        keys: of the job: what goes between nodes is encrypted where there is a token.
    """

    def __init__(self, socket_dir: Path, address: str, endpoint: str = "", keys: JobKeys | None = None) -> None:
        self._keys = keys or JobKeys()
        self.ipc_path = socket_dir / "daemon.sock"
        if len(os.fsencode(self.ipc_path)) > _MAX_IPC_BYTES:
            raise UsageError(
                f"the path of the socket {self.ipc_path} has {len(os.fsencode(self.ipc_path))} bytes, the system takes "
                f"{_MAX_IPC_BYTES}: set TMPDIR or XDG_RUNTIME_DIR to a shorter path, or --hold-job to a shorter name"
            )
        self.context = zmq.Context()
        """For the daemon's other sockets too: whoever opens one closes it before `close`."""
        self._poller = zmq.Poller()
        self._gate = Gate(self.context, self._keys) if self._keys.secret else None
        if self._gate is not None:
            self._poller.register(self._gate.socket, zmq.POLLIN)
        self._callbacks: dict[int, Callable[[], None]] = {}
        self._loopback: deque[AnyMessage] = deque()
        self._routers = {"node": self._router(), "net": self._router()}
        self._dealers: dict[int, tuple[str, zmq.Socket[bytes]]] = {}
        self._own_rank: int | None = None
        self.garbage = 0
        """Messages that did not decode."""
        self.dropped = 0
        """Messages that a peer's full or missing queue refused."""
        self._routers["node"].bind(f"ipc://{self.ipc_path}")
        self._keys.serve(self._routers["net"])
        self.endpoint = self._bind(address, endpoint)

    def _router(self) -> zmq.Socket[bytes]:
        router = self.context.socket(zmq.ROUTER)
        router.setsockopt(zmq.LINGER, 0)
        router.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        router.setsockopt(zmq.ROUTER_HANDOVER, 1)
        router.setsockopt(zmq.SNDHWM, 0)
        self._poller.register(router, zmq.POLLIN)
        return router

    def _bind(self, address: str, endpoint: str) -> str:
        if endpoint.startswith(f"tcp://{address}:"):
            try:
                self._routers["net"].bind(endpoint)
            except zmq.ZMQError as error:
                _log.warning("%s cannot be taken over (%s): other nodes must be told the new endpoint", endpoint, error)
            else:
                return endpoint
        return f"tcp://{address}:{self._routers['net'].bind_to_random_port(f'tcp://{address}')}"

    def watch(self, descriptor: int, callback: Callable[[], None]) -> None:
        """Call `callback` whenever `descriptor` is readable."""
        self._callbacks[descriptor] = callback
        self._poller.register(descriptor, zmq.POLLIN)

    def unwatch(self, descriptor: int) -> None:
        """Watch it no longer; to be called before it is closed."""
        if self._callbacks.pop(descriptor, None) is not None:
            self._poller.unregister(descriptor)

    def meet(self, members: Iterable[Member], own_rank: int) -> None:
        """Connect to the daemons of a generation; connections that stay are kept."""
        self._own_rank = own_rank
        wanted = {member.node_rank: member.daemon for member in members if member.node_rank != own_rank}
        for node_rank, (endpoint, dealer) in list(self._dealers.items()):
            if wanted.get(node_rank) != endpoint:
                dealer.close(0)
                del self._dealers[node_rank]
        for node_rank, endpoint in wanted.items():
            if node_rank not in self._dealers:
                dealer = self.context.socket(zmq.DEALER)
                dealer.setsockopt(zmq.LINGER, 1000)
                dealer.setsockopt(zmq.RECONNECT_IVL, 50)
                dealer.setsockopt(zmq.TCP_KEEPALIVE, 1)
                self._keys.dial(dealer)
                dealer.connect(endpoint)
                self._dealers[node_rank] = (endpoint, dealer)

    def send(self, peer: Peer, message: AnyMessage) -> None:
        """Send to a connection; a peer that is gone is no error."""
        if peer is LOOPBACK:
            self._loopback.append(message)
            return
        self._put(self._routers[peer.router], [peer.identity, encode(message)])

    def send_node(self, node_rank: int, message: AnyMessage) -> None:
        """Send to the daemon of `node_rank`; our own gets it in the next `receive`."""
        if node_rank == self._own_rank:
            self._loopback.append(message)
        elif node_rank in self._dealers:
            self._put(self._dealers[node_rank][1], [encode(message)])
        else:
            self.dropped += 1

    def _put(self, socket: zmq.Socket[bytes], frames: list[bytes]) -> None:
        try:
            socket.send_multipart(frames, zmq.NOBLOCK)
        except zmq.ZMQError as error:
            self.dropped += 1
            _log.debug("a message was not sent: %s", error)

    def receive(self, timeout_s: float) -> Iterable[tuple[Peer, AnyMessage]]:
        """Messages as they come, after `timeout_s` at the latest; callbacks of watched descriptors run in between."""
        if self._loopback:  # what these lead to is to be sent before we look at anything else
            yield from self._looped()
            return
        for source, _ in self._poller.poll(max(0, round(timeout_s * 1000))):
            if isinstance(source, int):
                if source in self._callbacks:
                    self._callbacks[source]()
                continue
            if self._gate is not None and source is self._gate.socket:
                self._gate.answer()
                continue
            name = "node" if source is self._routers["node"] else "net"
            for _ in range(_BATCH):
                try:
                    frames = source.recv_multipart(zmq.NOBLOCK)
                except zmq.Again:
                    break
                yield from self._decoded(name, frames)
                if not source.get(zmq.EVENTS) & zmq.POLLIN:  # far cheaper than the exception
                    break
        yield from self._looped()

    def _looped(self) -> Iterable[tuple[Peer, AnyMessage]]:
        while self._loopback:
            yield LOOPBACK, self._loopback.popleft()

    def _decoded(self, router: str, frames: list[bytes]) -> Iterable[tuple[Peer, AnyMessage]]:
        try:
            if len(frames) != 2:
                raise PeerError(f"{len(frames)} frames, expected an identity and a message")
            yield Peer(router, frames[0]), decode(frames[1])
        except PeerError as error:
            self.garbage += 1
            if self.garbage <= _LOGGED_GARBAGE:
                _log.warning("garbage on the %s socket is dropped: %s", router, error)

    def close(self) -> None:
        """Close all sockets and remove the ipc socket."""
        for _, dealer in self._dealers.values():
            dealer.close()
        for router in self._routers.values():
            router.close(500)
        if self._gate is not None:
            self._gate.close()
        self.context.term()
        self.ipc_path.unlink(missing_ok=True)
