"""One agent's whole part in membership: its `Member`, its `Leader` while it leads, and the `Election`. Pure.

The shell hands over what arrives and what its workers do, and carries out the instructions: messages to addresses
(`Send`), and what the machines want of this node. Every message goes to a host:port; an agent answers none in place, so
lost, doubled and late ones are all alike.

Rules
-----
1. An agent without a leader sends its report to every endpoint, to the agents of the newest generation that it knows
   and to those that it heard lately. An agent that has a leader answers with its address.
2. A leader sends its plan to all who follow it, and calls at every endpoint and at the agents of the newest generation
   that do not follow: a lost host may be back, or the cable whole again.
3. A leader whose node leaves names another agent, which leads from then on.
4. A leader that hears a plan of more authority yields: it tells its members where to go, and follows.
5. An agent that has left the job leads no longer, unless the whole job ends.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from holdfast.launcher import leader_orders, member
from holdfast.launcher.election import Election
from holdfast.launcher.leader import Leader
from holdfast.launcher.limits import Limits
from holdfast.launcher.member import Member, authority
from holdfast.launcher.wire import AgentMessage, Drain, NodeInfo, Phase, Plan, Redirect, Rejected, Report, Standing

_HINT_BEATS = 10.0


@dataclass(frozen=True)
class Send:
    """Send a message to agents, at host:port each."""

    message: AgentMessage
    addresses: tuple[str, ...]


@dataclass(frozen=True)
class Led:
    """This agent leads from now on, or no longer; for the event log."""

    leads: bool
    text: str = ""
    takes_over: bool = False
    """There was a generation before."""


Instruction = Send | Led | leader_orders.Instruction | member.Instruction


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What an agent brings into membership; fixed while it lives."""

    node: NodeInfo
    limits: Limits
    make_leader: Callable[[int, float, frozenset[str]], Leader]
    """A new leader of this agent: the number of the endpoint that it serves (-1: none), now, and who is missing."""
    endpoints: tuple[str, ...] = ()
    """host:port of the rendezvous endpoints; none in a job of one node."""
    may_found: bool = True
    """This agent may lead before there is a generation."""


@dataclass
class _Hints:
    """Addresses where a leader may be, and until when they are tried."""

    until: dict[str, float] = field(default_factory=dict)

    def add(self, address: str, until: float) -> None:
        self.until[address] = until

    def at(self, now: float) -> set[str]:
        self.until = {address: until for address, until in self.until.items() if until > now}
        return set(self.until)


