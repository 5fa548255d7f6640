"""Which version a generation starts from: a pure choice over inventories and storage, with a reason for each refusal.

SIGNATURES FIRST, bodies follow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from holdfast.checkpoint.version import GenerationId, Version
from holdfast.snapshot.messages import Inventory


@dataclass(frozen=True, kw_only=True)
class StoredStep:
    """A complete step directory (its root exists)."""

    step: int
    version: Version
    path: str
    tag: str | None = None


@dataclass(frozen=True, kw_only=True)
class ChainQuestion:
    """Everything the choice depends on."""

    generation: GenerationId
    fresh: bool
    """First generation of its incarnation: `resume` applies; later ones take the newest."""
    resume: str
    """auto, never, step:N, or path:TAG-OR-PATH."""
    inventories: tuple[Inventory, ...]
    stored: tuple[StoredStep, ...]
    """Complete steps in the checkpoint directory; for path:X outside of it, the shell adds that one."""
    history: str | None
    """History id of the checkpoint directory now; None where there is no directory."""
    excluded: tuple[Version, ...] = ()
    """Versions in memory that failed their checks (RestoreFailed)."""
    excluded_paths: tuple[str, ...] = ()
    """Step directories that failed theirs."""


@dataclass(frozen=True, kw_only=True)
class Rejected:
    """A candidate that was not taken, and why."""

    candidate: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What the generation starts from."""

    tier: str
    """memory, storage, none; error where `resume` names something that is not there (`reason` says it)."""
    version: Version | None = None
    step: int = 0
    path: str | None = None
    steps_lost: int = 0
    reason: str = ""
    rejected: tuple[Rejected, ...] = ()


def choose(question: ChainQuestion) -> Choice:
    """The newest candidate on the chain; memory on ties. The caller refines memory to "peers" per node (`tier_of`)."""
    raise NotImplementedError


def tier_of(choice: Choice, inventories: Sequence[Inventory], node_rank: int) -> str:
    """memory where every image of the version lies on that node, else peers; other tiers as they are."""
    raise NotImplementedError


def carried_persists(
    pinned: Sequence[Version], inventories: Sequence[Inventory], choice: Choice
) -> tuple[Version, ...]:
    """Of the pinned versions of older generations: those that go on (on the chain, not above the choice, all images there)."""
    raise NotImplementedError
