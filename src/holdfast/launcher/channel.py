"""The control channel between agents: a thin ZeroMQ shell that carries `holdfast.launcher.wire` messages.

The leader's end is a ROUTER bound to the rendezvous endpoint, a member's is a DEALER that dials it. Nothing is kept for
a peer that is not there: both ends send whole states, so the next one is as good. What does not decode is counted and
dropped.
"""

from __future__ import annotations

import errno
import logging

import zmq

from holdfast.errors import PeerError
from holdfast.launcher.wire import AgentMessage, Plan, Rejected, Report, decode, encode

logger = logging.getLogger(__name__)

_MAX_BYTES = 1 << 20
_LINGER_MS = 1000


class Channel:
    """One end. Used by the agent's main thread only; `socket` may be polled."""

    def __init__(self, socket: zmq.Socket[bytes], *, leads: bool) -> None:
        self.socket = socket
        self.leads = leads
        self._peers: dict[str, bytes] = {}
        self._dropped = 0

    @classmethod
    def lead(cls, context: zmq.Context[zmq.Socket[bytes]], host: str, port: int) -> Channel | None:
        """Serve the endpoint on all interfaces; None where another process of this machine does already."""
        socket = context.socket(zmq.ROUTER)
        socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        _set_up(socket, host)
        try:
            socket.bind(f"tcp://*:{port}")
        except zmq.ZMQError as error:
            socket.close(linger=0)
            if error.errno == errno.EADDRINUSE:
                return None
            raise PeerError(f"cannot serve the rendezvous endpoint at port {port}: {error}") from error
        return cls(socket, leads=True)

    @classmethod
    def follow(cls, context: zmq.Context[zmq.Socket[bytes]], host: str, port: int, node_id: str) -> Channel:
        """Dial the endpoint, again and again until somebody serves it."""
        socket = context.socket(zmq.DEALER)
        socket.setsockopt(zmq.IDENTITY, node_id.encode())
        socket.setsockopt(zmq.IMMEDIATE, 1)
        socket.setsockopt(zmq.RECONNECT_IVL, 100)
        _set_up(socket, host)
        socket.connect(f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}")
        return cls(socket, leads=False)

    def close(self) -> None:
        """Send what is queued, for a second at most."""
        self.socket.close(linger=_LINGER_MS)

    def report(self, report: Report) -> None:
        """Member to leader; dropped while there is none."""
        self._send([encode(report)])

    def broadcast(self, plan: Plan) -> None:
        """Leader to every agent that has reported."""
        data = encode(plan)
        for identity in self._peers.values():
            self._send([identity, data])

    def turn_away(self, node_id: str, reason: str) -> None:
        """Leader to one agent."""
        identity = self._peers.get(node_id)
        if identity is not None:
            self._send([identity, encode(Rejected(reason=reason))])

    def receive(self) -> list[AgentMessage]:
        """Everything that has arrived."""
        messages: list[AgentMessage] = []
        while True:
            try:
                frames = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return messages
            try:
                message = decode(frames[-1])
            except PeerError as error:
                self._dropped += 1
                logger.warning("dropped message %d on the control channel: %s", self._dropped, error)
                continue
            if self.leads and isinstance(message, Report):
                self._peers[message.node.node_id] = frames[0]
            if isinstance(message, Report) == self.leads:
                messages.append(message)

    def _send(self, frames: list[bytes]) -> None:
        try:
            self.socket.send_multipart(frames, zmq.NOBLOCK)
        except zmq.Again:
            logger.debug("nobody takes a message of %d bytes now", len(frames[-1]))
        except zmq.ZMQError as error:
            if error.errno != errno.EHOSTUNREACH:
                raise


def _set_up(socket: zmq.Socket[bytes], host: str) -> None:
    socket.setsockopt(zmq.MAXMSGSIZE, _MAX_BYTES)
    socket.setsockopt(zmq.SNDHWM, 100)
    if ":" in host:
        socket.setsockopt(zmq.IPV6, 1)
