"""From the live state to versions in slots: plans images, cached until the state changes, and drives the copier."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch

from holdfast.checkpoint.image import ImageLayout
from holdfast.checkpoint.objects import encode_objects
from holdfast.checkpoint.version import Version
from holdfast.errors import StateError
from holdfast.faults import Injector, RehearsedFault
from holdfast.runtime.capture import OwnedPiece, TensorEntry, Timing, TrainingState
from holdfast.snapshot.arena import Slot
from holdfast.snapshot.copier import Copier, CopyPlan, Fill, Source, Ticket

log = logging.getLogger(__name__)

_MIN_OBJECTS_BYTES = 64 << 10
_OBJECTS_GRAIN = 4096


class Snapshotter:
    """Takes versions of the state. Training thread only, but for `on_done`, which the copying thread calls.

    Args:
        state: what is captured.
        node_of: node rank of a global rank.
        global_rank, world_size: of this process, in the job.
        session_rank, session_size: the same within the Session.
        injector: fault points in the middle of a copy.
        on_done: called with each ticket that has ended, well or not.
    """

    def __init__(
        self,
        state: TrainingState,
        *,
        node_of: Callable[[int], int],
        global_rank: int,
        world_size: int,
        session_rank: int,
        session_size: int,
        injector: Injector,
        on_done: Callable[[Ticket], None],
    ) -> None:
        self._state = state
        self._node_of = node_of
        self._global_rank, self._world_size = global_rank, world_size
        self._session_rank, self._session_size = session_rank, session_size
        self._injector = injector
        self._on_done = on_done
        self._entries: Sequence[TensorEntry] | None = None
        self._plan: CopyPlan | None = None
        self._layout: ImageLayout | None = None
        self._objects_bytes = 0
        self._slots: tuple[Slot, ...] = ()
        self._copier: Copier | None = None
        self._last: Ticket | None = None
        self._demoted: set[str] = set()
        """Tensors that somebody changes outside of optimizers: copied at the boundary from now on."""

    def size_bytes(self, step: int) -> int:
        """What the image of the state takes as it is now, `step` steps being completed."""
        entries = self._state.entries()
        return self._plan_for(entries, len(encode_objects(self._state.objects(step)))).layout.size_bytes

    def use(self, slots: tuple[Slot, ...]) -> None:
        """Copy into `slots` from now on; cheap where they are those of before."""
        if slots is self._slots:
            return
        self.close()
        self._slots = slots
        self._copier = Copier(
            slots,
            global_rank=self._global_rank,
            world_size=self._world_size,
            session_rank=self._session_rank,
            session_size=self._session_size,
            on_clean=self._on_done,
            at=lambda when, step, image: self._injector.at(when, step, buffer=image),
            fill=_fill(self._entries or self._state.entries()),
        )
        if self._plan is not None and self._plan.layout.size_bytes <= self._copier.capacity_bytes:
            self._copier.prepare(self._plan)

    @property
    def num_slots(self) -> int:
        """Slots in use."""
        return len(self._slots)

    @property
    def entries(self) -> Sequence[TensorEntry] | None:
        """What was captured last."""
        return self._entries

    @property
    def last(self) -> Ticket | None:
        """The newest version that was begun."""
        return self._last

    def take(self, version: Version, slot: int, *, inline: bool = False) -> Ticket | None:
        """Begin to copy the state into `slot`; None where it no longer fits.

        Args:
            version: of the step that has just ended.
            slot: the slot granted for it.
            inline: copy everything before returning.

        Raises:
            StateError: an object without a codec.
        """
        self.check()
        assert self._copier is not None, "a grant without slots"
        entries = self._state.entries()
        objects = encode_objects(self._state.objects(version.step))
        plan = self._plan_for(entries, len(objects))
        if plan.layout.size_bytes > self._copier.capacity_bytes:
            return None
        self._last = self._copier.begin(version, slot, plan, objects, inline=inline)
        return self._last

    def before_update(self) -> float:
        """Wait until the state may be changed; seconds waited."""
        return self._copier.wait_before_update() if self._copier is not None else 0.0

    def check(self) -> None:
        """Draw the consequences of a version that was given up.

        Raises:
            RehearsedFault: one was rehearsed in the middle of the copy.
        """
        ticket = self._last
        if ticket is None or not ticket.done():
            return
        if isinstance(ticket.error, RehearsedFault):
            self._last = None
            raise ticket.error
        new = set(ticket.torn) - self._demoted
        if new:
            log.warning(
                "step %d could not be snapshotted: %s changed in place outside of optimizer.step() while being copied; "
                "from now on copied at the end of the step (`with session.mutating():` declares such changes)",
                ticket.version.step,
                ", ".join(sorted(new)[:3]) + (f" and {len(new) - 3} more" if len(new) > 3 else ""),
            )
            self._demoted |= new
            self._entries = None

    def close(self, timeout_s: float = 60.0) -> None:
        """Let the running copy end, and let go of the slots."""
        if self._copier is not None:
            self._copier.close(timeout_s)
            self._copier = None
            self._slots = ()

    def _plan_for(self, entries: Sequence[TensorEntry], objects_bytes: int) -> CopyPlan:
        """The plan for the state as it is; made anew when tensors or the size of the objects have changed."""
        fits = self._layout is not None and objects_bytes <= self._layout.objects_capacity
        if entries is self._entries and self._plan is not None and fits:
            return self._plan
        owned = self._state.pieces(entries, node_of=self._node_of)
        layout = self._layout_for(owned, objects_bytes)
        self._entries, self._layout = entries, layout
        self._plan = CopyPlan(layout, self._sources(owned, layout))
        return self._plan

    def _layout_for(self, owned: Sequence[OwnedPiece], objects_bytes: int) -> ImageLayout:
        """The old layout where only tensors were replaced: slots need not be cut again."""
        pieces = [piece.piece for piece in owned]
        old = self._layout
        if old is not None and objects_bytes <= old.objects_capacity and _same(old, pieces):
            return old
        capacity = max(_MIN_OBJECTS_BYTES, -(-2 * objects_bytes // _OBJECTS_GRAIN) * _OBJECTS_GRAIN)
        return ImageLayout.plan(pieces, objects_capacity=capacity)

    def _sources(self, owned: Sequence[OwnedPiece], layout: ImageLayout) -> list[Source]:
        offsets = {piece.key: offset for piece, offset in zip(layout.pieces, layout.piece_offsets, strict=True)}
        return [
            Source(
                piece.piece.name,
                piece.tensor,
                offsets[piece.piece.key],
                overlap=piece.timing is Timing.OVERLAP and piece.piece.name not in self._demoted,
                frozen=piece.timing is Timing.FROZEN,
            )
            for piece in owned
        ]


def _fill(entries: Sequence[TensorEntry]) -> Fill | None:
    """What copies the tensors of this rank's accelerator; None where all are in host memory.

    Raises:
        StateError: tensors on several accelerators, or on one that is no CUDA device.
    """
    devices = {entry.tensor.device for entry in entries} - {torch.device("cpu")}
    if not devices:
        return None
    if len(devices) > 1 or next(iter(devices)).type != "cuda":
        raise StateError(f"the state of one rank lies on {', '.join(map(str, devices))}: one CUDA device is supported")
    from holdfast.snapshot.cuda import CudaDevice, CudaFill

    return CudaFill(CudaDevice(next(iter(devices)).index))


def _same(layout: ImageLayout, pieces: Sequence[object]) -> bool:
    return len(layout.pieces) == len(pieces) and set(layout.pieces) == set(pieces)
