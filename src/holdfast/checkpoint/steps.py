"""The step directories of a checkpoint directory, its history id, and setting steps aside."""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import xxhash

from holdfast.checkpoint.places import place
from holdfast.checkpoint.root import ROOT_NAME, decode_root
from holdfast.checkpoint.storage import Storage, storage_of
from holdfast.checkpoint.version import Version
from holdfast.errors import DECODE_ERRORS, CheckpointError, CorruptError, FenceError, StorageError, UsageError

logger = logging.getLogger(__name__)

HISTORY_NAME = ".holdfast-history"
TAG_NAME = "tag"
"""In a step directory: a tag that it was given after its commit."""
MAX_SMALL_BYTES = 1 << 16
"""Roots and history files are smaller."""

_STEP = re.compile(r"step-(\d{8,18})", re.ASCII)
_HISTORY = re.compile(r"[0-9a-f]{32}", re.ASCII)


class _LateTag(msgspec.Struct, frozen=True, kw_only=True):
    """The content of `TAG_NAME`, as JSON."""

    tag: str
    version: str
    """Of the root beside it."""
    digest: str
    """xxh3_128 of tag and version."""

    @classmethod
    def of(cls, tag: str, version: str) -> _LateTag:
        return cls(tag=tag, version=version, digest=xxhash.xxh3_128_hexdigest(f"{tag}\0{version}".encode()))


class StepInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One step directory."""

    step: int
    path: Path
    complete: bool
    """Its root is there and sound."""
    version: Version | None = None
    world_size: int = 0
    """Ranks of the job that saved it; 0 where it is not complete."""
    tag: str | None = None
    tag_problem: str = ""
    """Why it may have a tag that is not known: nobody deletes it then."""
    metrics: dict[str, float] = {}
    size_bytes: int = 0
    """Of its images."""
    time: float = 0.0
    """Unix seconds of the commit; of the directory's last change where it is not complete."""
    history: str | None = None
    problem: str = ""
    """Why it is not complete."""

    @property
    def is_tagged(self) -> bool:
        """Whether it has a tag, or had one that is damaged."""
        return self.tag is not None or bool(self.tag_problem)


def step_dir_name(step: int) -> str:
    """``step-00000100``."""
    return f"step-{step:08d}"


def step_of(path: str | Path) -> int:
    """The step that the name of a step directory says; 0 where it is no such name."""
    match = _STEP.fullmatch(Path(path).name)
    return int(match[1]) if match else 0


def check_step_name(path: Path, step: int) -> None:
    """
    Raises:
        UsageError: the name of a step directory says another step: it would count as damaged.
    """
    if _STEP.fullmatch(path.name) and step_of(path) != step:
        raise UsageError(f"{path} is the name of step {step_of(path)}, the state is of step {step}: give another name")


def list_steps(checkpoint_dir: str | Path, *, storage: Storage | None = None) -> list[StepInfo]:
    """All step directories, complete or not, by step; none where `checkpoint_dir` does not exist.

    Raises:
        StorageError: the directory cannot be listed.
    """
    checkpoint_dir = place(checkpoint_dir)
    storage = storage or storage_of(checkpoint_dir)
    found: list[StepInfo] = []
    for entry in storage.list(checkpoint_dir):
        match = _STEP.fullmatch(entry.name)
        if match and entry.is_folder:
            found.append(_step_info(storage, checkpoint_dir / entry.name, int(match[1]), entry.time))
    return sorted(found, key=lambda info: info.step)


def newest_step(checkpoint_dir: str | Path, *, storage: Storage | None = None) -> StepInfo | None:
    """The newest complete one, None where there is none.

    Raises:
        StorageError: the directory cannot be listed.
    """
    return max(
        (info for info in list_steps(checkpoint_dir, storage=storage) if info.complete),
        key=lambda info: info.step,
        default=None,
    )


def _step_info(storage: Storage, path: Path, step: int, changed: float) -> StepInfo:
    try:
        return read_step_info(path, step, storage=storage)
    except CheckpointError as error:
        # An object store has no time for a folder: the newest time in it.
        changed = changed or max((entry.time for entry in storage.list(path)), default=0.0)
        return StepInfo(step=step, path=path, complete=False, time=changed, problem=str(error))


def read_step_info(path: Path, step: int | None = None, *, storage: Storage | None = None) -> StepInfo:
    """What the root of a step directory says.

    Args:
        path: the step directory.
        step: that its name says; None: not compared.
        storage: where it lies.

    Raises:
        StorageError: it has no root, or it cannot be read.
        CorruptError: the root is damaged, or is of another step.
    """
    path = place(path)
    storage = storage or storage_of(path)
    root, corrected = decode_root(storage.read(path / ROOT_NAME, limit=MAX_SMALL_BYTES))
    if corrected:
        logger.warning("%s: the root record had wrong bytes, which were corrected; check the disk", path)
    if step is not None and root.version.step != step:
        raise CorruptError(f"{path} holds the root of step {root.version.step}")
    tag, tag_problem = (root.tag, "") if root.tag is not None else _late_tag(storage, path, root.version)
    return StepInfo(
        step=root.version.step,
        path=path,
        complete=True,
        version=root.version,
        world_size=root.world_size,
        tag=tag,
        tag_problem=tag_problem,
        metrics=root.metrics,
        size_bytes=root.size_bytes,
        time=root.time,
        history=root.history,
    )


