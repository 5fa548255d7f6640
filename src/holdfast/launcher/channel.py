"""The control channel between agents: a thin ZeroMQ shell that carries `holdfast.launcher.wire` messages.

Each agent hears at one PULL socket: at a port of its own, and at the rendezvous endpoints that it serves besides. To
each agent that it talks to it has a PUSH socket that keeps the newest message only: all messages carry whole states,
so the newest one is as good as all. What does not decode is counted and dropped.
"""

from __future__ import annotations

import errno
import logging
import time

import zmq

from holdfast.errors import PeerError
from holdfast.launcher.wire import MAX_MESSAGE_BYTES, AgentMessage, decode, encode

logger = logging.getLogger(__name__)

_LINGER_MS = 1000
_UNUSED_S = 60.0
"""A connection that nothing was sent on for so long is closed."""


class Channel:
    """Used by the agent's main thread only; `socket` may be polled."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], host: str) -> None:
        """Hear at a port of its own.

        Args:
            context: of the agent's sockets.
            host: address of this host, as other nodes reach it.

        Raises:
            PeerError: no port can be had.
        """
        self._context = context
        self._peers: dict[str, tuple[zmq.Socket[bytes], float]] = {}
        self._dropped = 0
        self.socket = context.socket(zmq.PULL)
        self.socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        self.socket.setsockopt(zmq.IPV6, 1 if ":" in host else 0)
        try:
            self.socket.bind("tcp://*:*")
        except zmq.ZMQError as error:
            self.socket.close(linger=0)
            raise PeerError(f"cannot hear other agents: {error}") from error
        port = str(self.socket.getsockopt_string(zmq.LAST_ENDPOINT)).rstrip("\0").rpartition(":")[2]
        self.address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        """host:port at which other agents reach this one."""

    def serve(self, port: int) -> bool:
        """Hear at `port` too; False where another process of this host does already.

        Raises:
            PeerError: the port cannot be used.
        """
        try:
            self.socket.bind(f"tcp://*:{port}")
        except zmq.ZMQError as error:
            if error.errno == errno.EADDRINUSE:
                return False
            raise PeerError(f"cannot serve the rendezvous endpoint at port {port}: {error}") from error
        return True

    def close(self) -> None:
        """Send what is queued, for a second at most."""
        self.socket.close(linger=0)
        for peer, _ in self._peers.values():
            peer.close(linger=_LINGER_MS)
        self._peers.clear()

    def send(self, message: AgentMessage, addresses: tuple[str, ...]) -> None:
        """To each of `addresses` (host:port): now, or as soon as it can be reached, unless a newer message comes."""
        data = encode(message)
        now = time.monotonic()
        for address in addresses:
            try:
                self._peer(address, now).send(data, zmq.NOBLOCK)
            except zmq.Again:
                logger.debug("%s takes no message of %d bytes now", address, len(data))
        self._close_unused(now)

    def receive(self) -> list[AgentMessage]:
        """Everything that has arrived."""
        messages: list[AgentMessage] = []
        while True:
            try:
                messages.append(decode(self.socket.recv(zmq.NOBLOCK)))
            except zmq.Again:
                return messages
            except PeerError as error:
                self._dropped += 1
                logger.warning("dropped message %d on the control channel: %s", self._dropped, error)

    def _peer(self, address: str, now: float) -> zmq.Socket[bytes]:
        known = self._peers.get(address)
        socket = known[0] if known is not None else self._dial(address)
        self._peers[address] = (socket, now)
        return socket

    def _dial(self, address: str) -> zmq.Socket[bytes]:
        socket = self._context.socket(zmq.PUSH)
        socket.setsockopt(zmq.CONFLATE, 1)
        socket.setsockopt(zmq.RECONNECT_IVL, 100)
        socket.setsockopt(zmq.IPV6, 1 if address.startswith("[") else 0)
        socket.connect(f"tcp://{address}")
        return socket

    def _close_unused(self, now: float) -> None:
        for address, (socket, used) in list(self._peers.items()):
            if now - used > _UNUSED_S:
                socket.close(linger=0)
                del self._peers[address]
