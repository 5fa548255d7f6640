"""What must hold, whatever happens, checked against the world as it is (see `ledger_simulation`)."""

from __future__ import annotations

from simulated_world import File, Node, Violation, Worker

from holdfast.checkpoint.version import Version
from holdfast.snapshot import chain
from holdfast.snapshot.messages import Inventory
from holdfast.snapshot.reports import SlotRef


class Truth:
    """The checks; the attributes are made by `ledger_simulation.Simulation`."""

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
        self._check_promise()

    def _check_complete(self, version: Version) -> None:
        if any(node.lost for node in self.nodes):  # reports of a lost node may arrive after its end
            self.completed.add(version)
            return
        if not self._is_whole(version):
            raise Violation(f"complete: {version} is not clean on all ranks")
        self.seen["complete"] += 1
        if version.step == self.nodes[0].start_step and version.generation == self.nodes[0].generation:
            self.seen["restored state is a version"] += 1
        self.completed.add(version)
        if self.newest is None or version.step > self.newest.step or version.generation != self.newest.generation:
            self.newest, self.floor = version, max(self.floor, version.step)

    def _check_exclusive(self, node: Node, slot: SlotRef, version: Version) -> None:
        if slot in node.grants:
            raise Violation(f"exclusive: {slot} of node {node.rank} is granted twice")
        for worker in (*node.workers, *node.zombies):
            for writing in (worker.intent, worker.copying):
                if worker.alive and writing is not None and writing[0] == slot and writing[1] != version:
                    raise Violation(f"exclusive: {slot} is granted while rank {worker.rank} writes {writing[1]}")

    def _check_choice(self, choice: chain.Choice, inventories: tuple[Inventory, ...]) -> None:
        if any(node.lost for node in self.nodes):
            return  # it may have sent its inventory before: this generation will not run
        self.seen[f"restored from {choice.tier}"] += 1
        if choice.step < self.floor:
            raise Violation(f"choice: {choice}, step {self.floor} was complete")
        if choice.tier == "memory":
            assert choice.version is not None
            whole = self._is_whole(choice.version)
            if not whole and not self._retrievable(choice.version):
                raise Violation(f"choice: {choice.version} cannot be had")
            if not whole and not choice.rebuilds:
                raise Violation(f"choice: {choice.version} is not whole")
            self._check_rebuilds(choice.rebuilds)
            if self.newest is not None and self.newest.step == choice.step and not self._is_newest(choice.version):
                raise Violation(f"choice: {choice.version} is not on the chain, {self.newest} is")
        self.newest = choice.version if choice.tier == "memory" and not choice.rebuilds else None
        self.floor = choice.step
        self._carry_promise(choice)

    def _is_newest(self, version: Version) -> bool:
        """Or what a generation made of it again: the state is the same, on the same chain."""
        made_from = (node.parents.get(version.generation) for node in self.nodes)
        return version == self.newest or any(
            record is not None and (record.parent, record.step) == (self.newest, version.step) for record in made_from
        )

    def _check_restore(self, worker: Worker) -> None:
        parent = worker.node.parent
        if any(node.lost for node in self.nodes):
            return
        if parent is not None and not self._is_whole(parent) and not self._retrievable(parent):
            raise Violation(f"restore: {parent} is gone while rank {worker.rank} restores")

    def _check_persist(self, version: Version) -> None:
        self.seen["persist ordered"] += 1
        if version not in self.completed and not self._is_whole(version):
            raise Violation(f"persist: {version} was never complete")
