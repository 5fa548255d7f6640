"""A Session without ``holdfast run``: the storage tier only."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from holdfast.checkpoint.commit import abandon_after, list_steps
from holdfast.checkpoint.places import place
from holdfast.checkpoint.saving import Ranks
from holdfast.checkpoint.version import GenerationId, new_nonce
from holdfast.errors import CorruptError, StorageError
from holdfast.faults import When
from holdfast.runtime.census import meet
from holdfast.runtime.huddle import Huddle, session_name
from holdfast.runtime.init_from import agree_on
from holdfast.runtime.mode import Context, Mode
from holdfast.runtime.requests import LiveSave, Wanted, first_wanted
from holdfast.runtime.restoring import candidates, resume_path
from holdfast.runtime.results import Persisted, Restored, SaveHandle
from holdfast.runtime.say import plural, say
from holdfast.runtime.storage_tier import StorageTier
from holdfast.runtime.store_agreement import StoreAgreement
from holdfast.runtime.stored import StoredStates
from holdfast.snapshot.reports import Agreed

log = logging.getLogger(__name__)


class PlainMode(Mode):
    """Saves to storage at intervals and at the end; resumes from there."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._ranks = Ranks.alone() if context.alone else Ranks.of(context.process_group)
        self._name = f"holdfast/{session_name(context.ranks)}"
        self._huddle = Huddle(self._ranks, self._name)
        self._stored = StoredStates(context.state, self._ranks, self._name, session_rank=context.session_rank)
        self._agreement: StoreAgreement | None = None
        """Of several ranks, from the end of `open` to `close`."""
        self._requests: dict[str, LiveSave] = {}
        """Saves that this rank asked for and that are not made yet, by the identity of the request."""
        self._until: int | None = None
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
        if restored is None:
            path, same = agree_on(options.init_from, self._huddle)
            if options.init_from is not None and path is not None:
                self._stored.initialise(options.init_from, path, together=same)
                say(log, f"weights initialised from {path}", rank=rank)
        meet(self._context, self._huddle, sample=restored is None)
        self._step = restored.step if restored is not None else 0
        if not self._context.alone:
            self._agreement = StoreAgreement(self._ranks, f"{self._name}/agreement", first_step=self._step)
        return restored

    def expect(self, until: int) -> None:
        """No step beyond `until` is agreed on."""
        self._until = until
        if self._agreement is not None:
            self._agreement.expect(until)

    def secure(self) -> None:
        """It comes from storage, and is there."""

    def boundary(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Save where it is due, do what was agreed on."""
        previous, self._step = self._step, step
        agreed = self._agreement.boundary(step) if self._agreement is not None else None
        if agreed is not None and agreed.kind == "stop":
            self._stopping, self._persist_end = True, agreed.persist
        if self._tier is not None:
            self._store(self._tier, previous, step, metrics, agreed)
        return self._stopping

    def save(self, tag: str | None, metrics: Mapping[str, float]) -> SaveHandle:
        """At the next boundary where this rank is alone, else at an agreed step."""
        assert self._tier is not None, "save() needs checkpoint_dir"
        if self._agreement is None:
            return self._tier.request(self._step + 1, tag, metrics)
        request = LiveSave(None, Wanted(tag=tag, metrics=dict(metrics)))
        self._requests[self._agreement.request("save", persist=True, tag=tag, metrics=metrics)] = request
        return SaveHandle(request)

    def stop(self, *, persist: bool) -> None:
        """At the next boundary where this rank is alone, else at an agreed step."""
        if self._agreement is not None:
            self._agreement.request("stop", persist=persist, metrics={})
        else:
            self._stopping, self._persist_end = True, persist

    def before_update(self) -> None:
        """Saves read the state at the boundary only."""

    def close(self, step: int, *, failed: bool) -> None:
        """Save the final step, unless it is in storage already."""
        if self._agreement is not None:
            self._agreement.close()
        try:
            if not failed and self._tier is not None and step > 0:
                self._finish(self._tier, step)
        finally:
            for request in self._requests.values():
                request.give_up("the Session ended before it was made")

    # --- inside

    def _store(
        self, tier: StorageTier, previous: int, step: int, metrics: Mapping[str, float], agreed: Agreed | None
    ) -> None:
        """Save what is due or agreed on; at the last step, what any rank has asked for by then."""
        wanted, answered = None, set[str]()
        if agreed is not None and agreed.persist and (agreed.kind == "save" or agreed.tag is not None):
            wanted, answered = Wanted(tag=agreed.tag, metrics=agreed.metrics), set(agreed.requests)
        if wanted is None and step == self._until and self._agreement is not None:
            wanted, answered = self._gathered(), set(self._requests)
        outcome = tier.boundary(previous, step, metrics, wanted)
        if outcome is not None:
            self._answer(answered, outcome)

    def _finish(self, tier: StorageTier, step: int) -> None:
        wanted = self._gathered() if not self._context.alone else None
        if wanted is None or tier.saved_step == step:
            tier.finish(step, persist=self._persist_end)
            for request in self._requests.values():
                request.answer(tier.name(step, request.wanted.tag))
            self._requests.clear()
        else:
            self._answer(set(self._requests), tier.save(step, tag=wanted.tag, metrics=wanted.metrics))

    def _gathered(self) -> Wanted | None:
        """What is asked for on any rank; all ranks call it at the same step."""
        return first_wanted(self._huddle, [request.wanted for request in self._requests.values()])

    def _answer(self, answered: set[str], outcome: Persisted | StorageError) -> None:
        for identity in answered & self._requests.keys():
            self._requests.pop(identity).answer(outcome)

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
            self._step = self._stored.restore(path)
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