def tag_step(path: str | Path, tag: str, *, storage: Storage | None = None) -> StepInfo:
    """Give a complete step a name. Any process; of several the first one counts, like a root it is never changed.

    Raises:
        StorageError: there is no root, the step has another tag, or it cannot be written.
        CorruptError: the root is damaged.
    """
    path = place(path)
    storage = storage or storage_of(path)
    info = read_step_info(path, storage=storage)
    if info.tag is None:
        assert info.version is not None
        record = msgspec.json.encode(_LateTag.of(tag, str(info.version)))
        try:
            storage.write(path / TAG_NAME, [record], exclusive=True)
        except StorageError:
            if read_step_info(path, storage=storage).tag is None:
                raise
        info = read_step_info(path, storage=storage)  # again: retention may have taken it meanwhile
    if info.tag != tag:
        raise StorageError(f"{path} is tagged {info.tag!r}, which is never changed: it cannot be tagged {tag!r} too")
    return info


def _late_tag(storage: Storage, path: Path, version: Version) -> tuple[str | None, str]:
    """What `tag_step` wrote, None where it wrote nothing, or where that is damaged (the state is sound); what is wrong
    with it."""
    try:
        data = storage.read(path / TAG_NAME, limit=MAX_SMALL_BYTES)
        found = msgspec.json.decode(data, type=_LateTag)
    except StorageError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return None, ""
        problem = f"the tag of {path} cannot be read: {error}"
    except DECODE_ERRORS as error:
        problem = f"{path / TAG_NAME} does not parse, the step counts as not tagged: {error}"
    else:
        if found == _LateTag.of(found.tag, str(version)):
            return found.tag, ""
        problem = f"{path / TAG_NAME} is damaged, the step counts as not tagged"
        if found == _LateTag.of(found.tag, found.version):
            logger.warning("%s is of %s, the step counts as not tagged", path / TAG_NAME, found.version)
            return None, ""
    logger.warning("%s", problem)
    return None, problem


def abandon_after(
    checkpoint_dir: str | Path, step: int, *, storage: Storage | None = None, wanted: Callable[[], bool] = lambda: True
) -> Path | None:
    """Move step directories later than `step` into ``abandoned-<time>/``.

    Called when a run goes on from an older step, before it saves.

    Args:
        checkpoint_dir: where they are.
        step: stays, with all before.
        storage: of the directory, where it is known.
        wanted: asked before each move: a storage may hang, and answer when the run has long gone on without this.

    Returns:
        The folder that they are in now, None where there were none.

    Raises:
        StorageError: one cannot be moved; the later ones among them are moved first.
        FenceError: it is not wanted any more.
    """
    return _abandon(checkpoint_dir, lambda info: info.step > step, storage, wanted)


def abandon_step(
    checkpoint_dir: str | Path, step: int, *, storage: Storage | None = None, wanted: Callable[[], bool] = lambda: True
) -> Path | None:
    """The same for one step: its root was found off the chain when the step is to be saved again.

    Raises:
        StorageError: it cannot be moved.
        FenceError: it is not wanted any more.
    """
    return _abandon(checkpoint_dir, lambda info: info.step == step, storage, wanted)


def _abandon(
    checkpoint_dir: str | Path, chosen: Callable[[StepInfo], bool], storage: Storage | None, wanted: Callable[[], bool]
) -> Path | None:
    checkpoint_dir = place(checkpoint_dir)
    storage = storage or storage_of(checkpoint_dir)
    later = [info for info in list_steps(checkpoint_dir, storage=storage) if chosen(info)]
    if not later:
        return None
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    folder = checkpoint_dir / f"abandoned-{stamp}-{secrets.token_hex(2)}"
    # Newest first: interrupted at any point, what is left is a shorter history, not one with a hole.
    for info in reversed(later):
        if not wanted():
            raise FenceError(f"{checkpoint_dir}: step {info.step} stays where it is, the job has gone on without that")
        storage.move(info.path, folder / info.path.name)
    logger.info("%s: %d later checkpoints set aside in %s", checkpoint_dir, len(later), folder.name)
    return folder


def history_id(checkpoint_dir: str | Path, *, create: bool = False, storage: Storage | None = None) -> str | None:
    """The random id of this checkpoint directory's life: memory of another life must not be resumed from.

    Args:
        checkpoint_dir: the directory; made where `create`.
        create: give it an id where it has none. Whoever comes first decides, the others read it.
        storage: where it lies.

    Returns:
        32 hexadecimal digits; None where there are none.

    Raises:
        StorageError: it cannot be read or written.
        CorruptError: the file does not hold an id.
    """
    checkpoint_dir = place(checkpoint_dir)
    storage = storage or storage_of(checkpoint_dir)
    path = checkpoint_dir / HISTORY_NAME
    if not _has(storage, checkpoint_dir, HISTORY_NAME):
        if not create:
            return None
        try:
            storage.write(path, [f"{secrets.token_hex(16)}\n".encode()], exclusive=True)
        except StorageError:
            if not _has(storage, checkpoint_dir, HISTORY_NAME):
                raise
    text = storage.read(path, limit=MAX_SMALL_BYTES).decode("ascii", "replace").strip()
    if not _HISTORY.fullmatch(text):
        raise CorruptError(f"{path} does not hold a history id: remove it if the checkpoints beside it are yours")
    return text


def _has(storage: Storage, folder: str | Path, name: str) -> bool:
    return any(entry.name == name for entry in storage.list(folder))
