"""The ledgers under simulated faults: sound as they are, and every known way to break them is noticed.

``HOLDFAST_SCHEDULES=20000`` (and ``HOLDFAST_FIRST_SEED``) make a campaign of `test_schedules_hold_all_invariants`; a
failing seed is named in the error and reproduces alone:

    HOLDFAST_FIRST_SEED=4711 HOLDFAST_SCHEDULES=1 pytest tests/unit/snapshot/test_ledger_simulation.py -k schedules
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable

import ledger_simulation as simulation
import msgspec
import pytest

from holdfast.checkpoint.version import Version
from holdfast.snapshot import chain, leader, ledger
from holdfast.snapshot.agreement import Agreement, Decision, Situation, at_boundary
from holdfast.snapshot.reports import Agreed, NodeState, Pin
from holdfast.snapshot.slots import Row, SlotTable, Writer

SCHEDULES = int(os.environ.get("HOLDFAST_SCHEDULES", "600"))
FIRST_SEED = int(os.environ.get("HOLDFAST_FIRST_SEED", "0"))
CAMPAIGN = 20_000
TRIES = 900
"""Schedules within which a mutant must be caught."""


def _hold(seeds: range) -> Counter[str]:
    seen: Counter[str] = Counter()
    for seed in seeds:
        seen += simulation.run(seed)
    return seen


def test_schedules_hold_all_invariants():
    seeds = range(FIRST_SEED, FIRST_SEED + SCHEDULES)
    seen = _hold(seeds)
    print(f"seeds {seeds.start}..{seeds.stop - 1}: {dict(sorted(seen.items()))}")  # noqa: T201
    if SCHEDULES < 600:
        return
    happened = (
        "worker killed, killed in a copy, daemon killed, leading daemon killed, connection cut, agent killed, zombie, "
        "resize, pool grown, missed, skipped, complete, restored from memory, restored from none, persist persisted, "
        "persist dropped, persist carried over, save performed, stop performed, "
        "regroup performed, regrouped, left"
    )
    assert [one for one in happened.split(", ") if not seen[one]] == []


@pytest.mark.campaign
@pytest.mark.timeout(3600)
def test_a_campaign_of_schedules_holds_all_invariants():
    for first in range(100_000, 100_000 + CAMPAIGN, 1000):
        seen = _hold(range(first, first + 1000))
        print(f"seeds {first}..{first + 999}: {dict(sorted(seen.items()))}", flush=True)  # noqa: T201


def test_a_seed_reproduces_its_run():
    first, second = simulation.Simulation(12), simulation.Simulation(12)
    assert first.run() == second.run()
    assert [action[0] for action in first.trace] == [action[0] for action in second.trace]


# --- mutants: known ways to get it wrong, each as small as it can be -------------------------------------------------

MUTANTS: dict[str, simulation.Machines] = {}


def mutant(name: str) -> Callable[[type], type]:
    """Register a broken ledger, of a node or of the leader."""

    def register(broken: type) -> type:
        of_node = issubclass(broken, ledger.NodeLedger)
        MUTANTS[name] = simulation.Machines(node=broken) if of_node else simulation.Machines(leader=broken)
        return broken

    return register


def with_table(name: str) -> Callable[[type[SlotTable]], type[SlotTable]]:
    """Register a node ledger whose slot table is broken."""

    def register(broken: type[SlotTable]) -> type[SlotTable]:
        class Broken(ledger.NodeLedger):
            def __init__(self, *, epoch: int) -> None:
                super().__init__(epoch=epoch)
                self.table = broken()

        MUTANTS[name] = simulation.Machines(node=Broken)
        return broken

    return register


def with_agreement(name: str) -> Callable[[type[Agreement]], type[Agreement]]:
    """Register a leader whose half of the agreement is broken."""

    def register(broken: type[Agreement]) -> type[Agreement]:
        class Broken(leader.LeaderLedger):
            def __init__(self, config: leader.LeaderConfig) -> None:
                super().__init__(config)
                self.agreement = broken()

        MUTANTS[name] = simulation.Machines(leader=Broken)
        return broken

    return register


@mutant("early free: a newer version that is clean here frees the complete one")
class EarlyFree(ledger.NodeLedger):
    def _settle(self, out: list[ledger.NodeInstruction]) -> None:
        clean = [row for row in self.table.granted() if row.state == "clean"]
        for row in clean[:-1]:
            row.abandoned = True
            out.append(ledger.WithdrawGrant(slot=row.ref, version=row.version))
        super()._settle(out)


@mutant("parent freed early: as soon as all ranks have entered")
class ParentFreedEarly(ledger.NodeLedger):
    def _let_go_of_the_past(self) -> None:
        self.parent = None
        super()._let_go_of_the_past()


@with_table("missing fence: commits of an older generation count")
class MissingFence(SlotTable):
    def committed(self, version: Version, global_rank: int, wait_s: float, step_s: float) -> None:
        for row in self:
            if row.version is not None and row.version.step == version.step:
                version = row.version
        super().committed(version, global_rank, wait_s, step_s)


@with_table("fence forgets writers: slots of an older generation's living writers are free")
class StrangersIgnored(SlotTable):
    def fence(self, local_ranks: tuple[int, ...], headers: object) -> None:
        super().fence(local_ranks, headers)  # type: ignore[arg-type]
        for row in self:
            row.strangers = {}


@mutant("lost grant: some are noted and never written on the page")
class LostGrant(ledger.NodeLedger):
    def _settle(self, out: list[ledger.NodeInstruction]) -> None:
        super()._settle(out)
        out[:] = [one for one in out if not (isinstance(one, ledger.PublishGrant) and one.version.step % 3 == 0)]


@mutant("forgotten grant: one that comes while the arena grows never gets a slot")
class ForgottenGrant(ledger.NodeLedger):
    def _settle(self, out: list[ledger.NodeInstruction]) -> None:
        self.lost = getattr(self, "lost", set())
        if self.generation is not None and self._num_slots == 0:
            self.lost |= set(super()._waiting())
        super()._settle(out)

    def _waiting(self) -> list[int]:
        return [step for step in super()._waiting() if step not in self.lost]


@mutant("lost orders: a reconnected node gets none")
class LostOrders(leader.LeaderLedger):
    def _take_report(self, state: NodeState, out: list[leader.LeaderInstruction]) -> None:
        super()._take_report(msgspec.structs.replace(state, ask=False), out)


@with_table("grant twice: a granted slot counts as free")
class GrantTwice(SlotTable):
    def free(self) -> list[Row]:
        free = super().free()
        for row in self.granted():
            if not free and row.state == "granted":
                row.release()
                free = [row]
        return free


@with_table("complete without all ranks: one clean rank makes the node clean")
class CompleteWithoutAllRanks(SlotTable):
    def committed(self, version: Version, global_rank: int, wait_s: float, step_s: float) -> None:
        super().committed(version, global_rank, wait_s, step_s)
        for row in self:
            if row.version == version:
                row.writers = dict.fromkeys(row.writers, Writer.CLEAN)


@mutant("complete without all nodes: one clean node makes the version complete")
class CompleteWithoutAllNodes(leader.LeaderLedger):
    def _judge_outstanding(self, out: list[leader.LeaderInstruction]) -> None:
        for step in sorted(self.outstanding):
            held = [self._held(state, step) for state in self._reports.values()]
            clean = [one for one in held if one is not None and one.state == "clean"]
            if clean:
                self._note_complete(step, clean, out)
        super()._judge_outstanding(out)


@mutant("pin ignored: a version that is persisted is freed like others")
class PinIgnored(ledger.NodeLedger):
    def _take_pins(self, pins: tuple[Pin, ...], out: list[ledger.NodeInstruction]) -> None:
        self._pins = {}


@with_table("quarantine ignored: an abandoned slot is free at once")
class QuarantineIgnored(SlotTable):
    def settle(self) -> None:
        for row in self:
            if row.abandoned:
                row.release()


@with_table("quarantine for ever: only a commit lets go")
class QuarantineForEver(SlotTable):
    def missed(self, version: Version, global_rank: int) -> None:
        pass

    def read(self, generation: object, global_rank: int, step: int, headers: object) -> None:
        pass


@mutant("persist of an abandoned version: a missed must step is persisted all the same")
class PersistOfAbandoned(leader.LeaderLedger):
    def _judge_outstanding(self, out: list[leader.LeaderInstruction]) -> None:
        before = set(self.outstanding)
        super()._judge_outstanding(out)
        for step in before - self.outstanding:
            self._offer_if_wanted(step, out)


@mutant("page ignored: a restarted daemon does not adopt the grants on the page")
class PageIgnored(ledger.NodeLedger):
    def _adopt(self, event: ledger.Adopted) -> None:
        super()._adopt(msgspec.structs.replace(event, published=()))


@mutant("headers ignored: a restarted daemon takes granted slots for clean ones")
class HeadersIgnored(ledger.NodeLedger):
    def _adopt(self, event: ledger.Adopted) -> None:
        super()._adopt(event)
        for row in self.table:
            row.writers = dict.fromkeys(row.writers, Writer.CLEAN)


@mutant("hasty leader: a restarted leader does not wait for all reports")
class HastyLeader(leader.LeaderLedger):
    def _take_report(self, state: NodeState, out: list[leader.LeaderInstruction]) -> None:
        super()._take_report(state, out)
        if not self._gathered and self._reports:
            self._gathered = True


@mutant("forgetful leader: a restarted leader does not take over what is complete")
class ForgetfulLeader(leader.LeaderLedger):
    def _rebuild(self, out: list[leader.LeaderInstruction]) -> None:
        super()._rebuild(out)
        self._complete, self.outstanding = None, set()


@with_agreement("acknowledgement not required: a proposal is confirmed at once")
class AcknowledgementNotRequired(Agreement):
    def _drive_proposal(self, current: Agreed, now: Situation) -> None:
        self.current = msgspec.structs.replace(current, confirmed=True)


@with_agreement("one acknowledgement is enough")
class OneAcknowledgementIsEnough(Agreement):
    def _drive_proposal(self, current: Agreed, now: Situation) -> None:
        if any(rank.acknowledged >= current.number for rank in now.ranks):
            self.current = msgspec.structs.replace(current, confirmed=True)
        else:
            super()._drive_proposal(current, now)


@with_agreement("no later pick: a proposal that a rank has passed stands for ever")
class NoLaterPick(Agreement):
    def _drive_proposal(self, current: Agreed, now: Situation) -> None:
        if all(rank.acknowledged >= current.number for rank in now.ranks):
            super()._drive_proposal(current, now)


@mutant("no recall: grants of later steps keep the slots that an awaited step needs")
class NoRecall(leader.LeaderLedger):
    def _recall(self, awaited: int) -> None:
        pass


def _passes_unconfirmed(step: int, agreed: Agreed | None, acknowledged: int) -> Decision:
    decision = at_boundary(step, agreed, acknowledged)
    return Decision.GO_ON if decision is Decision.WAIT else decision


@mutant("settled too early: once the step is confirmed")
class SettledTooEarly(leader.LeaderLedger):
    def _settled(self) -> int | None:
        agreed = self.agreement.current
        return agreed.step if agreed is not None and agreed.confirmed and agreed.kind == "regroup" else None


@mutant("settled before the memory of a node that leaves can be missed")
class SettledUnsafe(leader.LeaderLedger):
    def _is_left(self) -> bool:
        return False


@with_agreement("a confirmed regroup is followed by another proposal")
class NotTheLast(Agreement):
    def _is_last(self) -> bool:
        return False


def _from_incomplete(question: chain.ChainQuestion) -> chain.Choice:
    versions = [image.version for inventory in question.inventories for image in inventory.clean]
    if not versions:
        return chain.choose(question)
    best = max(versions, key=lambda version: version.step)
    return chain.Choice(tier="memory", version=best, step=best.step)


MUTANTS["no wait: a worker passes an agreed step that is not confirmed"] = simulation.Machines(
    at_boundary=_passes_unconfirmed
)
MUTANTS["restore from a version that is not complete"] = simulation.Machines(choose=_from_incomplete)


@pytest.mark.parametrize("name", MUTANTS)
def test_every_mutant_is_caught(name):
    for seed in range(TRIES):
        try:
            simulation.run(seed, MUTANTS[name])
        except (AssertionError, KeyError) as error:  # a Violation, or an assertion of the machines themselves
            print(f"{name}: seed {seed}: {str(error).splitlines()[0]}")  # noqa: T201
            return
    pytest.fail(f"{name} survived {TRIES} schedules")
