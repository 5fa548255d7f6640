"""`Session`: the few lines by which a training loop becomes one that survives failures.

The Session itself only keeps count of steps and tells a `Mode` about them: `LiveMode` under ``holdfast run`` (memory
and storage), `PlainMode` otherwise (storage only).
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from holdfast.checkpoint.retention import Retention
from holdfast.environment import WorkerEnvironment, announced_world_size, worker_environment
from holdfast.errors import StorageError, UsageError
from holdfast.faults import Injector, When
from holdfast.runtime.capture import TrainingState
from holdfast.runtime.extra import PerRank, Stateful
from holdfast.runtime.init_from import InitFrom
from holdfast.runtime.mode import Context, Mode
from holdfast.runtime.options import Options, make_writable
from holdfast.runtime.restoring import restore_point
from holdfast.runtime.results import ListOfCallbacks, Persisted, Restored, SaveHandle
from holdfast.testing import install_hooks

__all__ = ["InitFrom", "PerRank", "Session", "restore_point"]

log = logging.getLogger(__name__)
_PROBE_S = 10.0
"""How long a generation that goes on from memory waits for its storage to show that it can be written to."""

Models = nn.Module | Sequence[nn.Module] | Mapping[str, nn.Module]
Optimizers = Optimizer | Sequence[Optimizer] | Mapping[str, Optimizer]


class Session:
    """Keeps the state of a training loop safe. Use it as a context manager, one at a time, on the training thread.

    Example::

        with holdfast.Session(model=model, optimizer=optimizer, checkpoint_dir="checkpoints") as session:
            for step in session.steps(until=10_000):
                ...  # forward, backward, optimizer.step(), scheduler.step()

    State is restored when the ``with`` block is entered. At its end the final step is made a version and, where
    `checkpoint_dir` is given, written to it. An exception in the block goes up unchanged, at once.

    Args:
        model: the module; a sequence of parts of one model (disjoint names); or a mapping of several models.
        optimizer: one or several; each owns parameters of `model`.
        extra: other state: anything with ``state_dict``/``load_state_dict``, the same on all ranks, or `PerRank`.
        checkpoint_dir: directory of step directories; None: nothing goes to storage.
        process_group: whose ranks train this state; None: all.
        snapshot_every: steps between versions in memory; "auto": as often as it costs less than 1 % of the time.
        persist_every: steps, or time, between checkpoints in storage; None: only at the end.
        keep: how many checkpoints stay (tagged ones always do), or a `Retention`.
        init_from: weights to begin with when there is nothing to resume.
        resume: "auto", "never", a step, or a tag or path; decides the first start of a job, not its recoveries.

    Raises:
        UsageError: an argument that cannot work.
    """

    _active: Session | None = None

    def __init__(
        self,
        *,
        model: Models,
        optimizer: Optimizers | None = None,
        extra: Mapping[str, Stateful | PerRank] | None = None,
        checkpoint_dir: str | os.PathLike[str] | None = None,
        process_group: dist.ProcessGroup | None = None,
        snapshot_every: int | Literal["auto"] = "auto",
        persist_every: int | timedelta | None = None,
        keep: int | Retention = 3,
        init_from: str | os.PathLike[str] | InitFrom | None = None,
        resume: int | str = "auto",
    ) -> None:
        self._options = Options.of(
            checkpoint_dir=checkpoint_dir,
            snapshot_every=snapshot_every,
            persist_every=persist_every,
            keep=keep,
            init_from=init_from,
            resume=resume,
        )
        self._model = model
        self._optimizer = optimizer
        self._extra = dict(extra or {})
        self._process_group = process_group
        self._callbacks = ListOfCallbacks()
        self._cleanup = ExitStack()
        self._mode: Mode | None = None
        self._context: Context | None = None
        self._restored: Restored | None = None
        self._step = 0
        self._should_stop = False
        self._updated = False
        """Whether an optimizer has stepped since the last boundary: tells what a ``break`` left behind."""
        self._left_at: int | None = None
        """Completed steps where a body with an update was left early: by ``break``, or by an exception, which does not
        count it. A generator cannot tell the two apart; `__exit__` can."""
        self._looping = False
        self._mutating = 0
        """Depth of `mutating` blocks."""
        self._pid = 0
        """Of the process that entered: a forked child has the object, but not its threads."""
        self._rng_pending = False
        """Whether nothing has been trained since the state was restored: iterators may have drawn numbers meanwhile."""

    # --- the context

    def __enter__(self) -> Self:
        """Restore the state and open the tiers.

        Raises:
            UsageError: another Session is open, or torch.distributed is not ready.
            StateError: names clash, or an object that cannot be stored.
            StorageError: `checkpoint_dir` is not writable, and there is no memory to go on from.
            MismatchError: what there is to resume is the state of another model.
            PeerError: the snapshot daemon or another rank is missing.
        """
        if Session._active is not None:
            raise UsageError("a Session is already open in this process: close it first, or give it all models")
        Session._active = self
        self._pid = os.getpid()
        self._should_stop = self._looping = self._updated = False
        self._left_at, self._mutating = None, 0
        try:
            self._open()
        except BaseException:
            mode, self._mode = self._mode, None
            Session._active = None
            self._cleanup.close()
            if mode is not None:
                _close_after_failure(mode, 0)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End the Session; where no exception is on its way, wait until the final step is in storage.

        ``sys.exit()`` without an error is an ending that the script chose, too. An update after the last boundary (a
        body left early) makes one more step.

        Raises:
            StorageError: the final step could not be written; older checkpoints are as they were.
        """
        if os.getpid() != self._pid:
            return  # a forked child unwinds: the Session is its parent's
        mode, self._mode = self._mode, None
        Session._active = None
        chosen = error is None or (isinstance(error, SystemExit) and error.code in (None, 0))
        if chosen:
            self._step = self._step + 1 if self._updated else self.step
        self._left_at = None
        try:
            with self._cleanup:
                if mode is not None and chosen:
                    mode.close(self._step, failed=False)
                elif mode is not None:
                    _close_after_failure(mode, self._step)
        finally:
            self._context = None

    def _open(self) -> None:
        environment = worker_environment()
        ranks, global_rank = _ranks(self._process_group)
        if self._options.checkpoint_dir is not None:
            _try_storage(self._options.checkpoint_dir, environment)
        state = TrainingState(
            model=self._model, optimizer=self._optimizer, extra=self._extra, ranks=ranks, global_rank=global_rank
        )
        injector = Injector.for_worker(environment, global_rank=global_rank)
        self._context = Context(
            state=state,
            options=self._options,
            ranks=ranks,
            global_rank=global_rank,
            process_group=self._process_group,
            injector=injector,
            callbacks=self._callbacks,
        )
        mode = _mode(self._context, environment)
        self._mode = mode
        self._restored = mode.open()
        self._step = self._restored.step if self._restored is not None else 0
        self._rng_pending = self._restored is not None
        state.buckets.begin()
        self._cleanup.callback(state.buckets.close)
        hook = register_optimizer_step_pre_hook(self._before_update)
        self._cleanup.callback(hook.remove)
        hooks = install_hooks(
            injector, models=_models(self._model), optimizers=state.optimizers, step=lambda: self._step
        )
        self._cleanup.push(hooks)

    # --- what the loop sees

    @property
    def step(self) -> int:
        """Completed steps of the live state; also the number in ``step-00000500``."""
        return self._step if self._left_at is None else self._left_at

    @property
    def restored(self) -> Restored | None:
        """Where the state came from; None where training started from nothing."""
        return self._restored

    @property
    def should_stop(self) -> bool:
        """Whether training ends now: the same answer on every rank at the same boundary."""
        return self._should_stop

    def steps(self, until: int) -> Iterator[int]:
        """The loop: 0-based steps from the restored one to `until`.

        After body i, `step` is i + 1. A body that leaves by ``break`` counts where it has updated the state.

        Args:
            until: completed steps at which training ends.

        Raises:
            UsageError: outside of the ``with`` block, or inside another loop over steps.
        """
        mode, context = self._live()
        if self._looping:
            raise UsageError("steps() is already running: one loop at a time")
        mode.expect(until)
        if self._rng_pending:
            self._rng_pending = False
            context.state.restore_rng()
            mode.secure()
        self._looping = True
        try:
            while self._step < until and not self._should_stop:
                step = self._step
                self._updated = False
                context.injector.at(When.BEGIN, step)
                try:
                    yield step
                except GeneratorExit:
                    self._left_by_break(step)
                    raise
                if self._step == step:
                    self._end_step(step + 1, {})
        finally:
            self._looping = False

    def end_step(self, step: int | None = None, *, metrics: Mapping[str, float] | None = None) -> None:
        """The session boundary, for loops that are not `steps`; inside `steps`, to hand over metrics.

        Args:
            step: completed steps including this one; default `step` + 1.
            metrics: what `Retention` may choose the best checkpoints by.

        Raises:
            UsageError: `step` is not ahead of the last one.
        """
        self._live()
        step = self._step + 1 if step is None else step
        if step <= self._step:
            raise UsageError(f"end_step({step}): {self._step} steps are already completed")
        self._end_step(step, dict(metrics or {}))

    def save(self, *, tag: str | None = None, metrics: Mapping[str, float] | None = None) -> SaveHandle:
        """Persist a version at the next step that all ranks can agree on.

        Under ``holdfast run`` any rank may call it. Under plain ``torchrun`` all ranks call it in the same step.

        Args:
            tag: a name for the checkpoint; tagged ones are kept, and ``resume=tag`` finds them.
            metrics: stored with it.

        Raises:
            UsageError: there is no `checkpoint_dir`.
        """
        mode, _ = self._live()
        if self._options.checkpoint_dir is None:
            raise UsageError("save() needs checkpoint_dir: where should the checkpoint go?")
        return mode.save(tag, dict(metrics or {}))

    def stop(self, *, save: bool = True) -> None:
        """End training after this body, as the script's own choice: the job exits with 0.

        With several ranks it ends at the next step that all can agree on.

        Args:
            save: whether the final step is persisted.
        """
        mode, _ = self._live()
        mode.stop(persist=save)

    @contextlib.contextmanager
    def mutating(self) -> Iterator[None]:
        """Declare in-place changes of parameters or optimizer state outside ``optimizer.step()``."""
        mode, _ = self._live()
        mode.before_update()
        self._mutating += 1
        try:
            yield
        finally:
            self._mutating -= 1

    @contextlib.contextmanager
    def section(self, name: str, limit: timedelta | None = None) -> Iterator[None]:
        """Declare a long stretch without steps (evaluation, upload), so that nobody takes it for a hang.

        Args:
            name: appears in the log.
            limit: how long it may take; past it, hang detection goes on.
        """
        mode, _ = self._live()
        begun = time.monotonic()
        with mode.section(limit):
            yield
        seconds = time.monotonic() - begun
        if limit is not None and seconds > limit.total_seconds():
            log.warning("section %s took %.1f s, its limit is %.1f s", name, seconds, limit.total_seconds())

    def on_persisted(self, fn: Callable[[Persisted], None]) -> None:
        """Have `fn` called, on the training thread, at the first boundary after a version has reached storage."""
        self._callbacks.add(fn)

    # --- inside

    def _live(self) -> tuple[Mode, Context]:
        if self._mode is None or self._context is None:
            raise UsageError("the Session is not open: use it inside `with holdfast.Session(...) as session:`")
        self._step, self._left_at = self.step, None
        return self._mode, self._context

    def _end_step(self, step: int, metrics: Mapping[str, float]) -> None:
        mode, context = self._live()
        self._step = step
        self._updated = self._rng_pending = False
        context.injector.at(When.BOUNDARY, step)
        if mode.boundary(step, metrics):
            self._should_stop = True
        if self._mutating:
            mode.before_update()  # changes go on: nothing may be left to copy

    def _left_by_break(self, step: int) -> None:
        """A body that has updated the state is a completed step, though it did not reach its end."""
        if self._mode is not None and self._step == step and self._updated:
            self._left_at = step + 1

    def _before_update(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:  # Any: torch's hook signature
        """Runs before each step of any optimizer: even one we were not given may change what is being copied."""
        if self._mode is None or os.getpid() != self._pid:
            return
        self._updated = True
        self._mode.before_update()


def _try_storage(checkpoint_dir: Path, environment: WorkerEnvironment | None) -> None:
    """A job that has run before may go on from memory while its storage is away: the leader's daemon decides that."""
    if environment is None or environment.generation.generation <= 1:
        make_writable(checkpoint_dir)
        return

    def probe() -> None:
        try:
            make_writable(checkpoint_dir)
        except StorageError as error:
            log.warning("%s", error)

    thread = threading.Thread(target=probe, name="holdfast-probe", daemon=True)  # it may hang for ever
    thread.start()
    thread.join(_PROBE_S)
    if thread.is_alive():
        log.warning("checkpoint_dir %r does not answer within %.0f s", str(checkpoint_dir), _PROBE_S)


def _models(model: Models) -> list[nn.Module]:
    if isinstance(model, nn.Module):
        return [model]
    return list(model.values()) if isinstance(model, Mapping) else list(model)


def _mode(context: Context, environment: WorkerEnvironment | None) -> Mode:
    if environment is None:
        from holdfast.runtime.plain import PlainMode

        return PlainMode(context)
    from holdfast.runtime.live import LiveMode

    return LiveMode(context, environment)


def _ranks(process_group: dist.ProcessGroup | None) -> tuple[tuple[int, ...], int]:
    """Global ranks of the Session, and this one."""
    if dist.is_available() and dist.is_initialized():
        global_rank = dist.get_rank()
        ranks = tuple(sorted(dist.get_process_group_ranks(process_group or dist.group.WORLD)))
        if global_rank not in ranks:
            raise UsageError(f"rank {global_rank} is not in the Session's process_group, whose ranks are {ranks}")
        return ranks, global_rank
    if process_group is not None:
        raise UsageError("process_group is given but torch.distributed is not initialised")
    world_size = announced_world_size()
    if world_size > 1:
        raise UsageError(
            f"there are {world_size} ranks and torch.distributed is not initialised: "
            "call torch.distributed.init_process_group() before the Session"
        )
    return (0,), 0


def _close_after_failure(mode: Mode, step: int) -> None:
    """The user's exception is on its way: nothing may delay or replace it."""
    try:
        mode.close(step, failed=True)
    except Exception:
        log.exception("the Session did not close cleanly at step %d after a failure", step)
