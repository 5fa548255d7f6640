"""Messages between workers, agents and snapshot daemons. One message, one class; dispatched with ``match``.

Everything on a socket is msgpack of a tagged union (`encode`, `decode`). What does not decode into a known class within
its size limit is counted by the receiver and dropped; it is never fatal. Every message that speaks about a version or a
generation carries its `GenerationId`; receivers refuse older ones.

Direction is written at each class: W worker, A agent, D the node's daemon, L the leader's daemon (the daemon of node
rank 0's agent unless the generation names another).
"""

from __future__ import annotations

import msgspec

from holdfast.checkpoint.version import GenerationId, Version
from holdfast.erasure.groups import Grouping
from holdfast.errors import DECODE_ERRORS, PeerError
from holdfast.snapshot.coding import HeldParity, Stream
from holdfast.snapshot.records import CleanImage, ImageLocation, Member, Parentage, SessionConfig
from holdfast.snapshot.reports import NodeState, Orders, Pin

MAX_MESSAGE_BYTES = 64 << 20


class Message(msgspec.Struct, frozen=True, kw_only=True, tag=True, omit_defaults=True):
    """Root of all messages."""


# --- agent and daemon ---------------------------------------------------------------------------------------------


class Hello(Message, frozen=True, kw_only=True):
    """A -> D: who owns this daemon now. Answered with `Welcome`."""

    agent_pid: int
    linger_s: float
    memory_limit_bytes: int | None = None
    redundancy: str = "auto"
    """auto, K+M, mirror or none (`holdfast.erasure.redundancy`)."""
    domain: str = ""
    """Failure domain of this node; "": its host."""
    bandwidth: float = 0.0
    """Most bytes per second that protecting versions may send; 0: no limit."""


class Welcome(Message, frozen=True, kw_only=True):
    """D -> A: what the daemon found or holds."""

    daemon: str
    """tcp:// endpoint for other nodes."""
    pid: int
    newest_incarnation: int
    """Largest incarnation that any version or record of this node names; 0 where there is none."""
    run_id: str | None
    """The run that the adopted memory belongs to, None where there is nothing."""
    newest: Version | None
    """Newest clean version of this node."""


class StartGeneration(Message, frozen=True, kw_only=True):
    """A -> D, before workers start. The daemon fences everything of older generations. Answered with `Ack`."""

    generation: GenerationId
    run_id: str
    members: tuple[Member, ...]
    node_rank: int
    leader: int
    """Node rank whose daemon leads."""
    fresh: bool
    """First generation of its incarnation: `resume` of the Session applies."""


class EndGeneration(Message, frozen=True, kw_only=True):
    """A -> D: all workers of the generation on this node have ended (pids reaped). Answered with `Ack`."""

    generation: GenerationId


class Shutdown(Message, frozen=True, kw_only=True):
    """A -> D: the job has ended. Persist the newest complete version first where `persist` and where it is not in
    storage yet, then remove the arena and exit. Answered with `Bye` before exit."""

    persist: bool


class Bye(Message, frozen=True, kw_only=True):
    """D -> A: gone in a moment."""

    persisted: Version | None = None
    path: str | None = None
    error: str | None = None


class Progress(Message, frozen=True, kw_only=True):
    """D -> A, pushed: a version is complete (on all ranks), or protected (against the loss of nodes)."""

    version: Version
    """The newest complete one."""
    protected: Version | None = None
    """The newest protected one of this generation."""


class ParityMade(Message, frozen=True, kw_only=True):
    """D -> A, pushed: what this node holds for others of a version is whole."""

    version: Version
    fetched_bytes: int
    """What came over the network for it."""
    buffer_bytes: int
    seconds: float
    """From the first question to the sealed buffer."""
    ended: float
    """time.time() at its end."""
    damaged: int
    """Answers so far, in this daemon's life, that did not match their tags and were asked for again."""


class RestoreChosen(Message, frozen=True, kw_only=True):
    """D -> A, pushed: what the generation starts from, for the event log. `tier`: memory, peers, storage or none."""

    generation: GenerationId
    tier: str
    version: Version | None
    step: int
    steps_lost: int
    reason: str = ""


class SessionPhase(Message, frozen=True, kw_only=True):
    """D -> A, pushed: a worker reached a phase: opened, restored, first_step, waiting (at the step of a regroup),
    closed."""

    generation: GenerationId
    global_rank: int
    phase: str
    step: int
    seconds: float
    """time.time() of the worker at which the phase was reached."""


