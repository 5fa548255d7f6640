"""Ranges of shared memory between nodes: what is given out, what is refused, what is noticed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import zmq

from holdfast.checkpoint.version import GenerationId
from holdfast.errors import CorruptError, HoldfastError, PeerError
from holdfast.snapshot.arena import SLOT_HEADER_BYTES, Arena, Slot
from holdfast.snapshot.bulk import MAX_RANGE_BYTES, BulkClient, BulkServer, SlotRange, TokenBucket
from holdfast.snapshot.keys import Gate, JobKeys
from holdfast.snapshot.shelf import Shelf

VERSION = GenerationId(incarnation=1, nonce="7f3a9c02", generation=4).at(7)
TOKEN = "a token of the job for tests"
Read = Callable[..., memoryview | HoldfastError]


@pytest.fixture
def slot(tmp_path: Path) -> Iterator[Slot]:
    arena = Arena.open(tmp_path / "arena")
    arena.reserve(0, (0,), 1, 1 << 16)
    opened = Slot.open(arena.slot_path(0, 0, 0))
    opened.begin(VERSION, 0, 1)
    opened.image[:5] = b"image"
    opened.finish(5, bytes(16))
    yield opened
    opened.close()
    arena.remove()


@pytest.fixture(params=["", "control", "all"])
def link(request: pytest.FixtureRequest, slot: Slot) -> Iterator[tuple[BulkServer, BulkClient]]:
    """A server and a client: without token, with one, with everything encrypted."""
    context = zmq.Context()
    keys = JobKeys(TOKEN if request.param else "", encrypt_all=request.param == "all")
    server = BulkServer(context, "127.0.0.1", "", keys=keys, read=Shelf(slot.path.parent).read)
    server.start()
    gate, stop = (Gate(context, keys) if keys.secret else None), threading.Event()
    thread = threading.Thread(target=_guard, args=(gate, stop))
    thread.start()
    client = BulkClient(context, server.endpoint, keys)
    yield server, client
    stop.set()
    thread.join()
    client.close()
    server.close()
    context.term()


def _guard(gate: Gate | None, stop: threading.Event) -> None:
    while gate is not None and not stop.wait(0.002):
        gate.answer()
    if gate is not None:
        gate.close()


@pytest.fixture
def read(link: tuple[BulkServer, BulkClient], slot: Slot) -> Read:
    def ask(**changes: object) -> memoryview | HoldfastError:
        wanted = SlotRange(path=str(slot.path), version=VERSION, offset=SLOT_HEADER_BYTES, length=5)
        number = link[1].ask(msgspec.structs.replace(wanted, **changes))
        answered, data = link[1].wait(120.0)
        assert answered == number
        return data

    return ask


def test_a_clean_slot_is_served(read: Read) -> None:
    assert read() == b"image"


def test_a_slot_that_holds_something_else_or_is_being_filled_is_not_served(read: Read, slot: Slot) -> None:
    other = read(version=msgspec.structs.replace(VERSION, step=8))
    assert isinstance(other, PeerError)
    assert "holds" in str(other)
    slot.begin(VERSION, 0, 1)
    assert isinstance(read(), PeerError)


@pytest.mark.parametrize("link", [""], indirect=True)
def test_a_slot_that_was_made_anew_at_the_same_place_is_the_one_that_is_read(read: Read, slot: Slot) -> None:
    assert read() == b"image"
    data = slot.path.read_bytes()
    slot.path.unlink()
    slot.path.write_bytes(data.replace(b"image", b"other"))
    assert read() == b"other"


@pytest.mark.parametrize("link", [""], indirect=True)
def test_a_slot_whose_place_a_link_has_taken_is_not_read(read: Read, slot: Slot) -> None:
    assert read() == b"image"
    slot.path.rename(slot.path.with_name("elsewhere"))
    slot.path.symlink_to(slot.path.with_name("elsewhere"))
    assert isinstance(read(), PeerError)


@pytest.mark.parametrize("link", ["control"], indirect=True)
@pytest.mark.parametrize("name", ["control", "../outside", "slot-0-0-0/../node.state", "/etc/passwd", "slot-0-0-9"])
def test_nothing_but_slots_of_the_arena_is_served(read: Read, slot: Slot, name: str) -> None:
    (slot.path.parent.parent / "outside").write_bytes(bytes(8192))
    assert isinstance(read(path=str(slot.path.parent / name)), PeerError)


@pytest.mark.parametrize("link", [""], indirect=True)
def test_garbage_and_ranges_out_of_bounds_are_counted_and_dropped(
    link: tuple[BulkServer, BulkClient], read: Read
) -> None:
    server, client = link
    client.socket.send_multipart([b"garbage", b""])
    for wrong in ({"length": 0}, {"length": MAX_RANGE_BYTES + 1}, {"offset": -1}):
        client.ask(msgspec.structs.replace(SlotRange(path="x", version=VERSION, offset=0, length=1), **wrong))
    assert read() == b"image"
    assert server.counters.garbage == 4


@pytest.mark.parametrize("link", ["control"], indirect=True)
def test_a_question_without_the_job_token_is_not_answered(link: tuple[BulkServer, BulkClient], slot: Slot) -> None:
    server, _ = link
    context = zmq.Context()
    stranger = BulkClient(context, server.endpoint, JobKeys("another token of another job"))
    stranger.ask(SlotRange(path=str(slot.path), version=VERSION, offset=0, length=5))
    deadline = time.monotonic() + 120
    while not server.counters.garbage and time.monotonic() < deadline:
        time.sleep(0.002)
    assert server.counters.garbage == 1
    assert server.counters.sent_bytes == 0
    stranger.close()
    context.term()


@pytest.mark.parametrize("token", ["", TOKEN])
@pytest.mark.parametrize("flips", [1, 3])
def test_a_bit_that_flips_on_the_way_is_noticed_and_never_delivered(token: str, flips: int) -> None:
    """A server whose memory changes between tag and wire, as a damaged message would: once, or again and again."""
    context, keys = zmq.Context(), JobKeys(token)
    left = [flips]
    given: list[bytearray] = []

    def read(_: object) -> memoryview:
        given.append(bytearray(b"image"))
        return memoryview(given[-1])

    class Flipping(JobKeys):
        def tag(self, kind: str, request: object, data: object) -> bytes:
            made = super().tag(kind, request, data)  # type: ignore[arg-type]
            if left[0]:
                left[0] -= 1
                given[-1][2] ^= 0x10
            return made

    server = BulkServer(context, "127.0.0.1", "", keys=Flipping(token), read=read)
    server.start()
    client = BulkClient(context, server.endpoint, keys)
    number = client.ask(SlotRange(path="x", version=VERSION, offset=0, length=5))
    answered, answer = client.wait(120.0)
    client.close()
    server.close()
    context.term()
    assert answered == number
    assert client.counters.damaged == flips
    if flips == 1:
        assert answer == b"image"
    else:
        assert isinstance(answer, CorruptError)


def test_a_bucket_lets_its_rate_pass_with_short_bursts() -> None:
    bucket = TokenBucket(1000.0)
    assert bucket.wait_s(5.0) == 0.0
    bucket.take(1000, 5.0)
    assert bucket.wait_s(5.0) == pytest.approx(0.9)
    assert bucket.wait_s(5.95) == 0.0
    bucket.take(100, 5.95)
    assert bucket.wait_s(6.0) == pytest.approx(0.0)
    bucket.take(100, 6.0)
    assert bucket.wait_s(6.0) == pytest.approx(0.1)
    assert TokenBucket(0.0).wait_s(0.0) == 0.0
