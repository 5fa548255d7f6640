"""Nodes lose their memory again and again, at any instant: what is protected comes back from the others, bit for bit.

Real daemons, agents played by the test, workers without torch that check every byte they read. Each seed is a history
of its own: one or two of four nodes are lost while versions are copied, while parity is made, while the loss before is
being recovered; others take their places, in another order. Never are more than m = 2 of those gone that held the
newest protected version.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator

import pytest

from holdfast.snapshot.messages import EndGeneration, Progress, RestoreChosen
from support.snapshot_worker import Plan
from support.snapshots import Job, Node, Worker

NODES, PARITIES = 4, 2
ROUNDS = int(os.environ.get("HOLDFAST_TEST_ROUNDS", "8"))
SEEDS = [int(seed) for seed in os.environ.get("HOLDFAST_TEST_SEEDS", "0 1 2 3 4 5 6 7").split()]


class History:
    """One job; `safe` is the newest step known to be protected, `holders` are the nodes that held it then."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.made: list[Node] = []
        self.nodes = [self.newcomer() for _ in range(NODES)]
        self.job = Job(self.nodes, 1)
        self.safe, self.holders = 0, set(self.nodes)
        self.plan = Plan(
            until=1_000_000,
            step_s=0.02,
            row_bytes=chance.choice([1 << 16, 3 << 19]),
            ranks=tuple(range(NODES)),
            snapshot_every=chance.choice([1, 1, 7]),
        )

    def newcomer(self) -> Node:
        """A node whose memory is empty."""
        node = Node(f"{len(self.made)}")
        self.made.append(node)
        node.start_daemon()
        node.hello(redundancy=f"{NODES - PARITIES}+{PARITIES}")
        return node

    def train(self, *, surely: bool = False) -> None:
        """Mostly until a newer version is protected; then a little longer."""
        if surely or self.safe == 0 or self.chance.random() < 0.7:
            told = self.nodes[0].expect(Progress, where=self._protects)
            assert told.protected is not None
            self.safe, self.holders = told.protected.step, set(self.nodes)
        time.sleep(self.chance.random() * 0.3)

    def _protects(self, told: Progress) -> bool:
        now = told.protected
        return now is not None and now.generation == self.job.generation and now.step > self.safe

    def lose(self) -> None:
        """One or two at once, with their workers; the agents of the others end what is left of the generation."""
        while True:
            lost = self.chance.sample(self.nodes, self.chance.choice([1, 2]))
            if len(self.holders.difference(lost)) >= NODES - PARITIES:
                break
        for node in lost:
            node.kill_daemon()
            node.close()
        self.holders.difference_update(lost)
        for worker in self.job.workers:
            worker.kill()
        left = [node for node in self.nodes if node not in lost]
        if self.chance.random() < 0.5:
            for node in left:
                node.send(EndGeneration(generation=self.job.generation))
        self.nodes = left + [self.newcomer() for _ in lost]
        self.chance.shuffle(self.nodes)
        self.job.nodes = self.nodes

    def recover(self) -> None:
        """All ranks read the whole state back, none of it older than what was protected."""
        chosen = self.nodes[0].expect(RestoreChosen, where=lambda one: one.generation == self.job.generation)
        assert chosen.tier == "peers", chosen
        assert chosen.step >= self.safe, (chosen, self.safe)

    def close(self) -> None:
        for node in self.made:
            node.close()


@pytest.fixture
def history(request: pytest.FixtureRequest) -> Iterator[History]:
    made = History(random.Random(request.param))
    yield made
    made.close()


def assert_restored(workers: list[Worker]) -> None:
    """Each worker has compared every byte before it said so; it was killed later."""
    for worker in workers:
        worker.kill()
        assert worker.event("restored")["tier"] in ("peers", "memory"), worker.events


@pytest.mark.campaign
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("history", SEEDS, indirect=True)
def test_two_of_four_nodes_are_lost_again_and_again(history: History) -> None:
    history.job.start(history.plan)
    for _ in range(ROUNDS):
        history.train()
        history.lose()
        history.job.start(history.plan)
        while len(history.holders) > NODES - PARITIES and history.chance.random() < 0.4:
            time.sleep(history.chance.random() * 1.5)  # in the middle of the recovery
            history.lose()
            history.job.start(history.plan)
        history.recover()
        time.sleep(0.2)
    history.train(surely=True)
    assert_restored(history.job.workers)
