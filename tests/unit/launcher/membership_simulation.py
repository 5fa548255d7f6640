"""Membership under deterministic simulation: agents, a network that delays and loses, workers, crashes, restarts.

Everything is driven by one seeded generator and a virtual clock. `Simulation.run` raises `Violation` when an invariant
breaks, and `Stuck` when the faults have ended and the job neither runs nor has ended.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass

from holdfast.checkpoint.version import GenerationId
from holdfast.launcher import leader, member
from holdfast.launcher.budget import RestartBudget
from holdfast.launcher.wire import DaemonInfo, Failure, NodeInfo, Plan, Rejected, Report, Verdict, decode, encode

LEADER_NODE = 0
TICK_S = 0.1


class Violation(AssertionError):
    """An invariant broke."""


class Stuck(AssertionError):
    """The job makes no headway although nothing is in its way."""


@dataclass
class Chaos:
    """What goes wrong while `until_s` has not come."""

    until_s: float = 60.0
    loss: float = 0.05
    max_delay_s: float = 0.2
    worker_failures_per_s: float = 0.05
    crashes_per_s: float = 0.03
    pauses_per_s: float = 0.02
    restart_after_s: tuple[float, float] = (0.1, 6.0)


@dataclass
class Workers:
    """This node's workers of one generation."""

    plan: Plan
    failed: bool = False


@dataclass
class SimAgent:
    """One agent process and, across restarts, its node."""

    node: int
    member: member.Member
    leader: leader.Leader | None
    node_id: str
    born: float
    workers: Workers | None = None
    stop_at: float | None = None
    paused_until: float = 0.0
    left: Verdict | None = None
    finished: bool = False
    heard: float = 0.0
    """When the newest plan arrived, or the agent last woke up."""


def _number(generation: GenerationId) -> tuple[int, int]:
    return generation.incarnation, generation.generation


