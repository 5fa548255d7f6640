"""What agents tell each other, and the size-checked codec for it.

Both messages carry whole states, never changes of them: a lost, doubled or late message costs a heartbeat, nothing
else. A member sends its `Report` whenever it changes and every heartbeat; the leader sends its `Plan` likewise.
"""

from __future__ import annotations

import enum
from typing import Literal

import msgspec

from holdfast.checkpoint.version import GenerationId
from holdfast.errors import DECODE_ERRORS, PeerError

PROTOCOL = 5
"""Raised whenever agents of two releases would misread each other."""
MAX_MESSAGE_BYTES = 1 << 20
_MAX_TEXT = 1000


class NodeInfo(msgspec.Struct, frozen=True, kw_only=True):
    """Who a member is; fixed while its agent lives."""

    node_id: str
    """Random, new for every agent process: a restarted agent is a new member."""
    job: str
    """Rendezvous id. Agents of another job are turned away."""
    host: str
    pid: int
    role: str
    num_workers: int
    address: str = ""
    """host:port at which this agent hears the others; "" in a job of one node."""
    rank_hint: int | None = None
    """Node rank that the user gave (static rendezvous), None where ranks are dealt out."""
    protocol: int = PROTOCOL


class DaemonInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What a member's snapshot daemon told it; all defaults where there is none."""

    endpoint: str = ""
    """tcp:// endpoint for other nodes."""
    newest_incarnation: int = 0
    run_id: str | None = None
    generation: GenerationId | None = None
    """Newest generation that the node ran before this agent came, where its seat remembers."""
    nodes: int = 0
    """Number of nodes of that generation, 0 where nobody remembers."""


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """The first failure that a node saw in a generation."""

    host: str
    global_rank: int
    local_rank: int
    pid: int
    exit_code: int
    """Negative: the signal that ended the process. 0: it has not ended, it hangs."""
    message: str = ""
    """One line: the exception, where the worker left an error file; of a hang, what was seen of it."""
    step: int = -1
    """Newest finished step of the worker, -1 where it published none."""
    time_s: float = 0.0
    """time.time() at which the agent saw the process end."""

    @property
    def hangs(self) -> bool:
        """Whether the process had not ended."""
        return self.exit_code == 0


class SessionState(msgspec.Struct, frozen=True, kw_only=True):
    """How far the Sessions of one node's workers have come; times are time.time() of the last rank."""

    opened: int = 0
    """Number of local ranks; the counts below likewise."""
    restored: int = 0
    first_step: int = 0
    waiting: int = 0
    """At the agreed step at which the membership changes: it is safe to end them."""
    closed: int = 0
    opened_s: float = 0.0
    restored_s: float = 0.0
    first_step_s: float = 0.0
    tier: str = ""
    step: int = 0
    steps_lost: int = 0
    reason: str = ""


class Standing(msgspec.Struct, frozen=True, kw_only=True):
    """A generation and who it is made of: those who may decide about its successor."""

    generation: GenerationId
    members: tuple[str, ...]
    """Node ids, by node rank."""
    addresses: tuple[str, ...]
    """host:port of their agents, likewise."""
    run_id: str = ""
    restart_count: int = 0
    bases: tuple[tuple[str, ...], ...] = ()
    """Where it is only proposed: the members of the generations before it that have not agreed to it yet."""
    overtakes: bool = False
    """Of a claim, as long as nobody knows that it ran: it begins an incarnation, or follows one that never ran, while a
    generation of an older one may still run elsewhere."""

    @property
    def order(self) -> tuple[int, int, str]:
        """Which of two is newer."""
        return self.generation.incarnation, self.generation.generation, self.generation.nonce

    def is_news_after(self, known: Standing | None) -> bool:
        """Whether it says more than `known`: a newer generation, or that this one is not only proposed or claimed."""
        return known is None or self._knowledge > known._knowledge

    @property
    def _knowledge(self) -> tuple[tuple[int, int, str], bool, bool]:
        return self.order, not self.bases, not self.overtakes


class StopRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Somebody asked this node's agent to end the job."""

    signal: int
    urgent: bool = False
    """Asked twice: no grace."""


