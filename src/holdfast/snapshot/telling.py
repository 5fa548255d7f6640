"""What a node tells the leader and its workers: messages made of what it holds and knows. No state of its own."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from holdfast.checkpoint.version import Version
from holdfast.snapshot.arena import SLOT_HEADER_BYTES, NodeState
from holdfast.snapshot.coding import HeldParity
from holdfast.snapshot.headers import SlotHeaders
from holdfast.snapshot.ledger import NodeLedger
from holdfast.snapshot.messages import (
    Inventory,
    LeaderRestore,
    PersistedMessage,
    PersistEnded,
    PersistFailedMessage,
    Restore,
    StartGeneration,
)
from holdfast.snapshot.records import CleanImage


def inventory(
    start: StartGeneration,
    state: NodeState,
    ledger: NodeLedger,
    headers: SlotHeaders,
    *,
    parity: tuple[HeldParity, ...],
) -> Inventory:
    """What this node holds and knows.

    Args:
        start: the generation that asks.
        state: of the arena.
        ledger: says which images are clean.
        headers: say where they lie.
        parity: whole buffers.
    """
    images = []
    for image in ledger.clean():
        found = headers.find(image.slot, image.local_rank)
        if found is not None:
            images.append(
                CleanImage(
                    version=image.version,
                    global_rank=image.global_rank,
                    world_size=found.header.world_size,
                    path=str(found.path),
                    offset=SLOT_HEADER_BYTES,
                    size_bytes=found.header.size_bytes,
                )
            )
    return Inventory(
        generation=start.generation,
        node_rank=start.node_rank,
        clean=tuple(images),
        parents=state.parents,
        history=state.history,
        newest_step=state.newest_step,
        pinned=ledger.pinned,
        parity=parity,
        bulk=state.bulk,
        domain=state.domain,
    )


def local_restore(restore: Restore, node_rank: int) -> Restore:
    """The leader's choice as the workers of a node see it: their own images first."""
    images = [msgspec.structs.replace(image, local=image.node_rank == node_rank) for image in restore.images]
    images.sort(key=lambda image: not image.local)
    tier = restore.tier
    if tier == "memory" and not all(image.local for image in images):
        tier = "peers"
    return msgspec.structs.replace(restore, images=tuple(images), tier=tier)


def session_ranks(decided: LeaderRestore | None) -> tuple[int, ...] | None:
    """Global ranks of the Session; None while nothing is decided."""
    return decided.config.ranks if decided is not None and decided.config is not None else None


def session_locals(decided: LeaderRestore | None, local_ranks: Sequence[int]) -> tuple[int, ...]:
    """Local ranks in the Session, all of them while that is not known; `local_ranks`: global ranks by their place."""
    ranks = session_ranks(decided)
    return tuple(local for local, global_rank in enumerate(local_ranks) if ranks is None or global_rank in ranks)


def parent_of(decided: LeaderRestore | None) -> Version | None:
    """The version that the generation started from, where that was in memory."""
    if decided is None or decided.restore.tier not in ("memory", "peers"):
        return None
    return decided.restore.version


def outcome(ended: PersistEnded) -> PersistedMessage | PersistFailedMessage:
    """What workers are told of a persist that has ended."""
    if ended.path is None:
        reason = ended.error or "it could not be written"
        return PersistFailedMessage(version=ended.version, reason=reason, final=ended.final)
    return PersistedMessage(version=ended.version, path=ended.path, seconds=ended.seconds, tag=ended.tag)
