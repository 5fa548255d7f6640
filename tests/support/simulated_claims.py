"""The claim store of the membership simulation: the real one, over names in memory."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from holdfast.checkpoint.storage import StorageEntry
from holdfast.checkpoint.version import GenerationId
from holdfast.errors import StorageError
from holdfast.launcher.claims import ClaimStore
from holdfast.launcher.wire import Standing


class MemoryStorage:
    """What a claim store asks of a storage; names are created once."""

    def __init__(self) -> None:
        self.objects: dict[Path, bytes] = {}
        self.writes_left = 1 << 30
        """After so many writes whoever writes is dead."""

    def list(self, folder: Path) -> list[StorageEntry]:
        found = sorted(path.name for path in self.objects if path.parent == folder)
        return [StorageEntry(name, 0, False, 0.0) for name in found]

    def read(self, path: Path, *, limit: int) -> bytes:
        if path not in self.objects or not self.writes_left:
            raise StorageError(f"{path} cannot be read")
        return self.objects[path]

    def write(self, path: Path, chunks: Iterable[bytes], *, exclusive: bool = False) -> int:
        if not self.writes_left or (exclusive and path in self.objects):
            raise StorageError(f"{path} cannot be written")
        self.writes_left -= 1
        self.objects[path] = b"".join(chunks)
        return len(self.objects[path])


class Claims(ClaimStore):
    """The real claim store, in memory."""

    def __init__(self) -> None:
        self.storage = MemoryStorage()
        super().__init__("/claims", self.storage)  # type: ignore[arg-type]  # it asks for no more than these methods

    @property
    def generations(self) -> list[str]:
        """Names that were claimed."""
        return [entry.name for entry in self.storage.list(Path("/claims/generations"))]

    def create_and_die(self, claim: Standing, after: GenerationId | None) -> None:
        """As a leader that dies after its first write."""
        self.storage.writes_left = 1
        with suppress(StorageError):
            self.create(claim, after)
        self.storage.writes_left = 1 << 30
