"""What messages, records and choices are made of: plain data of nodes, Sessions, images and generations."""

from __future__ import annotations

import msgspec

from holdfast.checkpoint.version import GenerationId, Version
from holdfast.snapshot.coding import Rebuild


class Member(msgspec.Struct, frozen=True, kw_only=True):
    """One node of a generation."""

    node_rank: int
    daemon: str
    """ZeroMQ endpoint (tcp://) at which other nodes reach this node's daemon."""
    first_global_rank: int
    num_ranks: int


class Parentage(msgspec.Struct, frozen=True, kw_only=True):
    """A generation and the version it started from (None: from nothing, or from storage at `step`)."""

    generation: GenerationId
    parent: Version | None
    step: int
    session_ranks: tuple[int, ...] | None = None
    """Global ranks of its Session: a version is whole with their images. None: those of the whole world."""


class SessionConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What a Session asks of its daemon; equal on all ranks, or the Session is refused."""

    ranks: tuple[int, ...]
    """Global ranks of the Session's process group."""
    checkpoint_dir: str | None
    snapshot_every: int
    """0: auto."""
    persist_every_steps: int | None
    persist_every_s: float | None
    keep: str
    """Retention policy, encoded by `holdfast.checkpoint.retention`."""
    resume: str
    """auto, never, step:N, or path:TAG-OR-PATH."""
    has_init_from: bool


class CleanImage(msgspec.Struct, frozen=True, kw_only=True):
    """One clean slot."""

    version: Version
    global_rank: int
    """In the generation that wrote it."""
    world_size: int
    path: str
    offset: int
    size_bytes: int


class ImageLocation(msgspec.Struct, frozen=True, kw_only=True):
    """Where one image of the version to restore lies."""

    node_rank: int
    """Node rank in the generation that now starts."""
    daemon: str
    """tcp:// endpoint of the bulk server that gives it by range to other nodes."""
    path: str
    """Slot file on that node, or the image's file name in the checkpoint step directory."""
    offset: int
    """Where the image starts in the file (bytes)."""
    size_bytes: int
    local: bool
    """This node's own: read by mmap."""
    global_rank: int = -1
    """Whose image it is, in the generation that wrote it."""
    rebuild: Rebuild | None = None
    """Set where the image is lost and is decoded from what others hold; `daemon` and `path` are empty then."""