class Membership:
    """See the module's head. One per agent, used by one thread; `now` never goes back."""

    def __init__(self, terms: Terms, *, endpoint: int, now: float) -> None:
        """`endpoint`: number of the rendezvous endpoint that this agent serves, -1 for none."""
        self._terms = terms
        self._node = terms.node
        self._limits = terms.limits
        self.endpoint = endpoint
        self.member = Member(node=terms.node, limits=terms.limits, now=now)
        self.leader: Leader | None = None
        self._election = Election(node_id=terms.node.node_id, limits=terms.limits)
        self._hints = _Hints()
        self._out: list[Instruction] = []

    @property
    def plan(self) -> Plan | None:
        """The newest plan, None while no leader is known."""
        return self.member.plan

    @property
    def finished(self) -> bool:
        """This node has left, and nobody needs it as a leader any more."""
        return self.member.left and self.leader is None

    # --- events

    def heard(self, message: AgentMessage, now: float) -> list[Instruction]:
        """A message arrived."""
        match message:
            case Report():
                self._heard_report(message, now)
            case Plan():
                self._heard_plan(message, now)
            case Redirect():
                self._heard_redirect(message, now)
            case Rejected():
                self._member(self.member.rejected(message, now), now)
        return self._flush()

    def tell(self, event: Callable[[Member], list[member.Instruction]], now: float) -> list[Instruction]:
        """Something happened on this node: `event` hands it to the member."""
        self._member(event(self.member), now)
        return self._flush()

    def answer(self, event: Callable[[Leader], list[leader_orders.Instruction]], now: float) -> list[Instruction]:
        """Something that the leader asked for is there; dropped where this agent no longer leads."""
        if self.leader is not None:
            self._leader(event(self.leader), now)
        return self._flush()

    def ticked(self, now: float) -> list[Instruction]:
        """Time has passed: at least every heartbeat."""
        if self.leader is not None:
            self._leader(self.leader.ticked(now), now)
        self._member(self.member.ticked(now), now)
        self._lead_no_longer()
        if self.leader is None and self.member.plan is None and not self.member.left:
            self._maybe_lead(now)
        return self._flush()

    def next_wake(self, now: float) -> float:
        """Seconds until `ticked` has something to do."""
        wakes = [self.member.next_wake(now)]
        if self.leader is not None:
            wakes.append(self.leader.next_wake(now))
        return min(wakes)

    # --- messages

    def _heard_report(self, report: Report, now: float) -> None:
        self._election.heard(report, now)
        if self.leader is not None:
            self._leader(self.leader.reported(report, now), now)
        elif self.plan is not None and not report.leader_id:
            self._send(Redirect(sender=self._node.node_id, address=self.plan.address), [report.node.address])

    def _heard_plan(self, plan: Plan, now: float) -> None:
        if plan.leader_id == self._node.node_id:
            return
        if self.leader is None:
            self._member(self.member.planned(plan, now), now)
        elif plan.phase is Phase.END or self.leader.plan.phase is Phase.END:
            pass  # each ends its own side
        elif authority(plan) > authority(self.leader.plan):
            self._yield(plan, now)
        else:
            self._send(self.leader.plan, [plan.address])

    def _heard_redirect(self, redirect: Redirect, now: float) -> None:
        plan = self.plan
        if self.leader is not None:
            return
        if redirect.address == self._node.address:
            if redirect.resigns and plan is not None and plan.leader_id == redirect.sender:
                self._take_over(now)
        elif plan is not None and plan.leader_id == redirect.sender and plan.address != redirect.address:
            self._hints.add(redirect.address, now + _HINT_BEATS * self._limits.heartbeat_s)
            self._member(self.member.led_away(now), now)
        elif plan is None:
            self._hints.add(redirect.address, now + _HINT_BEATS * self._limits.heartbeat_s)
            self._send(self.member.report, [redirect.address])

    # --- leading

    def _maybe_lead(self, now: float) -> None:
        own = self.member.report
        if own.standing is None and not self._terms.may_found and self._terms.endpoints:
            return
        lost = self.member.lost_leader
        if not self._election.should_lead(
            own, since=self.member.seeking_since, lost=lost, endpoint=self.endpoint, now=now
        ):
            return
        self._lead(frozenset({lost}) if lost else frozenset(), now)

    def _take_over(self, now: float) -> None:
        """The leader leaves, and has named this agent. Leading is no power: whoever else thinks so can do it too."""
        self._member(self.member.led_away(now), now)
        if self.leader is None and self.member.report.drain is Drain.NONE and not self.member.left:
            self._lead(frozenset(), now, why="the leader's node leaves the job")

    def _lead(self, missing: frozenset[str], now: float, *, why: str = "the leader's node was lost") -> None:
        own = self.member.report
        self.leader = self._terms.make_leader(self.endpoint, now, missing)
        self._out.append(Led(True, why, takes_over=own.standing is not None))
        self._leader(self.leader.reported(own, now), now)
        for report in self._election.reports(now):
            if self.leader is not None:
                self._leader(self.leader.reported(report, now), now)

    def _lead_no_longer(self) -> None:
        """A leader whose own node has left, though the job has not ended, is missed by the others as a lost one."""
        if self.leader is not None and self.member.left and self.leader.plan.phase is not Phase.END:
            self.leader = None
            self._out.append(Led(False, "this node has left the job"))

    def _resign(self, address: str, now: float) -> None:
        assert self.leader is not None, "only a leader resigns"
        followers = self.leader.addresses
        self.leader = None
        self._out.append(Led(False, f"this node leaves the job, {address} leads"))
        self._hints.add(address, now + _HINT_BEATS * self._limits.heartbeat_s)
        self._member(self.member.led_away(now), now)
        self._send(
            Redirect(sender=self._node.node_id, address=address, resigns=True), followers
        )  # last: the newest message counts

    def _yield(self, plan: Plan, now: float) -> None:
        assert self.leader is not None, "only a leader yields"
        followers = self.leader.addresses
        self.leader = None
        self._out.append(Led(False, f"another leader goes on at {plan.address}"))
        self._member(self.member.led_away(now), now)
        self._member(self.member.planned(plan, now), now)
        self._send(Redirect(sender=self._node.node_id, address=plan.address), followers)  # last: the newest one counts

    # --- instructions

    def _member(self, instructions: Sequence[member.Instruction], now: float) -> None:
        for instruction in instructions:
            if not isinstance(instruction, member.SendReport):
                self._out.append(instruction)
            elif self.leader is not None:
                self._out.append(instruction)  # for those who watch the job
                self._leader(self.leader.reported(instruction.report, now), now)
            elif self.plan is not None:
                self._send(instruction.report, [self.plan.address])
            else:
                self._send(instruction.report, self._everybody(now))

    def _leader(self, instructions: Sequence[leader_orders.Instruction], now: float) -> None:
        for instruction in instructions:
            match instruction:
                case leader_orders.Broadcast(plan):
                    followers = self.leader.addresses if self.leader is not None else ()
                    self._out.append(instruction)
                    self._send(plan, [*followers, *self._everybody(now)])
                    self._member(self.member.planned(plan, now), now)
                case leader_orders.TurnAway(node_id, reason, address):
                    if node_id == self._node.node_id:
                        self._member(self.member.rejected(Rejected(reason=reason), now), now)
                    else:
                        self._send(Rejected(reason=reason), [address])
                case leader_orders.Finished():
                    self.leader = None
                case leader_orders.Resign(address):
                    self._resign(address, now)
                    return
                case _:
                    self._out.append(instruction)

    def _everybody(self, now: float) -> list[str]:
        """Where this agent may find a leader, or a leader those that it lost."""
        standing: Standing | None = self.member.report.standing
        known = set(standing.addresses) if standing is not None else set()
        return sorted({*self._terms.endpoints, *known, *self._hints.at(now), *self._election.addresses(now)})

    def _send(self, message: AgentMessage, addresses: Sequence[str]) -> None:
        wanted = tuple(a for a in dict.fromkeys(addresses) if a and a != self._node.address)
        if wanted:
            self._out.append(Send(message, wanted))

    def _flush(self) -> list[Instruction]:
        out, self._out = self._out, []
        return out
