"""The copier: what lies in a clean slot is the state at the boundary, bit for bit, or there is no clean slot."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch
import xxhash
import zmq

from holdfast.checkpoint.boxes import whole
from holdfast.checkpoint.image import ImageLayout, Piece, block_checksums, read_header
from holdfast.checkpoint.version import GenerationId
from holdfast.faults import RehearsedFault
from holdfast.snapshot.arena import Slot, SlotState
from holdfast.snapshot.copier import Copier, CopyPlan, Source, Ticket
from holdfast.snapshot.images import open_image
from holdfast.snapshot.keys import JobKeys
from holdfast.snapshot.records import ImageLocation

GENERATION = GenerationId(incarnation=1, nonce="0123abcd", generation=2)
LARGE = 300_000
"""Elements: several blocks of the layouts made here, and over the limit of the bulk lane."""
BLOCK = 1 << 18


class Gate:
    """Holds the copying thread in the middle of a copy."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.open = threading.Event()
        self.seen: list[str] = []

    def at(self, when: str, step: int, image: memoryview | None) -> None:
        self.seen.append(when)
        if when == "copy":
            self.reached.set()
            assert self.open.wait(120)


class Rig:
    """Two slots of one rank, and a state."""

    def __init__(self, directory: Path, state: dict[str, torch.Tensor], **timing: str) -> None:
        self.state = state
        self.timing = timing
        self.layout = ImageLayout.plan(
            [
                Piece(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), whole(tuple(tensor.shape)))
                for name, tensor in state.items()
            ],
            objects_capacity=8192,
            block_bytes=BLOCK,
        )
        self.slots = []
        for index in range(2):
            path = directory / f"slot-0-0-{index}"
            path.write_bytes(bytes(4096 + self.layout.size_bytes))
            self.slots.append(Slot.open(path))
        self.clean: list[Ticket] = []
        self.copier: Copier

    def plan(self) -> CopyPlan:
        offsets = dict(zip((piece.name for piece in self.layout.pieces), self.layout.piece_offsets, strict=True))
        return CopyPlan(
            self.layout,
            [
                Source(
                    name,
                    tensor.detach(),
                    offsets[name],
                    overlap=self.timing.get(name, "overlap") == "overlap",
                    frozen=self.timing.get(name) == "frozen",
                )
                for name, tensor in self.state.items()
            ],
        )

    def read(self, slot: int) -> dict[str, torch.Tensor]:
        """What any safetensors reader finds, after all checksums have been verified."""
        image = self.slots[slot].image[: self.layout.size_bytes]
        digest = self.slots[slot].read_header().header_digest
        meta = read_header(lambda offset, length: image[offset : offset + length], expected_digest=digest)
        assert block_checksums([image[meta.data_start :]], BLOCK) == meta.checksums
        found = safetensors.torch.load(bytes(image))
        del found["__objects__"]
        return found


Make = Callable[..., Rig]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    rigs: list[Rig] = []

    def make(
        state: dict[str, torch.Tensor],
        at: Callable[[str, int, memoryview | None], None] | None = None,
        **timing: str,
    ) -> Rig:
        rig = Rig(tmp_path, state, **timing)
        rig.copier = Copier(rig.slots, global_rank=3, world_size=4, on_clean=rig.clean.append, at=at)
        rigs.append(rig)
        return rig

    yield make
    for rig in rigs:
        rig.copier.close()


