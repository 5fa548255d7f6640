"""A deterministic simulation of the snapshot tier: nodes, daemons, workers, agents, and everything that can go wrong.

The machines under test are the real ones (`NodeLedger`, `LeaderLedger`, `at_boundary`, `choose`); everything around
them is modelled, small and literal: slot files with headers, control pages that outlive daemons, one FIFO connection
per node to the leading daemon, doorbells, processes that die between any two of their actions. A seed determines a run.

A run has two phases. In the first a random scheduler picks any action that is possible, faults among them. In the
second faults end, the agents repair what is broken and every possible action is taken in turn: now the job must end
properly within a bound, or it is stuck.

What is checked (`Violation` otherwise)
    newest     after every action: each image of the newest complete version (or of the parent) is physically there
    complete   when a version is declared complete: each rank's file is physically clean with it
    exclusive  when a slot is granted: no living process can still write it, no other grant of it stands on the page
    overwrite  when a worker begins to write: nobody else is writing the file
    inventory  what a node lists as readable is physically clean and nobody writes it
    choice     a generation never starts from less than the newest complete version, and only from whole ones
    restore    while workers still restore, the parent is there
    persist    what is read for storage is a complete version, untouched while it is read, and every rank is in it
    agreed     all workers of a generation perform the same step; none passes it
    alive      after faults stop, the job ends within the bound, its last version complete and in storage
"""

from __future__ import annotations

import random
from collections import Counter

from simulated_exchange import Exchanging
from simulated_world import ROUNDS, Leading, Machines, Node, Plan, Violation, Worker

from holdfast.checkpoint.version import GenerationId, Version
from holdfast.erasure.groups import Grouping
from holdfast.snapshot import ledger
from holdfast.snapshot.exchange_events import ExchangeFenced
from holdfast.snapshot.reports import Request

__all__ = ["Machines", "Simulation", "Violation", "run"]


