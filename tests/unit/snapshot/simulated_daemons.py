"""The daemons of the simulation, of nodes and of the leader: literal shells of ledgers (see `ledger_simulation`)."""

from __future__ import annotations

from simulated_workers import Workers
from simulated_world import Leading, Node, Violation

from holdfast.checkpoint.version import GenerationId
from holdfast.snapshot import chain, leader, ledger
from holdfast.snapshot.messages import Inventory
from holdfast.snapshot.records import CleanImage, Parentage


class Daemons(Workers):
    """Everything that a daemon does."""

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
        node.exchange, node.room_known = None, False
        node.jobs.clear()
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
                protected=node.protected,
            ),
        )
        if node.pool is not None:
            self._feed(node, ledger.PoolReady(pool=node.pool[0], num_slots=node.pool[1]))
        if node.decided:
            self._feed(
                node,
                ledger.RestoreDecided(
                    generation=node.generation, parent=node.parent, step=node.start_step, protected=node.protected
                ),
            )
            self._begin_exchange(node)
        for worker in node.workers:
            if not worker.alive:
                self._feed(node, ledger.WriterDied(generation=worker.generation, global_rank=worker.rank))
        if node.rank == self.leader_rank and node.generation == self.generation:
            node.leading = Leading(self.generation)
            if node.decided:  # what it chose stands in its node.state
                record = node.parents[self.generation]
                tier = "none" if record.parent is None else "memory" if node.parent is not None else "storage"
                node.leading.choice = chain.Choice(
                    tier=tier,
                    version=record.parent,
                    step=node.start_step,
                    protected=node.decided_protected,
                    exposed=node.exposed,
                )

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
                node.grants, node.agreed, node.settled, node.acks = {}, None, None, {}
            case ledger.SendInventory():
                self._send_inventory(node)
            case ledger.PublishGrant():
                self._check_exclusive(node, instruction.slot, instruction.version)
                self.seen["grants"] += 1
                node.grants[instruction.slot] = instruction.version.step
            case ledger.WithdrawGrant():
                if node.grants.get(instruction.slot) == instruction.version.step:
                    del node.grants[instruction.slot]
            case ledger.ReadRanks():
                self._feed(node, *(self._reading(worker) for worker in node.workers if worker.alive))
            case ledger.PublishAgreed():
                node.agreed = instruction.agreed
            case ledger.Settled():
                node.settled = instruction.step
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
            case ledger.Protect():
                self._protect(node, instruction.version)
            case ledger.Protected():
                self._keep(node, instruction.version)

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
            parity=self._held_parity(node),
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
                node.protected = node.decided_protected = choice.protected
                node.exposed = choice.exposed and self._has_parity(self.generation)
                self._feed(
                    node,
                    ledger.RestoreDecided(
                        generation=self.generation, parent=version, step=choice.step, protected=choice.protected
                    ),
                )
                self._begin_exchange(node)
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
        rebuilds = {pin.version: chain.lost_images(pin.version, inventories) for pin in carried}
        leading.lost = {version: {one.global_rank for one in lost} for version, lost in rebuilds.items() if lost}
        if leading.lost:
            self.seen["lost share written"] += 1
        config = leader.LeaderConfig(
            generation=self.generation,
            epoch=head.epoch,
            nodes=tuple(node.rank for node in self.nodes),
            num_ranks=self.worlds[self.generation],
            start_step=choice.step,
            snapshot_every=self.plan.snapshot_every,
            persist_every_steps=self.plan.persist_every,
            carried=carried,
            decoded=tuple(leading.lost),
            coded=self._has_parity(self.generation),
            parent=choice.version if choice.tier == "memory" else None,
            protected=choice.protected,
            exposed=choice.exposed and self._has_parity(self.generation),
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
                if not instruction.orders.resync:
                    self._check_orders(instruction.orders.protected)
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
            case leader.VersionProtected():
                self._promise(instruction.version)

    def _has_parity(self, generation: GenerationId) -> bool:
        return self.plan.coded and any(group.num_parity for group in self.groups[generation].groups)

    def _do_commit(self, head: Node) -> None:
        leading = head.leading
        if leading is None or not leading.commits:
            return
        order = leading.commits.pop(0)
        ranks = leading.parts.get((order.version, order.attempt), set()) | leading.lost.get(order.version, set())
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
