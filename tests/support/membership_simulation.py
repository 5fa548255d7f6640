"""Membership under deterministic simulation: agents, workers, crashes, a network that delays, doubles, loses, splits.

Everything is driven by one seeded generator and a virtual clock. `Simulation.run` raises `Violation` when an invariant
breaks, and `settle` raises `Stuck` when nothing stands in the way and the job neither runs nor has ended.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from holdfast.checkpoint.version import GenerationId
from holdfast.launcher import leader, leader_orders, member
from holdfast.launcher.budget import RestartBudget
from holdfast.launcher.limits import Limits
from holdfast.launcher.membership import Membership, Send, Terms
from holdfast.launcher.quorum import may_follow
from holdfast.launcher.wire import (
    AgentMessage,
    DaemonInfo,
    Failure,
    NodeInfo,
    Phase,
    Plan,
    SessionState,
    Standing,
    StopRequest,
    Verdict,
)
from support.simulated_claims import Claims

TICK_S = 0.1


class Violation(AssertionError):
    """An invariant broke."""


class Stuck(AssertionError):
    """The job makes no headway although nothing is in its way."""


@dataclass
class Chaos:
    """What goes wrong while `until_s` has not come; rates are per second and node."""

    until_s: float = 60.0
    loss: float = 0.05
    double: float = 0.05
    max_delay_s: float = 0.2
    worker_failures: float = 0.05
    crashes: float = 0.03
    pauses: float = 0.02
    longest_pause_s: float = 6.0
    splits: float = 0.0
    """Per second of the whole network: it falls apart, or becomes whole again."""
    cuts: float = 0.0
    """Per second of the whole network: one direction between two nodes is cut, or all such cuts heal."""
    drains: float = 0.0
    """Nodes that are asked to leave; they come back as other ones."""
    half_claims: float = 0.05
    """Of all claims: whose leader dies between its two writes."""
    store_delay_s: float = 0.1
    """The longest time until the claim store has done something, and again until who asked has the answer."""
    other_memories: float = 0.0
    """Of all agents that start: whose seat remembers a later incarnation of the job, which the others never met."""
    restart_after_s: tuple[float, float] = (0.1, 6.0)


CALM = Chaos(until_s=0.0)


@dataclass
class Workers:
    """This node's workers of one generation."""

    plan: Plan
    failed: bool = False


@dataclass
class SimAgent:
    """One agent process; a node has at most one."""

    node: int
    node_id: str
    membership: Membership
    address: str
    workers: Workers | None = None
    stop_at: float | None = None
    paused_until: float = 0.0
    left: Verdict | None = None
    heard: float = 0.0
    """When the newest plan arrived, or the agent last woke up."""

    @property
    def leads(self) -> bool:
        return self.membership.leader is not None


def memory_of(generation: GenerationId, nodes: int) -> DaemonInfo:
    """What a seat tells that ran this generation of so many nodes last."""
    return DaemonInfo(newest_incarnation=generation.incarnation, generation=generation, nodes=nodes)


def number(generation: GenerationId) -> tuple[int, int]:
    return generation.incarnation, generation.generation


