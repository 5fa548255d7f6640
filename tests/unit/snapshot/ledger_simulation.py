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
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from holdfast.checkpoint.version import GenerationId, Version
from holdfast.snapshot import agreement, chain, leader, ledger
from holdfast.snapshot.messages import CleanImage, Inventory, Parentage
from holdfast.snapshot.reports import Agreed, Pin, Request, SlotRef

ROUNDS = 150
"""Rounds (each possible action once) within which a job must end after the last fault; sound runs need about 60."""


class Violation(AssertionError):
    """An invariant does not hold."""


@dataclass(frozen=True, kw_only=True)
class Machines:
    """The machines under test; mutants replace some."""

    node: type[ledger.NodeLedger] = ledger.NodeLedger
    leader: type[leader.LeaderLedger] = leader.LeaderLedger
    at_boundary: Callable[[int, Agreed | None, int], agreement.Decision] = agreement.at_boundary
    choose: Callable[[chain.ChainQuestion], chain.Choice] = chain.choose


@dataclass
class File:
    """A slot file: its header, and who writes it."""

    version: Version
    rank: int
    clean: bool
    writer: Worker


@dataclass(eq=False)
class Worker:
    """A worker process."""

    generation: GenerationId
    rank: int
    local: int
    node: Node
    step: int
    alive: bool = True
    stage: str = "start"
    """start, body, agreed (must look), grant (must look), final, stop, done"""
    intent: tuple[SlotRef, Version] | None = None
    """It has read a grant and not begun to write."""
    copying: tuple[SlotRef, Version] | None = None
    taken: set[int] = field(default_factory=set)
    bells: deque[object] = field(default_factory=deque)
    connected_to: int = 0
    performed: int | None = None


@dataclass(eq=False)
class Node:
    """A node: what outlives its daemon, and the daemon (`ledger`, None while it is dead)."""

    rank: int
    epoch: int = 0
    files: dict[tuple[int, SlotRef], File] = field(default_factory=dict)
    # control page
    grants: dict[SlotRef, int] = field(default_factory=dict)
    agreed: Agreed | None = None
    acks: dict[int, int] = field(default_factory=dict)
    # node.state
    generation: GenerationId | None = None
    local_ranks: tuple[int, ...] = ()
    decided: bool = False
    parent: Version | None = None
    start_step: int = 0
    parents: dict[GenerationId, Parentage] = field(default_factory=dict)
    requests: tuple[Request, ...] = ()
    pinned: tuple[Pin, ...] = ()
    pool: tuple[int, int] | None = None
    newest_before: int = 0
    # the daemon
    ledger: ledger.NodeLedger | None = None
    leading: Leading | None = None
    connected: bool = False
    up: deque[tuple[object, ...]] = field(default_factory=deque)
    down: deque[tuple[object, ...]] = field(default_factory=deque)
    complete: int | None = None
    persisting: list[tuple[Version, int]] = field(default_factory=list)
    polled: dict[int, tuple[int, int]] = field(default_factory=dict)
    workers: list[Worker] = field(default_factory=list)
    zombies: list[Worker] = field(default_factory=list)


