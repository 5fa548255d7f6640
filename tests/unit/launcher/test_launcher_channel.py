"""The control channel: who has the job's token is heard, nobody else."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import zmq

from holdfast.errors import PeerError
from holdfast.launcher.channel import Channel
from holdfast.launcher.wire import Redirect, decode, encode
from holdfast.snapshot.keys import JobKeys

TOKEN, OTHER = "the token of this job", "the token of another"
HELLO = Redirect(sender="n", address="host:1")


def test_text_that_is_none_is_an_error_of_the_peer() -> None:
    assert decode(encode(HELLO)) == HELLO
    with pytest.raises(PeerError, match="no message"):
        decode(encode(HELLO).replace(b"host:1", b"host:\xff"))


@pytest.fixture
def channels() -> Iterator[list[Channel]]:
    made: list[Channel] = []
    yield made
    for channel in made:
        channel.close()
        channel.context.destroy()


def channel(made: list[Channel], token: str) -> Channel:
    """Each in a context of its own, as in another process."""
    made.append(Channel(zmq.Context(), "127.0.0.1", JobKeys(token)))
    return made[-1]


def hears(channel: Channel, limit_ms: int) -> list[object]:
    """What arrives first."""
    while _ready(channel, limit_ms):
        messages: list[object] = list(channel.receive())
        if messages:
            return messages
    return []


def _ready(channel: Channel, limit_ms: int) -> bool:
    poller = zmq.Poller()
    for socket in channel.sockets:
        poller.register(socket, zmq.POLLIN)
    return bool(poller.poll(limit_ms))


@pytest.mark.parametrize("token", ["", TOKEN])
def test_agents_of_one_job_hear_each_other(channels: list[Channel], token: str) -> None:
    one, two = channel(channels, token), channel(channels, token)
    for sender, receiver in ((one, two), (two, one)):
        sender.send(HELLO, (receiver.address,))
        assert hears(receiver, 120_000) == [HELLO]


@pytest.mark.parametrize("token", ["", OTHER])
def test_who_has_another_token_or_none_is_not_heard(channels: list[Channel], token: str) -> None:
    ours, friend, stranger = channel(channels, TOKEN), channel(channels, TOKEN), channel(channels, token)
    stranger.send(Redirect(sender="stranger", address="host:2"), (ours.address,))
    assert hears(ours, 300) == []
    friend.send(HELLO, (ours.address,))
    assert hears(ours, 120_000) == [HELLO]


@pytest.mark.parametrize(("ours", "theirs"), [(TOKEN, ""), (TOKEN, OTHER), ("", TOKEN), (TOKEN, TOKEN)])
def test_who_is_refused_at_an_endpoint_says_it_once(
    channels: list[Channel], capfd: pytest.CaptureFixture[str], ours: str, theirs: str
) -> None:
    endpoint = channel(channels, ours)
    channels.append(Channel(zmq.Context(), "127.0.0.1", JobKeys(theirs), endpoints=[endpoint.address]))
    caller = channels[-1]
    caller.send(HELLO, (endpoint.address,))
    same = ours == theirs
    assert hears(endpoint, 120_000 if same else 0) == ([HELLO] if same else [])
    refused, said = f"{endpoint.address} refuses to talk to this node", ""
    deadline = time.monotonic() + 120
    while not same and refused not in said and time.monotonic() < deadline:
        hears(caller, 50)
        said += capfd.readouterr().err
    hears(caller, 500)  # as long as it is turned away again
    said += capfd.readouterr().err
    assert said.count(refused) == (not same)


def test_nothing_is_told_to_who_has_no_token(channels: list[Channel]) -> None:
    ours, stranger = channel(channels, TOKEN), channel(channels, "")
    ours.send(HELLO, (stranger.address,))
    assert hears(stranger, 300) == []


def test_an_address_that_is_none_does_not_keep_others_from_hearing(channels: list[Channel]) -> None:
    one, two = channel(channels, ""), channel(channels, "")
    one.send(HELLO, ("no address", "", "host:port", two.address))
    assert hears(two, 120_000) == [HELLO]
