"""The order of things in accelerator copies, on a device that writes down what it is told and runs it later."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

import holdfast.snapshot.cuda as cuda
from holdfast.snapshot.copyplan import CopyPlan, Source
from holdfast.snapshot.cuda import CudaFill, plan_runs


class FakeEvent:
    def __init__(self) -> None:
        self.place: tuple[FakeStream, int] | None = None

    def record(self, stream: FakeStream) -> None:
        self.place = (stream, len(stream.queue))

    def synchronize(self) -> None:
        assert self.place is not None, "an event that was never recorded"
        stream, position = self.place
        stream.run(position)


class FakeStream:
    """Work that runs when somebody waits for it, in order, after what it waits for."""

    def __init__(self) -> None:
        self.queue: list[Callable[[], None]] = []
        self.done = 0

    def wait_event(self, event: FakeEvent) -> None:
        self.queue.append(event.synchronize)

    def run(self, until: int) -> None:
        while self.done < until:
            self.done += 1
            self.queue[self.done - 1]()


class FakeDevice:
    """Copies that are launched inside `use` are queued, as an accelerator does."""

    def __init__(self, *, registers: bool = True) -> None:
        self.training, self.side = FakeStream(), FakeStream()
        self.registers = registers
        self.registered: list[int] = []

    def current_stream(self) -> FakeStream:
        return self.training

    def side_stream(self) -> FakeStream:
        return self.side

    def event(self) -> FakeEvent:
        return FakeEvent()

    @contextlib.contextmanager
    def use(self, stream: FakeStream) -> Iterator[None]:
        yield

    def pinned(self, num_bytes: int) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)

    def register(self, address: int, num_bytes: int) -> bool:
        self.registered.append(address)
        return self.registers

    def unregister(self, address: int) -> None:
        self.registered.remove(address)


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "SMALL_BYTES", 256)
    monkeypatch.setattr(cuda, "RING_CHUNK_BYTES", 1024)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> FakeDevice:
    fake = FakeDevice()
    launch = cuda._launch
    monkeypatch.setattr(
        cuda,
        "_launch",
        lambda tensors, target, staging: fake.side.queue.append(lambda: launch(tensors, target, staging)),
    )
    return fake


def sources() -> list[Source]:
    """Small and large pieces in turn, one strided, one that may change at once; with a gap in the image."""
    generator = torch.Generator().manual_seed(1)
    found, offset = [], 64
    for index, shape in enumerate([(3,), (5, 2), (700,), (4,), (2, 3), (40, 30), (6,)]):
        tensor = torch.randn(shape, generator=generator)
        if shape == (40, 30):
            tensor = torch.randn(30, 40, generator=generator).t()
        found.append(Source(f"t{index}", tensor, offset, overlap=index != 1))
        offset += found[-1].size_bytes + (16 if index == 3 else 0)
    return found


def plan_of(pieces: list[Source]) -> CopyPlan:
    return cast(CopyPlan, SimpleNamespace(device=tuple(pieces)))


def check(image: torch.Tensor, pieces: list[Source], expected: list[torch.Tensor]) -> None:
    for piece, tensor in zip(pieces, expected, strict=True):
        found = image[piece.offset : piece.offset + piece.size_bytes].clone().view(tensor.dtype).view(tensor.shape)
        assert torch.equal(found, tensor), piece.name


def test_small_neighbours_travel_together_and_large_pieces_alone() -> None:
    pieces = sources()
    runs = plan_runs(pieces[::-1])
    assert [[source.name for source in run.sources] for run in runs] == [
        ["t0", "t1"],
        ["t2"],
        ["t3"],
        ["t4"],
        ["t5"],
        ["t6"],
    ]
    for run in runs:
        assert run.offset == run.sources[0].offset
        assert run.length == sum(source.size_bytes for source in run.sources)


def test_ring_brings_every_byte_and_the_image_is_registered_after_it(device: FakeDevice) -> None:
    pieces = sources()
    image = torch.zeros(16384, dtype=torch.uint8)
    fill = CudaFill(cast(Any, device))
    expected = [piece.tensor.clone() for piece in pieces]
    transfer = fill.start(plan_of(pieces), image)
    assert not transfer.direct
    pieces[1].tensor.add_(1)  # may change at once: a clone travels
    transfer.finish()
    check(image, pieces, expected)
    assert device.registered == [image.data_ptr()]
    assert fill.start(plan_of(pieces), image).direct
    fill.close()
    assert device.registered == []


def test_direct_copies_are_launched_at_the_boundary_and_the_update_waits_on_the_device(device: FakeDevice) -> None:
    pieces = sources()
    image = torch.zeros(16384, dtype=torch.uint8)
    fill = CudaFill(cast(Any, device))
    fill._registered[image.data_ptr()] = True
    transfer = fill.start(plan_of(pieces), image)
    assert device.side.done == 0, "the host has waited"
    transfer.before_update()
    assert device.side.done == 0, "the host has waited"
    expected = [piece.tensor.clone() for piece in pieces]
    device.training.queue.append(lambda: [piece.tensor.zero_() for piece in pieces] and None)  # the update
    device.training.run(len(device.training.queue))
    transfer.finish()
    check(image, pieces, expected)


def test_second_version_stays_behind_the_first(device: FakeDevice) -> None:
    pieces = sources()
    images = [torch.zeros(16384, dtype=torch.uint8) for _ in range(2)]
    fill = CudaFill(cast(Any, device))
    plan = plan_of(pieces)
    for image in images:
        fill._registered[image.data_ptr()] = True
    first = fill.start(plan, images[0])
    before = [piece.tensor.clone() for piece in pieces]
    first.before_update()
    device.training.queue.append(lambda: [piece.tensor.mul_(2) for piece in pieces] and None)
    second = fill.start(plan, images[1])
    second.before_update()
    device.training.queue.append(lambda: [piece.tensor.zero_() for piece in pieces] and None)
    device.training.run(len(device.training.queue))
    second.finish()
    first.finish()
    check(images[0], pieces, before)
    overlapping = [piece for piece in pieces if piece.overlap]
    check(images[1], overlapping, [2 * tensor for tensor, piece in zip(before, pieces, strict=True) if piece.overlap])


def test_refused_registration_stays_with_the_ring(device: FakeDevice, caplog: pytest.LogCaptureFixture) -> None:
    device.registers = False
    pieces = sources()
    image = torch.zeros(16384, dtype=torch.uint8)
    fill = CudaFill(cast(Any, device))
    for _ in range(2):
        transfer = fill.start(plan_of(pieces), image)
        assert not transfer.direct
        transfer.finish()
    check(image, pieces, [piece.tensor for piece in pieces])
    assert caplog.text.count("the driver refused") == 1