class Simulation:
    """`nodes` agents; the first `endpoints` of them serve rendezvous endpoints."""

    def __init__(
        self,
        seed: int,
        *,
        nodes: int = 3,
        endpoints: int = 1,
        limits: Limits | None = None,
        chaos: Chaos | None = None,
        max_restarts: int | None = 100_000,
        node_ranks_given: bool = False,
        claims: bool = False,
        supervised: bool = True,
        boot_within_s: float = 2.0,
    ) -> None:
        self.random = random.Random(seed)
        self.limits = limits or Limits(min_nodes=nodes, max_nodes=nodes, join_timeout_s=300, last_call_s=3)
        self.chaos = chaos or Chaos()
        self.max_restarts = max_restarts
        self.static = node_ranks_given
        self.num_endpoints = endpoints
        self.claims = Claims() if claims else None
        self.supervised = supervised
        """An agent that leaves with a job that was stopped is started again."""
        self.stubborn = False
        """Workers end only where they are given no grace."""
        self.agreed_after_s = 0.1
        """From the first request to the agreed step."""
        self.asked_to_regroup: list[tuple[float, GenerationId, bool]] = []
        self.protects = True
        """The first version of a generation is protected at once."""
        self.lost_leaders = 0
        """How often an agent found its leader silent."""
        self.dies_claiming: set[int] = set()
        """Nodes whose agent will die between the two writes of its next claim."""
        self.stuck: set[int] = set()
        """Nodes whose workers do not even end by SIGKILL."""
        self.session = False
        """Workers open a Session at once, and stop at agreed steps."""
        self.now = 0.0
        self.agents: dict[int, SimAgent] = {}
        self.by_address: dict[str, SimAgent] = {}
        self.ended: list[SimAgent] = []
        self.sides: dict[int, int] = {}
        """Part of the network that each node is in, 0 where not named."""
        self.cuts: set[tuple[int, int]] = set()
        """(from, to) that loses everything."""
        self.loses: Callable[[int, int, AgentMessage], bool] = lambda sender, receiver, message: False
        """Whether the network loses this message, for schedules that a test lays out by hand."""
        self.node_newest: dict[int, Plan] = {}
        self.plans: dict[GenerationId, Plan] = {}
        self.started: list[GenerationId] = []
        self.progressed: GenerationId | None = None
        """The newest generation whose workers all ran."""
        self.ended_by_leader: GenerationId | None = None
        """Generation whose own leader has ended the job: what starts afterwards is another run of it."""
        self.notes: list[tuple[float, str, leader_orders.Note]] = []
        self.gone: set[int] = set()
        """Nodes that do not come back."""
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self._births = 0
        for node in range(nodes):
            self._at(self.random.uniform(0, boot_within_s), lambda node=node: self.boot(node))
        self._at(TICK_S, self._network_mischief)

    # --- engine

    def _at(self, delay_s: float, action: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._events, (self.now + delay_s, self._count, action))

    def run(self, duration_s: float) -> Simulation:
        end = self.now + duration_s
        while self._events and self._events[0][0] <= end:
            self.now, _, action = heapq.heappop(self._events)
            action()
        self.now = end
        return self

    def run_until(self, condition: Callable[[], object], within_s: float) -> float:
        """How long it took; `Stuck` where it did not happen."""
        begun = self.now
        while not condition():
            if self.now - begun > within_s:
                raise Stuck(f"it did not happen within {within_s} s: {self.describe()}")
            self.run(TICK_S)
        return self.now - begun

    @property
    def _chaotic(self) -> bool:
        return self.now < self.chaos.until_s

    def boot(self, node: int, memory: DaemonInfo | None = None) -> SimAgent | None:
        """Start an agent; `memory`: what its seat remembers, where it has run nothing in this simulation."""
        if node in self.agents or node in self.gone:
            return None
        self._births += 1
        node_id = f"node{node}-{self._births}"
        info = NodeInfo(
            node_id=node_id,
            job="sim",
            host=f"host{node}",
            pid=self._births,
            role="default",
            num_workers=2,
            address=f"a{node}-{self._births}",
            rank_hint=node if self.static else None,
        )
        endpoint = node if node < self.num_endpoints else -1
        terms = Terms(
            node=info,
            limits=self.limits,
            make_leader=lambda served, now, missing: self._make_leader(info, served, now, missing),
            endpoints=tuple(f"e{i}" for i in range(self.num_endpoints)),
        )
        agent = SimAgent(node, node_id, Membership(terms, endpoint=endpoint, now=self.now), info.address)
        self.agents[node] = agent
        self.by_address[info.address] = agent
        if endpoint >= 0:
            self.by_address[f"e{endpoint}"] = agent
        known = memory or DaemonInfo()
        newest = self.node_newest.get(node)
        if newest is not None and newest.generation is not None:
            generation = newest.generation
            known = memory_of(generation, len(newest.places))
        if self._chaotic and self.chaos.other_memories and self.random.random() < self.chaos.other_memories:
            incarnation = known.newest_incarnation + self.random.randint(1, 3)
            nonce = f"{self.random.getrandbits(32):08x}"
            known = memory_of(GenerationId(incarnation=incarnation, nonce=nonce, generation=2), 1)
        self._do(agent, agent.membership.tell(lambda m: m.daemon(known, self.now), self.now))
        self._tick(agent)
        return agent

    def _make_leader(self, info: NodeInfo, endpoint: int, now: float, missing: frozenset[str]) -> leader.Leader:
        return leader.Leader(
            node=info,
            nonce=f"{self.random.getrandbits(32):08x}",
            run_id="run",
            limits=self.limits,
            budget=RestartBudget(max_restarts=self.max_restarts, no_progress=3),
            now=now,
            endpoint=endpoint,
            claims=self.claims is not None,
            missing=missing,
        )

    def _alive(self, agent: SimAgent) -> bool:
        return self.agents.get(agent.node) is agent

    def _tick(self, agent: SimAgent) -> None:
        if not self._alive(agent):
            return
        self._at(TICK_S, lambda: self._tick(agent))
        if self.now < agent.paused_until:
            return
        deaf_s = self.now - agent.heard
        if agent.workers is not None and not agent.leads and deaf_s > self.limits.dead_after_s + 1.5:
            raise Violation(f"{agent.node_id} runs workers {deaf_s:.1f} s after it last heard of a leader")
        self._mischief(agent)
        if not self._alive(agent):
            return
        if agent.stop_at is not None and self.now >= agent.stop_at and agent.workers is not None:
            generation = agent.workers.plan.generation
            assert generation is not None
            agent.workers, agent.stop_at = None, None
            self._do(agent, agent.membership.tell(lambda m: m.gone(generation, self.now), self.now))
        self._do(agent, agent.membership.ticked(self.now))
        if agent.membership.finished:
            self._exit(agent)

    def _exit(self, agent: SimAgent) -> None:
        del self.agents[agent.node]
        self.ended.append(agent)
        if self.supervised and agent.left is not None and agent.left.kind in ("stopped", "drained"):
            self._at(self.random.uniform(*self.chaos.restart_after_s), lambda: self.boot(agent.node))

    # --- faults

    def _mischief(self, agent: SimAgent) -> None:
        if not self._chaotic:
            return
        chaos = self.chaos
        draw = self.random.random() / TICK_S
        if draw < chaos.crashes:
            self.crash(agent)
        elif draw < chaos.crashes + chaos.pauses:
            agent.paused_until = agent.heard = self.now + self.random.uniform(0.5, chaos.longest_pause_s)
        elif agent.workers is not None and draw < chaos.crashes + chaos.pauses + chaos.worker_failures:
            self.fail_worker(agent)
        elif self.random.random() / TICK_S < chaos.drains if chaos.drains else False:
            self.ask_drain(agent.node)

    def _network_mischief(self) -> None:
        if not self._chaotic:
            self.heal()
            return
        self._at(TICK_S, self._network_mischief)
        if self.progressed is None:
            return  # agents that never met cannot know of each other
        if self.random.random() < self.chaos.splits * TICK_S:
            self.sides = {}
            if self.random.random() < 0.6:
                self.sides = {node: self.random.randrange(2) for node in self.agents}
        if self.random.random() < self.chaos.cuts * TICK_S:
            nodes = list(self.agents)
            self.cuts = set()
            if len(nodes) > 1 and self.random.random() < 0.6:
                for _ in range(self.random.randint(1, 3)):
                    a, b = self.random.sample(nodes, 2)
                    self.cuts.add((a, b))

    def heal(self) -> None:
        self.sides, self.cuts = {}, set()

    def split(self, *sides: Iterable[int]) -> None:
        self.sides = {node: index for index, side in enumerate(sides) for node in side}

    def crash(self, agent: SimAgent, *, forever: bool = False) -> None:
        """The agent dies and its workers with it; a new one comes later."""
        del self.agents[agent.node]
        if forever:
            self.gone.add(agent.node)
        else:
            self._at(self.random.uniform(*self.chaos.restart_after_s), lambda: self.boot(agent.node))

    def lose(self, *nodes: int) -> None:
        """Power off, for good."""
        for node in nodes:
            self.crash(self.agents[node], forever=True)

    def fail_worker(self, agent: SimAgent) -> None:
        assert agent.workers is not None
        generation = agent.workers.plan.generation
        assert generation is not None
        agent.workers.failed = True
        failure = Failure(host="h", global_rank=0, local_rank=0, pid=1, exit_code=-9, time_s=self.now)
        self._do(agent, agent.membership.tell(lambda m: m.failed(generation, failure, self.now), self.now))

    def finish_workers(self) -> None:
        """All workers of all nodes end with exit code 0."""
        for agent in list(self.agents.values()):
            if agent.workers is not None:
                generation = agent.workers.plan.generation
                assert generation is not None
                agent.workers, agent.stop_at = None, None
                self._do(agent, agent.membership.tell(lambda m, g=generation: m.done(g, self.now), self.now))

    def ask_stop(self, node: int, *, urgent: bool = False) -> None:
        agent = self.agents[node]
        request = StopRequest(signal=15, urgent=urgent)
        self._do(agent, agent.membership.tell(lambda m: m.asked_to_stop(request, self.now), self.now))

    def ask_drain(self, node: int, *, urgent: bool = False) -> None:
        agent = self.agents[node]
        self._do(agent, agent.membership.tell(lambda m: m.asked_to_drain(self.now, urgent=urgent), self.now))

    # --- network

    def connected(self, a: int, b: int) -> bool:
        return self.sides.get(a, 0) == self.sides.get(b, 0) and (a, b) not in self.cuts

    def _send(self, sender: SimAgent, address: str, message: AgentMessage) -> None:
        copies = 1
        if self._chaotic:
            if self.random.random() < self.chaos.loss:
                return
            copies += self.random.random() < self.chaos.double
        for _ in range(copies):
            delay = self.random.uniform(0, self.chaos.max_delay_s if self._chaotic else 0.01)
            self._at(delay, lambda: self._deliver(sender.node, address, message))

    def _deliver(self, sender: int, address: str, message: AgentMessage) -> None:
        agent = self.by_address.get(address)
        if agent is None or not self._alive(agent) or not self.connected(sender, agent.node):
            return
        if self.loses(sender, agent.node, message):
            return
        if self.now < agent.paused_until:
            self._at(agent.paused_until - self.now, lambda: self._deliver(sender, address, message))
            return
        if isinstance(message, Plan):
            agent.heard = self.now
        self._do(agent, agent.membership.heard(message, self.now))

    # --- what agents do

    def _do(self, agent: SimAgent, instructions: list) -> None:
        newest: dict[str, AgentMessage] = {}
        """Of what waits to be sent to an agent the channel keeps no other; in a chaotic network all may have gone."""
        for instruction in instructions:
            match instruction:
                case Send(message, addresses):
                    if self._chaotic:
                        for address in addresses:
                            self._send(agent, address, message)
                    else:
                        newest |= dict.fromkeys(addresses, message)
                case leader_orders.HostStore(generation):
                    self._host_store(agent, generation)
                case leader_orders.Note():
                    self.notes.append((self.now, agent.node_id, instruction))
                case leader_orders.ReadClaims(proof):
                    self._later(agent, lambda: self._read_claims(agent, proof))
                case leader_orders.Claim(standing, after):
                    self._later(agent, lambda s=standing, a=after: self._claim(agent, s, a))
                case member.ReadProof(nonce):
                    self._later(agent, lambda n=nonce: self._read_proof(agent, n))
                case member.StartWorkers(plan, _):
                    self._start(agent, plan)
                case member.StopWorkers(_, _, _, grace_s):
                    if agent.node in self.stuck:
                        self._at(5.0, lambda: self._give_up(agent))
                    elif agent.stop_at is None and not (self.stubborn and grace_s != 0.0):
                        agent.stop_at = self.now + self.random.uniform(0, 1.0)
                case member.AskRegroup(generation, leaves):
                    self.asked_to_regroup.append((self.now, generation, leaves))
                    self._at(self.agreed_after_s, lambda g=generation: self._regroup(g))
                case member.LostLeader():
                    self.lost_leaders += 1
                case member.Leave(verdict):
                    agent.left = verdict
                    plan = agent.membership.plan
                    if plan is not None and plan.phase is Phase.END and plan.generation is not None:
                        self.ended_by_leader = plan.generation
                case _:
                    pass
        for address, message in newest.items():
            self._send(agent, address, message)

    def _host_store(self, agent: SimAgent, generation: GenerationId) -> None:
        address = f"host:{self._count}"
        self._do(agent, agent.membership.answer(lambda m: m.stored(generation, address, self.now), self.now))

    def _later(self, agent: SimAgent, action: Callable[[], None]) -> None:
        limit_s = self.chaos.store_delay_s if self._chaotic else 0.1
        self._at(self.random.uniform(0, limit_s), lambda: action() if self._alive(agent) else None)

    def _read_proof(self, agent: SimAgent, nonce: str) -> None:
        assert self.claims is not None
        plan = agent.membership.plan
        if self.claims.has_proof(nonce):
            self._do(agent, agent.membership.tell(lambda m: m.proved(nonce, self.now), self.now))
        elif plan is not None and plan.proof == nonce:
            self._later(agent, lambda: self._read_proof(agent, nonce))

    def _read_claims(self, agent: SimAgent, proof: str) -> None:
        assert self.claims is not None
        if not self.claims.has_proof(proof):
            self.claims.prove(proof)
        newest = self.claims.newest()
        self._later(
            agent,
            lambda: self._do(agent, agent.membership.answer(lambda m: m.claims_read(newest, self.now), self.now)),
        )

    def _claim(self, agent: SimAgent, standing: Standing, after: GenerationId | None) -> None:
        assert self.claims is not None
        if agent.node in self.dies_claiming or (self._chaotic and self.random.random() < self.chaos.half_claims):
            self.dies_claiming.discard(agent.node)
            self.claims.create_and_die(standing, after)
            self.crash(agent)
            return
        won = self.claims.create(standing, after)
        self._later(
            agent,
            lambda: self._do(
                agent, agent.membership.answer(lambda m: m.claim_ended(standing, won=won, now=self.now), self.now)
            ),
        )

    def _regroup(self, generation: GenerationId) -> None:
        """The daemons have agreed on a step, and its version is settled: all workers wait."""
        waiting = SessionState(opened=2, waiting=2)
        for one in [a for a in self.agents.values() if a.workers and a.workers.plan.generation == generation]:
            self._later(one, lambda a=one: self._tell_session(a, waiting))

    def _tell_session(self, agent: SimAgent, state: SessionState) -> None:
        self._do(agent, agent.membership.tell(lambda m: m.session(state, self.now), self.now))

    def _give_up(self, agent: SimAgent) -> None:
        """As the shell does where workers outlive SIGKILL."""
        if self._alive(agent) and agent.workers is not None:
            generation = agent.workers.plan.generation
            assert generation is not None
            self._do(agent, agent.membership.tell(lambda m: m.stuck(generation, "SIGKILL", self.now), self.now))

    def _start(self, agent: SimAgent, plan: Plan) -> None:
        generation = plan.generation
        assert generation is not None
        if agent.workers is not None:
            raise Violation(f"{agent.node_id} starts {generation} beside {agent.workers.plan.generation}")
        before = self.node_newest.get(agent.node)
        if before is not None and before.generation is not None and number(generation) <= number(before.generation):
            raise Violation(f"{agent.node_id} starts {generation} after {before.generation}")
        known = self.plans.setdefault(generation, plan)
        if (known.places, known.restart_count, known.store) != (plan.places, plan.restart_count, plan.store):
            raise Violation(f"two nodes see {generation} differently")
        if self.limits.legal(len(plan.places)) != len(plan.places):
            raise Violation(f"{generation} has {len(plan.places)} nodes")
        agent.workers, agent.stop_at = Workers(plan), None
        self.node_newest[agent.node] = plan
        self.started.append(generation)
        self._do(agent, agent.membership.tell(lambda m: m.started(generation, self.now, self.now), self.now))
        if self.session:
            state = SessionState(opened=2)
            self._do(agent, agent.membership.tell(lambda m: m.session(state, self.now), self.now))
            if self.protects:
                self._do(agent, agent.membership.tell(lambda m: m.progressed(1, self.now, protected=True), self.now))
        self._check()

    # --- invariants

    def whole_generations(self) -> list[GenerationId]:
        """Generations whose workers all run: only these can make progress."""
        running: dict[GenerationId, set[str]] = {}
        for agent in self.agents.values():
            if agent.workers is not None:
                generation = agent.workers.plan.generation
                assert generation is not None
                running.setdefault(generation, set()).add(agent.node_id)
        return [g for g, ids in running.items() if ids == {place.node_id for place in self.plans[g].places}]

    def world(self) -> list[int]:
        """Numbers of nodes of the generations that run."""
        return [len(self.plans[g].places) for g in self.whole_generations()]

    def _check(self) -> None:
        whole = self.whole_generations()
        if len(whole) > 1 and not self._two_may_run():
            raise Violation(f"{whole} run side by side")
        for generation in whole:
            older = self.progressed is not None and number(generation) < number(self.progressed)
            if older and self.progressed != self.ended_by_leader:
                if not self._two_may_run():
                    raise Violation(f"{generation} runs after {self.progressed}")
            else:
                self.progressed = generation

    def _two_may_run(self) -> bool:
        return self.limits.max_nodes <= 2 and self.claims is None

    def describe(self) -> str:
        return "; ".join(
            f"{a.node_id} {'leads ' + str(a.membership.leader._phase) if a.leads else ''} "
            f"{a.membership.member.report.state} knows "
            f"{a.membership.member.report.standing and a.membership.member.report.standing.members}"
            for a in self.agents.values()
        )

    def settle(self, within_s: float) -> float:
        """After the faults: one generation has to run, or everything has ended. Gives the seconds that it took."""
        return self.run_until(lambda: not self.agents or self.whole_generations(), within_s)

    def side_that_may_go_on(self) -> set[int] | None:
        """Nodes of a part of the network that may form the successor of the newest generation, None for none."""
        newest = max(self.plans.values(), key=lambda plan: number(plan.generation), default=None)
        if newest is None or newest.generation is None:
            return None
        standing = Standing(
            generation=newest.generation, members=tuple(place.node_id for place in newest.places), addresses=()
        )
        for side in set(self.sides.values()) | {0}:
            agents = [a for a in self.agents.values() if self.sides.get(a.node, 0) == side]
            present = {agent.node_id for agent in agents}
            if self.limits.legal(len(agents)) and may_follow(standing, present, self.limits, store=False):
                return {agent.node for agent in agents}
        return None
