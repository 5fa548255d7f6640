"""Copies of accelerator tensors: a side stream, pinned memory, and events instead of waiting.

At the boundary (training thread, a few microseconds per launch):

1. Pieces that anything may change are cloned on the current stream, in stream order.
2. The side stream waits on an event of the current stream, gathers small tensors into one staging buffer, and copies
   everything into the image.
3. Before the next update the *current stream* waits on an event of the side stream. The host never waits.

The copying thread waits for the last event, then hashes. A version may be started while the one before is still being
copied: the side stream keeps them in order.

The image can be the target of an asynchronous copy once its memory is registered with the driver; that takes about a
second per few GB and happens on the copying thread, slot by slot. Until then copies go through a small pinned ring, and
the training thread waits at the next update until the last of them has been launched.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import logging
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from holdfast.snapshot.copyplan import CopyPlan, Source

log = logging.getLogger(__name__)

SMALL_BYTES = 64 << 10
"""Pieces below this are gathered on the device: a launch costs more than their bytes."""
RING_CHUNK_BYTES = 32 << 20
RING_CHUNKS = 3
_LAUNCH_LIMIT_S = 600


# Any below: an event and a stream of the same device, whose own types mypy cannot relate to protocols.


class Event(Protocol):
    """What is used of ``torch.cuda.Event``."""

    def record(self, stream: Any) -> Any:
        """Mark this place in the stream."""
        ...

    def synchronize(self) -> None:
        """Block the calling thread until the mark is passed."""
        ...


class Stream(Protocol):
    """What is used of ``torch.cuda.Stream``."""

    def wait_event(self, event: Any) -> Any:
        """Work queued later waits for the event."""
        ...


class Device(Protocol):
    """One accelerator: its whole surface here, so that tests can run the order of things without one."""

    def current_stream(self) -> Stream:
        """The stream on which training queues its work."""
        ...

    def side_stream(self) -> Stream:
        """The stream of the copies, the same each time."""
        ...

    def event(self) -> Event:
        """A new event."""
        ...

    def use(self, stream: Any) -> contextlib.AbstractContextManager[object]:
        """Queue work on `stream` inside the block."""
        ...

    def pinned(self, num_bytes: int) -> torch.Tensor:
        """New pinned bytes."""
        ...

    def register(self, address: int, num_bytes: int) -> bool:
        """Let the driver copy asynchronously into memory that is there; False where it refuses."""
        ...

    def unregister(self, address: int) -> None:
        """Take back `register`."""
        ...


class CudaDevice:
    """The `Device` of CUDA device `index`."""

    def __init__(self, index: int) -> None:
        self._index = index
        self._side = torch.cuda.Stream(index)  # type: ignore[no-untyped-call]

    def current_stream(self) -> Stream:
        """See `Device`."""
        return torch.cuda.current_stream(self._index)

    def side_stream(self) -> Stream:
        """See `Device`."""
        return self._side

    def event(self) -> Event:
        """See `Device`. The copying thread sleeps in `synchronize` instead of spinning."""
        return torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]

    def use(self, stream: Any) -> contextlib.AbstractContextManager[object]:
        """See `Device`."""
        return torch.cuda.stream(stream)

    def pinned(self, num_bytes: int) -> torch.Tensor:
        """See `Device`."""
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def register(self, address: int, num_bytes: int) -> bool:
        """See `Device`."""
        with torch.cuda.device(self._index):
            return int(_cudart().cudaHostRegister(address, num_bytes, 0)) == 0

    def unregister(self, address: int) -> None:
        """See `Device`."""
        with torch.cuda.device(self._index):
            _cudart().cudaHostUnregister(address)


def _cudart() -> Any:  # torch ships no types for the runtime
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class Run:
    """Bytes that one asynchronous copy moves: neighbours in the image."""

    offset: int
    """In the image."""
    length: int
    sources: tuple[Source, ...]
    """One large piece, or small ones that are gathered first."""


def plan_runs(sources: Sequence[Source]) -> tuple[Run, ...]:
    """Join small neighbours; large pieces go alone.

    Args:
        sources: accelerator pieces, in any order.
    """
    runs: list[Run] = []
    small: list[Source] = []

    def flush() -> None:
        if small:
            end = small[-1].offset + small[-1].size_bytes
            runs.append(Run(small[0].offset, end - small[0].offset, tuple(small)))
            small.clear()

    for source in sorted(sources, key=lambda source: source.offset):
        gap = small and small[-1].offset + small[-1].size_bytes != source.offset
        if gap or (small and source.offset + source.size_bytes - small[0].offset > RING_CHUNK_BYTES):
            flush()
        if source.size_bytes < SMALL_BYTES:
            small.append(source)
        else:
            flush()
            runs.append(Run(source.offset, source.size_bytes, (source,)))
    flush()
    return tuple(runs)


@dataclass
class Transfer:
    """The copies of one version. `before_update` is for the training thread, `finish` for the copying thread."""

    fill: CudaFill
    image: torch.Tensor
    runs: tuple[Run, ...]
    tensors: list[list[torch.Tensor]]
    """What each run reads: live tensors, or clones of those that may change before the next update."""
    staging: torch.Tensor | None
    """Where small tensors are gathered on the device; held until nothing uses it any more."""
    ready: Event
    """Recorded on the training's stream: the state is there."""
    read: Event
    """Recorded on the side stream behind the last copy: the state may change."""
    launched: threading.Event
    """Set when `read` has been recorded, or never will be."""
    direct: bool
    """Launched at the boundary, straight into the image."""

    def before_update(self) -> None:
        """Make the current stream wait for the copies; the host waits only while they are being launched."""
        if not self.launched.wait(_LAUNCH_LIMIT_S):
            raise AssertionError(f"the copies to the host were not launched within {_LAUNCH_LIMIT_S} s")
        self.fill.device.current_stream().wait_event(self.read)

    def finish(self) -> None:
        """Block until every byte is in the image."""
        try:
            if self.direct:
                self.read.synchronize()
            else:
                self.fill.through_ring(self)
        finally:
            self.launched.set()
            self.tensors, self.staging = [], None


