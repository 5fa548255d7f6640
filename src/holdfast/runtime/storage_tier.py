"""Checkpoints written by the ranks themselves: the storage tier where no daemon writes for them.

Every rank of the Session writes what it owns; they agree through the store of their process group. It blocks training,
which is why it is used only under plain ``python`` or ``torchrun``, and where the state does not fit into memory.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path

import torch

from holdfast.checkpoint.commit import StepInfo, history_id, step_dir_name
from holdfast.checkpoint.image import Piece
from holdfast.checkpoint.saving import Ranks, save_pieces
from holdfast.checkpoint.tensors import tensor_bytes
from holdfast.checkpoint.version import GenerationId
from holdfast.errors import CheckpointError, PeerTimeout, StorageError
from holdfast.runtime.census import meet
from holdfast.runtime.huddle import Huddle
from holdfast.runtime.mode import Context
from holdfast.runtime.requests import Wanted, name_stored
from holdfast.runtime.results import Persisted, SaveHandle
from holdfast.runtime.say import say

log = logging.getLogger(__name__)


class _SaveAtBoundary:
    """A save that happens at the end of the running step."""

    def __init__(self, step: int, tag: str | None, metrics: Mapping[str, float]) -> None:
        self.at, self.tag, self.metrics = step, tag, metrics
        self.outcome: Persisted | StorageError | None = None

    def done(self) -> bool:
        """Whether that boundary has passed."""
        return self.outcome is not None

    def result(self, timeout: timedelta) -> Persisted:
        """What came of it; the training thread itself saves, so there is nothing to wait for."""
        match self.outcome:
            case Persisted():
                return self.outcome
            case None:
                raise PeerTimeout(f"the save is made at the end of step {self.at}, which has not come yet")
            case error:
                raise error

    def step(self) -> int | None:
        """The step that is saved: another one where nothing has come after the last."""
        return self.outcome.step if isinstance(self.outcome, Persisted) else self.at


class StorageTier:
    """Writes the live state to `Options.checkpoint_dir`, all ranks together. Training thread only."""

    def __init__(self, context: Context, ranks: Ranks, generation: GenerationId, huddle: Huddle) -> None:
        """Begin.

        Args:
            context: of the Session; its options name a checkpoint directory.
            ranks: who saves together.
            generation: goes into names and versions; the same on all ranks.
            huddle: agrees when a time interval has passed.
        """
        assert context.options.checkpoint_dir is not None
        self._context = context
        self._ranks = ranks
        self._generation = generation
        self._huddle = huddle
        self._directory: Path = context.options.checkpoint_dir
        self._attempts = 0
        self._last_save = time.monotonic()
        self._requests: list[_SaveAtBoundary] = []
        self.saved_step: int | None = None
        """Newest step that is in storage."""

    def request(self, step: int, tag: str | None, metrics: Mapping[str, float]) -> SaveHandle:
        """Save at the end of the running step, which is `step`; every rank calls it in the same one."""
        request = _SaveAtBoundary(step, tag, metrics)
        self._requests.append(request)
        return SaveHandle(request)

    def boundary(
        self, previous: int, step: int, metrics: Mapping[str, float], wanted: Wanted | None = None
    ) -> Persisted | StorageError | None:
        """Make the saves that were requested, or the one that is due since `previous`.

        One that fails in the middle of training is a warning: older checkpoints are there.

        Args:
            previous: the step of the boundary before.
            step: the one that has ended.
            metrics: of the step.
            wanted: a save that all ranks know to be asked for.

        Returns:
            What came of `wanted`.
        """
        requests, self._requests = self._requests, []
        for request in requests:
            request.outcome = self._try_save(step, request.tag, {**metrics, **request.metrics})
        outcome = self._try_save(step, wanted.tag, {**metrics, **wanted.metrics}) if wanted is not None else None
        if not requests and wanted is None and self._is_due(previous, step):
            self._try_save(step, None, metrics)
        return outcome

    def finish(self, step: int, *, persist: bool) -> None:
        """The end: answer requests that were made after the last boundary, and save the final step.

        Args:
            step: the final one.
            persist: whether it is saved though nobody asked.

        Raises:
            StorageError: it could not be written.
        """
        requests, self._requests = self._requests, []
        if self.saved_step == step:
            for request in requests:
                request.outcome = self.name(step, request.tag)
        elif requests or persist:
            wanted = [(request.tag, request.metrics) for request in requests] or [(None, {})]
            tag, metrics = min(wanted, key=lambda one: one[0] is None)
            saved = self.save(step, tag=tag, metrics=metrics)
            for request in requests:
                same = request.tag in (None, tag)
                request.outcome = saved if same else StorageError(f"step {step} was saved as {tag}")

    def name(self, step: int, tag: str | None) -> Persisted | StorageError:
        """What becomes of a save of `step`, which is in storage: its tag names that."""
        return name_stored(self._directory, step, tag)

    def _is_due(self, previous: int, step: int) -> bool:
        options = self._context.options
        if options.persist_every_steps is not None:
            return step // options.persist_every_steps > previous // options.persist_every_steps
        if options.persist_every_s is None:
            return False
        limit = options.persist_every_s
        return self._huddle.from_first(lambda: "y" if time.monotonic() - self._last_save >= limit else "n") == "y"

    def _try_save(self, step: int, tag: str | None, metrics: Mapping[str, float]) -> Persisted | StorageError:
        self._last_save = time.monotonic()
        try:
            return self.save(step, tag=tag, metrics=metrics)
        except StorageError as error:
            log.warning("step %d could not be saved, training goes on: %s", step, error)
            return error

    def save(self, step: int, *, tag: str | None = None, metrics: Mapping[str, float] | None = None) -> Persisted:
        """Write the state as of `step`; every rank calls it at the same boundary.

        Raises:
            StorageError: it could not be written on some rank; older checkpoints are as they were.
            PeerTimeout: a rank did not come.
        """
        begun = time.monotonic()
        self._attempts += 1
        info = self._write(step, tag, metrics or {})
        self.saved_step = step
        persisted = Persisted(step=step, path=info.path, tag=tag, seconds=time.monotonic() - begun)
        say(log, f"step {step} is in storage: {info.path} ({persisted.seconds:.2f} s)", rank=self._ranks.rank)
        if self._ranks.rank == 0:
            self._retain()
        self._context.callbacks.call(persisted)
        return persisted

    def _write(self, step: int, tag: str | None, metrics: Mapping[str, float]) -> StepInfo:
        state = self._context.state
        meet(self._context, self._huddle)
        owned = state.pieces(state.entries(), node_of=lambda rank: 0)
        tensors = {piece.piece.key: piece.tensor for piece in owned}
        return save_pieces(
            self._directory / step_dir_name(step),
            ranks=self._ranks,
            version=self._generation.at(step),
            pieces=[piece.piece for piece in owned],
            data=lambda piece: _piece_bytes(piece, tensors),
            objects=state.objects(step),
            metrics=metrics,
            tag=tag,
            history=history_id(self._directory, create=True),
            attempt=self._attempts,
            timeout=timedelta(minutes=30),
        )

    def _retain(self) -> None:
        try:
            self._context.options.keep.apply(self._directory)
        except CheckpointError as error:
            log.warning("old checkpoints in %s could not be deleted: %s", self._directory, error)


def _piece_bytes(piece: Piece, tensors: Mapping[str, torch.Tensor]) -> memoryview:
    return tensor_bytes(tensors[piece.key].cpu().contiguous())
