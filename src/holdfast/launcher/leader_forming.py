"""How a leader forms a generation: who is waited for, who gets a place, who may go on at all. Pure.

The rules stand in `holdfast.launcher.leader`, and in `holdfast.launcher.quorum` those of splits.
"""

from __future__ import annotations

from holdfast.checkpoint.version import GenerationId
from holdfast.launcher.leader_orders import Claim, HostStore, Resign
from holdfast.launcher.leader_state import CLAIM_AGAIN_S, CLAIMING, FORMING, LeaderState, Run
from holdfast.launcher.quorum import founders_needed, lone_upper, may_follow
from holdfast.launcher.ranks import node_ranks, places
from holdfast.launcher.roster import Node, newest_incarnation, remembered_run
from holdfast.launcher.wire import Phase, Standing, Verdict

FENCE_S = 10.0
"""How long a new incarnation waits after its claim, so that a generation that still runs somewhere has read it; what
follows one that died or fell apart meanwhile waits as long."""


class FormingLeader(LeaderState):
    """See the module's head; `Leader` is made of it."""

    def _advance_gather(self, now: float) -> None:
        if self._claims and not self._read_claims(now):
            return
        ready = [node for node in self._roster.nodes.values() if self._is_ready(node)]
        candidates = [node for node in ready if not self._is_leaving(node)]
        if candidates and self._leader_id in self._leaving_ids():
            self._resign(candidates)
            return
        size = self._limits.legal(len(candidates))
        if size == 0:
            self._enough_since = None
            if now - self._gather_since >= self._limits.last_call_s:
                self._note_few(len(candidates))
        elif not self._still_waiting(ready, now):
            self._enough_since = now if self._enough_since is None else self._enough_since
            self._choose(ready, candidates, size, now)
        if self._phase == Phase.GATHER and now - self._gather_since > self._limits.join_timeout_s:
            self._end(self._too_few(candidates))

    def _resign(self, candidates: list[Node]) -> None:
        ranks = self._previous_ranks()
        heir = min(candidates, key=lambda node: (ranks.get(node.report.node.node_id, len(ranks)), node.joined))
        self._out.append(Resign(heir.report.node.address))

    def _is_ready(self, node: Node) -> bool:
        """Idle, promised to this leader, and able to read its claim store."""
        report = node.report
        promised = report.promised == self._ballot and report.promised_to == self._leader_id
        return promised and not report.alive and report.proof == self._proof

    def _still_waiting(self, ready: list[Node], now: float) -> bool:
        """Whether a node that is on its way shall be waited for."""
        known = set(self._standing.members) if self._standing is not None else set()
        for node_id, node in self._roster.nodes.items():
            if node in ready:
                continue
            limit_s = (
                self._limits.stop_timeout_s if node.report.alive and node_id in known else self._limits.dead_after_s
            )
            if now - max(self._ballot_since, node.since) <= limit_s:
                return True
        unseen = known - set(self._roster.nodes) - self._missing
        return self._run is None and bool(unseen) and now - self._begun <= 2 * self._limits.heartbeat_s

    def _choose(self, ready: list[Node], candidates: list[Node], size: int, now: float) -> None:
        """`ready` have a vote, `candidates` among them may get a place."""
        present = {node.report.node.node_id for node in ready}
        if self._standing is not None and self._ours():
            if may_follow(self._standing, present, self._limits, store=self._claims):
                self._follow_on(self._standing, present, candidates, size, now)
                return
            self._note_waiting(self._standing, present)
        assert self._enough_since is not None, "there are enough"
        newcomers = sum(self._is_new(node.report) for node in candidates)
        remembered = max([node.report.daemon.nodes for node in candidates])
        if self._standing is not None:
            remembered = max(remembered, len(self._standing.members))
        needed = founders_needed(self._limits, endpoint=self._endpoint, remembered=remembered, store=self._claims)
        at_once = self._standing is None and len(candidates) >= self._limits.legal(self._limits.max_nodes)
        called = at_once or now - self._enough_since >= self._limits.last_call_s
        if newcomers >= needed and called and self._may_found:
            self._form(self._chosen(candidates, size), None, now)

    def _follow_on(self, standing: Standing, present: set[str], candidates: list[Node], size: int, now: float) -> None:
        """This side may go on, if it wins the claim where there is a store: larger sides try first."""
        if lone_upper(standing, present, self._limits) and not self._claims:
            self._stride = 2
            if self._ballot == standing.generation.generation + 1:
                self._ballot, self._ballot_since = self._ballot + 1, now
                return
        elif self._limits.max_nodes == 2 and len(standing.members) == 2 and size == 1:
            self._stride = 2
        elif size > 1:
            self._stride = 1
        votes = sum(member in present for member in standing.members)
        smaller = self._claims and 2 * votes <= len(standing.members)
        if smaller and now - self._gather_since <= self._limits.dead_after_s:
            return
        self._form(self._chosen(candidates, size), standing, now)

    def _chosen(self, ready: list[Node], size: int) -> list[Node]:
        """Members of the generation before, then this node, then in order of joining."""
        before = self._previous_ranks()
        first = sorted(
            ready,
            key=lambda n: (n.report.node.node_id not in before, n.report.node.node_id != self._leader_id, n.joined),
        )
        return sorted(first[:size], key=lambda n: n.joined)

    def _note_waiting(self, standing: Standing, present: set[str]) -> None:
        votes = sum(member in present for member in standing.members)
        text = f"{votes} of the {len(standing.members)} nodes of {standing.generation} are here: too few to go on"
        if text != self._waiting_noted:
            self._waiting_noted = text
            self._note("waiting", text)

    def _note_few(self, num_nodes: int) -> None:
        least, within_s = self._limits.min_nodes, self._limits.join_timeout_s
        text = f"{num_nodes} of at least {least} nodes are here: the job waits for others, up to {within_s:g} s in all"
        if text != self._few_noted:
            self._few_noted = text
            self._note("waiting", text)

    def _too_few(self, ready: list[Node]) -> Verdict:
        within = f"within {self._limits.join_timeout_s:g} s"
        if self._limits.legal(len(ready)) == 0:
            reason = f"{len(ready)} of at least {self._limits.min_nodes} nodes were there {within}"
        else:
            reason = f"{self._waiting_noted or 'too few new nodes'}, and no others came {within}"
        return Verdict(kind="failed" if self._standing is None else "stopped", reason=reason)

    def _form(self, chosen: list[Node], follows: Standing | None, now: float) -> None:
        if follows is None:
            number = self._found_incarnation(chosen)
        else:
            number = self._succeed(chosen, follows)
        self._before = self._run
        infos = [node.report.node for node in chosen]
        ranks = node_ranks(infos, self._previous_ranks() if follows is not None else {})
        self._run = Run(
            generation=GenerationId(incarnation=self._incarnation, nonce=self._nonce, generation=number),
            places=places(infos, ranks, {n.report.node.node_id: n.report.daemon.endpoint for n in chosen}),
            follows=follows,
            known=self._standing,
            overtakes=self._claims and self._standing is not None and (follows is None or follows.overtakes),
            ids=frozenset(ranks),
        )
        self._fresh = follows is None
        self._restarts = follows.restart_count + 1 if follows is not None else 0
        self._session = False
        self._dump = 0
        self._regroup_since = None
        if self._claims:
            self._phase = CLAIMING
            self._claims_next = now
        else:
            self._phase = FORMING
            self._proposals.add(self._run.generation)
            self._out.append(HostStore(self._run.generation))

    def _succeed(self, chosen: list[Node], standing: Standing) -> int:
        """The next number of the incarnation; that incarnation must look newer than any that the nodes come from."""
        old = standing.generation
        self._nonce, self._run_id = old.nonce, standing.run_id
        others = newest_incarnation(chosen, other_than=old.nonce) + 1
        self._incarnation = max(old.incarnation, self._incarnation, others)
        return old.generation + 1 if self._claims else self._ballot

    def _found_incarnation(self, chosen: list[Node]) -> int:
        """One more than the largest number that any node has seen, in memory or under another leader."""
        known = self._standing.generation.incarnation if self._standing is not None else 0
        self._incarnation = max(known, newest_incarnation(self._roster.nodes.values())) + 1
        self._nonce = f"{(int(self._own_nonce, 16) + 0x9E3779B1 * len(self._founded)) & 0xFFFFFFFF:08x}"
        self._founded.append(self._nonce)
        self._run_id = remembered_run(chosen) or self._run_id
        return 1 if self._claims else self._ballot

    def _advance_claiming(self, now: float) -> None:
        """Claim, and again where the store does not answer: the same claim is created once only."""
        assert self._run is not None
        if any(not self._is_ready(node) for node in self._members()):
            self._gather_again(now)
        elif now >= self._claims_next:
            self._claims_next = now + CLAIM_AGAIN_S
            known = self._run.known
            self._out.append(Claim(self._run_standing(), known.generation if known is not None else None))

    def _claim_lost(self, run: Run, now: float) -> None:
        """Another side was first. One that wanted to found an incarnation does not try again: it would overtake."""
        self._note("claim_lost", f"another side has {run.generation}")
        self._may_found = self._may_found and run.follows is not None
        self._claims_known, self._claims_next = False, now
        self._gather_again(now)

    def _advance_forming(self, now: float) -> None:
        """Run, once there is a store, and enough of those who have a vote have accepted the proposal."""
        run = self._run
        assert run is not None
        ready = {node_id for node_id, node in self._roster.nodes.items() if self._is_ready(node)}
        votes = {node_id for node_id in ready if self._has_accepted(self._roster.nodes[node_id], run)}
        if not run.ids <= ready or self._standing is not run.known or not self._may_run(run, ready):
            self._gather_again(now)
        elif run.store and self._may_run(run, votes) and now >= self._fenced_until:
            self._proposals.discard(run.generation)
            run.overtakes = False
            self._standing = self._run_standing()
            self._phase = Phase.RUN
            self._note("forming", f"{len(run.places)} nodes, {sum(p.num_ranks for p in run.places)} ranks")

    def _may_run(self, run: Run, votes: set[str]) -> bool:
        """Whether so many votes are enough for a generation that was chosen."""
        return run.follows is None or self._claims or may_follow(run.follows, votes, self._limits, store=False)

    def _has_accepted(self, node: Node, run: Run) -> bool:
        standing = node.report.standing
        return standing is not None and standing.generation == run.generation

    def _gather_again(self, now: float) -> None:
        """A generation that nobody has started yet is given up."""
        self._run = self._before
        self._phase = Phase.GATHER
        self._gather_since = now
        self._ballot, self._ballot_since = self._ballot + self._stride, now
