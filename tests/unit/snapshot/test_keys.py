"""What is derived from the job token: tags that nobody else makes, clients that are let in."""

from __future__ import annotations

from pathlib import Path

import pytest
import zmq

from holdfast.errors import UsageError
from holdfast.snapshot import keys as module
from holdfast.snapshot.keys import HMAC, POLY1305, XXH3, Gate, JobKeys, read_token

TOKEN = "a token of the job for tests"


def test_a_tag_depends_on_token_kind_question_and_every_bit() -> None:
    keys, data = JobKeys(TOKEN), bytearray(range(256)) * 5
    assert keys.kinds == (POLY1305, HMAC)
    tags = {keys.tag(kind, question, data) for kind in keys.kinds for question in (b"a", b"b")}
    tags |= {JobKeys(TOKEN + "!").tag(kind, b"a", data) for kind in keys.kinds}
    assert len(tags) == 6
    assert {len(tag) for tag in tags} == {16}
    for kind in keys.kinds:
        tag = keys.tag(kind, b"a", data)
        assert JobKeys(TOKEN).sound(kind, b"a", memoryview(bytes(data)), tag)
        data[700] ^= 1
        assert not keys.sound(kind, b"a", data, tag)
        data[700] ^= 1
    assert keys.sound(POLY1305, b"", b"", keys.tag(POLY1305, b"", b""))
    assert not keys.sound("none", b"a", data, b"")
    assert not keys.sound(XXH3, b"a", data, JobKeys().tag(XXH3, b"a", data))


def test_poly1305_is_that_of_rfc_8439() -> None:
    """Section 2.5.2 of the RFC, under the key that the RFC gives."""
    poly1305 = module._poly1305()
    assert poly1305 is not None
    key = bytes.fromhex("85d6be7857556d337f4452fe42d506a80103808afb0db2fd4abff6af4149f51b")
    expected = bytes.fromhex("a8061dc1305136c6c22b8baf0c0127a9")
    assert poly1305(key, b"Cryptographic Forum Research Group") == expected


def test_without_libsodium_there_is_hmac(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_poly1305", lambda: None)
    keys = JobKeys(TOKEN)
    assert keys.kinds == (HMAC,)
    assert keys.sound(HMAC, b"q", b"data", keys.tag(HMAC, b"q", b"data"))
    with pytest.raises(UsageError, match="poly1305"):
        keys.tag(POLY1305, b"q", b"data")


def test_only_clients_with_the_key_pair_of_the_token_are_let_in() -> None:
    keys, context = JobKeys(TOKEN), zmq.Context()
    gate = Gate(context, keys)
    server, friend, stranger = (context.socket(kind) for kind in (zmq.ROUTER, zmq.DEALER, zmq.DEALER))
    keys.serve(server)
    keys.dial(friend)
    keys.dial(stranger)
    stranger.curve_publickey, stranger.curve_secretkey = zmq.curve_keypair()  # it knows the server's public key only
    port = server.bind_to_random_port("tcp://127.0.0.1")
    for socket in (stranger, friend):
        socket.connect(f"tcp://127.0.0.1:{port}")
        socket.send(b"hello")
    while not (server.poll(1) and gate.refused):
        gate.answer()
    assert server.recv_multipart()[1] == b"hello"
    assert not server.poll(20)
    for socket in (server, friend, stranger):
        socket.close(0)
    gate.close()
    context.term()


def test_a_token_file_is_private_and_a_token_is_long(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text(f"{TOKEN}\n")
    path.chmod(0o640)
    with pytest.raises(UsageError, match="chmod 600"):
        read_token(path)
    path.chmod(0o600)
    assert read_token(path) == TOKEN
    with pytest.raises(UsageError, match="No such file"):
        read_token(tmp_path / "missing")
    with pytest.raises(UsageError, match="at least 16"):
        JobKeys("short")


def test_workers_send_each_other_tagged_data_or_none() -> None:
    data = memoryview(b"bulk")
    tagger = JobKeys(TOKEN).between_workers()
    assert tagger is not None
    assert tagger(b"message", data) == JobKeys(TOKEN).tag(POLY1305, b"message", data)
    assert tagger(b"message", data) != tagger(b"another", data)
    assert JobKeys(TOKEN, encrypt_all=True).between_workers() is None
    without = JobKeys("", encrypt_all=True).between_workers()
    assert without is not None
    assert without(b"message", data) == JobKeys().tag(XXH3, b"", data)