class RequestStop(Message, frozen=True, kw_only=True):
    """A -> D -> L: end at an agreed step (preemption, SIGTERM); persist it where `persist`."""

    reason: str
    persist: bool = True
    grace_s: float = 0.0
    """How long ending may take; a persist that is sure to take longer is left out. 0: as long as it takes."""


class RequestRegroup(Message, frozen=True, kw_only=True):
    """A -> D -> L: the membership changes: all workers wait for their end at an agreed step of this generation."""

    generation: GenerationId
    leaves: bool = False
    """A node leaves the job with what it holds."""


class Notice(Message, frozen=True, kw_only=True):
    """D -> A and D -> W, pushed: one line for people, with its severity (info, warning, error)."""

    severity: str
    text: str
    about: str = ""
    """What is to be counted: divergence (copies that should agree do not), damage (bytes that did not match
    their checksum, and went nowhere)."""
    number: int = 1
    """How many of it."""


class Ack(Message, frozen=True, kw_only=True):
    """The request was carried out."""


class Refused(Message, frozen=True, kw_only=True):
    """The request was not carried out; `reason` is one clear line."""

    reason: str
    kind: str = "peer"
    """usage, state, mismatch, corrupt, storage, fence or peer: which error the caller raises."""


# --- worker and daemon --------------------------------------------------------------------------------------------


class OpenSession(Message, frozen=True, kw_only=True):
    """W -> D: a Session opens. Answered with `Restore` once all its ranks have opened, or with `Refused`."""

    generation: GenerationId
    global_rank: int
    local_rank: int
    pid: int
    config: SessionConfig


class Restore(Message, frozen=True, kw_only=True):
    """D -> W: where the state comes from, the same on every rank."""

    tier: str
    """memory, peers, storage or none."""
    version: Version | None = None
    step: int = 0
    path: str | None = None
    """Step directory, where the tier is storage."""
    images: tuple[ImageLocation, ...] = ()
    bulk: dict[int, str] = {}
    """Node rank -> endpoint of its bulk server, for what is decoded."""
    attempt: int = 0
    """Choices of this generation before this one: the same version may be tried again from other images."""
    steps_lost: int = 0
    first_of_incarnation: bool = True
    exposed: bool = False
    """The loss of a node, or of another one, may take this version: each rank waits a moment for the grant of the
    restored step, so that it becomes a version of this generation before anything else is done."""


class RestoreFailed(Message, frozen=True, kw_only=True):
    """W -> D: an image did not match its checksum or could not be read; answered with the next `Restore`."""

    generation: GenerationId
    global_rank: int
    version: Version
    reason: str
    path: str | None = None
    """Step directory, where the tier was storage."""
    attempt: int = 0
    """Of the `Restore`."""
    bad_images: tuple[int, ...] = ()
    """Global ranks, in the generation that wrote them, whose images in slots did not match their checksums, or did not
    open."""
    damaged: int = 0
    """How many images gave bytes that did not match."""


class Reached(Message, frozen=True, kw_only=True):
    """W -> D: the Session reached a phase (see `SessionPhase`)."""

    generation: GenerationId
    global_rank: int
    phase: str
    step: int
    seconds: float


class Diverged(Message, frozen=True, kw_only=True):
    """W -> D: copies that should agree do not; for the run's log."""

    generation: GenerationId
    version: Version
    text: str
    severity: str = "error"
    """warning where nothing keeps them equal."""


class NeedSlots(Message, frozen=True, kw_only=True):
    """W -> D: the image of this rank takes `size_bytes`; make slots ready. Answered (late) by `SlotsReady` or
    `Refused`. Sent again, larger, when the state has grown."""

    generation: GenerationId
    global_rank: int
    local_rank: int
    size_bytes: int
    until: int | None = None
    """Last step of the loop where known: always granted."""


class SlotsReady(Message, frozen=True, kw_only=True):
    """D -> W: slot files are there, reserved and faulted in; index i of `paths` is slot i. Fewer than two: no memory
    tier, the reason was sent as a `Notice`."""

    paths: tuple[str, ...]
    capacity_bytes: int
    """Room for one image in each."""
    pool: int = 0
    """Number of the pool that they belong to."""


