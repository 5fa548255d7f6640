"""The workers of the simulation: they train, copy what is granted, and say so (see `ledger_simulation`)."""

from __future__ import annotations

from simulated_truth import Truth
from simulated_world import PATIENCE, File, Violation, Worker

from holdfast.snapshot import agreement, ledger


class Workers(Truth):
    """Everything that a worker process does."""

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
            case "secure":
                return True
            case "body":
                return not worker.intent and self._others_are_there(worker)
            case "agreed":
                return self._decision(worker) is not agreement.Decision.WAIT
            case "grant":
                return not worker.intent and not worker.copying
            case "save" | "stop" | "regroup" | "final":
                if worker.step not in worker.taken:
                    return worker.step in node.grants.values() and not worker.intent and not worker.copying
                if worker.stage == "save":
                    return True
                if worker.stage == "regroup":
                    return node.settled is not None and node.settled >= worker.step
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

    def _do_move(self, worker: Worker) -> None:
        if not worker.alive or not self._can_move(worker):
            return
        node = worker.node
        match worker.stage:
            case "start":
                self._check_restore(worker)
                worker.step, worker.stage = node.start_step, "secure" if node.exposed else "body"
                worker.connected_to = node.epoch if node.ledger is not None else 0
                if worker.step >= self.last_step:
                    self.last_step = worker.step + self.rng.randint(1, 3)
                until = self.last_step if self.plan.until_known else None
                worker.bells.append(
                    ledger.RankEntered(
                        generation=worker.generation, global_rank=worker.rank, step=worker.step, until=until
                    )
                )
            case "secure":  # for a moment only: it may go on at any time
                worker.looks += not self.chaos
                if worker.step in node.grants.values():
                    self._want(worker)
                    worker.stage = "body"
                elif self.rng.random() < 0.02 or worker.looks >= PATIENCE:
                    self.seen["restored state not granted in time"] += 1
                    worker.stage = "body"
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
            case "save" | "stop" | "regroup" | "final":
                if worker.step not in worker.taken:
                    self._want(worker)
                elif worker.stage == "save":
                    worker.stage = "grant"
                elif worker.stage == "regroup":
                    worker.stage = "waiting"
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