@dataclass(eq=False)
class Leading:
    """The leading part of a daemon."""

    generation: GenerationId
    inventories: dict[int, Inventory] = field(default_factory=dict)
    choice: chain.Choice | None = None
    ledger: leader.LeaderLedger | None = None
    commits: list[leader.CommitPersist] = field(default_factory=list)
    parts: dict[tuple[Version, int], set[int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """The shape of a run."""

    num_nodes: int
    ranks_per_node: int
    num_slots: int
    snapshot_every: int
    persist_every: int | None
    steps: int
    until_known: bool
    coupled: bool
    skip: float
    faults: int
    requests: int
    actions: int

    @classmethod
    def draw(cls, rng: random.Random) -> Plan:
        return cls(
            num_nodes=rng.choice((1, 1, 2, 2, 3)),
            ranks_per_node=rng.choice((1, 1, 2)),
            num_slots=rng.choice((2, 2, 3, 3, 4, 6)),
            snapshot_every=rng.choice((1, 1, 1, 2, 3)),
            persist_every=rng.choice((None, 2, 3, 5)),
            steps=rng.randint(4, 10),
            until_known=rng.random() < 0.5,
            coupled=rng.random() < 0.7,
            skip=rng.choice((0.0, 0.0, 0.1, 0.3)),
            faults=rng.choice((0, 1, 1, 2, 2, 3, 4)),
            requests=rng.choice((0, 0, 1, 2)),
            actions=rng.randint(60, 360),
        )


class Simulation:
    """One run. `run` raises `Violation`, or returns what happened."""

    def __init__(self, seed: int, machines: Machines | None = None) -> None:
        self.rng = random.Random(seed)
        self.seed = seed
        self.machines = machines or Machines()
        self.plan = Plan.draw(self.rng)
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
        self._new_generation()

    # --- the run

    def run(self) -> Counter[str]:
        """Both phases."""
        for _ in range(self.plan.actions):
            entity = self.rng.choice(self._entities())
            actions = self._fault_actions() if self.rng.random() < 0.1 else self._actions_of(entity)
            if actions:
                self._take(self.rng.choice(actions))
        self._end_well()
        return self.seen

    def _end_well(self) -> None:
        self.chaos = False
        if any(not worker.alive for node in self.nodes for worker in node.workers):
            self._new_generation()
        for number in range(ROUNDS):
            self.late = number > ROUNDS // 2  # agents see to it that nobody lingers for ever
            if self._ended():
                return
            entities = self._entities()
            self.rng.shuffle(entities)
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
        return self.settled.get(final) == "persisted" or final in self.storage.values()

    def _describe(self) -> str:
        workers = [(w.rank, w.step, w.stage, w.alive) for node in self.nodes for w in node.workers]
        leading = self.nodes[self.leader_rank].leading
        known = leading.ledger.__dict__ if leading and leading.ledger else None
        return f"workers {workers}, last step {self.last_step}, leader {known}, plan {self.plan}"

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
        actions = self._node_actions(entity) if entity.ledger is not None else [("restart", entity)]
        if not self.starting and not self.spawned:
            actions.append(("spawn",))
        return actions

    def _zombie_actions(self, zombie: Worker) -> list[tuple[object, ...]]:
        """A process of an older generation: it may finish its copy at any time, say so, and die at last."""
        actions: list[tuple[object, ...]] = []
        if zombie.bells and zombie.node.ledger is not None and self.rng.random() < 0.3:
            actions.append(("ring", zombie))
        if zombie.copying and self.rng.random() < 0.08:
            actions.append(("finish", zombie))
        if self.rng.random() < (0.3 if self.late else 0.03):
            actions.append(("zombie_dies", zombie))
        return actions

    def _node_actions(self, node: Node) -> list[tuple[object, ...]]:
        actions: list[tuple[object, ...]] = []
        if node.rank in self.starting:
            return [("start", node)]
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

    def _worker_actions(self, worker: Worker) -> list[tuple[object, ...]]:
        actions: list[tuple[object, ...]] = []
        node = worker.node
        if node.ledger is not None:
            if worker.connected_to != node.epoch:
                actions.append(("reconnect", worker))
            elif worker.bells:
                actions.append(("ring", worker))
            if self._page_changed(worker):
                actions.append(("poll", worker))
            if worker.rank in node.ledger.watched and self.rng.random() < 0.3:
                actions.append(("read", worker))
        if worker.intent:
            actions.append(("begin", worker))
        elif worker.copying and self._slow(0.6):
            actions.append(("finish", worker))
        if self._can_move(worker):
            actions += [("move", worker)] * 2
        return actions

    def _slow(self, chance: float) -> bool:
        """Slow work (a copy, a write to storage) while the scheduler is random."""
        return not self.chaos or self.rng.random() < chance

    def _page_changed(self, worker: Worker) -> bool:
        entered = worker.stage != "start"
        return entered and worker.node.polled.get(worker.rank) != (worker.step, worker.node.acks.get(worker.rank, 0))

    def _can_move(self, worker: Worker) -> bool:
        node = worker.node
        match worker.stage:
            case "start":
                return node.decided and node.pool is not None
            case "body":
                return not worker.intent and self._others_are_there(worker)
            case "agreed":
                return self._decision(worker) is not agreement.Decision.WAIT
            case "grant":
                return not worker.intent and not worker.copying
            case "save" | "stop" | "final":
                if worker.step not in worker.taken:
                    return worker.step in node.grants.values() and not worker.intent and not worker.copying
                if worker.stage == "save":
                    return True
                return node.complete is not None and node.complete >= worker.step
        return False

    def _decision(self, worker: Worker) -> agreement.Decision:
        acknowledged = worker.node.acks.get(worker.rank, 0)
        return self.machines.at_boundary(worker.step, worker.node.agreed, acknowledged)

    def _others_are_there(self, worker: Worker) -> bool:
        """Training is collective: a body ends only when all ranks are in it (or past it); uncoupled ones drift."""
        for node in self.nodes:
            for other in node.workers:
                if self.plan.coupled:
                    if other.step < worker.step or (other.step == worker.step and other.stage != "body"):
                        return False
                elif other.step < worker.step - 2:
                    return False
        return True

    # --- faults and agents

    def _fault_actions(self) -> list[tuple[object, ...]]:
        actions: list[tuple[object, ...]] = []
        rng = self.rng
        ripe = bool(self.completed) or rng.random() < 0.05
        if self.faults_left and ripe:
            living = [worker for node in self.nodes for worker in node.workers if worker.alive]
            daemons = [node for node in self.nodes if node.ledger is not None]
            actions += [("kill_worker", rng.choice(living))] if living else []
            actions += [("kill_daemon", rng.choice(daemons))] if daemons else []
            actions += [("kill_daemon", self.nodes[self.leader_rank])] if daemons else []
            actions.append(("cut", rng.choice(self.nodes)))
        dead = any(not worker.alive for node in self.nodes for worker in node.workers)
        if dead:
            actions.append(("regenerate",))
        elif self.faults_left and self.spawned and ripe:
            copying = any(worker.copying for node in self.nodes for worker in node.workers)
            actions += [("kill_agent",)] * (2 if copying else int(rng.random() < 0.3))
        if self.spawned and self.rng.random() < 0.05:
            actions.append(("grow", rng.choice(self.nodes)))
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
        node.ledger, node.leading = None, None
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
        kind = self.rng.choice(("save", "save", "stop"))
        request = Request(id=f"n{node.rank}-{self.num_requests}", kind=kind)
        self.seen[f"{kind} requested"] += 1
        self._feed(node, ledger.Requested(request=request))

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
        self.starting = {node.rank for node in self.nodes}
        self.spawned = False
        self.leader_rank = self.rng.randrange(len(self.nodes))
        if self.chaos and self.rng.random() < 0.1:
            self.ranks_per_node = self.rng.choice((1, 2))
            self.seen["resize"] += 1
        self.worlds[self.generation] = self.ranks_per_node * len(self.nodes)

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
        node.parent, node.start_step, node.complete = None, 0, None
        node.persisting = []
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

    # --- daemons

    def _headers(self, node: Node, rank: int | None = None) -> tuple[ledger.Header, ...]:
        return tuple(
            ledger.Header(
                slot=slot,
                local_rank=local,
                version=file.version,
                global_rank=file.rank,
                clean=file.clean,
                writer_alive=file.writer.alive,
            )
            for (local, slot), file in node.files.items()
            if rank is None or file.rank == rank
        )

    def _do_restart(self, node: Node) -> None:
        if node.ledger is not None:
            return
        node.epoch += 1
        node.ledger = self.machines.node(epoch=node.epoch)
        if node.generation is None:
            return
        self._feed(
            node,
            ledger.Adopted(
                generation=node.generation,
                node_rank=node.rank,
                local_ranks=node.local_ranks,
                parent=node.parent,
                headers=self._headers(node),
                published=tuple(ledger.Published(slot=slot, step=step) for slot, step in node.grants.items()),
                agreed=node.agreed,
                requests=node.requests,
                pinned=node.pinned,
            ),
        )
        if node.pool is not None:
            self._feed(node, ledger.PoolReady(pool=node.pool[0], num_slots=node.pool[1]))
        if node.decided:
            self._feed(
                node,
                ledger.RestoreDecided(generation=node.generation, parent=node.parent, step=node.start_step),
            )
        for worker in node.workers:
            if not worker.alive:
                self._feed(node, ledger.WriterDied(generation=worker.generation, global_rank=worker.rank))
        if node.rank == self.leader_rank and node.generation == self.generation:
            node.leading = Leading(self.generation)
            if node.decided:  # what it chose stands in its node.state
                record = node.parents[self.generation]
                tier = "none" if record.parent is None else "memory" if node.parent is not None else "storage"
                node.leading.choice = chain.Choice(tier=tier, version=record.parent, step=node.start_step)

    def _do_pool(self, node: Node) -> None:
        if node.ledger is None or not node.decided or node.pool is not None:
            return
        self.pools += 1
        node.pool = (self.pools, self.plan.num_slots)
        self._feed(node, ledger.PoolReady(pool=self.pools, num_slots=self.plan.num_slots))

    def _do_grow(self, node: Node) -> None:
        """The state has grown: no grants until there is a new pool."""
        if node.ledger is None or node.pool is None or not node.workers:
            return
        self.seen["pool grown"] += 1
        node.pool = None
        self._feed(node, ledger.PoolPaused())

    def _do_connect(self, node: Node) -> None:
        leading = self.nodes[self.leader_rank].leading
        if node.ledger is None or node.connected or leading is None or leading.generation != node.generation:
            return
        node.connected = True
        self._send_inventory(node)
        self._feed(node, ledger.LeaderConnected())

    def _feed(self, node: Node, *events: ledger.NodeEvent) -> None:
        assert node.ledger is not None
        for instruction in node.ledger.handle(*events):
            self._carry_out(node, instruction)

    def _carry_out(self, node: Node, instruction: ledger.NodeInstruction) -> None:
        match instruction:
            case ledger.ClearGrants():
                node.grants, node.agreed, node.acks = {}, None, {}
            case ledger.SendInventory():
                self._send_inventory(node)
            case ledger.PublishGrant():
                self._check_exclusive(node, instruction.slot)
                self.seen["grants"] += 1
                node.grants[instruction.slot] = instruction.version.step
            case ledger.WithdrawGrant():
                if node.grants.get(instruction.slot) == instruction.version.step:
                    del node.grants[instruction.slot]
            case ledger.ReadRanks():
                self._feed(node, *(self._reading(worker) for worker in node.workers if worker.alive))
            case ledger.PublishAgreed():
                node.agreed = instruction.agreed
            case ledger.SendReport():
                if node.connected:
                    node.up.append(("report", instruction.state))
            case ledger.StoreRequests():
                node.requests = instruction.requests
            case ledger.StorePins():
                node.pinned = instruction.pinned
            case ledger.DropSlot():
                for local, slot in list(node.files):
                    if slot == instruction.slot:
                        self._set_file(node, local, slot, None)
            case ledger.StopPersist():
                node.persisting = [one for one in node.persisting if one[0] != instruction.version]
            case ledger.Completed():
                node.complete = max(node.complete or 0, instruction.version.step)

    def _send_inventory(self, node: Node) -> None:
        if not node.connected:
            return
        assert node.ledger is not None
        assert node.generation is not None
        clean = []
        for image in node.ledger.clean():
            file = node.files.get((image.local_rank, image.slot))
            if file is None or not file.clean or file.version != image.version:
                raise Violation(f"inventory: node {node.rank} lists {image}, there is {file}")
            world = self.worlds[image.version.generation]
            path = f"slot-{image.slot.pool}-{image.local_rank}-{image.slot.index}"
            clean.append(
                CleanImage(
                    version=image.version,
                    global_rank=image.global_rank,
                    world_size=world,
                    path=path,
                    offset=4096,
                    size_bytes=1,
                )
            )
        inventory = Inventory(
            generation=node.generation,
            node_rank=node.rank,
            clean=tuple(clean),
            parents=tuple(node.parents.values()),
            history=None,
            newest_step=node.newest_before,
            pinned=node.ledger.pinned,
        )
        node.up.append(("inventory", inventory))

    def _do_deliver_down(self, node: Node) -> None:
        if node.ledger is None or not node.down:
            return
        kind, *rest = node.down.popleft()
        match kind:
            case "restore":
                choice: chain.Choice = rest[0]
                version = choice.version if choice.tier == "memory" else None
                if node.decided:
                    return
                node.decided, node.parent, node.start_step = True, version, choice.step
                node.parents[self.generation] = Parentage(
                    generation=self.generation, parent=choice.version, step=choice.step
                )
                self._feed(node, ledger.RestoreDecided(generation=self.generation, parent=version, step=choice.step))
            case "orders":
                self._feed(node, ledger.OrdersReceived(orders=rest[0]))
            case "persist":
                if (rest[0], rest[1]) not in node.persisting:
                    node.persisting.append((rest[0], rest[1]))

    def _do_write_part(self, node: Node) -> None:
        if node.ledger is None or not node.persisting:
            return
        version, attempt = node.persisting.pop(0)
        ranks = set()
        for image in node.ledger.slots_of(version):
            file = node.files.get((image.local_rank, image.slot))
            if file is None or not file.clean or file.version != version:
                raise Violation(f"persist: {version} was overwritten while node {node.rank} reads it: {file}")
            ranks.add(image.global_rank)
        if node.connected:
            node.up.append(("part", version, attempt, ranks))

    # --- the leading daemon

    def _do_deliver_up(self, node: Node) -> None:
        head = self.nodes[self.leader_rank]
        if not node.up or head.leading is None:
            return
        leading = head.leading
        kind, *rest = node.up.popleft()
        match kind:
            case "inventory":
                self._take_inventory(head, leading, node, rest[0])
            case "report":
                if leading.ledger is not None:
                    self._lead_on(head, leading, leader.ReportReceived(state=rest[0]))
            case "part":
                version, attempt, ranks = rest
                leading.parts.setdefault((version, attempt), set()).update(ranks)
                if leading.ledger is not None:
                    event = leader.PartEnded(version=version, attempt=attempt, node_rank=node.rank)
                    self._lead_on(head, leading, event)

    def _take_inventory(self, head: Node, leading: Leading, node: Node, inventory: Inventory) -> None:
        if inventory.generation != leading.generation:
            return
        leading.inventories[node.rank] = inventory
        if leading.choice is not None:
            node.down.append(("restore", leading.choice))
        if len(leading.inventories) < len(self.nodes) or leading.ledger is not None:
            return
        if leading.choice is not None:  # a restarted leader
            self._lead(head, leading.choice, tuple(leading.inventories.values()))
            return
        stored = tuple(
            chain.StoredStep(step=step, version=version, path=f"step-{step}") for step, version in self.storage.items()
        )
        inventories = tuple(leading.inventories.values())
        choice = self.machines.choose(
            chain.ChainQuestion(
                generation=self.generation,
                fresh=False,
                resume="auto",
                inventories=inventories,
                stored=stored,
                history=None,
            )
        )
        self._check_choice(choice, inventories)
        leading.choice = choice
        for other in self.nodes:
            if other.connected:
                other.down.append(("restore", choice))
        self._lead(head, choice, inventories)

    def _lead(self, head: Node, choice: chain.Choice, inventories: tuple[Inventory, ...]) -> None:
        leading = head.leading
        assert leading is not None
        carried = chain.carried_persists(inventories, choice, generation=self.generation)
        if carried:
            self.seen["persist carried over"] += 1
        config = leader.LeaderConfig(
            generation=self.generation,
            epoch=head.epoch,
            nodes=tuple(node.rank for node in self.nodes),
            num_ranks=self.worlds[self.generation],
            start_step=choice.step,
            snapshot_every=self.plan.snapshot_every,
            persist_every_steps=self.plan.persist_every,
            carried=carried,
        )
        leading.ledger = self.machines.leader(config)
        for instruction in leading.ledger.start():
            self._obey(head, leading, instruction)

    def _lead_on(self, head: Node, leading: Leading, event: leader.LeaderEvent) -> None:
        assert leading.ledger is not None
        for instruction in leading.ledger.handle(event):
            self._obey(head, leading, instruction)

    def _obey(self, head: Node, leading: Leading, instruction: leader.LeaderInstruction) -> None:
        match instruction:
            case leader.SendOrders():
                node = self.nodes[instruction.node_rank]
                if node.connected:
                    node.down.append(("orders", instruction.orders))
            case leader.OrderPersist():
                self._check_persist(instruction.version)
                for rank in instruction.nodes:
                    if self.nodes[rank].connected:
                        self.nodes[rank].down.append(("persist", instruction.version, instruction.attempt))
            case leader.CommitPersist():
                leading.commits.append(instruction)
            case leader.PersistSettled():
                self.seen[f"persist {instruction.outcome}"] += 1
                self.settled[instruction.version] = instruction.outcome
            case leader.VersionCompleted():
                self._check_complete(instruction.version)

    def _do_commit(self, head: Node) -> None:
        leading = head.leading
        if leading is None or not leading.commits:
            return
        order = leading.commits.pop(0)
        ranks = leading.parts.get((order.version, order.attempt), set())
        missing = set(range(self.worlds[order.version.generation])) - ranks
        if missing:
            raise Violation(f"persist: root of {order.version} without ranks {missing}")
        known = self.storage.get(order.version.step)
        if known is None or known.generation.generation <= order.version.generation.generation:
            self.storage[order.version.step] = order.version
        if self.chaos and self.faults_left and self.rng.random() < 0.1:
            self._do_kill_daemon(head)  # the root is there, nobody heard of it
            return
        if leading.ledger is not None:
            self._lead_on(head, leading, leader.CommitEnded(version=order.version, attempt=order.attempt))

    # --- workers

    def _do_move(self, worker: Worker) -> None:
        if not worker.alive or not self._can_move(worker):
            return
        node = worker.node
        match worker.stage:
            case "start":
                self._check_restore(worker)
                worker.step, worker.stage = node.start_step, "body"
                worker.connected_to = node.epoch if node.ledger is not None else 0
                if worker.step >= self.last_step:
                    self.last_step = worker.step + self.rng.randint(1, 3)
                until = self.last_step if self.plan.until_known else None
                worker.bells.append(
                    ledger.RankEntered(
                        generation=worker.generation, global_rank=worker.rank, step=worker.step, until=until
                    )
                )
            case "body":
                worker.step += 1
                worker.stage = "agreed"
                passed = self.agreed_at.get(worker.generation)
                if passed is not None and worker.step > passed and worker.performed != passed:
                    raise Violation(f"agreed: rank {worker.rank} passes the agreed step {passed}")
            case "agreed":
                self._look_at_agreed(worker)
            case "grant":
                self._look_at_grants(worker)
                if worker.step >= self.last_step:
                    worker.stage = "final"
                    worker.bells.append(self._final(worker))
                else:
                    worker.stage = "body"
            case "save" | "stop" | "final":
                if worker.step not in worker.taken:
                    self._want(worker)
                elif worker.stage == "save":
                    worker.stage = "grant"
                else:
                    worker.stage = "done"

    def _final(self, worker: Worker) -> ledger.RankFinished:
        return ledger.RankFinished(
            generation=worker.generation, global_rank=worker.rank, step=worker.step, persist=True
        )

    def _look_at_agreed(self, worker: Worker) -> None:
        agreed = worker.node.agreed
        decision = self._decision(worker)
        if decision is agreement.Decision.PERFORM:
            assert agreed is not None
            before = self.agreed_at.setdefault(worker.generation, worker.step)
            if worker.step > before:
                self.agreed_at[worker.generation] = worker.step
            elif worker.step < before:
                raise Violation(f"agreed: rank {worker.rank} performs {worker.step}, others {before}")
            for node in self.nodes:
                for other in node.workers:
                    if (
                        other.generation == worker.generation
                        and other.step > worker.step
                        and (other.performed != worker.step)
                    ):
                        raise Violation(f"agreed: rank {other.rank} has passed the agreed step {worker.step}")
            self.seen[f"{agreed.kind} performed"] += 1
            worker.performed = worker.step
            worker.stage = agreed.kind
            return
        if decision is agreement.Decision.ACKNOWLEDGE:
            assert agreed is not None
            worker.node.acks[worker.rank] = agreed.number
        worker.stage = "grant"

    def _look_at_grants(self, worker: Worker) -> None:
        for step in sorted(worker.node.grants.values()):
            if step < worker.step and step not in worker.taken:
                worker.taken.add(step)
                self.seen["missed"] += 1
                version = worker.generation.at(step)
                worker.bells.append(ledger.RankMissed(version=version, global_rank=worker.rank))
        if worker.step in worker.node.grants.values() and worker.step not in worker.taken:
            if self.chaos and worker.step < self.last_step and self.rng.random() < self.plan.skip:
                self.seen["skipped"] += 1
                return
            self._want(worker)

    def _want(self, worker: Worker) -> None:
        slot = next(slot for slot, step in worker.node.grants.items() if step == worker.step)
        worker.taken.add(worker.step)
        worker.intent = (slot, worker.generation.at(worker.step))

    def _do_begin(self, worker: Worker) -> None:
        if not worker.intent or worker.copying:
            return
        slot, version = worker.intent
        node = worker.node
        file = node.files.get((worker.local, slot))
        if file is not None and not file.clean and file.writer.alive and file.writer is not worker:
            raise Violation(f"overwrite: {version} into {slot}, where rank {file.rank} still writes {file.version}")
        worker.intent, worker.copying = None, (slot, version)
        self._set_file(node, worker.local, slot, File(version, worker.rank, clean=False, writer=worker))

    def _do_finish(self, worker: Worker) -> None:
        if not worker.alive or not worker.copying:
            return
        slot, version = worker.copying
        worker.copying = None
        file = worker.node.files.get((worker.local, slot))
        if file is None or file.writer is not worker or file.version != version:
            raise Violation(f"overwrite: {version} of rank {worker.rank} in {slot} was overwritten by {file}")
        self._set_file(worker.node, worker.local, slot, File(version, worker.rank, clean=True, writer=worker))
        worker.bells.append(ledger.RankCommitted(version=version, global_rank=worker.rank, wait_s=0.1, step_s=1.0))

    def _do_ring(self, worker: Worker) -> None:
        """A doorbell; the shell looks at the page first, so both are one moment."""
        if worker.bells and worker.node.ledger is not None:
            looks = worker in worker.node.workers and self.rng.random() < 0.7
            seen = self._polled(worker) if looks else []
            self._feed(worker.node, *seen, worker.bells.popleft())

    def _do_reconnect(self, worker: Worker) -> None:
        """A worker finds a new daemon: doorbells in flight are lost, the shell reads its headers instead."""
        node = worker.node
        if node.ledger is None or worker.stage == "start":
            return
        worker.connected_to = node.epoch
        worker.bells.clear()
        until = self.last_step if self.plan.until_known else None
        generation, rank = worker.generation, worker.rank
        self._feed(node, ledger.RankEntered(generation=generation, global_rank=rank, step=worker.step, until=until))
        self._read(worker)
        if worker.stage in ("final", "done") and worker.performed != worker.step:
            self._feed(node, self._final(worker))

    def _do_read(self, worker: Worker) -> None:
        if worker.node.ledger is not None and worker.alive:
            self._read(worker)

    def _read(self, worker: Worker) -> None:
        self._feed(worker.node, self._reading(worker))

    def _reading(self, worker: Worker) -> ledger.RankRead:
        """The shell reads a worker's step and headers, as they are at this moment."""
        headers = self._headers(worker.node, worker.rank)
        return ledger.RankRead(generation=worker.generation, global_rank=worker.rank, step=worker.step, headers=headers)

    def _do_poll(self, worker: Worker) -> None:
        if worker.node.ledger is not None:
            self._feed(worker.node, *self._polled(worker))

    def _polled(self, worker: Worker) -> list[ledger.NodeEvent]:
        """The shell looks at what a worker has published."""
        node = worker.node
        assert node.ledger is not None
        if worker.stage == "start":
            return []
        acknowledged = node.acks.get(worker.rank, 0)
        node.polled[worker.rank] = (worker.step, acknowledged)
        generation, rank = worker.generation, worker.rank
        events: list[ledger.NodeEvent] = []
        if node.ledger.generation == worker.generation and rank in node.ledger.watched:
            events.append(self._reading(worker))
        else:
            events.append(ledger.RankStepped(generation=generation, global_rank=rank, step=worker.step))
        if acknowledged:
            events.append(ledger.RankAcknowledged(generation=generation, global_rank=rank, number=acknowledged))
        return events

    # --- checks

    def _set_file(self, node: Node, local: int, slot: SlotRef, file: File | None) -> None:
        old = node.files.get((local, slot))
        if old is not None and old.clean:
            self.whole[(old.version, old.rank)] -= 1
        if file is None:
            node.files.pop((local, slot), None)
            return
        node.files[(local, slot)] = file
        if file.clean:
            self.whole[(file.version, file.rank)] += 1

    def _is_whole(self, version: Version) -> bool:
        return all(self.whole[(version, rank)] > 0 for rank in range(self.worlds[version.generation]))

    def _check_newest(self) -> None:
        if self.newest is not None and not self._is_whole(self.newest):
            raise Violation(f"newest: {self.newest} is gone")

    def _check_complete(self, version: Version) -> None:
        if not self._is_whole(version):
            raise Violation(f"complete: {version} is not clean on all ranks")
        self.seen["complete"] += 1
        self.completed.add(version)
        if self.newest is None or version.step > self.newest.step or version.generation != self.newest.generation:
            self.newest, self.floor = version, max(self.floor, version.step)

    def _check_exclusive(self, node: Node, slot: SlotRef) -> None:
        if slot in node.grants:
            raise Violation(f"exclusive: {slot} of node {node.rank} is granted twice")
        for worker in (*node.workers, *node.zombies):
            for writing in (worker.intent, worker.copying):
                if worker.alive and writing is not None and writing[0] == slot:
                    raise Violation(f"exclusive: {slot} is granted while rank {worker.rank} writes {writing[1]}")

    def _check_choice(self, choice: chain.Choice, inventories: tuple[Inventory, ...]) -> None:
        self.seen[f"restored from {choice.tier}"] += 1
        if choice.step < self.floor:
            raise Violation(f"choice: {choice}, step {self.floor} was complete")
        if choice.tier == "memory":
            assert choice.version is not None
            if not self._is_whole(choice.version):
                raise Violation(f"choice: {choice.version} is not whole")
            if self.newest is not None and self.newest.step == choice.step and self.newest != choice.version:
                raise Violation(f"choice: {choice.version} is not on the chain, {self.newest} is")
        self.newest = choice.version if choice.tier == "memory" else None
        self.floor = choice.step

    def _check_restore(self, worker: Worker) -> None:
        parent = worker.node.parent
        if parent is not None and not self._is_whole(parent):
            raise Violation(f"restore: {parent} is gone while rank {worker.rank} restores")

    def _check_persist(self, version: Version) -> None:
        self.seen["persist ordered"] += 1
        if version not in self.completed and not self._is_whole(version):
            raise Violation(f"persist: {version} was never complete")


def run(seed: int, machines: Machines | None = None) -> Counter[str]:
    """Run one seed; an error names it."""
    simulation = Simulation(seed, machines)
    try:
        return simulation.run()
    except Violation as error:
        lines = [f"{name} {[getattr(one, 'rank', one) for one in rest]}" for name, *rest in simulation.trace[-30:]]
        tail = "\n  ".join(lines)
        raise Violation(f"seed {seed}: {error}\n{simulation.plan}\n  {tail}") from error