class SlotsMapped(Message, frozen=True, kw_only=True):
    """W -> D: the slots of `SlotsReady` are mapped and faulted in; grants may come."""

    generation: GenerationId
    global_rank: int
    pool: int


class Committed(Message, frozen=True, kw_only=True):
    """W -> D, doorbell: the slot header says clean (the header is the truth)."""

    version: Version
    global_rank: int
    slot: int
    wait_s: float = 0.0
    """Training thread's wait for this version."""
    step_s: float = 0.0
    """Duration of the last step."""
    metrics: dict[str, float] = {}
    """What `end_step` was given at this step; stored with its checkpoint."""


class Missed(Message, frozen=True, kw_only=True):
    """W -> D: a granted step passed without a copy."""

    version: Version
    global_rank: int


class RequestSave(Message, frozen=True, kw_only=True):
    """W -> D -> L: persist a version at an agreed step. Answered with `SaveAgreed` on every rank's connection."""

    generation: GenerationId
    global_rank: int
    tag: str | None
    metrics: dict[str, float] = {}
    request: str = ""
    """Unique in the job: a request that is sent again is still one."""


class SaveAgreed(Message, frozen=True, kw_only=True):
    """D -> W: the save is made at this step."""

    step: int
    tag: str | None
    requests: tuple[str, ...] = ()
    """The requests that it answers."""


class RequestEnd(Message, frozen=True, kw_only=True):
    """W -> L through D: some rank called ``stop()`` or a signal asked: end at an agreed step."""

    generation: GenerationId
    global_rank: int
    persist: bool
    request: str = ""
    """Unique in the job: a request that is sent again is still one."""


class FinalStep(Message, frozen=True, kw_only=True):
    """W -> D: the loop ended at `step` on this rank: grant it, persist it. The grant appears on the control page."""

    generation: GenerationId
    global_rank: int
    step: int
    persist: bool


class PersistedMessage(Message, frozen=True, kw_only=True):
    """D -> W, pushed: a version is in storage."""

    version: Version
    path: str
    seconds: float
    tag: str | None = None


class PersistFailedMessage(Message, frozen=True, kw_only=True):
    """D -> W, pushed: a version could not be written; older checkpoints are as they were."""

    version: Version
    reason: str
    final: bool = False
    """As in `PersistEnded`."""


class CloseSession(Message, frozen=True, kw_only=True):
    """W -> D: the Session is over on this rank; `outcome` is done or failed. Answered with `Ack`."""

    generation: GenerationId
    global_rank: int
    step: int
    outcome: str


# --- daemon and daemon --------------------------------------------------------------------------------------------
# The shells carry the events and instructions of the ledgers in these.


class Inventory(Message, frozen=True, kw_only=True):
    """D -> L, when a generation starts and when a daemon restarts: what this node holds and knows."""

    generation: GenerationId
    node_rank: int
    clean: tuple[CleanImage, ...]
    parents: tuple[Parentage, ...]
    history: str | None
    """History id of the checkpoint directory that the memory belongs to."""
    newest_step: int
    """Newest finished step that any worker of this node published in the generation before."""
    pinned: tuple[Pin, ...] = ()
    """Versions kept for a persist that has not ended."""
    parity: tuple[HeldParity, ...] = ()
    """Whole parity buffers."""
    bulk: str = ""
    """tcp:// endpoint of the node's bulk server."""
    domain: str = ""
    """Failure domain of the node."""


class RanksOpened(Message, frozen=True, kw_only=True):
    """D -> L: Sessions that opened on this node, with their configuration."""

    generation: GenerationId
    node_rank: int
    opened: tuple[tuple[int, SessionConfig], ...]


class LeaderRestore(Message, frozen=True, kw_only=True):
    """L -> D: the choice for the generation; `Restore` less what is local to a node."""

    generation: GenerationId
    restore: Restore
    history: str | None
    config: SessionConfig | None = None
    """Of the Session; a node of which no rank is in it learns it here."""
    grouping: Grouping | None = None
    """Which nodes protect each other in this generation; None: none does."""
    domains: dict[int, str] = {}
    """Failure domain by node rank."""
    protected: Version | None = None
    """The version whose slots and parity stay until one of this generation is protected."""
    lowered: int = 0
    """The most parities that a group has for want of memory; 0: as formed. Sent again where it changes, with `grouping`
    lowered."""


