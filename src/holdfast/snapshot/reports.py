"""What a node's ledger and the leader's ledger tell each other: two states, not a stream of changes.

`NodeState` goes up, `Orders` come down. Each is the whole truth of its sender, so only the newest one counts: a lost,
repeated or coalesced message costs time and never a decision. What is needed of the transport: between two given
daemon processes messages arrive in order, and none arrives after either was restarted.
"""

from __future__ import annotations

import msgspec

from holdfast.checkpoint.version import GenerationId, Version


class SlotRef(msgspec.Struct, frozen=True, order=True):
    """One slot of a node: the files ``slot-<pool>-<local_rank>-<index>`` of all its local ranks."""

    pool: int
    index: int


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """Somebody on a node wants an agreed step. It is repeated in every report until a complete version answers it."""

    id: str
    """Unique in the job, chosen by the daemon that received it (for example ``n0-17``)."""
    kind: str
    """save, stop or regroup. A regroup ends with the generation for which it was asked."""
    persist: bool = True
    tag: str | None = None
    metrics: dict[str, float] = {}
    leaves: bool = False
    """Of a regroup: a node leaves the job, and what it holds goes with it."""


class Agreed(msgspec.Struct, frozen=True, kw_only=True):
    """A proposed or confirmed agreed step. A later pick for the same requests has a new, larger number."""

    number: int
    step: int
    confirmed: bool
    kind: str
    """save, stop or regroup."""
    persist: bool = True
    tag: str | None = None
    metrics: dict[str, float] = {}
    requests: tuple[str, ...] = ()
    """Ids of the requests that it answers."""


class Pin(msgspec.Struct, frozen=True, kw_only=True):
    """A version that is being persisted or queued for it: its slots are kept."""

    version: Version
    mandatory: bool = False
    """An agreed save or the final step: never dropped for a newer one."""
    final: bool = False
    """The job waits for it at its end: tried again for minutes."""
    tag: str | None = None
    metrics: dict[str, float] = {}


class Final(msgspec.Struct, frozen=True, kw_only=True):
    """The loop of a rank ended by itself after `step` completed steps."""

    step: int
    persist: bool


class RankState(msgspec.Struct, frozen=True, kw_only=True):
    """What one worker has published on the control page or told its daemon."""

    global_rank: int
    step: int = 0
    """Newest finished step."""
    entered: bool = False
    """It has opened its Session and restored its state: it may be granted steps."""
    acknowledged: int = 0
    """Number of the newest proposed agreed step that it acknowledged."""
    until: int | None = None
    final: Final | None = None


class Held(msgspec.Struct, frozen=True, kw_only=True):
    """A step of the current generation that the node has a slot for, or that waits for one."""

    step: int
    state: str
    """granted: some rank may still write. clean: all ranks of the node are. missed: some rank never will be."""
    wait_s: float = 0.0
    """Largest wait of any local training thread for this version."""
    step_s: float = 0.0
    """Largest step duration of any local rank at this version."""
    metrics: dict[str, float] = {}
    """What the ranks of the node reported; the smallest rank counts where they differ."""


class NodeState(msgspec.Struct, frozen=True, kw_only=True):
    """Node to leader: the whole state of a node's ledger."""

    generation: GenerationId
    node_rank: int
    epoch: int
    """Grows whenever the daemon of this node is restarted."""
    leader_epoch: int
    """The newest leader epoch that this node obeys; orders of older ones are refused."""
    num_slots: int
    """Slots of the pool in use; 0 while there is none or it grows; below 2 there is no memory tier."""
    free: int
    """Slots that further grants could take now (the steps in `held` have theirs); negative where some wait."""
    held: tuple[Held, ...]
    complete: int | None
    """Newest complete step of this generation that the node knows of."""
    pinned: tuple[Pin, ...]
    ranks: tuple[RankState, ...]
    requests: tuple[Request, ...] = ()
    agreed: Agreed | None = None
    """What stands on the control page."""
    coded: Version | None = None
    """The parities that this node holds of it are whole: the newest version of which that is so."""
    protected: Version | None = None
    """What the node was last told to be protected."""
    uncodable: Version | None = None
    """The newest version whose parity can never be made on this node."""
    parity: bool | None = None
    """Whether this node has room for parity; None while that is not known."""
    most_parity: int = 0
    """Where it has none: so many parities, fewer than now, it has room for."""
    lowered: int = 0
    """The most parities of a group that these are said of (`LeaderRestore.lowered`)."""
    ask: bool = False
    """The node is newly connected: it needs orders even if nothing has changed."""


class Orders(msgspec.Struct, frozen=True, kw_only=True):
    """Leader to node: the whole state of the leader's ledger, as far as nodes need it."""

    generation: GenerationId
    leader_epoch: int
    """Grows whenever the leader's daemon is restarted."""
    resync: bool = False
    """A new leader asks for a report and orders nothing: every other field is to be ignored."""
    running: bool = False
    """All ranks have entered: old versions other than the parent and the pinned ones may go."""
    grants: tuple[int, ...] = ()
    """Outstanding steps: granted, neither complete nor abandoned. A step that a node holds and that is neither here,
    nor complete, nor pinned, is abandoned or superseded: its slot may go once its writers have let go."""
    complete: int | None = None
    """Newest complete step of this generation."""
    pinned: tuple[Pin, ...] = ()
    agreed: Agreed | None = None
    protect: int | None = None
    """The complete step of this generation that is being protected now: its slots are kept."""
    protected: Version | None = None
    """The newest version whose parity is whole on every node, of this generation or an older one: its slots and its
    parity are kept until a newer one takes its place here. None: nothing is protected."""
    settled: int | None = None
    """The confirmed step of a regroup, once its version is safe without the nodes that leave: workers may go."""
