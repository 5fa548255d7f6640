"""Step directories: images, index, root (stub: bodies follow)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import msgspec

from holdfast.checkpoint.catalog import Catalog
from holdfast.checkpoint.image import ImageMeta
from holdfast.checkpoint.source import Source
from holdfast.checkpoint.version import GenerationId, Version


class ImageRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What the leader must know of an image file that was written."""

    name: str
    size_bytes: int
    global_rank: int

    def encode(self) -> bytes:
        raise NotImplementedError

    @classmethod
    def decode(cls, data: bytes) -> ImageRecord:
        raise NotImplementedError


class StepInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One step directory."""

    step: int
    path: Path
    complete: bool
    version: Version | None = None
    tag: str | None = None
    metrics: dict[str, float] = {}
    size_bytes: int = 0
    time: float = 0.0
    """Unix seconds at which it was committed; of the directory where it is not complete."""
    history: str | None = None
    problem: str = ""
    """Why it is not complete."""


def step_dir_name(step: int) -> str:
    return f"step-{step:08d}"


def image_file_name(generation: GenerationId, rank: int, world_size: int) -> str:
    return f"{generation}-rank-{rank:05d}-of-{world_size:05d}.safetensors"


def write_image(directory: Path, name: str, meta: ImageMeta, chunks: Iterable[memoryview | bytes]) -> ImageRecord:
    """Write one image durably: header first, then data. Refuses where the step is committed."""
    raise NotImplementedError


def subset_image(meta: ImageMeta, source: Source) -> tuple[ImageMeta, Iterable[memoryview | bytes]]:
    """The job-scope subset of an image in memory: its meta, and its bytes, verified while they stream."""
    raise NotImplementedError


def commit_step(
    directory: Path,
    records: Sequence[ImageRecord],
    *,
    version: Version,
    world_size: int,
    metrics: Mapping[str, float] | None = None,
    tag: str | None = None,
    history: str | None = None,
) -> StepInfo:
    """Write index (twice) and root: after it returns the checkpoint exists."""
    raise NotImplementedError


def open_checkpoint(path: str | Path) -> Catalog:
    """A step directory as a Catalog. Raises CheckpointError kinds."""
    raise NotImplementedError


def list_steps(checkpoint_dir: str | Path) -> list[StepInfo]:
    """All step directories, by step, complete or not."""
    raise NotImplementedError


def newest_step(checkpoint_dir: str | Path) -> StepInfo | None:
    """The newest complete one."""
    raise NotImplementedError


def abandon_after(checkpoint_dir: str | Path, step: int) -> Path | None:
    """Move step directories later than `step` into ``abandoned-<time>/``; None where there were none."""
    raise NotImplementedError


def history_id(checkpoint_dir: str | Path, *, create: bool = False) -> str | None:
    """The random id of this checkpoint directory's life; created once where `create`."""
    raise NotImplementedError