class CudaFill:
    """Copies accelerator pieces into images. One per `holdfast.snapshot.copier.Copier`."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self._plan: CopyPlan | None = None
        self._runs: tuple[Run, ...] = ()
        self._staging: torch.Tensor | None = None
        self._ring: list[torch.Tensor] = []
        # Image address -> whether the driver took it; written by the copying thread, read by the training thread.
        self._registered: dict[int, bool] = {}

    def start(self, plan: CopyPlan, image: torch.Tensor) -> Transfer:
        """Training thread, at the boundary: order the copies behind the work queued so far.

        Args:
            plan: of the version; its accelerator pieces are copied.
            image: the slot's bytes, as a tensor of dtype uint8.
        """
        if plan is not self._plan:
            self._plan, self._runs = plan, plan_runs(plan.device)
            gathered = max((run.length for run in self._runs if len(run.sources) > 1), default=0)
            self._staging = torch.empty(gathered, dtype=torch.uint8, device=plan.device[0].tensor.device)
        side = self.device.side_stream()
        transfer = Transfer(
            self,
            image,
            self._runs,
            [[_stable(source) for source in run.sources] for run in self._runs],
            self._staging,
            self.device.event(),
            self.device.event(),
            threading.Event(),
            self._registered.get(image.data_ptr(), False),
        )
        transfer.ready.record(self.device.current_stream())
        side.wait_event(transfer.ready)
        if transfer.direct:
            with self.device.use(side):
                for run, tensors in zip(transfer.runs, transfer.tensors, strict=True):
                    _launch(tensors, image[run.offset : run.offset + run.length], transfer.staging)
            transfer.read.record(side)
            transfer.launched.set()
        return transfer

    def through_ring(self, transfer: Transfer) -> None:
        """Copying thread: device -> pinned chunk -> image, `RING_CHUNKS` in flight; then register the image."""
        if not self._ring:
            self._ring = [self.device.pinned(RING_CHUNK_BYTES) for _ in range(RING_CHUNKS)]
        side, image = self.device.side_stream(), transfer.image
        flying: deque[tuple[Event, torch.Tensor, int]] = deque()

        def land() -> None:
            event, chunk, offset = flying.popleft()
            event.synchronize()
            ctypes.memmove(image.data_ptr() + offset, chunk.data_ptr(), chunk.numel())

        chunks = itertools.cycle(self._ring)
        for run, tensors in zip(transfer.runs, transfer.tensors, strict=True):
            with self.device.use(side):  # cutting a strided tensor makes a copy on the device
                parts = [tensors] if run.length <= RING_CHUNK_BYTES else _cut(tensors)
            offset = run.offset
            for part in parts:
                if len(flying) == len(self._ring):
                    land()
                chunk = next(chunks)[: sum(tensor.nbytes for tensor in part)]
                event = self.device.event()
                with self.device.use(side):
                    _launch(part, chunk, transfer.staging)
                event.record(side)
                flying.append((event, chunk, offset))
                offset += chunk.numel()
        transfer.read.record(side)
        transfer.launched.set()
        while flying:
            land()
        self._register(image)

    def _register(self, image: torch.Tensor) -> None:
        address = image.data_ptr()
        if address not in self._registered:
            self._registered[address] = self.device.register(address, image.numel())
            if not self._registered[address]:
                log.warning("the driver refused %d bytes of shared memory: copies stay in the ring", image.numel())

    def close(self) -> None:
        """Give registered memory back; called when nothing is being copied any more."""
        for address, taken in self._registered.items():
            if taken:
                self.device.unregister(address)
        self._registered.clear()


def _stable(source: Source) -> torch.Tensor:
    """The live tensor where only an update changes it, else a clone made in stream order."""
    return source.tensor if source.overlap else source.tensor.clone()


def _launch(tensors: list[torch.Tensor], target: torch.Tensor, staging: torch.Tensor | None) -> None:
    """Queue the copy of `tensors` into `target` (pinned bytes) on the current stream."""
    if len(tensors) == 1:
        (source,) = tensors
        target.view(source.dtype).view(source.shape).copy_(source, non_blocking=True)
        return
    assert staging is not None, "several tensors are gathered first"
    staged = staging[: target.numel()]
    places = staged.split_with_sizes([tensor.nbytes for tensor in tensors])
    views = [place.view(tensor.dtype).view(tensor.shape) for place, tensor in zip(places, tensors, strict=True)]
    torch._foreach_copy_(views, tensors)
    target.copy_(staged, non_blocking=True)


def _cut(tensors: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    """A tensor larger than a ring chunk, in chunks of bytes."""
    (tensor,) = tensors
    flat = tensor.contiguous().view(-1).view(torch.uint8)
    return [[flat[start : start + RING_CHUNK_BYTES]] for start in range(0, flat.numel(), RING_CHUNK_BYTES)]
