"""The control channel: who has the job's token is heard, nobody else."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import zmq

from holdfast.launcher.channel import Channel
from holdfast.launcher.wire import Redirect
from holdfast.snapshot.keys import JobKeys

TOKEN, OTHER = "the token of this job", "the token of another"
HELLO = Redirect(sender="n", address="host:1")


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
    poller = zmq.Poller()
    for socket in channel.sockets:
        poller.register(socket, zmq.POLLIN)
    while poller.poll(limit_ms):
        messages: list[object] = list(channel.receive())
        if messages:
            return messages
    return []


@pytest.mark.parametrize("token", ["", TOKEN])
def test_agents_of_one_job_hear_each_other(channels: list[Channel], token: str) -> None:
    one, two = channel(channels, token), channel(channels, token)
    for sender, receiver in ((one, two), (two, one)):
        sender.send(HELLO, (receiver.address,))
        assert hears(receiver, 10_000) == [HELLO]


@pytest.mark.parametrize("token", ["", OTHER])
def test_who_has_another_token_or_none_is_not_heard(channels: list[Channel], token: str) -> None:
    ours, friend, stranger = channel(channels, TOKEN), channel(channels, TOKEN), channel(channels, token)
    stranger.send(Redirect(sender="stranger", address="host:2"), (ours.address,))
    assert hears(ours, 300) == []
    friend.send(HELLO, (ours.address,))
    assert hears(ours, 10_000) == [HELLO]


def test_nothing_is_told_to_who_has_no_token(channels: list[Channel]) -> None:
    ours, stranger = channel(channels, TOKEN), channel(channels, "")
    ours.send(HELLO, (stranger.address,))
    assert hears(stranger, 300) == []