def mixed_state() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {
        "large": torch.randn(LARGE, generator=generator),
        "other_large": torch.randn(3, LARGE // 2, generator=generator, dtype=torch.float64),
        "half": torch.randn(1000, generator=generator).to(torch.bfloat16),
        "small": torch.randn(5, 7, generator=generator),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "flags": torch.randint(0, 2, (33,), generator=generator).bool(),
        "counts": torch.arange(70_000),
        "strided": torch.randn(40, 50, generator=generator).t(),
        "channels_last": torch.randn(8, 16, 40, 40, generator=generator).to(memory_format=torch.channels_last),
    }


def copy_of(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("inline", [False, True])
def test_clean_slot_holds_every_tensor_bit_for_bit(make: Make, inline: bool) -> None:
    rig = make(mixed_state(), small="boundary", large="frozen", counts="boundary")
    ticket = rig.copier.begin(GENERATION.at(9), 1, rig.plan(), b"objects", inline=inline)
    assert ticket.wait(120)
    assert ticket.clean
    assert rig.clean == [ticket]
    header = rig.slots[1].read_header()
    assert (header.state, header.version, header.global_rank) == (SlotState.CLEAN, GENERATION.at(9), 3)
    assert_same(rig.read(1), rig.state)
    start = rig.layout.objects_offset
    assert bytes(rig.slots[1].image[start : start + 8192]) == b"objects".ljust(8192, b"\0")


def test_an_image_in_a_slot_is_verified_once_and_read_without_copies(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = make(mixed_state())
    assert rig.copier.begin(GENERATION.at(9), 1, rig.plan(), b"objects", inline=True).wait(120)
    place = ImageLocation(
        node_rank=0,
        daemon="",
        path=str(rig.slots[1].path),
        offset=4096,
        size_bytes=rig.layout.size_bytes,
        local=True,
    )
    with zmq.Context() as context:
        image = open_image(context, place, GENERATION.at(9), JobKeys(None, encrypt_all=False), {})
    checked: list[int] = []
    plain = xxhash.xxh3_64_intdigest
    monkeypatch.setattr(xxhash, "xxh3_64_intdigest", lambda data: checked.append(len(data)) or plain(data))
    length = rig.layout.size_bytes - rig.layout.data_start
    for _ in range(2):
        found = image.range(rig.layout.data_start, length)
        assert bytes(found) == bytes(rig.slots[1].image[rig.layout.data_start : rig.layout.size_bytes])
        del found
    assert sum(checked) == length
    image.close()


def test_update_waits_for_the_copy_and_the_slot_keeps_the_boundary(make: Make) -> None:
    gate = Gate()
    rig = make(mixed_state(), gate.at)
    expected = copy_of(rig.state)
    ticket = rig.copier.begin(GENERATION.at(1), 0, rig.plan(), b"")
    assert gate.reached.wait(120)
    assert not ticket.copied()
    threading.Timer(0.05, gate.open.set).start()
    assert rig.copier.wait_before_update() > 0
    assert ticket.copied()
    for tensor in rig.state.values():
        tensor.zero_()
    assert ticket.wait(120)
    assert ticket.clean
    assert_same(rig.read(0), expected)


def test_boundary_pieces_may_change_as_soon_as_begin_returns(make: Make) -> None:
    gate = Gate()
    rig = make(mixed_state(), gate.at, small="boundary", large="boundary", strided="boundary")
    expected = copy_of(rig.state)
    ticket = rig.copier.begin(GENERATION.at(1), 0, rig.plan(), b"")
    for name in ("small", "large", "strided"):
        rig.state[name].add_(1)
    gate.open.set()
    assert ticket.wait(120)
    assert ticket.clean
    assert_same(rig.read(0), expected)


def test_undeclared_change_gives_the_version_up_and_names_the_tensor(make: Make) -> None:
    gate = Gate()
    rig = make(mixed_state(), gate.at)
    ticket = rig.copier.begin(GENERATION.at(1), 0, rig.plan(), b"")
    assert gate.reached.wait(120)
    rig.state["small"].add_(1)
    gate.open.set()
    assert ticket.wait(120)
    assert not ticket.clean
    assert ticket.torn == ("small",)
    assert rig.slots[0].read_header().state is SlotState.FILLING
    again = rig.copier.begin(GENERATION.at(2), 0, rig.plan(), b"")
    assert again.wait(120)
    assert again.clean
    assert_same(rig.read(0), rig.state)


def test_failure_in_the_copy_is_told_and_the_next_version_is_whole(make: Make) -> None:
    def at(when: str, step: int, image: memoryview | None) -> None:
        if when == "copy" and step == 1:
            raise RehearsedFault("rehearsed")

    rig = make(mixed_state(), at, large="frozen")
    ticket = rig.copier.begin(GENERATION.at(1), 0, rig.plan(), b"")
    assert ticket.wait(120)
    assert isinstance(ticket.error, RehearsedFault)
    assert rig.slots[0].read_header().state is SlotState.FILLING
    assert rig.copier.wait_before_update() == 0.0
    again = rig.copier.begin(GENERATION.at(2), 0, rig.plan(), b"")
    assert again.wait(120)
    assert again.clean
    assert_same(rig.read(0), rig.state)


def test_frozen_piece_is_copied_once_and_again_when_it_has_changed(make: Make) -> None:
    rig = make(mixed_state(), large="frozen")
    plan = rig.plan()
    assert rig.copier.begin(GENERATION.at(1), 0, plan, b"").wait(120)
    position = rig.layout.piece_offsets[[piece.name for piece in rig.layout.pieces].index("large")]
    middle = position + 4 * (LARGE // 3)
    rig.slots[0].image[middle : middle + 4] = b"\xff\xff\xff\xff"  # would be overwritten by another copy
    second = rig.copier.begin(GENERATION.at(2), 0, plan, b"")
    assert second.wait(120)
    assert second.skip
    assert bytes(rig.slots[0].image[middle : middle + 4]) == b"\xff\xff\xff\xff"
    rig.state["large"].data.mul_(2)  # leaves the version counter alone
    third = rig.copier.begin(GENERATION.at(3), 0, plan, b"")
    assert third.wait(120)
    assert_same(rig.read(0), rig.state)


def test_replaced_tensors_and_shorter_objects_leave_nothing_behind(make: Make) -> None:
    rig = make(mixed_state())
    assert rig.copier.begin(GENERATION.at(1), 0, rig.plan(), b"long" * 500).wait(120)
    rig.state = {name: tensor.clone() for name, tensor in rig.state.items()}
    rig.state["small"].mul_(3)
    ticket = rig.copier.begin(GENERATION.at(2), 0, rig.plan(), b"short")
    assert ticket.wait(120)
    assert_same(rig.read(0), rig.state)
    start = rig.layout.objects_offset
    assert bytes(rig.slots[0].image[start : start + 8192]) == b"short".ljust(8192, b"\0")


def test_next_copy_goes_before_the_checksums_of_the_last(make: Make) -> None:
    order: list[tuple[str, int]] = []
    rig = make(mixed_state(), lambda when, step, image: order.append((when, step)))
    tickets = [rig.copier.begin(GENERATION.at(step), step % 2, rig.plan(), b"", inline=True) for step in (1, 2)]
    assert all(ticket.wait(120) and ticket.clean for ticket in tickets)
    assert order.index(("copy", 2)) < order.index(("commit", 2))
    assert_same(rig.read(0), rig.state)
    assert_same(rig.read(1), rig.state)


def test_close_lets_the_running_copy_end(make: Make) -> None:
    gate = Gate()
    rig = make(mixed_state(), gate.at)
    ticket = rig.copier.begin(GENERATION.at(1), 0, rig.plan(), b"")
    assert gate.reached.wait(120)
    threading.Timer(0.05, gate.open.set).start()
    rig.copier.close()
    assert ticket.clean
    assert not [thread for thread in threading.enumerate() if thread.name == "holdfast-copier"]
    assert gate.seen == ["copy", "copied", "commit"]


def test_doorbell_that_fails_ends_neither_the_ticket_nor_the_thread(tmp_path: Path) -> None:
    rig = Rig(tmp_path, mixed_state())

    def ring(ticket: Ticket) -> None:
        raise OSError("the socket is gone")

    copier = Copier(rig.slots, global_rank=0, world_size=1, on_clean=ring)
    try:
        for step in (1, 2):
            ticket = copier.begin(GENERATION.at(step), step % 2, rig.plan(), b"")
            assert ticket.wait(120)
            assert ticket.clean
            assert rig.slots[step % 2].read_header().state is SlotState.CLEAN
    finally:
        copier.close()


def test_slots_say_the_rank_in_the_job_and_images_the_rank_in_the_session(tmp_path: Path) -> None:
    rig = Rig(tmp_path, mixed_state())
    copier = Copier(rig.slots, global_rank=3, world_size=8, session_rank=1, session_size=2, on_clean=rig.clean.append)
    try:
        assert copier.begin(GENERATION.at(1), 0, rig.plan(), b"").wait(120)
    finally:
        copier.close()
    header, image = rig.slots[0].read_header(), rig.slots[0].image
    meta = read_header(lambda offset, length: image[offset : offset + length])
    assert (header.global_rank, header.world_size) == (3, 8)
    assert (meta.global_rank, meta.world_size) == (1, 2)
