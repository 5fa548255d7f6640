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
from collections.abc import Collection

import zmq
from zmq.utils.monitor import recv_monitor_message

from holdfast.errors import PeerError
from holdfast.launcher.console import say
from holdfast.launcher.wire import MAX_MESSAGE_BYTES, AgentMessage, decode, encode
from holdfast.snapshot.keys import Gate, JobKeys

logger = logging.getLogger(__name__)

_LINGER_MS = 1000
_HANDSHAKE_FAILED = (
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)
_FAILURES_IN_A_ROW = 5
"""So many handshakes without a word fail only where keys differ; one may, because the other side ends."""
_UNUSED_S = 60.0
"""A connection that nothing was sent on for so long is closed."""


class _Handshakes:
    """Says it once where an endpoint answers, but will not have us: it is silent about that, as CURVE wants it."""

    def __init__(self) -> None:
        self._watched: dict[str, tuple[zmq.Socket[bytes], zmq.Socket[bytes]]] = {}
        self._failed: dict[str, int] = {}

    @property
    def sockets(self) -> list[zmq.Socket[bytes]]:
        return [monitor for _, monitor in self._watched.values()]

    def watch(self, address: str, socket: zmq.Socket[bytes]) -> None:
        """Until it is clear; before `socket` connects."""
        monitor = socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | _HANDSHAKE_FAILED)
        self._watched[address] = (socket, monitor)

    def check(self) -> None:
        for address, (_, monitor) in list(self._watched.items()):
            while address in self._watched and monitor.poll(0):
                self._heed(address, int(recv_monitor_message(monitor)["event"]))

    def _heed(self, address: str, event: int) -> None:
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self.forget(address)
            return
        self._failed[address] = self._failed.get(address, 0) + 1
        if event != zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL or self._failed[address] == _FAILURES_IN_A_ROW:
            self.forget(address)
            say(
                f"{address} refuses to talk to this node: not all nodes have the same job token "
                "(HOLDFAST_TOKEN, --hold-job-token-file), or another program has that port"
            )

    def forget(self, address: str) -> None:
        """Before the socket is closed."""
        if address in self._watched:
            socket, monitor = self._watched.pop(address)
            socket.disable_monitor()
            monitor.close(linger=0)


class Channel:
    """Used by the agent's main thread only; `sockets` may be polled."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        host: str,
        keys: JobKeys | None = None,
        endpoints: Collection[str] = (),
    ) -> None:
        """Hear at a port of its own.

        Args:
            context: of the agent's sockets.
            host: address of this host, as other nodes reach it.
            keys: of the job.
            endpoints: host:port of the rendezvous endpoints; one that refuses this node's keys is named in a line.

        Raises:
            PeerError: no port can be had.
        """
        self.context = context
        self._keys = keys or JobKeys()
        self._gate = Gate(context, self._keys) if self._keys.secret else None
        self._turned_away = 0
        self._endpoints = frozenset(endpoints)
        self._handshakes = _Handshakes()
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
        gate = [self._gate.socket] if self._gate is not None else []
        return [self.socket, *gate, *self._handshakes.sockets]

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
        for address, (peer, _) in self._peers.items():
            self._handshakes.forget(address)
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
            except zmq.ZMQError as error:  # what an agent calls its address may be none
                logger.warning("%r cannot be dialled: %s", address, error)
        self._close_unused(now)

    def receive(self) -> list[AgentMessage]:
        """Everything that has arrived."""
        if self._gate is not None:
            self._answer_strangers(self._gate)
        self._handshakes.check()
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
        if address in self._endpoints:
            self._handshakes.watch(address, socket)
        try:
            socket.connect(f"tcp://{address}")
        except zmq.ZMQError:
            self._handshakes.forget(address)
            socket.close(linger=0)
            raise
        return socket

    def _close_unused(self, now: float) -> None:
        for address, (socket, used) in list(self._peers.items()):
            if now - used > _UNUSED_S:
                self._handshakes.forget(address)
                socket.close(linger=0)
                del self._peers[address]
