"""The control channel between agents: a thin ZeroMQ shell that carries `holdfast.launcher.wire` messages.

Each agent hears at one PULL socket: at a port of its own, and at the rendezvous endpoints that it serves besides. To
each agent that it talks to it has a PUSH socket that keeps the newest message only: all messages carry whole states,
so the newest one is as good as all. What does not decode is counted and dropped.

With a job token the connections are CURVE, by keys that follow from it (`holdfast.snapshot.keys`): who does not have it
is neither heard nor told anything.
"""

from __future__ import annotations

import errno
import logging
import time

import zmq

from holdfast.errors import PeerError
from holdfast.launcher.wire import MAX_MESSAGE_BYTES, AgentMessage, decode, encode
from holdfast.snapshot.keys import Gate, JobKeys

logger = logging.getLogger(__name__)

_LINGER_MS = 1000
_UNUSED_S = 60.0
"""A connection that nothing was sent on for so long is closed."""


class Channel:
    """Used by the agent's main thread only; `sockets` may be polled."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], host: str, keys: JobKeys | None = None) -> None:
        """Hear at a port of its own.

        Args:
            context: of the agent's sockets.
            host: address of this host, as other nodes reach it.
            keys: of the job.

        Raises:
            PeerError: no port can be had.
        """
        self.context = context
        self._keys = keys or JobKeys()
        self._gate = Gate(context, self._keys) if self._keys.secret else None
        self._turned_away = 0
        self._peers: dict[str, tuple[zmq.Socket[bytes], float]] = {}
        self._dropped = 0
        self.socket = context.socket(zmq.PULL)
        self._keys.serve(self.socket)
        self.socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        self.socket.setsockopt(zmq.IPV6, 1 if ":" in host else 0)
        try:
            self.socket.bind("tcp://*:*")
        except zmq.ZMQError as error:
            self.close()
            raise PeerError(f"cannot hear other agents: {error}") from error
        port = str(self.socket.getsockopt_string(zmq.LAST_ENDPOINT)).rstrip("\0").rpartition(":")[2]
        self.address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        """host:port at which other agents reach this one."""

    @property
    def sockets(self) -> list[zmq.Socket[bytes]]:
        """What to poll for reading, before `receive`."""
        return [self.socket, *([self._gate.socket] if self._gate is not None else [])]

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
        if self._gate is not None:
            self._gate.close()
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
        if self._gate is not None:
            self._answer_strangers(self._gate)
        messages: list[AgentMessage] = []
        while True:
            try:
                messages.append(decode(self.socket.recv(zmq.NOBLOCK)))
            except zmq.Again:
                return messages
            except PeerError as error:
                self._dropped += 1
                logger.warning("dropped message %d on the control channel: %s", self._dropped, error)

    def _answer_strangers(self, gate: Gate) -> None:
        gate.answer()
        if gate.refused > self._turned_away == 0:
            logger.warning("somebody without this job's token was turned away from the control channel")
        self._turned_away = gate.refused

    def _peer(self, address: str, now: float) -> zmq.Socket[bytes]:
        known = self._peers.get(address)
        socket = known[0] if known is not None else self._dial(address)
        self._peers[address] = (socket, now)
        return socket

    def _dial(self, address: str) -> zmq.Socket[bytes]:
        socket = self.context.socket(zmq.PUSH)
        self._keys.dial(socket)
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
