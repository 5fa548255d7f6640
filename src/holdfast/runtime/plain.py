"""A Session without ``holdfast run``: the storage tier only."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from holdfast.checkpoint.commit import abandon_after, list_steps, open_checkpoint
from holdfast.checkpoint.places import place
from holdfast.checkpoint.saving import Ranks
from holdfast.checkpoint.version import GenerationId, new_nonce
from holdfast.errors import CorruptError, StorageError
from holdfast.faults import When
from holdfast.runtime.census import meet
from holdfast.runtime.huddle import Huddle, session_name
from holdfast.runtime.init_from import init_weights
from holdfast.runtime.mode import Context, Mode
from holdfast.runtime.restoring import candidates, resume_path
from holdfast.runtime.results import Restored, SaveHandle
from holdfast.runtime.say import plural, say
from holdfast.runtime.storage_tier import StorageTier

log = logging.getLogger(__name__)


class PlainMode(Mode):
    """Saves to storage at intervals and at the end; resumes from there."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._ranks = Ranks.alone() if context.alone else Ranks.of(context.process_group)
        self._huddle = Huddle(self._ranks, f"holdfast/{session_name(context.ranks)}")
        self._tier: StorageTier | None = None
        self._step = 0
        self._stopping = False
        self._persist_end = True

    # --- Mode

    def open(self) -> Restored | None:
        """Resume from storage, or initialise."""
        options, rank = self._context.options, self._ranks.rank
        directory = options.checkpoint_dir
        active = "only the storage tier is" if directory is not None else "no tier is (give checkpoint_dir)"
        say(log, f"{active} active: the memory tier comes with `holdfast run`", rank=rank)
        restored = None
        meet(self._context, self._huddle)
        if directory is not None:
            generation = GenerationId.parse(self._huddle.from_first(lambda: str(_generation(directory))))
            self._tier = StorageTier(self._context, self._ranks, generation, self._huddle)
            restored = self._resume(directory)
        if restored is None and options.init_from is not None:
            path = init_weights(options.init_from, self._context.state.entries())
            say(log, f"weights initialised from {path}", rank=rank)
        meet(self._context, self._huddle, sample=restored is None)
        self._step = restored.step if restored is not None else 0
        return restored

    def expect(self, until: int) -> None:
        """Nothing to prepare."""

    def boundary(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Save where it is due."""
        previous, self._step = self._step, step
        if self._tier is not None:
            self._tier.boundary(previous, step, metrics)
        return self._stopping

    def save(self, tag: str | None, metrics: Mapping[str, float]) -> SaveHandle:
        """At the next boundary."""
        assert self._tier is not None, "save() needs checkpoint_dir"
        return self._tier.request(self._step + 1, tag, metrics)

    def stop(self, *, persist: bool) -> None:
        """At the next boundary; all ranks call it in the same step."""
        self._stopping = True
        self._persist_end = persist

    def before_update(self) -> None:
        """Saves read the state at the boundary only."""

    def close(self, step: int, *, failed: bool) -> None:
        """Save the final step, unless it is in storage already."""
        if not failed and self._tier is not None and step > 0:
            self._tier.finish(step, persist=self._persist_end)

    # --- inside

    def _resume(self, directory: Path) -> Restored | None:
        """Take the best checkpoint that every rank can read."""
        options = self._context.options
        tried: set[str] = set()
        while True:
            choice = self._huddle.from_first(lambda: _choose(directory, options.resume, tried))
            if not choice:
                self._set_aside(directory, -1 if options.resume == "never" else None)
                return None
            problem = self._read(place(choice))
            problems = [text for text in self._huddle.gather(problem) if text]
            if not problems:
                break
            if options.resume != "auto":
                raise CorruptError(f"resume: {choice} cannot be used: {problems[0]}")
            log.warning("%s cannot be used, trying the one before it: %s", choice, problems[0])
            tried.add(choice)
        path = place(choice)
        self._set_aside(directory, self._step if tried or options.resume != "auto" else None)
        assert self._tier is not None
        if path.parent == directory:
            self._tier.saved_step = self._step
        say(log, f"resumed from storage at step {self._step}: {path}", rank=self._ranks.rank)
        return Restored(step=self._step, tier="storage", generation=0, path=path)

    def _read(self, path: Path) -> str:
        """Restore from `path`; what is wrong with it, "" where nothing is. Another model's state raises."""
        try:
            self._context.injector.at(When.RESTORE, 0)
            with open_checkpoint(path) as catalog:
                self._step = self._context.state.restore(catalog)
        except (CorruptError, StorageError) as error:
            return str(error)
        return ""

    def _set_aside(self, directory: Path, step: int | None) -> None:
        """Move checkpoints later than `step` away, once, before anything is written."""

        def move() -> str:
            moved = abandon_after(directory, step) if step is not None else None
            return "" if moved is None else str(moved)

        moved = self._huddle.from_first(move)
        if moved:
            say(log, f"later checkpoints were moved to {moved}", rank=self._ranks.rank)


def _choose(directory: Path, resume: str, tried: set[str]) -> str:
    steps = list_steps(directory)
    elsewhere = resume_path(resume, steps, directory)
    found = [elsewhere] if elsewhere is not None else [info.path for info in candidates(steps, resume, directory)]
    unfinished = [info for info in steps if not info.complete]
    if unfinished and not tried:
        log.info("%s without a root record in %s", plural(len(unfinished), "step directory"), directory)
    return next((str(path) for path in found if str(path) not in tried), "")


def _generation(directory: Path) -> GenerationId:
    """The incarnation after the newest in storage: its image names clash with nothing that is there."""
    numbers = [info.version.generation.incarnation for info in list_steps(directory) if info.version is not None]
    return GenerationId(incarnation=max(numbers, default=0) + 1, nonce=new_nonce(), generation=1)
