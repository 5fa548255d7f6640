"""The storage part of choosing what a generation starts from; runs in a lane of the leader's daemon.

It lists what is in storage, asks the pure choice (`holdfast.snapshot.chain`), and makes the checkpoint directory ready
for what follows: steps above the restored one are moved aside, and the directory has a history id. An incarnation that
runs goes on from memory where its storage cannot be used: that may be the very thing that has failed.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

from holdfast.checkpoint.commit import StepInfo, abandon_after, history_id, list_steps
from holdfast.checkpoint.places import UrlPath, place
from holdfast.checkpoint.version import GenerationId, Version
from holdfast.errors import CorruptError, StorageError, UsageError
from holdfast.snapshot import chain
from holdfast.snapshot.messages import Inventory
from holdfast.snapshot.records import SessionConfig


@dataclass(frozen=True, kw_only=True)
class Question:
    """What the choice depends on, less what is in storage."""

    generation: GenerationId
    fresh: bool
    config: SessionConfig
    inventories: tuple[Inventory, ...]
    excluded: tuple[Version, ...] = ()
    bad_images: tuple[tuple[Version, int], ...] = ()
    excluded_paths: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The choice, and the history that this generation's memory belongs to."""

    choice: chain.Choice
    history: str | None
    problem: str = ""
    """Why the checkpoint directory could not be used, where memory gives all that is needed."""


def decide(question: Question, *, wanted: Callable[[], bool] = lambda: True) -> Answer:
    """Choose, and make the checkpoint directory ready.

    Args:
        question: what it depends on.
        wanted: whether anybody waits for the answer; asked before anything is changed in storage.

    Raises:
        FenceError: nobody does.
        UsageError: `resume` names what is not there.
        StorageError: the checkpoint directory cannot be read or written, and memory alone does not do.
        CorruptError: the same of its history id.
    """
    try:
        return _with_storage(question, wanted)
    except (StorageError, CorruptError, OSError) as error:
        answer = from_memory_alone(question, problem=str(error))
        if answer is None:
            raise
        return answer


def from_memory_alone(question: Question, *, problem: str) -> Answer | None:
    """What memory gives to an incarnation that runs; None where that is nothing, or none runs. Which history it belongs
    to stands in the inventories; later steps that lie in storage stay where they are, and are set aside when they are
    saved again. Touches no storage.

    Args:
        question: what it depends on.
        problem: `Answer.problem`.
    """
    if question.fresh:
        return None
    choice = chain.choose(_chain_question(question, (), None))
    histories = [one.history for one in question.inventories if one.history is not None]
    history = next(iter(histories), None)
    return Answer(choice=choice, history=history, problem=problem) if choice.tier == "memory" else None


def _with_storage(question: Question, wanted: Callable[[], bool]) -> Answer:
    config = question.config
    directory = config.checkpoint_dir
    stored = stored_steps(directory, config.resume if question.fresh else "auto")
    choice = chain.choose(_chain_question(question, stored, history_of(directory)))
    if choice.tier == "error":
        raise UsageError(choice.reason)
    return Answer(choice=choice, history=_make_ready(directory, choice, stored, wanted))


def _chain_question(
    question: Question, stored: tuple[chain.StoredStep, ...], history: str | None
) -> chain.ChainQuestion:
    return chain.ChainQuestion(
        generation=question.generation,
        fresh=question.fresh,
        resume=question.config.resume,
        inventories=question.inventories,
        stored=stored,
        history=history,
        excluded=question.excluded,
        bad_images=question.bad_images,
        excluded_paths=question.excluded_paths,
    )


def history_of(directory: str | None) -> str | None:
    """History id of the checkpoint directory as it is now."""
    return history_id(directory) if directory is not None else None


def stored_path(directory: str, version: Version) -> str | None:
    """Where `version` lies in storage, None where it does not."""
    return next((step.path for step in stored_steps(directory, "auto") if step.version == version), None)


def stored_steps(directory: str | None, resume: str) -> tuple[chain.StoredStep, ...]:
    """Complete steps in `directory`, and the one that ``resume="path:..."`` names outside of it."""
    found = list_steps(directory) if directory is not None else []
    steps = [_stored(info) for info in found if info.complete]
    if resume.startswith("path:"):
        path = place(resume.removeprefix("path:"))
        if path.is_dir() and str(path) not in {step.path for step in steps}:
            steps += [_stored(info) for info in list_steps(path.parent) if info.path == path and info.complete]
    return tuple(step for step in steps if step is not None)


def _stored(info: StepInfo) -> chain.StoredStep:
    assert info.version is not None, f"{info.path} is complete and has no version"
    return chain.StoredStep(step=info.step, version=info.version, path=str(info.path), tag=info.tag)


def _make_ready(
    directory: str | None, choice: chain.Choice, stored: tuple[chain.StoredStep, ...], wanted: Callable[[], bool]
) -> str | None:
    if directory is None:
        return None
    try:
        if not isinstance(place(directory), UrlPath):
            os.makedirs(directory, exist_ok=True)
    except OSError as error:
        raise StorageError(f"checkpoint_dir {directory} cannot be made: {error}; give one that is writable") from error
    if any(step.step > choice.step and place(step.path).parent == place(directory) for step in stored):
        abandon_after(directory, choice.step, wanted=wanted)
    return history_id(directory, create=True)
