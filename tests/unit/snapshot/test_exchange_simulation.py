"""Jobs with redundancy under simulated faults, node losses among them: sound as they are, every mutant noticed.

``HOLDFAST_SCHEDULES=20000`` (and ``HOLDFAST_FIRST_SEED``) make a campaign of the test of schedules;
a failing seed is named in the error and reproduces alone:

    HOLDFAST_FIRST_SEED=4711 HOLDFAST_SCHEDULES=1 pytest tests/unit/snapshot/test_exchange_simulation.py -k schedules
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable

import ledger_simulation as simulation
import msgspec
import pytest
from simulated_world import PATIENCE, Worker

from holdfast.checkpoint.version import Version
from holdfast.snapshot import chain, leader, ledger
from holdfast.snapshot import exchange_events as events
from holdfast.snapshot.coding import Chunk
from holdfast.snapshot.exchange import Exchange
from holdfast.snapshot.protection import Protection

SCHEDULES = int(os.environ.get("HOLDFAST_SCHEDULES", "150"))
FIRST_SEED = int(os.environ.get("HOLDFAST_FIRST_SEED", "0"))
CAMPAIGN = 20_000
TRIES = 200
"""Schedules within which a mutant must be caught."""


def _hold(seeds: range) -> Counter[str]:
    seen: Counter[str] = Counter()
    for seed in seeds:
        seen += simulation.run(seed, coded=True)
    return seen


def test_schedules_with_parity_hold_all_invariants():
    seeds = range(FIRST_SEED, FIRST_SEED + SCHEDULES)
    seen = _hold(seeds)
    print(f"seeds {seeds.start}..{seeds.stop - 1}: {dict(sorted(seen.items()))}")  # noqa: T201
    if SCHEDULES < 150:
        return
    happened = (
        "protected, parity sealed, node lost, node lost in an exchange, loss survived by parity, loss not covered, "
        "image decoded, newcomer, shrunk, ranks moved, message lost, message twice, partition, leading daemon killed, "
        "restored from memory, restored from storage, restored state is a version, restored state not granted in time"
    )
    assert [one for one in happened.split(", ") if not seen[one]] == []


@pytest.mark.campaign
@pytest.mark.timeout(7200)
def test_a_campaign_of_schedules_with_parity_holds_all_invariants():
    for first in range(200_000, 200_000 + CAMPAIGN, 1000):
        seen = _hold(range(first, first + 1000))
        print(f"seeds {first}..{first + 999}: {dict(sorted(seen.items()))}", flush=True)  # noqa: T201


def test_parity_survives_a_restart_between_its_report_and_the_orders_that_name_it():
    _hold(range(215_946, 215_947))


def test_a_worker_that_waits_for_a_restored_step_which_is_never_granted_goes_on_within_a_bound():
    """The others had passed the step, so the grant was gone: the job ended after the last round that it was given."""
    _hold(range(202_472, 202_473))
    world = simulation.Simulation(0, coded=True)
    world.chaos, world.rng.random = False, lambda: 1.0  # chance alone would never end the wait
    node = world.nodes[0]
    worker = Worker(world.generation, 0, 0, node, step=7, stage="secure")
    node.workers = [worker]
    for _ in range(PATIENCE):
        assert worker.stage == "secure"
        world._do_move(worker)
    assert worker.stage == "body"


def test_a_seed_with_parity_reproduces_its_run():
    first, second = simulation.Simulation(7, coded=True), simulation.Simulation(7, coded=True)
    assert first.run() == second.run()
    assert [action[0] for action in first.trace] == [action[0] for action in second.trace]


# --- mutants: known ways to get it wrong, each as small as it can be -------------------------------------------------

MUTANTS: dict[str, simulation.Machines] = {}


def mutant(name: str) -> Callable[[type], type]:
    """Register a broken exchange, or ledger of a node."""

    def register(broken: type) -> type:
        of_exchange = issubclass(broken, Exchange)
        MUTANTS[name] = simulation.Machines(exchange=broken) if of_exchange else simulation.Machines(node=broken)
        return broken

    return register


def with_protection(name: str) -> Callable[[type[Protection]], type[Protection]]:
    """Register a leader whose part in protecting versions is broken."""

    def register(broken: type[Protection]) -> type[Protection]:
        class Broken(leader.LeaderLedger):
            def __init__(self, config: leader.LeaderConfig) -> None:
                super().__init__(config)
                self.protection = broken(coded=config.coded, parent=config.parent, protected=config.protected)

        MUTANTS[name] = simulation.Machines(leader=Broken)
        return broken

    return register


def with_choice(name: str) -> Callable[[Callable[[chain.ChainQuestion], chain.Choice]], object]:
    """Register a broken choice of what a generation starts from."""

    def register(broken: Callable[[chain.ChainQuestion], chain.Choice]) -> object:
        MUTANTS[name] = simulation.Machines(choose=broken)
        return broken

    return register


@mutant("write hole: the old parity goes when the new one begins")
class WriteHole(Exchange):
    def _protect(self, event, out):
        self._kept = None
        super()._protect(event, out)


@mutant("early free of parity: the old one goes when the new one is whole here")
class ParityFreedEarly(Exchange):
    def _take_running(self, running, event, out):
        super()._take_running(running, event, out)
        if isinstance(event, events.ParitySealed) and event.version == running.version:
            self._kept = event.version
            self._drop_finished(out)


@mutant("early free of data: slots of the protected version are freed as any other's")
class DataFreedEarly(ledger.NodeLedger):
    def _let_go_of_the_past(self) -> None:
        kept, self._protected = self._protected, None
        super()._let_go_of_the_past()
        self._protected = kept

    def _abandon_unlisted(self, out) -> None:
        kept, self._protected = self._protected, None
        super()._abandon_unlisted(out)
        self._protected = kept


@mutant("slots of the version that is being protected are freed when a newer one is complete")
class BeingProtectedFreed(ledger.NodeLedger):
    def _abandon_unlisted(self, out) -> None:
        kept, self._protect = self._protect, None
        super()._abandon_unlisted(out)
        self._protect = kept


@mutant("duplicate chunk absorbed: what has come already is added again")
class DuplicateAbsorbed(Exchange):
    def _take_chunk(self, running, chunk: Chunk, out) -> None:
        node = self._source_of(running, chunk)
        if node is not None and chunk not in running.sources[node].waiting:
            running.sources[node].asked[chunk] = None
        super()._take_chunk(running, chunk, out)


@mutant("the first chunk is added to what the buffer held before")
class DirtyBuffer(Exchange):
    def handle(self, event):
        out = super().handle(event)
        return [
            msgspec.structs.replace(one, first=False, clear=0) if isinstance(one, events.Absorb) else one for one in out
        ]


@mutant("behind a short first chunk the buffer is not cleared")
class TailNotCleared(Exchange):
    def handle(self, event):
        out = super().handle(event)
        return [msgspec.structs.replace(one, clear=0) if isinstance(one, events.Absorb) else one for one in out]


@mutant("sealed one chunk early")
class SealedEarly(Exchange):
    def _begin(self, running, out) -> None:
        super()._begin(running, out)
        running.left = max(0, running.left - 1)


@mutant("parity kept over a generation: finished parity that nobody names any more is never dropped")
class NeverDropped(Exchange):
    def _drop_finished(self, out) -> None:
        pass


@mutant("lost protect message: every third version's order is not taken")
class LostProtect(ledger.NodeLedger):
    def _take_protection(self, orders, out) -> None:
        super()._take_protection(orders, out)
        out[:] = [one for one in out if not (isinstance(one, ledger.Protect) and one.version.step % 3 == 0)]


@mutant("a stream that does not come is never asked for again")
class NeverAskedAgain(Exchange):
    def _nudge(self, out) -> None:
        pass

    def _ask_streams(self, running, out) -> None:
        pass


@with_protection("protected when one node has its parity whole")
class OneNodeIsEnough(Protection):
    def advance(self, reports, complete, num_slots):
        done = [state for state in reports if state.coded is not None and state.coded == self.current]
        return super().advance(done or reports, complete, num_slots)


@with_protection("protected as soon as it is ordered")
class ProtectedAtOnce(Protection):
    def advance(self, reports, complete, num_slots):
        done = super().advance(reports, complete, num_slots)
        if self.current is not None:
            self.protected = self.current
        return done


@with_protection("a restarted leader forgets which version is protected")
class ForgetfulOfProtection(Protection):
    def restore(self, reports, generation) -> None:
        pass


@with_protection("the protected version of the generation before is given up at once")
class InsuranceGivenUp(Protection):
    def __init__(self, *, coded: bool, parent: Version | None, protected: Version | None) -> None:
        super().__init__(coded=coded, parent=parent, protected=None)


@with_choice("stale owner map: parity is read as if its holder had today's rank")
def stale_owner_map(question: chain.ChainQuestion) -> chain.Choice:
    inventories = tuple(
        msgspec.structs.replace(
            one,
            parity=tuple(
                msgspec.structs.replace(held, holder=one.node_rank)
                for held in one.parity
                if one.node_rank in held.coded.group.members
            ),
        )
        for one in question.inventories
    )
    return chain.choose(chain.replace(question, inventories=inventories))


@with_choice("unfinished counts: a lost image is taken for decodable without its parity")
def lost_counts_as_there(question: chain.ChainQuestion) -> chain.Choice:
    versions = [held.coded.version for one in question.inventories for held in one.parity]
    versions += [image.version for one in question.inventories for image in one.clean]
    if not versions:
        return chain.choose(question)
    best = max(versions, key=lambda version: (version.generation.generation, version.step))
    return chain.Choice(tier="memory", version=best, step=best.step, protected=None)


@with_choice("what is protected is not carried into the next generation")
def protection_forgotten(question: chain.ChainQuestion) -> chain.Choice:
    return chain.replace(chain.choose(question), protected=None)


@pytest.mark.parametrize("name", MUTANTS)
def test_every_mutant_of_the_exchange_is_caught(name):
    for seed in range(TRIES):
        try:
            simulation.run(seed, MUTANTS[name], coded=True)
        except (AssertionError, KeyError, StopIteration) as error:  # a Violation, or what the machines find themselves
            print(f"{name}: seed {seed}: {str(error).splitlines()[0]}")  # noqa: T201
            return
    pytest.fail(f"{name} survived {TRIES} schedules")
