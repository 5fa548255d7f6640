"""What goes into the parity exchange of a node and what comes out of it: frozen events and instructions (pure).

The machine between them is `holdfast.snapshot.exchange`. The holder of a parity *fetches*: it asks each source for the
chunks that it needs, a window at a time, and adds each to its parity as it comes. So back pressure, connections that
are made again and restarts need nothing but a request that is sent again.
"""

from __future__ import annotations

import msgspec

from holdfast.checkpoint.version import GenerationId, Version
from holdfast.erasure.groups import Group
from holdfast.snapshot.coding import Chunk, CodedVersion, Stream


class Finished(msgspec.Struct, frozen=True):
    """A buffer that holds the whole parity of a version."""

    buffer: int
    """0 or 1."""
    coded: CodedVersion


# --- events: what the shell feeds -----------------------------------------------------------------------------------


class ExchangeStarted(msgspec.Struct, frozen=True, kw_only=True):
    """Feed when the restore of a generation is decided (after the ledger's `RestoreDecided`), and in a restarted daemon
    where it is decided already."""

    generation: GenerationId
    node_rank: int
    group: Group
    """The one of this node, from `form_groups` over the members of the generation."""
    world_size: int
    finished: tuple[Finished, ...]
    """What lies whole (sealed) in the arena, read anew. Buffers that are not sealed are dropped by the shell itself."""


class ExchangeFenced(msgspec.Struct, frozen=True):
    """Feed when a generation starts, with the ledger's `GenerationStarted`: node ranks name other nodes from now on, so
    the running version, of which requests go out by rank, is dropped. Nothing runs until `ExchangeStarted`. What it
    answers, and everything before, is to be carried out before the inventory of the generation is taken."""


class ProtectWanted(msgspec.Struct, frozen=True, kw_only=True):
    """Feed at the ledger's `Protect`, with the stream of this node's images of that version."""

    version: Version
    stream: Stream


class StreamReceived(msgspec.Struct, frozen=True, kw_only=True):
    """Feed when a member of the group says what its stream is (`SendStream` there)."""

    version: Version
    stream: Stream


class StreamAsked(msgspec.Struct, frozen=True, kw_only=True):
    """Feed when a member asks for our stream (`AskStream` there)."""

    version: Version
    node_rank: int


class ParityReserved(msgspec.Struct, frozen=True, kw_only=True):
    """Feed when the buffer of `ReserveParity` is there. Where it cannot be had, tell the ledger
    (`ParityAvailable(available=False)`) and do not feed anything here."""

    version: Version


class ChunkArrived(msgspec.Struct, frozen=True, kw_only=True):
    """Feed when a chunk is here whole and its MAC and length are right. Duplicates and late ones may be fed."""

    version: Version
    chunk: Chunk


class ChunkAbsorbed(msgspec.Struct, frozen=True, kw_only=True):
    """Feed when an `Absorb` was carried out."""

    version: Version
    chunk: Chunk


class ChunkRefused(msgspec.Struct, frozen=True, kw_only=True):
    """Feed when a source answers that it cannot serve the chunk (its slot is gone), or the answer was garbage. It is
    asked for again at the next `Nudged`."""

    version: Version
    chunk: Chunk


class SourceReset(msgspec.Struct, frozen=True, kw_only=True):
    """Feed when the connection to a member was made anew, or it has not answered for some seconds: what was asked of
    it and has not come is asked again."""

    node_rank: int


class ParitySealed(msgspec.Struct, frozen=True, kw_only=True):
    """Feed when `SealParity` was carried out: the record is written, the buffer says whole."""

    version: Version


class VersionFailed(msgspec.Struct, frozen=True, kw_only=True):
    """Feed with the ledger's `ParityFailed`: the parity of this version can never be made here."""

    version: Version


class KeepParity(msgspec.Struct, frozen=True, kw_only=True):
    """Feed at the ledger's `Protected`: this version is the protected one. Every other finished parity goes, but that
    of a version that is being protected, and what this generation finished until `ProtectWanted` says which that is."""

    version: Version | None


class Nudged(msgspec.Struct, frozen=True):
    """Feed every second or so while `Exchange.waiting`: asks again for streams and for refused chunks."""


ExchangeEvent = (
    ExchangeFenced
    | ExchangeStarted
    | ProtectWanted
    | StreamReceived
    | StreamAsked
    | ParityReserved
    | ChunkArrived
    | ChunkAbsorbed
    | ChunkRefused
    | SourceReset
    | ParitySealed
    | VersionFailed
    | KeepParity
    | Nudged
)

# --- instructions: what the shell must do, in this order ------------------------------------------------------------


class SendStream(msgspec.Struct, frozen=True, kw_only=True):
    """Send our stream to a member. It may be lost: the member asks again."""

    node_rank: int
    version: Version
    stream: Stream


class AskStream(msgspec.Struct, frozen=True, kw_only=True):
    """Ask a member for its stream of the version."""

    node_rank: int
    version: Version


class ReserveParity(msgspec.Struct, frozen=True, kw_only=True):
    """Make buffer `buffer` ready for ``coded.buffer_bytes(node_rank)`` bytes: mark it as filling (not whole), before
    anything is written into it. Its bytes need not be zeroed. Then feed `ParityReserved`."""

    buffer: int
    coded: CodedVersion
    node_rank: int


class Fetch(msgspec.Struct, frozen=True, kw_only=True):
    """Ask a member for a chunk: ``coded.shard_range(stripe, shard)[chunk_range]`` of its stream. It serves it only
    while its slots hold the version clean, the version is of the generation that it is in, and `node_rank` is its rank
    there: else another node's bytes would be taken for this one's."""

    node_rank: int
    version: Version
    chunk: Chunk
    offset: int
    """Bytes from the start of the source's stream."""
    length: int


class Absorb(msgspec.Struct, frozen=True, kw_only=True):
    """Add the chunk that has just arrived to a parity. In the order of the instructions, at least for one `Parity`;
    then feed `ChunkAbsorbed`. With `ReedSolomon.accumulate(chunk.shard, bytes, {number: block}, offset=offset,
    overwrite=first)`, where block is the parity's part of the buffer."""

    buffer: int
    version: Version
    chunk: Chunk
    parity: int
    """Index in ``coded.parities(node_rank)``."""
    offset: int
    """Bytes from the start of that parity."""
    length: int
    first: bool
    """The first source of this range: replace what the buffer holds."""
    clear: int
    """Bytes behind ``offset + length`` to zero before: another source reaches further. 0 unless `first`."""


class SealParity(msgspec.Struct, frozen=True, kw_only=True):
    """Every chunk was absorbed: write the record (`HeldParity`) and then mark the buffer as whole; feed
    `ParitySealed`."""

    buffer: int
    coded: CodedVersion
    node_rank: int


class DropParity(msgspec.Struct, frozen=True, kw_only=True):
    """The buffer holds nothing that counts: mark it as empty. What was asked for it is not wanted any more."""

    buffer: int
    version: Version


class DeclareDone(msgspec.Struct, frozen=True, kw_only=True):
    """Feed the ledger `ParityDone(version)`."""

    version: Version


ExchangeInstruction = SendStream | AskStream | ReserveParity | Fetch | Absorb | SealParity | DropParity | DeclareDone
