"""A piece: a box of a global tensor, as an image holds it."""

from __future__ import annotations

import msgspec

from holdfast.checkpoint.boxes import Box
from holdfast.checkpoint.dtypes import itemsize


class Piece(msgspec.Struct, frozen=True, gc=False):
    """One box of one global tensor."""

    name: str
    dtype: str
    """torch's name without ``torch.``."""
    shape: tuple[int, ...]
    """Of the global tensor, in elements."""
    box: Box
    """The region that the piece holds; its bytes are in C order."""
    rank: int | None = None
    """Set for per-rank state: the global rank whose tensor this is. None: there is one such tensor in the job."""
    job: bool = True
    """Whether this copy is the one that goes to storage (JOB scope); False for copies kept in memory only."""
    nodes: tuple[int, ...] = ()
    """In memory: node ranks whose images hold these bytes too, this one's among them; empty where no other node does,
    or nothing is known of it. Never stored."""

    @property
    def size_bytes(self) -> int:
        """Bytes of the piece."""
        return self.box.volume * itemsize(self.dtype)

    @property
    def is_whole(self) -> bool:
        """Whether it is the whole tensor."""
        return self.box.lengths == self.shape

    @property
    def key(self) -> str:
        """Its name in the image's safetensors header, unique within the image."""
        key = self.name if self.is_whole else f"{self.name}{self.box}"
        return key if self.rank is None else f"{key}@rank{self.rank}"