class Drain(enum.StrEnum):
    """How far a node has come that is asked to leave the job, which goes on without it."""

    NONE = ""
    ASKED = "asked"
    READY = "ready"
    """Its workers have ended at an agreed step; it stays until the others no longer need what it holds."""
    GOING = "going"
    """It goes as soon as it may: its grace is over, it was asked twice, or there is nothing to stay for."""


class WorkerState(enum.StrEnum):
    """The workers of one node in the generation that it last started."""

    NONE = "none"
    RUNNING = "running"
    DONE = "done"
    """All ended with exit code 0."""
    FAILED = "failed"
    """One ended otherwise; the others may still be running."""
    STOPPED = "stopped"
    """They were ended by their agent before they were done."""


class Pulse(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What an agent sees of one of its workers; gathered every heartbeat, no event by itself.

    One that is not in a Session gives no signs of life: its silence counts from its start.
    """

    global_rank: int
    local_rank: int
    pid: int
    phase: int
    """`holdfast.snapshot.control.Phase` of its Session."""
    entered: bool = True
    """It has begun to open a Session in this generation, whatever has become of that."""
    step: int = -1
    """Newest finished step."""
    steps_done: int = 0
    """Steps finished in this generation."""
    inner_beats: int = 0
    """Signs of life since then: how far it is into the next one."""
    silent_s: float = 0.0
    """Since the newest sign of life."""
    beat_s: float = 0.0
    """time.time() of that sign on its host."""
    exempt: bool = False
    """In a `session.section` whose limit is not over."""
    step_s: float = 0.0
    """How long the newest step took; 0 before there is one."""
    lead_s: float = 0.0
    """The part of it before the first forward pass had ended, 0 where none was seen."""
    state: str = ""
    """Process state as in /proc: R, S, D, T, ..."""
    stuck_s: float = 0.0
    """For how long it has been seen in state T, or in state D without a moment of running."""
    cpu_s: float = 0.0
    """CPU time of all its threads; where it is silent, with that of the processes that it has started."""
    switches: int = 0
    """Context switches of its main thread."""
    io_bytes: int = 0
    """Bytes read and written."""
    dump: int = 0
    """Number of the newest dump of stacks that it has answered, or failed to."""
    stack: str = ""
    """Digest of its stacks in that dump, without threads of holdfast."""
    frame: str = ""
    """Where its main thread stood: "train.py:88 in step"; or why nobody knows."""


class Report(msgspec.Struct, frozen=True, kw_only=True, tag="report"):
    """Member to leader: everything the leader needs to know of this node."""

    node: NodeInfo
    sequence: int
    leader_id: str = ""
    """Leader that the member follows, "" while it knows none."""
    seen: int = 0
    """Sequence number of the newest plan of that leader that the member has acted on."""
    promised: int = 0
    """Largest ballot that the member has promised to a leader: it starts nothing of an older one."""
    promised_to: str = ""
    """That leader."""
    standing: Standing | None = None
    """Newest generation that the member knows."""
    failures: int = 0
    """Restarts after failures that the member knows of: a new leader goes on counting."""
    growths: int = 0
    """Growths of the world that the member knows of."""
    grown_ago_s: float = 0.0
    """How long ago it heard of the newest one: a new leader waits as the former one would have. 0: before it came."""
    proof: str = ""
    """Nonce that the member has read from the claim store."""
    daemon: DaemonInfo = DaemonInfo()
    generation: GenerationId | None = None
    """Generation that this node last started workers for, None before the first."""
    restart_count: int = 0
    """Restarts that this node has seen in the incarnation: a new leader goes on counting."""
    state: WorkerState = WorkerState.NONE
    alive: bool = False
    """Worker processes of this node, of whatever generation, are still there."""
    failure: Failure | None = None
    session: SessionState = SessionState()
    progress: int = -1
    """Step of the newest complete version that this node heard of, -1 where there is none."""
    started_s: float = 0.0
    """time.time() at which the workers of the generation had been spawned."""
    protected: bool = False
    """A version of the generation is protected."""
    stop: StopRequest | None = None
    drain: Drain = Drain.NONE
    ended: bool = False
    """This node has carried out the end of the job."""
    pulses: tuple[Pulse, ...] = ()
    """Of the workers of `generation`."""


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """One node's place in a generation."""

    node_id: str
    node_rank: int
    host: str
    daemon: str
    role: str
    num_ranks: int
    first_global_rank: int
    first_role_rank: int
    role_world_size: int
    address: str = ""
    """host:port of its agent."""


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """How the job ends."""

    kind: Literal["done", "failed", "stopped", "drained"]
    """drained: of one node only, the job goes on."""
    reason: str
    """One line."""
    failure: Failure | None = None
    signal: int = 0
    """Signal to end workers with, 0: the default one."""
    grace_s: float | None = None
    """How long workers have after that signal, None: as after a failure."""


class Phase(enum.StrEnum):
    """What the leader wants of the members."""

    GATHER = "gather"
    """Stay without workers until there is a generation."""
    RUN = "run"
    STOP = "stop"
    """End the workers of the named generation, and wait."""
    END = "end"
    """End all workers, then the agent, by `Plan.verdict`."""


class Plan(msgspec.Struct, frozen=True, kw_only=True, tag="plan"):
    """Leader to all members."""

    leader_id: str
    sequence: int
    phase: Phase
    address: str = ""
    """host:port of the leader."""
    ballot: int = 0
    """What members promise the leader; grows with every generation, and where another leader's was as large."""
    newest: GenerationId | None = None
    """Newest generation that the leader knows."""
    seniority: int = 0
    """Node rank of the leader in it; else the number of the endpoint that it serves, after all node ranks."""
    failures: int = 0
    """Restarts after failures so far."""
    growths: int = 0
    """Generations so far that ended only to make the world larger."""
    proof: str = ""
    """Nonce in the claim store that every member has to read before it gets a place."""
    proposed: Standing | None = None
    """A generation that is about to start: enough of those who have a vote must know of it before."""
    regroup: bool = False
    """The membership shall change at an agreed step."""
    leaves: bool = False
    """Then a node leaves the job with what it holds."""
    leaving: tuple[str, ...] = ()
    """Node ids: they get no place any more."""
    released: tuple[str, ...] = ()
    """Those of them that may go."""
    stopping: bool = False
    """The job shall end at an agreed step."""
    generation: GenerationId | None = None
    restart_count: int = 0
    fresh: bool = True
    """First generation of its incarnation."""
    run_id: str = ""
    places: tuple[Place, ...] = ()
    store: str = ""
    """host:port of the generation's TCPStore."""
    session: bool = False
    """All ranks have entered a Session and none has left it: stop requests become agreed steps."""
    verdict: Verdict | None = None
    dump: int = 0
    """Number of the newest dump of all workers' stacks that was ordered in this generation."""


class Redirect(msgspec.Struct, frozen=True, kw_only=True, tag="redirect"):
    """Any agent to one that seeks a leader: ask there. A leader that yields or resigns sends it to its members."""

    sender: str
    """Node id."""
    address: str
    """host:port of the leader."""
    resigns: bool = False
    """The sender leads no longer, because its node leaves: who is at that address leads from now on."""


class Rejected(msgspec.Struct, frozen=True, kw_only=True, tag="rejected"):
    """Leader to one agent: it cannot belong to this job."""

    reason: str


AgentMessage = Report | Plan | Redirect | Rejected


def plain_text(text: str) -> str:
    """`text` as it may stand in a message: Unicode without lone surrogates, and not too long for one."""
    text = text.encode(errors="replace").decode()
    return text if len(text) <= _MAX_TEXT else f"{text[: _MAX_TEXT - 1]}…"


_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[AgentMessage] = msgspec.msgpack.Decoder(AgentMessage)


def encode(message: AgentMessage) -> bytes:
    """The bytes of `message` for a socket."""
    return _encoder.encode(message)


def decode(data: bytes) -> AgentMessage:
    """The message in `data`.

    Raises:
        PeerError: `data` is no message of an agent, or too large.
    """
    if len(data) > MAX_MESSAGE_BYTES:
        raise PeerError(f"a message of {len(data)} bytes from an agent is over the limit of {MAX_MESSAGE_BYTES}")
    try:
        return _decoder.decode(data)
    except DECODE_ERRORS as error:
        raise PeerError(f"{len(data)} bytes from an agent are no message: {error}") from error