class Simulation(Exchanging):
    """One run. `run` raises `Violation`, or returns what happened."""

    def __init__(self, seed: int, machines: Machines | None = None, *, coded: bool = False) -> None:
        self.rng = random.Random(seed)
        self.seed = seed
        self.machines = machines or Machines()
        self.plan = Plan.draw_coded(self.rng) if coded else Plan.draw(self.rng)
        self.nodes = [Node(rank) for rank in range(self.plan.num_nodes)]
        self.seen: Counter[str] = Counter()
        self.trace: list[tuple[object, ...]] = []
        self.last_step = self.plan.steps
        # truth
        self.worlds: dict[GenerationId, int] = {}
        self.newest: Version | None = None
        self.floor = 0
        self.completed: set[Version] = set()
        self.whole: Counter[tuple[Version, int]] = Counter()
        self.storage: dict[int, Version] = {}
        self.agreed_at: dict[GenerationId, int] = {}
        self.settled: dict[Version, str] = {}
        self.per_node: dict[GenerationId, int] = {}
        self.groups: dict[GenerationId, Grouping] = {}
        self.members: dict[GenerationId, list[Node]] = {}
        self.promise: Version | None = None
        """The protected version, as far as anybody was told."""
        self.duties: dict[Node, tuple[bool, bool]] = {}
        """Who must still hold images and parity of it."""
        self.former: tuple[Version | None, dict[Node, tuple[bool, bool]]] = (None, {})
        """What was promised before."""
        self.wire: list[tuple[Node, Node, int, tuple[object, ...]]] = []
        self.parted: set[Node] | None = None
        self.power_left = self.plan.power
        # agents
        self.generation = GenerationId(incarnation=1, nonce="0badcafe", generation=0)
        self.starting: set[int] = set()
        self.spawned = False
        self.leader_rank = 0
        self.ranks_per_node = self.plan.ranks_per_node
        self.pools = 0
        self.chaos = True
        self.late = False
        self.faults_left = self.plan.faults
        self.requests_left = self.plan.requests
        self.num_requests = 0
        self.leaving: tuple[GenerationId | None, Node | None] = (None, None)
        self._new_generation()

    # --- the run

    def run(self) -> Counter[str]:
        """Both phases."""
        for _ in range(self.plan.actions):
            if self.wire and self.rng.random() < 0.4:
                self._take(("net",))
                continue
            entity = self.rng.choice(self._entities())
            actions = self._fault_actions() if self.rng.random() < 0.1 else self._actions_of(entity)
            if actions:
                self._take(self.rng.choice(actions))
        self._end_well()
        return self.seen

    def _end_well(self) -> None:
        self.chaos, self.parted = False, None
        if any(node.lost or not all(worker.alive for worker in node.workers) for node in self.nodes):
            self._new_generation()
        for number in range(ROUNDS):
            self.late = number > ROUNDS // 2  # agents see to it that nobody lingers for ever
            if self._ended():
                return
            entities = self._entities()
            self.rng.shuffle(entities)
            for _ in range(len(self.wire)):
                self._take(("net",))
            for entity in entities:
                for action in self._actions_of(entity):
                    self._take(action)
        raise Violation(f"alive: the job is stuck in {self.generation}: {self._describe()}")

    def _ended(self) -> bool:
        workers = [worker for node in self.nodes for worker in node.workers]
        if not self.spawned or not workers or any(worker.stage != "done" for worker in workers):
            return False
        final = self.generation.at(workers[0].step)
        if final not in self.completed:
            raise Violation(f"alive: all workers left, {final} is not complete")
        if self.settled.get(final) != "persisted" and final not in self.storage.values():
            return False
        return self.promise == final or not self._protects()

    def _protects(self) -> bool:
        parities = [group.num_parity for group in self.groups[self.generation].groups]
        return self.plan.coded and any(parities) and not self.plan.no_room

    def _describe(self) -> str:
        workers = [(w.rank, w.step, w.stage, w.alive) for node in self.nodes for w in node.workers]
        leading = self.nodes[self.leader_rank].leading
        known = leading.ledger if leading is not None else None
        orders = known._sent.get(self.leader_rank) if known is not None else None
        exchanges = [(node.rank, node.exchange.running, len(node.jobs)) for node in self.nodes if node.exchange]
        return f"workers {workers}, last step {self.last_step}, orders {orders}, exchanges {exchanges}"

    def _take(self, action: tuple[object, ...]) -> None:
        name, *arguments = action
        self.trace.append(action)
        getattr(self, f"_do_{name}")(*arguments)
        self._check_newest()

    def _entities(self) -> list[Node | Worker]:
        found: list[Node | Worker] = []
        for node in self.nodes:
            found += [node, *node.workers, *node.zombies]
        return found

    def _actions_of(self, entity: Node | Worker) -> list[tuple[object, ...]]:
        """What may happen next there. Every action tolerates that it has become impossible meanwhile."""
        if isinstance(entity, Worker):
            if entity.generation == self.generation and entity not in entity.node.zombies:
                return self._worker_actions(entity) if entity.alive else []
            return self._zombie_actions(entity)
        if entity.lost:
            return [("regenerate",)] if self.rng.random() < 0.2 else []
        actions = self._node_actions(entity) if entity.ledger is not None else [("restart", entity)]
        actions += self._exchange_actions(entity)
        if not self.starting and not self.spawned:
            actions.append(("spawn",))
        return actions

    def _node_actions(self, node: Node) -> list[tuple[object, ...]]:
        actions: list[tuple[object, ...]] = []
        if node.rank in self.starting:
            return [("start", node)]
        if self._all_wait():
            return [("regroup",)]
        head = self.nodes[self.leader_rank]
        leading = head.leading
        if not node.connected and leading is not None and leading.generation == node.generation:
            actions.append(("connect", node))
        if node.up:
            actions += [("deliver_up", node)] * 2
        if node.down:
            actions += [("deliver_down", node)] * 2
        if node.persisting and self._slow(0.3):
            actions.append(("write_part", node))
        if node.leading is not None and node.leading.commits:
            actions.append(("commit", node))
        if node.decided and node.pool is None:
            actions.append(("pool", node))
        return actions

    # --- faults and agents

    def _fault_actions(self) -> list[tuple[object, ...]]:
        actions: list[tuple[object, ...]] = []
        rng = self.rng
        ripe = bool(self.promise if self.plan.coded else self.completed) or rng.random() < 0.05
        if self.faults_left and ripe:
            living = [worker for node in self.nodes for worker in node.workers if worker.alive]
            daemons = [node for node in self.nodes if node.ledger is not None]
            actions += [("kill_worker", rng.choice(living))] if living else []
            actions += [("kill_daemon", rng.choice(daemons))] if daemons else []
            actions += [("kill_daemon", self.nodes[self.leader_rank])] if daemons else []
            actions.append(("cut", rng.choice(self.nodes)))
            if self.promise is not None and self.promise.generation == self.generation:
                actions += [("kill_daemon", self.nodes[self.leader_rank])] * 2
        dead = any(not worker.alive for node in self.nodes for worker in node.workers)
        if dead:
            actions.append(("regenerate",))
        elif self.faults_left and self.spawned and ripe:
            copying = any(worker.copying for node in self.nodes for worker in node.workers)
            actions += [("kill_agent",)] * (2 if copying else int(rng.random() < 0.3))
        if self.spawned and self.rng.random() < 0.05:
            actions.append(("grow", rng.choice(self.nodes)))
        if self.power_left and rng.random() < (0.15 if self.promise is not None else 0.02):
            actions.append(("power_off", rng.choice(self.nodes)))
        if self.plan.coded and self.rng.random() < 0.1:
            actions.append(("part",))
        if self.requests_left and self.spawned:
            actions.append(("request", rng.choice(self.nodes)))
        return actions

    def _do_kill_worker(self, worker: Worker) -> None:
        if not worker.alive:
            return
        self.faults_left -= 1
        self.seen["worker killed"] += 1
        self._kill(worker)

    def _kill(self, worker: Worker) -> None:
        if worker.copying:
            self.seen["killed in a copy"] += 1
        worker.alive, worker.intent, worker.copying = False, None, None
        worker.bells.clear()
        if worker.node.ledger is not None and self.rng.random() < 0.7:
            self._feed(worker.node, ledger.WriterDied(generation=worker.generation, global_rank=worker.rank))

    def _do_kill_daemon(self, node: Node) -> None:
        if node.ledger is None:
            return
        self.faults_left -= 1
        self.seen["daemon killed"] += 1
        if node.leading is not None:
            self.seen["leading daemon killed"] += 1
            for other in self.nodes:
                self._cut(other)
        node.ledger, node.leading, node.exchange = None, None, None
        node.jobs.clear()
        node.persisting, node.complete = [], None
        node.polled.clear()
        self._cut(node)

    def _do_cut(self, node: Node) -> None:
        self.faults_left -= 1
        self.seen["connection cut"] += 1
        self._cut(node)

    def _cut(self, node: Node) -> None:
        node.connected = False
        node.up.clear()
        node.down.clear()

    def _do_kill_agent(self) -> None:
        self.faults_left -= 1
        self.seen["agent killed"] += 1
        self._new_generation()

    def _do_regenerate(self) -> None:
        self._new_generation()

    def _do_request(self, node: Node) -> None:
        self.requests_left -= 1
        if node.ledger is None or node.generation != self.generation:
            return
        self.num_requests += 1
        kind = self.rng.choice(("save", "save", "stop", "regroup"))
        leaves = kind == "regroup" and self.rng.random() < 0.5
        request = Request(id=f"n{node.rank}-{self.num_requests}", kind=kind, persist=kind != "regroup", leaves=leaves)
        if leaves:
            self.leaving = (self.generation, node)
        self.seen[f"{kind} requested"] += 1
        self._feed(node, ledger.Requested(request=request))

    def _all_wait(self) -> bool:
        workers = [worker for node in self.nodes for worker in node.workers]
        there = self.spawned and not self.starting and not any(node.lost for node in self.nodes)
        return there and bool(workers) and all(worker.alive and worker.stage == "waiting" for worker in workers)

    def _do_regroup(self) -> None:
        """All wait at the agreed step: the agents change the nodes. One of them may leave, with all that it holds."""
        if not self._all_wait():
            return
        step = self.nodes[0].workers[0].step
        generation, node = self.leaving
        if generation == self.generation and node in self.nodes and len(self.nodes) > 1 and self._may_leave():
            self.power_left += 1
            self._do_power_off(node)
            self.seen["left"] += 1
        self.floor = step
        self.seen["regrouped"] += 1
        self._new_generation()

    def _may_leave(self) -> bool:
        """Nobody has said, where the node's daemon died with the request before it had noted it."""
        known = {request.leaves for node in self.nodes for request in node.requests}
        return True in known

    def _new_generation(self) -> None:
        """The agents stop all workers (some linger in a copy) and begin anew."""
        if self.generation.generation:
            self.seen["generations after the first"] += 1
        number = self.generation.generation + 1
        self.generation = GenerationId(incarnation=1, nonce="0badcafe", generation=number)
        for node in self.nodes:
            node.newest_before = max([node.newest_before, *(worker.step for worker in node.workers)])
            for worker in node.workers:
                if worker.alive and worker.intent and self.rng.random() < 0.8:
                    self._do_begin(worker)
                if worker.alive and worker.copying and self.rng.random() < 0.8:
                    self.seen["zombie"] += 1
                    node.zombies.append(worker)
                elif worker.alive:
                    self._kill(worker)
            node.workers = []
        self._replace_lost()
        self.starting = {node.rank for node in self.nodes}
        self.spawned = False
        self.leader_rank = self.rng.randrange(len(self.nodes))
        if self.chaos and self.rng.random() < 0.1:
            self.ranks_per_node = self.rng.choice((1, 2))
            self.seen["resize"] += 1
        self.worlds[self.generation] = self.ranks_per_node * len(self.nodes)
        self.per_node[self.generation] = self.ranks_per_node
        self.groups[self.generation] = self._form_groups()
        self.members[self.generation] = list(self.nodes)

    def _do_zombie_dies(self, worker: Worker) -> None:
        if worker not in worker.node.zombies:
            return
        worker.alive, worker.copying = False, None
        worker.node.zombies.remove(worker)
        if worker.node.ledger is not None:
            self._feed(worker.node, ledger.WriterDied(generation=worker.generation, global_rank=worker.rank))

    def _do_start(self, node: Node) -> None:
        """StartGeneration at a node."""
        if node.ledger is None or node.rank not in self.starting:
            return
        self.starting.discard(node.rank)
        self._cut(node)
        if node.leading is not None:
            for other in self.nodes:
                if other.generation == node.generation:
                    self._cut(other)
        node.leading = None
        living = {(worker.generation, worker.rank) for worker in node.zombies}
        if node.generation is not None:
            for rank in node.local_ranks:
                if (node.generation, rank) not in living:
                    self._feed(node, ledger.WriterDied(generation=node.generation, global_rank=rank))
        first = node.rank * self.ranks_per_node
        ranks = tuple(range(first, first + self.ranks_per_node))
        if node.pool is not None and len(ranks) != len(node.local_ranks):
            node.pool = None
        pool, node.pool = node.pool, None
        node.generation, node.local_ranks, node.decided = self.generation, ranks, False
        node.parent, node.start_step, node.complete, node.exposed = None, 0, None, False
        node.persisting, node.room_known = [], False
        if node.exchange is not None:
            self._tell(node, ExchangeFenced())
            while node.jobs:
                self._do_work(node)
        node.ranks_then[self.generation] = node.rank
        node.polled.clear()
        headers = self._headers(node)
        self._feed(
            node,
            ledger.GenerationStarted(
                generation=self.generation, node_rank=node.rank, local_ranks=ranks, headers=headers
            ),
        )
        node.pool = pool
        if pool is not None:
            self._feed(node, ledger.PoolReady(pool=pool[0], num_slots=pool[1]))
        if node.rank == self.leader_rank:
            node.leading = Leading(self.generation)

    def _do_spawn(self) -> None:
        if self.spawned or self.starting:
            return
        self.spawned = True
        for node in self.nodes:
            node.workers = [
                Worker(self.generation, rank, local, node, step=0) for local, rank in enumerate(node.local_ranks)
            ]


def run(seed: int, machines: Machines | None = None, *, coded: bool = False) -> Counter[str]:
    """Run one seed; an error names it."""
    simulation = Simulation(seed, machines, coded=coded)
    try:
        return simulation.run()
    except Violation as error:
        lines = [f"{name} {[getattr(one, 'rank', one) for one in rest]}" for name, *rest in simulation.trace[-30:]]
        tail = "\n  ".join(lines)
        raise Violation(f"seed {seed}: {error}\n{simulation.plan}\n  {tail}") from error
