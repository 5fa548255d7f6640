"""Scripts that name the rendezvous port by themselves find the launcher's store there, as under torchrun."""

from __future__ import annotations

import socket

from holdfast.launcher.stores import new_store


def test_the_store_has_the_port_that_was_named_while_it_is_free() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        taken = new_store(port)
        assert taken.port != port
    first = new_store(port)
    assert first.port == port
    assert new_store(port).port != port, "the store of the generation before may still be there"
    del first
    assert new_store(port).port == port
    assert new_store(0).port > 0
