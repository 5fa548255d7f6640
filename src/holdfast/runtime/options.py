"""The arguments of a Session, checked and in one form."""

from __future__ import annotations

import os
import secrets
import tempfile
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from holdfast.checkpoint.places import UrlPath, place
from holdfast.checkpoint.retention import Retention
from holdfast.checkpoint.storage import TEMPORARY_PREFIX, storage_of
from holdfast.errors import StorageError, UsageError
from holdfast.runtime.init_from import InitFrom


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the user asked for."""

    checkpoint_dir: Path | None
    """None: nothing is written to storage."""
    snapshot_every: int
    """Steps between versions in memory; 0: the daemon finds the smallest interval that costs nothing."""
    persist_every_steps: int | None
    persist_every_s: float | None
    keep: Retention
    init_from: InitFrom | None
    resume: str
    """auto, never, step:N, or path:TAG-OR-PATH."""

    @classmethod
    def of(
        cls,
        *,
        checkpoint_dir: str | os.PathLike[str] | None,
        snapshot_every: int | str,
        persist_every: int | timedelta | None,
        keep: int | Retention,
        init_from: str | os.PathLike[str] | InitFrom | None,
        resume: int | str,
    ) -> Options:
        """Check the arguments as `holdfast.Session` takes them.

        Raises:
            UsageError: one that cannot work, with its value.
        """
        steps, seconds = _interval(persist_every)
        if persist_every is not None and checkpoint_dir is None:
            raise UsageError(f"persist_every={persist_every!r} needs checkpoint_dir: where should checkpoints go?")
        return cls(
            checkpoint_dir=None if checkpoint_dir is None else place(checkpoint_dir).absolute(),
            snapshot_every=_snapshot_every(snapshot_every),
            persist_every_steps=steps,
            persist_every_s=seconds,
            keep=_retention(keep),
            init_from=init_from if isinstance(init_from, InitFrom | None) else InitFrom(path=init_from),
            resume=_resume(resume),
        )


def _snapshot_every(value: int | str) -> int:
    if value == "auto":
        return 0
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UsageError(f'snapshot_every={value!r}: give a number of steps from 1 on, or "auto"')
    return value


def _interval(value: int | timedelta | None) -> tuple[int | None, float | None]:
    if value is None:
        return None, None
    if isinstance(value, timedelta) and value > timedelta(0):
        return None, value.total_seconds()
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UsageError(f"persist_every={value!r}: give a number of steps from 1 on, or a positive timedelta")
    return value, None


def _retention(value: int | Retention) -> Retention:
    if isinstance(value, Retention):
        return value
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UsageError(f"keep={value!r}: give a number of checkpoints from 1 on, or a holdfast.Retention")
    return Retention(last=value)


def _resume(value: int | str) -> str:
    if isinstance(value, str) and value:
        return value if value in ("auto", "never") else f"path:{value}"
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise UsageError(f'resume={value!r}: give "auto", "never", a step, a tag or a path')
    return f"step:{value}"


def make_writable(checkpoint_dir: Path) -> None:
    """Create the directory and try it, so that a typo costs seconds and not the first checkpoint of the night.

    Raises:
        StorageError: nothing can be written there.
    """
    if isinstance(checkpoint_dir, UrlPath):
        storage = storage_of(checkpoint_dir)
        # A name of its own: every rank tries at the same time.
        probe = checkpoint_dir / f"{TEMPORARY_PREFIX}probe-{secrets.token_hex(8)}"
        storage.write(probe, [b"holdfast can write here"])
        storage.remove(probe)
        return
    try:
        checkpoint_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=checkpoint_dir):
            pass
    except OSError as error:
        raise StorageError(
            f"checkpoint_dir {str(checkpoint_dir)!r} is not writable ({error.strerror}): "
            "give a directory in which this user may create files"
        ) from error
