"""What lies in a step directory, by its names alone: whether all of it is ours, and whether all images are there.

A folder is deleted or moved without a root that vouches for it only if nothing of anyone else's lies in it: other
programs give their checkpoints such names too.
"""

from __future__ import annotations

from pathlib import Path

from holdfast.checkpoint.commit import INDEX_COPY, INDEX_NAME
from holdfast.checkpoint.index import IMAGE_NAME
from holdfast.checkpoint.root import ROOT_NAME
from holdfast.checkpoint.steps import TAG_NAME, StepInfo
from holdfast.checkpoint.storage import TEMPORARY_PREFIX, Storage
from holdfast.errors import StorageError

_OURS = (ROOT_NAME, INDEX_NAME, TAG_NAME)


def foreign_names(storage: Storage, folder: Path) -> list[str]:
    """Names in a step directory that no holdfast gives; sorted.

    Raises:
        StorageError: it cannot be listed.
    """
    return [entry.name for entry in storage.list(folder) if entry.is_folder or not _is_ours(entry.name)]


def _is_ours(name: str) -> bool:
    return (
        name in _OURS
        or name.startswith(TEMPORARY_PREFIX)
        or IMAGE_NAME.fullmatch(name) is not None
        or INDEX_COPY.fullmatch(name) is not None
    )


def refuse_foreign(storage: Storage, directory: Path) -> None:
    """For whoever is about to make a checkpoint of a folder. Hidden names are let be: file systems make them, too.

    Raises:
        StorageError: there is something that is no part of one, further checkpoints for example.
    """
    foreign = [name for name in foreign_names(storage, directory) if not name.startswith(".")]
    if foreign:
        raise StorageError(f"{directory} holds {foreign[0]!r}, which is no part of a checkpoint: give a new directory")


def missing_part(storage: Storage, info: StepInfo) -> str:
    """What a complete step lacks nevertheless, by names and sizes: somebody deleted it, or cut it short; "" where
    nothing is missing. Checksums are not looked at.

    Raises:
        StorageError: it cannot be listed.
    """
    assert info.version is not None
    entries = storage.list(info.path)
    size = sum(
        entry.size_bytes
        for entry in entries
        if IMAGE_NAME.fullmatch(entry.name) and entry.name.startswith(f"{info.version.generation}-")
    )
    if size != info.size_bytes:
        return f"its images have {size} bytes, not {info.size_bytes}"
    if not any(entry.name == INDEX_NAME or INDEX_COPY.fullmatch(entry.name) for entry in entries):
        return "both copies of its index are gone"
    return ""
