"""This agent's place among the agents: `Membership` with the sockets, the stores and the log that it needs.

The agent hands over what happens on its node and gets back what it has to do there; messages, store addresses, claims
and notes are seen to here. Used by the agent's main thread only.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any

import zmq

from holdfast.checkpoint.version import GenerationId, new_nonce
from holdfast.environment import job_token
from holdfast.errors import PeerError
from holdfast.launcher import events, leader_orders, member
from holdfast.launcher.arguments import Launch
from holdfast.launcher.budget import RestartBudget
from holdfast.launcher.channel import Channel
from holdfast.launcher.claims import ClaimDesk, ClaimStore
from holdfast.launcher.console import say
from holdfast.launcher.leader import Leader
from holdfast.launcher.member import Member
from holdfast.launcher.membership import Instruction, Led, Membership, Send, Terms
from holdfast.launcher.orders import node_info
from holdfast.launcher.recoveries import RecoveryBook
from holdfast.launcher.stores import new_store
from holdfast.launcher.timeline import describe_failure
from holdfast.launcher.wire import Phase, Plan, Report, Standing
from holdfast.snapshot.keys import JobKeys

_SERVE_AGAIN_S = 1.0

NodeInstruction = (
    member.StartWorkers | member.StopWorkers | member.AskStop | member.AskRegroup | member.LostLeader | member.Leave
)
"""What is left for the agent to do on its node."""


class Council:
    """See the module's head."""

    def __init__(
        self,
        launch: Launch,
        *,
        address: str,
        run_id: str,
        context: zmq.Context[zmq.Socket[bytes]],
        write: Callable[[events.AnyEvent], None],
        observe_report: Callable[[Report], None] = lambda report: None,
        observe_plan: Callable[[Plan], None] = lambda plan: None,
    ) -> None:
        """Serve an endpoint where this host is one; nobody is asked anything before the first `ticked`.

        Args:
            launch: the command line.
            address: of this host, as other nodes reach it.
            run_id: of a run that begins here.
            context: of the agent's sockets.
            write: takes events.
            observe_report: takes all reports while this agent leads, its own too.
            observe_plan: takes the plans that it sends as a leader.

        Raises:
            PeerError: this agent has to serve the endpoint and cannot.
            UsageError: --hold-claim-store names no place.
        """
        self._launch = launch
        self._run_id = run_id
        self._write = write
        self._observe_report, self._observe_plan = observe_report, observe_plan
        self.recoveries = RecoveryBook(write)
        self._address = address
        self._store: object | None = None
        self._serve_next = 0.0
        self._answers: list[NodeInstruction] = []
        alone = launch.meeting.max_nodes == 1
        store = launch.hold.claim_store
        self._desk = ClaimDesk(ClaimStore(store), say) if store and not alone else None
        endpoints = () if alone else tuple(_join(host, port) for host, port in launch.meeting.endpoints)
        self._channel = None if alone else Channel(context, address, JobKeys(job_token()), endpoints)
        self._ports = () if alone else self._own_ports()
        endpoint = 0 if alone else self._serve()
        terms = Terms(
            node=node_info(launch, self._channel.address if self._channel is not None else ""),
            limits=launch.limits,
            make_leader=self._make_leader,
            endpoints=endpoints,
            may_found=launch.may_lead is not False,
        )
        self.node = terms.node
        self.membership = Membership(terms, endpoint=endpoint, now=time.monotonic())

    @property
    def plan(self) -> Plan | None:
        """The newest plan, None while no leader is known."""
        return self.membership.plan

    @property
    def waits(self) -> bool:
        """Whether a generation runs without this node, which is a spare then."""
        plan = self.plan
        inside = plan is not None and any(place.node_id == self.node.node_id for place in plan.places)
        return plan is not None and plan.phase is Phase.RUN and not inside

    @property
    def leads(self) -> bool:
        """Whether this agent leads now."""
        return self.membership.leader is not None

    @property
    def sockets(self) -> list[Any]:
        """What to poll for reading, before `hear`."""
        found: list[Any] = self._channel.sockets if self._channel is not None else []
        return [*found, self._desk.descriptor] if self._desk is not None else found

    def close(self) -> None:
        """Send what is queued, and end the thread of the claim store."""
        self.recoveries.close()
        if self._channel is not None:
            self._channel.close()
        if self._desk is not None:
            self._desk.close()

    # --- events

    def hear(self) -> list[NodeInstruction]:
        """Take in what has arrived."""
        left: list[NodeInstruction] = []
        for message in self._channel.receive() if self._channel is not None else ():
            if self.leads and isinstance(message, Report):
                self._observe(message)
            left += self._do(self.membership.heard(message, time.monotonic()))
        if self._desk is not None:
            self._desk.answers()
            left += self._answers
            self._answers = []
        return left

    def ticked(self, now: float) -> list[NodeInstruction]:
        """Time has passed: at least every heartbeat."""
        if self.leads and self.membership.endpoint < 0 and now >= self._serve_next:
            self._serve_next = now + _SERVE_AGAIN_S
            self.membership.endpoint = self._serve()
        return self._do(self.membership.ticked(now))

    def tell(self, event: Callable[[Member], list[member.Instruction]]) -> list[NodeInstruction]:
        """Something happened on this node: `event` hands it to the member."""
        return self._do(self.membership.tell(event, time.monotonic()))

    def answer(self, event: Callable[[Leader], list[leader_orders.Instruction]]) -> list[NodeInstruction]:
        """Something for the leader; dropped where this agent does not lead."""
        return self._do(self.membership.answer(event, time.monotonic()))

    def next_wake(self, now: float) -> float:
        """Seconds until `ticked` has something to do."""
        return self.membership.next_wake(now)

    # --- instructions

    def _do(self, instructions: list[Instruction]) -> list[NodeInstruction]:
        """Carry out in order; what that leads to comes after, so that plans go out in the order of their numbers."""
        left: list[NodeInstruction] = []
        queue = deque(instructions)
        while queue:
            instruction = queue.popleft()
            match instruction:
                case Send(message, addresses):
                    assert self._channel is not None, "nobody to send to"
                    self._channel.send(message, addresses)
                case member.SendReport(report):
                    self._observe(report)
                case leader_orders.Broadcast(plan):
                    self.recoveries.agreed(plan)
                    self._observe_plan(plan)
                case leader_orders.HostStore(generation):
                    queue.extend(self._stored(generation, self._host_store()))
                case leader_orders.ReadClaims() | leader_orders.Claim() | member.ReadProof():
                    self._ask_store(instruction)
                case leader_orders.Note():
                    self._note(instruction)
                case member.SeeksOn():
                    self._say_who_is_sought()
                case Led():
                    self._led(instruction)
                case leader_orders.TurnAway() | leader_orders.Finished() | leader_orders.Resign():
                    pass  # seen to by Membership
                case _:
                    left.append(instruction)
        return left

    def _stored(self, generation: GenerationId, address: str) -> list[Instruction]:
        now = time.monotonic()
        return self.membership.answer(lambda machine: machine.stored(generation, address, now), now)

    def _observe(self, report: Report) -> None:
        self.recoveries.observe(report)
        self._observe_report(report)

    def _ask_store(self, instruction: leader_orders.ReadClaims | leader_orders.Claim | member.ReadProof) -> None:
        assert self._desk is not None, "there is a claim store"
        now = time.monotonic
        match instruction:
            case leader_orders.ReadClaims(proof):
                self._desk.ask(
                    lambda store: _prove_and_read(store, proof),
                    lambda found: self._answer(lambda machine: machine.claims_read(_claim(found), now())),
                )
            case leader_orders.Claim(standing, after):
                self._desk.ask(
                    lambda store: store.create(standing, after),
                    lambda won: self._answer(lambda machine: machine.claim_ended(standing, won=won is True, now=now())),
                )
            case member.ReadProof(nonce):
                self._desk.ask(
                    lambda store: store.awaits_proof(nonce), lambda found: self._proved(nonce, found is True)
                )

    def _answer(self, event: Callable[[Leader], list[leader_orders.Instruction]]) -> None:
        self._answers += self.answer(event)

    def _proved(self, nonce: str, found: bool) -> None:
        plan = self.plan
        if found:
            self._answers += self.tell(lambda machine: machine.proved(nonce, time.monotonic()))
        elif plan is not None and plan.proof == nonce:
            say(f"what the leader wrote is not in --hold-claim-store {self._launch.hold.claim_store}: is it shared?")
            self._ask_store(member.ReadProof(nonce))

    def _say_who_is_sought(self) -> None:
        endpoints = ", ".join(_join(host, port) for host, port in self._launch.meeting.endpoints)
        say(
            f"no leader has answered at {endpoints} yet: this node asks on, for "
            f"{self._launch.limits.join_timeout_s:g} s in all"
        )

    # --- leading

    def _make_leader(self, endpoint: int, now: float, missing: frozenset[str]) -> Leader:
        hold = self._launch.hold
        return Leader(
            node=self.node,
            nonce=new_nonce(),
            run_id=self._run_id,
            limits=self._launch.limits,
            budget=RestartBudget(max_restarts=self._launch.max_restarts, no_progress=hold.no_progress),
            now=now,
            endpoint=endpoint,
            claims=self._desk is not None,
            missing=missing,
        )

    def _own_ports(self) -> tuple[tuple[int, int], ...]:
        """Number and port of the endpoints that are on this host."""
        from torch.distributed.elastic.rendezvous.utils import _matches_machine_hostname

        meeting, may = self._launch.meeting, self._launch.may_lead
        if meeting.node_rank is not None:
            own = [meeting.node_rank == 0] * len(meeting.endpoints)
        elif may is not None:
            own = [may] * len(meeting.endpoints)
        else:
            own = [bool(_matches_machine_hostname(host)) for host, _ in meeting.endpoints]
        return tuple((i, port) for i, (_, port) in enumerate(meeting.endpoints) if own[i])

    def _serve(self) -> int:
        """Serve one of the endpoints on this host; its number, -1 where all are served already.

        Raises:
            PeerError: the user said that this agent serves it, and the port is in use.
        """
        assert self._channel is not None, "a job of one node meets nobody"
        for number, port in self._ports:
            if self._channel.serve(port):
                return number
        told = self._launch.meeting.node_rank == 0 or self._launch.may_lead
        if told and self._ports and self._serve_next == 0.0:
            raise PeerError(f"port {self._ports[0][1]} of the rendezvous endpoint is in use on this host")
        return -1

    def _host_store(self) -> str:
        """A fresh store for the next generation; the one before goes with its addresses."""
        meeting = self._launch.meeting
        self._store = None  # it may hold the port that was named
        store = self._store = new_store(meeting.port if meeting.max_nodes == 1 else 0)
        given = meeting.endpoints[self.membership.endpoint][0] if self.membership.endpoint >= 0 else self._address
        host = self._launch.config.local_addr or (given if meeting.max_nodes > 1 else "127.0.0.1")
        return f"{host}:{store.port}"

    def _led(self, change: Led) -> None:
        if not change.leads:
            say(f"this agent leads no longer: {change.text}")
            self._write(events.Membership(change="yielded", text=change.text))
        elif change.takes_over:
            say("this agent leads now: it looks for the nodes that are left")
            self._write(events.Membership(change="leads", text=self.node.address))
            held = self.membership.member.in_session
            self.recoveries.begin(change.text, time.time(), had_session=held)

    def _note(self, note: leader_orders.Note) -> None:
        text = describe_failure(note.failure) if note.failure is not None else note.text
        self._write(events.Membership(change=note.kind, text=f"{note.text}: {text}" if note.failure else text))
        match note.kind:
            case "stopping":
                self.recoveries.begin(text, note.failure.time_s if note.failure is not None else time.time())
            case "stopped":
                self.recoveries.stopped()
            case "node_lost":
                say(f"lost node {note.text}")
            case "node_left":
                say(f"{note.text} has left the job")
            case "waiting" | "claim_lost" | "asked_to_grow" | "asked_to_drain":
                say(note.text)


def _join(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _prove_and_read(store: ClaimStore, proof: str) -> Standing | None:
    if not store.has_proof(proof):
        store.prove(proof)
    return store.newest()


def _claim(found: object) -> Standing | None:
    return found if isinstance(found, Standing) else None
