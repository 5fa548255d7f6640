"""Which checkpoint in storage to begin from: the pure choice, and `restore_point`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from holdfast.checkpoint.commit import StepInfo, list_steps
from holdfast.checkpoint.places import place
from holdfast.environment import worker_environment
from holdfast.errors import UsageError
from holdfast.runtime.memory_view import newest_in_memory
from holdfast.runtime.results import Restored


def candidates(steps: Sequence[StepInfo], resume: str, checkpoint_dir: Path) -> list[StepInfo]:
    """The checkpoints to try, best first.

    Args:
        steps: what `list_steps` found in `checkpoint_dir`.
        resume: as in `Options.resume`.
        checkpoint_dir: for messages.

    Returns:
        For "auto" all complete ones, newest first; for a step or a tag that one; else none.

    Raises:
        UsageError: the step that was asked for is not there, or not complete.
    """
    complete = sorted((info for info in steps if info.complete), key=lambda info: info.step, reverse=True)
    if resume == "auto":
        return complete
    if resume == "never":
        return []
    kind, _, value = resume.partition(":")
    if kind == "step":
        found = [info for info in complete if info.step == int(value)]
        if not found:
            there = ", ".join(str(info.step) for info in complete) or "none"
            raise UsageError(
                f"resume={value}: {checkpoint_dir} has no complete checkpoint of that step; steps: {there}"
            )
        return found
    return [info for info in complete if info.tag == value][:1]


def resume_path(resume: str, steps: Sequence[StepInfo], checkpoint_dir: Path) -> Path | None:
    """The directory that ``resume=path`` names, where it is no tag of one of `steps`; None for other kinds.

    Raises:
        UsageError: neither a tag nor a checkpoint.
    """
    kind, _, value = resume.partition(":")
    if kind != "path" or any(info.complete and info.tag == value for info in steps):
        return None
    path = place(value)
    if not (path / "root").exists():
        tags = ", ".join(sorted(info.tag for info in steps if info.complete and info.tag)) or "none"
        raise UsageError(f"resume={value!r} is no checkpoint directory and no tag in {checkpoint_dir}; tags: {tags}")
    return path


def restore_point(checkpoint_dir: str | os.PathLike[str] | None = None) -> Restored | None:
    """What a Session of this process would most likely restore, told before the model is built.

    Looks at this node's memory under ``holdfast run`` and at `checkpoint_dir`; reads headers only. The Session itself
    decides together with all other ranks, and may find a newer or, where something is damaged, an older state.

    Args:
        checkpoint_dir: as for the Session.

    Returns:
        None where training would start from nothing.
    """
    environment = worker_environment()
    memory = newest_in_memory(environment) if environment is not None else None
    newest = None
    checkpoint_dir = None if checkpoint_dir is None else place(checkpoint_dir)
    if checkpoint_dir is not None and checkpoint_dir.is_dir():
        newest = next(iter(candidates(list_steps(checkpoint_dir), "auto", checkpoint_dir)), None)
    generation = environment.generation.generation if environment is not None else 0
    if newest is None and memory is None:
        return None
    if newest is None or (memory is not None and memory >= newest.step):
        assert memory is not None
        return Restored(step=memory, tier="memory", generation=generation)
    return Restored(step=newest.step, tier="storage", generation=generation, path=newest.path)