class AskNode(Message, frozen=True, kw_only=True):
    """L -> D: the leader of `generation` has no inventory, or not all openings, of this node yet; also sent by a
    restarted leader. Answered with `Inventory` and `RanksOpened`."""

    generation: GenerationId
    leader_epoch: int


class DaemonMoved(Message, frozen=True, kw_only=True):
    """D -> D, from a successor that could not take over its predecessor's endpoint; repeated while the generation
    lasts."""

    generation: GenerationId
    node_rank: int
    daemon: str
    """tcp:// endpoint where it listens now."""
    bulk: str = ""
    """The same of its bulk server."""


class StreamTold(Message, frozen=True, kw_only=True):
    """D -> D, within a group: what this node has to be coded of a version. It may be lost: it is asked for again."""

    version: Version
    stream: Stream


class StreamWanted(Message, frozen=True, kw_only=True):
    """D -> D, within a group: tell the stream of the version. Answered with `StreamTold` once there is one."""

    version: Version
    node_rank: int
    """Who asks."""


class NodeReport(Message, frozen=True, kw_only=True):
    """D -> L: the whole state of a node's ledger; only the newest one counts."""

    state: NodeState


class LeaderOrders(Message, frozen=True, kw_only=True):
    """L -> D: the whole state of the leader's ledger, as far as nodes need it; only the newest one counts."""

    orders: Orders


class PersistOrder(Message, frozen=True, kw_only=True):
    """L -> D: write your job-scope part of this version into `directory`; answered with `PersistPart`."""

    version: Version
    directory: str
    attempt: int
    tag: str | None = None
    metrics: dict[str, float] = {}
    lost: tuple[ImageLocation, ...] = ()
    """Images that no node has any more, for this one to decode and to write."""
    images: tuple[ImageLocation, ...] = ()
    """With `lost`: all others, for pieces that are not coded because several nodes hold them."""
    bulk: dict[int, str] = {}
    """With `lost`: node rank -> endpoint of its bulk server."""


class PersistPart(Message, frozen=True, kw_only=True):
    """D -> L: the images that this node wrote (encoded image records), or why it could not."""

    version: Version
    node_rank: int
    attempt: int
    records: tuple[bytes, ...] = ()
    error: str | None = None


class PersistEnded(Message, frozen=True, kw_only=True):
    """L -> D: the root record is there (path), or the attempt failed (error)."""

    version: Version
    path: str | None = None
    error: str | None = None
    seconds: float = 0.0
    tag: str | None = None
    final: bool = False
    """Of a failure: it was tried as the step for which the job waits at its end, which it is not tried as again."""


AnyMessage = (
    Hello
    | Welcome
    | StartGeneration
    | EndGeneration
    | Shutdown
    | Bye
    | Progress
    | ParityMade
    | RestoreChosen
    | SessionPhase
    | RequestRegroup
    | RequestStop
    | Notice
    | Ack
    | Refused
    | OpenSession
    | Restore
    | RestoreFailed
    | Reached
    | Diverged
    | NeedSlots
    | SlotsReady
    | SlotsMapped
    | Committed
    | Missed
    | RequestSave
    | SaveAgreed
    | RequestEnd
    | FinalStep
    | PersistedMessage
    | PersistFailedMessage
    | CloseSession
    | AskNode
    | Inventory
    | RanksOpened
    | LeaderRestore
    | DaemonMoved
    | StreamTold
    | StreamWanted
    | NodeReport
    | LeaderOrders
    | PersistOrder
    | PersistPart
    | PersistEnded
)

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[AnyMessage] = msgspec.msgpack.Decoder(AnyMessage)


def encode(message: AnyMessage) -> bytes:
    """The bytes of `message` for a socket."""
    return _encoder.encode(message)


def decode(data: bytes | memoryview) -> AnyMessage:
    """The message in `data`.

    Raises:
        PeerError: `data` is no message, or too large.
    """
    if len(data) > MAX_MESSAGE_BYTES:
        raise PeerError(f"a message of {len(data)} bytes is over the limit of {MAX_MESSAGE_BYTES}")
    try:
        return _decoder.decode(data)
    except DECODE_ERRORS as error:
        raise PeerError(f"{len(data)} bytes from a peer are no message: {error}") from error
