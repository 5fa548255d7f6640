"""What the machine of a leader tells its shell to do: frozen instructions."""

from __future__ import annotations

from dataclasses import dataclass

from holdfast.checkpoint.version import GenerationId
from holdfast.launcher.wire import Failure, Plan, Standing


@dataclass(frozen=True)
class Broadcast:
    """Send the plan to every member."""

    plan: Plan


@dataclass(frozen=True)
class TurnAway:
    """Tell this agent that it cannot belong to the job."""

    node_id: str
    reason: str
    address: str = ""


@dataclass(frozen=True)
class HostStore:
    """Make a new store for the generation and answer with `stored`."""

    generation: GenerationId


@dataclass(frozen=True)
class ReadClaims:
    """Read the newest claim of the store and answer with `claims_read`; first write the proof, where it is named."""

    proof: str


@dataclass(frozen=True)
class Claim:
    """Try to create the claim, and answer with `claim_ended`."""

    standing: Standing
    after: GenerationId | None
    """The newest generation that the leader knew: it has one successor."""


@dataclass(frozen=True)
class Note:
    """Something for the event log: what happened, in which generation."""

    kind: str
    """node_joined, node_lost, node_left, forming, running, stopping, stopped, asked_to_stop, asked_to_grow,
    asked_to_drain, waiting or claim_lost."""
    text: str
    generation: int = 0
    failure: Failure | None = None


@dataclass(frozen=True)
class Resign:
    """This node leaves the job: the agent at this address leads from now on. The leader is of no use after it."""

    address: str


@dataclass(frozen=True)
class Finished:
    """Every member has carried out the end, or is gone: the leader may leave."""


Instruction = Broadcast | TurnAway | HostStore | ReadClaims | Claim | Note | Resign | Finished
