"""Messages: what decodes is a known class with sound fields; everything else is one error."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.checkpoint.version import GenerationId
from holdfast.errors import PeerError
from holdfast.snapshot import messages
from holdfast.snapshot.messages import (
    MAX_MESSAGE_BYTES,
    AnyMessage,
    Committed,
    LeaderRestore,
    NodeReport,
    Restore,
    decode,
    encode,
)
from holdfast.snapshot.reports import NodeState

GENERATION = GenerationId(incarnation=2, nonce="7f3a9c02", generation=4)


@pytest.mark.parametrize(
    "message",
    [
        Committed(version=GENERATION.at(7), global_rank=3, slot=2, wait_s=0.5),
        LeaderRestore(generation=GENERATION, restore=Restore(tier="none"), history=None),
        NodeReport(
            state=NodeState(
                generation=GENERATION,
                node_rank=1,
                epoch=3,
                leader_epoch=1,
                num_slots=6,
                free=2,
                held=(),
                complete=None,
                pinned=(),
                ranks=(),
            )
        ),
    ],
)
def test_a_message_comes_back_as_it_was_sent(message: AnyMessage) -> None:
    assert decode(encode(message)) == message


def test_every_message_class_is_decodable() -> None:
    classes = {
        value
        for value in vars(messages).values()
        if isinstance(value, type) and issubclass(value, messages.Message) and value is not messages.Message
    }
    assert classes == set(AnyMessage.__args__)


@given(st.binary(max_size=200))
def test_random_bytes_are_an_error_of_the_peer_or_a_message(data: bytes) -> None:
    try:
        message = decode(data)
    except PeerError:
        return
    assert isinstance(message, messages.Message)


@pytest.mark.parametrize(
    "payload",
    [
        {"type": "Committed", "version": 7, "global_rank": 0, "slot": 1},
        {"type": "Committed"},
        {"type": "NoSuchMessage"},
        {"type": "Missed", "version": {"generation": {"incarnation": "1"}, "step": 2}, "global_rank": 0},
        [],
        None,
    ],
)
def test_wrong_fields_are_an_error_of_the_peer(payload: object) -> None:
    with pytest.raises(PeerError):
        decode(msgspec.msgpack.encode(payload))


def test_text_that_is_none_is_an_error_of_the_peer() -> None:
    data = encode(Committed(version=GENERATION.at(7), global_rank=3, slot=2))
    assert b"7f3a9c02" in data
    with pytest.raises(PeerError, match="no message"):
        decode(data.replace(b"7f3a9c02", b"7f3a9c0\xff"))


def test_a_message_over_the_limit_is_refused_unread() -> None:
    with pytest.raises(PeerError, match="over the limit"):
        decode(memoryview(bytearray(MAX_MESSAGE_BYTES + 1)))
