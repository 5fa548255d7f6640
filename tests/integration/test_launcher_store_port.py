"""Scripts that name the rendezvous port by themselves find the launcher's store there, as under torchrun."""

from __future__ import annotations

import contextlib
import socket

from holdfast.launcher.stores import new_store

PORTS = range(32000, 32768)
"""Below the ephemeral range: no connection of a neighbour is given one of them while the test has let go of it."""


def test_the_store_has_the_port_that_was_named_while_it_is_free() -> None:
    with socket.socket() as probe:
        port = bound(probe)
        taken = new_store(port)
        assert taken.port != port
    first = new_store(port)
    assert first.port == port
    assert new_store(port).port != port, "the store of the generation before may still be there"
    del first
    assert new_store(port).port == port
    assert new_store(0).port > 0


def bound(probe: socket.socket) -> int:
    """A port that nobody had; the socket has it now."""
    for port in PORTS:
        with contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("all ports are taken")
