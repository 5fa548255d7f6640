"""Whether this node reaches the others of its generation: what no heartbeat to the leader tells.

Connections are begun, never waited for: `look` sees what has become of them. A node looks at the ones that follow it by
rank, so that in a large job every node is looked at, and nobody looks at all of them.
"""

from __future__ import annotations

import errno
import ipaddress
import logging
import select
import socket

from holdfast.launcher.health import Finding
from holdfast.launcher.wire import Place, Plan

logger = logging.getLogger(__name__)

WITHIN_S = 3.0
"""A node that has not answered by then does not."""
MOST_NODES = 16


class Reach:
    """See the module's head. One per agent, used by its main thread; `close` ends it."""

    def __init__(self) -> None:
        self._open: dict[socket.socket, tuple[str, str]] = {}
        """Connections that were begun: host name and host:port of the other end."""
        self._refused: list[Finding] = []
        self._until = 0.0

    def begin(self, plan: Plan, place: Place, now: float) -> None:
        """Begin to look at the generation of `plan`, in which this node has `place`."""
        self.close()
        self._until = now + WITHIN_S
        ring = [other for other in plan.places if other.node_rank > place.node_rank]
        ring += [other for other in plan.places if other.node_rank < place.node_rank]
        for other in ring[:MOST_NODES]:
            for endpoint in (other.address, other.daemon.removeprefix("tcp://")):
                self._dial(other.host, endpoint)

    def look(self, now: float) -> list[Finding]:
        """What was found since the last look: one for each end that does not answer."""
        found, self._refused = self._refused, []
        if not self._open:
            return found
        poller = select.poll()
        for connection in self._open:
            poller.register(connection, select.POLLOUT)
        ready = {descriptor for descriptor, _ in poller.poll(0)}
        for connection, (host, endpoint) in list(self._open.items()):
            if connection.fileno() not in ready and now < self._until:
                continue
            error = errno.ETIMEDOUT
            if connection.fileno() in ready:
                error = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if error:
                found.append(_silent(host, endpoint))
            del self._open[connection]
            connection.close()
        return found

    def close(self) -> None:
        """Give up what was begun."""
        self._refused.clear()
        while self._open:
            self._open.popitem()[0].close()

    def _dial(self, host: str, endpoint: str) -> None:
        address, _, port = endpoint.rpartition(":")
        address = address.strip("[]")
        if not port.isdigit() or not _is_number(address):
            return  # there is nothing to dial, or only a name server could tell what
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        try:
            connection = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        except OSError as error:  # none can be had: nothing is known of the other node
            logger.warning("cannot dial %s: %s", endpoint, error)
            return
        if connection.connect_ex((address, int(port) & 0xFFFF)) in (0, errno.EINPROGRESS):
            self._open[connection] = (host, endpoint)
        else:
            connection.close()
            self._refused.append(_silent(host, endpoint))


def _silent(host: str, endpoint: str) -> Finding:
    text = f"{host} does not answer this node at {endpoint}: see firewalls and routes between them, or --hold-iface"
    return Finding(check="reach", status="fail", text=text)


def _is_number(address: str) -> bool:
    try:
        ipaddress.ip_address(address)
    except ValueError:
        return False
    return True