class Simulation:
    """`nodes` agents around one endpoint on node 0."""

    def __init__(
        self,
        seed: int,
        *,
        nodes: int = 3,
        limits: leader.Limits | None = None,
        chaos: Chaos | None = None,
        max_restarts: int | None = 1000,
        node_ranks_given: bool = False,
    ) -> None:
        self.random = random.Random(seed)
        self.limits = limits or leader.Limits(min_nodes=nodes, max_nodes=nodes, join_timeout_s=300, last_call_s=3)
        self.chaos = chaos or Chaos()
        self.max_restarts = max_restarts
        self.static = node_ranks_given
        self.stubborn = False
        """Workers end only where they are given no grace."""
        self.now = 0.0
        self.agents: dict[int, SimAgent] = {}
        self.ended: list[SimAgent] = []
        self.node_newest: dict[int, GenerationId] = {}
        self.plans: dict[GenerationId, Plan] = {}
        self.failures_by_leader: dict[str, int] = {}
        self.started: list[GenerationId] = []
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self._births = 0
        for node in range(nodes):
            self._at(self.random.uniform(0, 2), lambda node=node: self._boot(node))

    # --- engine

    def _at(self, delay_s: float, action: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._events, (self.now + delay_s, self._count, action))

    def run(self, duration_s: float) -> Simulation:
        end = self.now + duration_s
        while self._events and self._events[0][0] <= end:
            self.now, _, action = heapq.heappop(self._events)
            action()
            self._check()
        self.now = end
        return self

    @property
    def _chaotic(self) -> bool:
        return self.now < self.chaos.until_s

    def _boot(self, node: int) -> None:
        self._births += 1
        node_id = f"node{node}-{self._births}"
        info = NodeInfo(
            node_id=node_id,
            job="sim",
            host=f"host{node}",
            pid=self._births,
            role="default",
            num_workers=2,
            rank_hint=node if self.static else None,
        )
        agent = SimAgent(node, member.Member(node=info, limits=self.limits, now=self.now), None, node_id, self.now)
        if node == LEADER_NODE:
            agent.leader = leader.Leader(
                leader_id=node_id,
                job="sim",
                nonce=f"{self.random.getrandbits(32):08x}",
                run_id="run",
                limits=self.limits,
                budget=RestartBudget(max_restarts=self.max_restarts, no_progress=3),
                now=self.now,
            )
        self.agents[node] = agent
        newest = self.node_newest.get(node)
        known = DaemonInfo(newest_incarnation=newest.incarnation if newest else 0, generation=newest)
        self._do(agent, agent.member.daemon(known, self.now))
        self._tick(agent)

    def _alive(self, agent: SimAgent) -> bool:
        return self.agents.get(agent.node) is agent

    def _tick(self, agent: SimAgent) -> None:
        if not self._alive(agent):
            return
        self._at(TICK_S, lambda: self._tick(agent))
        if self.now < agent.paused_until:
            return
        deaf_s = self.now - agent.heard
        if agent.workers is not None and agent.leader is None and deaf_s > self.limits.dead_after_s + 1.5:
            raise Violation(f"{agent.node_id} runs workers {deaf_s:.1f} s after it last heard of a leader")
        self._mischief(agent)
        if not self._alive(agent):
            return
        if agent.stop_at is not None and self.now >= agent.stop_at and agent.workers is not None:
            generation = agent.workers.plan.generation
            assert generation is not None
            agent.workers, agent.stop_at = None, None
            self._do(agent, agent.member.gone(generation, self.now))
        if agent.leader is not None:
            self._do(agent, agent.leader.ticked(self.now))
        self._do(agent, agent.member.ticked(self.now))
        self._maybe_exit(agent)

    def _mischief(self, agent: SimAgent) -> None:
        if not self._chaotic:
            return
        chaos = self.chaos
        if self.random.random() < chaos.crashes_per_s * TICK_S:
            self._crash(agent)
        elif self.random.random() < chaos.pauses_per_s * TICK_S:
            agent.paused_until = agent.heard = self.now + self.random.uniform(0.5, 6.0)
        elif agent.workers is not None and self.random.random() < chaos.worker_failures_per_s * TICK_S:
            self.fail_worker(agent)

    def _crash(self, agent: SimAgent) -> None:
        """The agent dies and its workers with it; a new one comes later."""
        del self.agents[agent.node]
        low, high = self.chaos.restart_after_s
        self._at(self.random.uniform(low, high), lambda: self._boot(agent.node))

    def fail_worker(self, agent: SimAgent) -> None:
        assert agent.workers is not None
        generation = agent.workers.plan.generation
        assert generation is not None
        agent.workers.failed = True
        failure = Failure(host="h", global_rank=0, local_rank=0, pid=1, exit_code=-9, time_s=self.now)
        self._do(agent, agent.member.failed(generation, failure, self.now))

    def finish_workers(self) -> None:
        """All workers of all nodes end with exit code 0."""
        for agent in list(self.agents.values()):
            if agent.workers is not None:
                generation = agent.workers.plan.generation
                assert generation is not None
                agent.workers, agent.stop_at = None, None
                self._do(agent, agent.member.done(generation, self.now))

    def _maybe_exit(self, agent: SimAgent) -> None:
        if agent.left is not None and (agent.leader is None or agent.finished):
            del self.agents[agent.node]
            self.ended.append(agent)

    # --- network

    def _send(self, to: int, message: Report | Plan | Rejected) -> None:
        if self._chaotic and self.random.random() < self.chaos.loss:
            return
        data = encode(message)
        delay = self.random.uniform(0, self.chaos.max_delay_s if self._chaotic else 0.01)
        self._at(delay, lambda: self._deliver(to, data))

    def _deliver(self, to: int, data: bytes) -> None:
        agent = self.agents.get(to)
        if agent is None:
            return
        if self.now < agent.paused_until:
            self._at(agent.paused_until - self.now, lambda: self._deliver(to, data))
            return
        match decode(data):
            case Report() as report if agent.leader is not None:
                self._do(agent, agent.leader.reported(report, self.now))
            case Plan() as plan:
                agent.heard = self.now
                self._do(agent, agent.member.planned(plan, self.now))
            case Rejected() as rejected:
                self._do(agent, agent.member.rejected(rejected, self.now))
            case _:
                pass

    # --- what agents do

    def _do(self, agent: SimAgent, instructions: list) -> None:
        for instruction in instructions:
            match instruction:
                case leader.Broadcast(plan):
                    for node, other in list(self.agents.items()):
                        if other is not agent:
                            self._send(node, plan)
                    self._do(agent, agent.member.planned(plan, self.now))
                case leader.HostStore(generation):
                    assert agent.leader is not None
                    address = f"host:{self._count}"
                    self._do(agent, agent.leader.stored(generation, address, self.now))
                case leader.Finished():
                    agent.finished = True
                case leader.TurnAway(node_id, reason):
                    for node, other in list(self.agents.items()):
                        if other.node_id == node_id:
                            self._send(node, Rejected(reason=reason))
                case member.SendReport(report):
                    if agent.leader is not None:
                        self._do(agent, agent.leader.reported(report, self.now))
                    else:
                        self._send(LEADER_NODE, report)
                case member.StartWorkers(plan, _):
                    self._start(agent, plan)
                case member.StopWorkers(_, _, _, grace_s):
                    if agent.stop_at is None and not (self.stubborn and grace_s != 0.0):
                        agent.stop_at = self.now + self.random.uniform(0, 1.0)
                case member.Leave(verdict):
                    agent.left = verdict
                case _:
                    pass

    def _start(self, agent: SimAgent, plan: Plan) -> None:
        generation = plan.generation
        assert generation is not None
        if agent.workers is not None:
            raise Violation(f"{agent.node_id} starts {generation} beside {agent.workers.plan.generation}")
        before = self.node_newest.get(agent.node)
        if before is not None and _number(generation) <= _number(before):
            raise Violation(f"{agent.node_id} starts {generation} after {before}")
        known = self.plans.setdefault(generation, plan)
        if (known.places, known.restart_count, known.store) != (plan.places, plan.restart_count, plan.store):
            raise Violation(f"two nodes see {generation} differently")
        if not self.limits.min_nodes <= len(plan.places) <= self.limits.max_nodes:
            raise Violation(f"{generation} has {len(plan.places)} nodes")
        agent.workers, agent.stop_at = Workers(plan), None
        self.node_newest[agent.node] = generation
        self.started.append(generation)
        self._do(agent, agent.member.started(generation, self.now, self.now))

    # --- invariants

    def whole_generations(self) -> list[GenerationId]:
        """Generations whose workers all run: only these can make progress."""
        found = []
        for generation, plan in self.plans.items():
            running = {
                agent.node_id
                for agent in self.agents.values()
                if agent.workers is not None and agent.workers.plan.generation == generation
            }
            if running == {place.node_id for place in plan.places}:
                found.append(generation)
        return found

    def _check(self) -> None:
        whole = self.whole_generations()
        if len(whole) > 1:
            raise Violation(f"{whole} run side by side")

    def settle(self, duration_s: float) -> None:
        """After the faults: one generation has to run on enough nodes, or everything has ended."""
        self.run(duration_s)
        if not self.agents:
            return
        if not self.whole_generations():
            states = {agent.node_id: agent.member.report.state for agent in self.agents.values()}
            raise Stuck(f"no generation runs {duration_s} s after the last fault: {states}")
