"""The leader's half of membership: which nodes form which generation, and when one ends. Pure.

Rules
-----
1. A generation runs on a fixed set of nodes. Anything that changes the set, or a failure of any worker, ends it on all
   of them; the next one has a larger number. Restart count, ranks and store address come from one `Plan`, so they are
   equal everywhere, whatever the rendezvous backend is.
2. A new generation starts only when every living node of the old one has acknowledged its end and has no worker left.
3. A node that has been silent for `dead_after_s` is gone. If the remaining nodes are enough (``--nnodes min:max``,
   ``--hold-node-multiple``) and may go on (`holdfast.launcher.quorum`) they do so at once; else the job waits up to
   `join_timeout_s` for others.
4. The first generation forms when all `max_nodes` are there, or `last_call_s` after `min_nodes` were. Later ones form
   at once from the nodes that are known: no last call.
5. Nodes beyond `max_nodes` wait and step in. A node that joins while there is room makes the world larger, at most
   every `grow_s`: at an agreed step where all ranks are in a Session, at once where no rank has left one yet. What was
   agreed is carried out though the node has gone meanwhile: workers wait for it.
6. Only failures of workers are put to the restart budget.
7. Asked to stop while every rank is in a Session, the job gets `grace_s` to end by itself (its workers agree on a
   step); otherwise its workers get the signal at once.
8. A node that is asked to leave is replaced: its generation ends at an agreed step, once its version is safe without
   that node; where ranks have not entered a Session, or the node is in a hurry, at once. It has a vote in the next one
   and no place, and is released when a version of that one is protected. Where the others are too few the job stops.
   A leader that leaves first names another one.
9. A leader that cannot go on, because too few members of the newest generation are with it, may found a new incarnation
   together with enough agents that never had a place (`founders_needed`), after a last call.

Why two successors of one generation never both make progress stands in `holdfast.launcher.quorum`.

States: GATHER (no generation, or the old one has gone) -> CLAIMING (with a claim store) -> FORMING (the store is being
made) -> RUN -> STOP -> GATHER, and END from anywhere. `handle` takes an event and the time and returns instructions;
`Broadcast` carries the whole state, so lost messages heal with the next heartbeat.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass, field

import msgspec

from holdfast.checkpoint.version import GenerationId
from holdfast.launcher.budget import RestartBudget
from holdfast.launcher.leader_orders import (
    Broadcast,
    Claim,
    Finished,
    HostStore,
    Instruction,
    Note,
    ReadClaims,
    Resign,
    TurnAway,
)
from holdfast.launcher.limits import Limits
from holdfast.launcher.quorum import founders_needed, lone_upper, may_follow
from holdfast.launcher.ranks import node_ranks, places
from holdfast.launcher.roster import Node, Roster, newest_incarnation, remembered_run
from holdfast.launcher.wire import (
    Drain,
    Failure,
    NodeInfo,
    Phase,
    Place,
    Plan,
    Report,
    Standing,
    StopRequest,
    Verdict,
    WorkerState,
)

CLAIMING = "claiming"
"""A generation is chosen and its number is being claimed; members still see GATHER."""
FORMING = "forming"
"""A generation is chosen and waits for its store; members still see GATHER."""
_STRANGER = 1 << 20
"""Seniority of a leader without a generation, before the number of its endpoint."""
_CLAIM_AGAIN_S = 2.0
"""How often the claim store is read."""
_FENCE_S = 10.0
"""How long a new incarnation waits after its claim, so that a generation that still runs somewhere has read it."""


@dataclass
class _Run:
    """The generation that runs, forms or ends."""

    generation: GenerationId
    places: tuple[Place, ...]
    follows: Standing | None
    """The generation before; None for the first one of an incarnation."""
    store: str = ""
    running_noted: bool = False
    stop_sequence: int = 0
    stop_since: float = 0.0
    verdict: Verdict | None = None
    """Set while STOP leads to the END."""
    ids: frozenset[str] = field(default_factory=frozenset)


class Leader:
    """See the module's head. One instance per time that an agent leads, used by one thread; `now` never goes back."""

    def __init__(
        self,
        *,
        node: NodeInfo,
        nonce: str,
        run_id: str,
        limits: Limits,
        budget: RestartBudget,
        now: float,
        endpoint: int = 0,
        claims: bool = False,
        missing: frozenset[str] = frozenset(),
    ) -> None:
        """Lead from `now` on.

        Args:
            node: this agent.
            nonce: fresh; names the incarnation, should this leader found one.
            run_id: of a run that begins here.
            limits: of the job.
            budget: restarts after failures.
            now: time.monotonic().
            endpoint: number of the rendezvous endpoint that this agent serves, -1 for none.
            claims: there is a claim store.
            missing: nodes that need not be waited for: the former leader.
        """
        self._node = node
        self._leader_id = node.node_id
        self._nonce = self._own_nonce = nonce
        self._founded = 0
        self._run_id = run_id
        self._limits = limits
        self._budget = budget
        self._endpoint = endpoint
        self._claims = claims
        self._missing = missing
        self._phase: Phase | str = Phase.GATHER
        self._roster = Roster(job=node.job, limits=limits)
        self._run: _Run | None = None
        self._before: _Run | None = None
        """The one before `_run`, to go back to."""
        self._standing: Standing | None = None
        """Newest generation that anybody here knows."""
        self._incarnation = 0
        self._fresh = True
        self._restarts = 0
        self._ballot = 0
        self._ballot_since = now
        self._stride = 1
        self._proof = f"{nonce}-{node.node_id}" if claims else ""
        self._claims_known = not claims
        self._claims_next = now
        self._fenced_until = now
        self._may_found = True
        self._regroup_since: float | None = None
        self._leaves = False
        """A node leaves at the agreed step of the regroup."""
        self._leaving: set[str] = set()
        """Nodes that get no place any more, beside those that say so themselves."""
        self._seen_session = False
        self._grown: float | None = None
        self._waiting_noted = ""
        self._begun = now
        self._gather_since = now
        self._enough_since: float | None = None
        self._stop_deadline: float | None = None
        self._session = False
        self._verdict: Verdict | None = None
        self._dump = 0
        self._sequence = 0
        self._sent: Plan | None = None
        self._unsent = True
        self._next_beat = now
        self._finished = False
        self._out: list[Instruction] = []

    @property
    def plan(self) -> Plan:
        """What members are told now."""
        return self._plan()

    @property
    def addresses(self) -> tuple[str, ...]:
        """host:port of the agents that follow."""
        return tuple(n.report.node.address for n in self._roster.nodes.values())

    # --- events

    def reported(self, report: Report, now: float) -> list[Instruction]:
        """A report arrived, from this agent's own member too."""
        self._heard(report, now)
        return self._advance(now)

    def stored(self, generation: GenerationId, address: str, now: float) -> list[Instruction]:
        """The store of `generation` answers at `address` (host:port)."""
        run = self._run
        if self._phase == FORMING and run is not None and run.generation == generation:
            run.store = address
        return self._advance(now)

    def claims_read(self, newest: Standing | None, now: float) -> list[Instruction]:
        """The claim store's newest claim."""
        self._claims_known = True
        if newest is not None and (self._standing is None or newest.order > self._standing.order):
            self._standing = newest
            self._may_found = self._may_found and self._run is None
        return self._advance(now)

    def claim_ended(self, claim: Standing, *, won: bool, now: float) -> list[Instruction]:
        """The claim was created, or somebody else had it before."""
        run = self._run
        if self._phase == CLAIMING and run is not None and run.generation == claim.generation:
            if won:
                self._fenced_until = now + _FENCE_S if run.follows is None and self._standing is not None else now
                self._standing = claim
                self._phase = FORMING
                self._out.append(HostStore(run.generation))
            else:
                self._claim_lost(run, now)
        return self._advance(now)

    def _claim_lost(self, run: _Run, now: float) -> None:
        """Another side was first. One that wanted to found an incarnation does not try again: it would overtake."""
        self._note("claim_lost", f"another side has {run.generation}")
        self._may_found = self._may_found and run.follows is not None
        self._claims_known, self._claims_next = False, now
        self._gather_again(now)

    def ticked(self, now: float) -> list[Instruction]:
        """Time has passed: at least every heartbeat."""
        for node_id in self._roster.silent(now):
            self._lost(node_id, now)
        return self._advance(now)

    def hung(self, generation: GenerationId, failure: Failure, now: float) -> list[Instruction]:
        """A worker hangs, and only a restart helps: it counts as failed."""
        if self._phase == Phase.RUN and self._run is not None and self._run.generation == generation:
            self._worker_failed(failure, now)
        return self._advance(now)

    def dump_ordered(self, generation: GenerationId, number: int, now: float) -> list[Instruction]:
        """All nodes shall write the stacks of their workers, for the `number`-th time in this generation."""
        if self._run is not None and self._run.generation == generation:
            self._dump = number
        return self._advance(now)

    def next_wake(self, now: float) -> float:
        """Seconds until `ticked` has something to do."""
        return max(0.0, self._next_beat - now)

    # --- members

    def _heard(self, report: Report, now: float) -> None:
        info = report.node
        if report.ended and self._phase != Phase.END and (self._run is None or info.node_id not in self._run.ids):
            if self._roster.nodes.pop(info.node_id, None) is not None:
                self._note("node_left", f"{info.host} (agent {info.pid})")
            return
        reason = self._roster.heard(report, now)
        if reason is None:
            self._unsent = True
            self._note("node_joined", f"{info.host} (agent {info.pid}, {info.num_workers} workers)")
        elif reason:
            self._out.append(TurnAway(info.node_id, reason, info.address))

    def _lost(self, node_id: str, now: float) -> None:
        node = self._roster.nodes.pop(node_id)
        text = f"{node.report.node.host} (agent {node.report.node.pid}) silent for {self._limits.dead_after_s:g} s"
        self._note("node_lost", text)
        if self._run is None or node_id not in self._run.ids:
            return
        if self._phase == Phase.RUN:
            self._begin_stop(now, cause=f"lost node {text}")
        elif self._phase in (CLAIMING, FORMING):
            self._gather_again(now)

    def _members(self) -> list[Node]:
        """Living nodes of the current generation."""
        assert self._run is not None
        return [self._roster.nodes[place.node_id] for place in self._run.places if place.node_id in self._roster.nodes]

    # --- what others know

    def _learn(self, now: float) -> None:
        """Take over the newest generation, the largest ballot and the failures that any node knows of."""
        for node in self._roster.nodes.values():
            report = node.report
            self._budget.carry_over(report.failures)
            if report.standing is not None and self._is_newer(report.standing):
                self._standing = report.standing
        rivals = [
            node.report.promised + (node.report.promised_to != self._leader_id)
            for node in self._roster.nodes.values()
            if node.report.promised >= self._ballot
        ]
        number = self._standing.generation.generation if self._standing is not None and self._ours() else 0
        needed = max([number + 1, *rivals]) if self._phase == Phase.GATHER else 0
        if needed > self._ballot:
            self._ballot, self._ballot_since = needed, now

    def _ours(self) -> bool:
        """Whether a successor of the newest known generation would belong to its incarnation."""
        return self._run is None or self._standing is None or self._standing.generation.nonce == self._nonce

    def _is_newer(self, standing: Standing) -> bool:
        """Whether it is newer than what is known; a leader with generations of its own heeds no other incarnation."""
        if self._run is not None and standing.generation.nonce != self._nonce:
            return False
        return self._standing is None or standing.order > self._standing.order

    # --- the machine

    def _advance(self, now: float) -> list[Instruction]:
        before: Phase | str | None = None
        while before != self._phase:
            before = self._phase
            self._learn(now)
            self._heed_stop_requests(now)
            self._dismiss_strangers()
            match self._phase:
                case Phase.GATHER:
                    self._advance_gather(now)
                case "claiming":
                    self._advance_claiming(now)
                case "forming":
                    self._advance_forming(now)
                case Phase.RUN:
                    self._advance_run(now)
                case Phase.STOP:
                    self._advance_stop(now)
                case Phase.END:
                    self._advance_end()
        self._publish(now)
        out, self._out = self._out, []
        return out

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
        elif not self._still_waiting(ready, now):
            self._enough_since = now if self._enough_since is None else self._enough_since
            self._choose(ready, candidates, size, now)
        if self._phase == Phase.GATHER and now - self._gather_since > self._limits.join_timeout_s:
            self._end(self._too_few(candidates))

    def _resign(self, candidates: list[Node]) -> None:
        ranks = self._previous_ranks()
        heir = min(candidates, key=lambda node: (ranks.get(node.report.node.node_id, len(ranks)), node.joined))
        self._out.append(Resign(heir.report.node.address))

    def _read_claims(self, now: float) -> bool:
        """Whether the newest claim is known; asks for it at first, and while this side waits."""
        if now >= self._claims_next:
            self._claims_next = now + _CLAIM_AGAIN_S
            self._out.append(ReadClaims(self._proof))
        return self._claims_known

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
        newcomers = sum(node.report.standing is None for node in candidates)
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

    def _previous_ranks(self) -> dict[str, int]:
        if self._standing is None:
            return {}
        return {node_id: rank for rank, node_id in enumerate(self._standing.members)}

    def _note_waiting(self, standing: Standing, present: set[str]) -> None:
        votes = sum(member in present for member in standing.members)
        text = f"{votes} of the {len(standing.members)} nodes of {standing.generation} are here: too few to go on"
        if text != self._waiting_noted:
            self._waiting_noted = text
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
        self._run = _Run(
            generation=GenerationId(incarnation=self._incarnation, nonce=self._nonce, generation=number),
            places=places(infos, ranks, {n.report.node.node_id: n.report.daemon.endpoint for n in chosen}),
            follows=follows,
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
            self._out.append(HostStore(self._run.generation))

    def _run_standing(self) -> Standing:
        assert self._run is not None
        ordered = sorted(self._run.places, key=lambda place: place.node_rank)
        return Standing(
            generation=self._run.generation,
            members=tuple(place.node_id for place in ordered),
            addresses=tuple(place.address for place in ordered),
            run_id=self._run_id,
            restart_count=self._restarts,
        )

    def _succeed(self, chosen: list[Node], standing: Standing) -> int:
        """The next number of the incarnation; that incarnation must look newer than any that the nodes come from."""
        old = standing.generation
        self._nonce, self._run_id = old.nonce, standing.run_id
        self._incarnation = max(old.incarnation, newest_incarnation(chosen, other_than=old.nonce) + 1)
        return old.generation + 1 if self._claims else self._ballot

    def _found_incarnation(self, chosen: list[Node]) -> int:
        """One more than the largest number that any node has seen, in memory or under another leader."""
        known = self._standing.generation.incarnation if self._standing is not None else 0
        self._incarnation = max(known, newest_incarnation(self._roster.nodes.values())) + 1
        self._nonce = f"{(int(self._own_nonce, 16) + 0x9E3779B1 * self._founded) & 0xFFFFFFFF:08x}"
        self._founded += 1
        self._run_id = remembered_run(chosen) or self._run_id
        return 1 if self._claims else self._ballot

    def _advance_claiming(self, now: float) -> None:
        """Claim, and again where the store does not answer: the same claim is created once only."""
        if any(not self._is_ready(node) for node in self._members()):
            self._gather_again(now)
        elif now >= self._claims_next:
            self._claims_next = now + _CLAIM_AGAIN_S
            self._out.append(Claim(self._run_standing()))

    def _advance_forming(self, now: float) -> None:
        """Run, once there is a store, and all whose vote was needed start the generation or know of it."""
        run = self._run
        assert run is not None
        if any(not self._is_ready(node) for node in self._members()):
            self._gather_again(now)
        elif run.store and self._is_known(run) and now >= self._fenced_until:
            self._standing = self._run_standing()
            self._phase = Phase.RUN
            self._note("forming", f"{len(run.places)} nodes, {sum(p.num_ranks for p in run.places)} ranks")

    def _is_known(self, run: _Run) -> bool:
        if run.follows is None or self._claims:
            return True
        told = {
            node_id
            for node_id, node in self._roster.nodes.items()
            if node.report.standing is not None and node.report.standing.generation == run.generation
        }
        return may_follow(run.follows, run.ids | told, self._limits, store=False)

    def _gather_again(self, now: float) -> None:
        """A generation that nobody has started yet is given up."""
        self._run = self._before
        self._phase = Phase.GATHER
        self._gather_since = now
        self._ballot, self._ballot_since = self._ballot + self._stride, now

    def _advance_run(self, now: float) -> None:
        run = self._run
        assert run is not None
        if self._claims:
            self._read_claims(now)
        members = self._members()
        if len(members) < len(run.places):
            self._begin_stop(now, cause="a node was lost")
            return
        if self._standing is not None and self._standing.generation != run.generation:
            self._begin_stop(now, cause=f"there is a newer generation, {self._standing.generation}")
            return
        if any(n.report.promised > self._ballot and n.report.generation != run.generation for n in members):
            self._begin_stop(now, cause="a node has promised itself to another leader")
            return
        for node in members:
            if node.report.generation == run.generation:
                self._budget.progressed(node.report.progress)
        current = [node.report for node in members if node.report.generation == run.generation]
        failed = [report.failure for report in current if report.state is WorkerState.FAILED and report.failure]
        if failed:
            self._worker_failed(min(failed, key=lambda failure: failure.time_s), now)
            return
        if any(report.state is WorkerState.STOPPED for report in current):
            self._begin_stop(now, cause="a node that had not heard of the leader ended its workers")
            return
        self._session = len(current) == len(members) and all(
            r.session.opened == r.node.num_workers and r.session.closed == 0 for r in current
        )
        self._seen_session = self._seen_session or self._session
        if self._drain(current, now):
            return
        if len(current) == len(members):
            self._all_current(current, now)

    def _all_current(self, current: list[Report], now: float) -> None:
        run = self._run
        assert run is not None
        if all(report.state is WorkerState.DONE for report in current):
            stopping = self._stop_deadline is not None
            self._end(
                Verdict(kind="stopped", reason="stopped at an agreed step, as asked")
                if stopping
                else Verdict(kind="done", reason="all workers ended")
            )
        elif not run.running_noted and all(report.started_s for report in current):
            run.running_noted = True
            self._note("running", f"restart {self._restarts}")
        elif self._stop_deadline is not None and now >= self._stop_deadline:
            self._end(Verdict(kind="stopped", reason=f"stopped: the grace of {self._limits.grace_s:g} s was over"))
        elif self._regroup_since is not None:
            self._regroup(current, now)
        elif self._may_grow(now) and all(report.state is WorkerState.RUNNING for report in current):
            self._grow(current, now)

    def _may_grow(self, now: float) -> bool:
        assert self._run is not None
        if self._stop_deadline is not None:
            return False
        if self._grown is not None and now - self._grown < self._limits.grow_s:
            return False
        waiting = [
            node
            for node_id, node in self._roster.nodes.items()
            if node_id not in self._run.ids and not node.report.alive and node.report.proof == self._proof
            if node.report.drain is Drain.NONE
        ]
        return self._limits.legal(len(self._run.places) + len(waiting)) > len(self._run.places)

    def _grow(self, current: list[Report], now: float) -> None:
        """End the generation for a larger one: at an agreed step, where there is a Session to agree on one."""
        if any(report.session.closed for report in current):
            return  # the script is about to end
        self._grown = now
        if self._session:
            self._regroup_since = now
            self._note("asked_to_grow", "a node joined: the world grows at an agreed step")
        else:
            self._begin_stop(now, cause="a node joined")

    def _regroup(self, current: list[Report], now: float) -> None:
        """End the generation once all workers wait at the agreed step. Where they have come to the end of the script
        before it, they never do; where a node has lost its daemon for good, there is nothing to wait for."""
        waits = all(report.session.waiting == report.node.num_workers for report in current)
        if waits or any(report.session.opened < report.node.num_workers for report in current):
            self._begin_stop(now, cause="the nodes change")

    # --- nodes that leave

    def _drain(self, current: list[Report], now: float) -> bool:
        """Let the generation end for nodes that are asked to leave; whether it ends now."""
        assert self._run is not None
        ours = self._run.ids | {self._leader_id}
        asked = [
            n.report for name, n in self._roster.nodes.items() if name in ours and n.report.drain is not Drain.NONE
        ]
        if not asked or self._stop_deadline is not None:
            return False
        entered = self._session or self._seen_session or any(report.session.closed for report in current)
        if not entered or any(report.drain is not Drain.ASKED for report in asked):
            self._begin_stop(now, cause=_leaves(asked))
            return True
        if self._session and not self._leaves:
            self._regroup_since, self._leaves = now, True
            self._note("asked_to_drain", f"{_leaves(asked)} at an agreed step")
        return False

    def _dismiss_strangers(self) -> None:
        """Nodes that are asked to leave and have no place, nor had one, leave at once."""
        known = set(self._standing.members) if self._standing is not None else set()
        known |= set(self._run.ids) if self._run is not None else set()
        for node_id, node in self._roster.nodes.items():
            if node.report.drain is Drain.ASKED and node_id not in known:
                self._leaving.add(node_id)

    def _is_leaving(self, node: Node) -> bool:
        return node.report.drain in (Drain.READY, Drain.GOING) or node.report.node.node_id in self._leaving

    def _leaving_ids(self) -> tuple[str, ...]:
        return tuple(sorted(name for name, node in self._roster.nodes.items() if self._is_leaving(node)))

    def _released(self) -> tuple[str, ...]:
        """Those that leave, once the generation that runs no longer needs what they hold."""
        run = self._run
        if run is None or self._phase != Phase.RUN:
            return ()
        safe = any(node.report.protected and node.report.generation == run.generation for node in self._members())
        held = set(run.follows.members) if run.follows is not None and not safe else set()
        return tuple(
            node_id
            for node_id in self._leaving_ids()
            if node_id not in run.ids and node_id != self._leader_id
            if node_id not in held or self._roster.nodes[node_id].report.drain is Drain.GOING
        )

    def _too_few_would_stay(self) -> bool:
        """Whether nodes of the generation are asked to leave, and the others cannot go on without them."""
        if self._phase != Phase.RUN or self._run is None:
            return False
        asked = [node_id for node_id, node in self._roster.nodes.items() if node.report.drain is not Drain.NONE]
        stay = len(self._roster.nodes) - len(asked)
        return bool(self._run.ids.intersection(asked)) and self._limits.legal(stay) == 0

    def _worker_failed(self, failure: Failure, now: float) -> None:
        if self._stop_deadline is not None:
            verdict = Verdict(kind="stopped", reason="a worker failed while the job was being stopped", failure=failure)
            self._begin_stop(now, cause=verdict.reason, failure=failure, verdict=verdict)
            return
        decision = self._budget.failed(failure)
        verdict_or_none = None
        if not decision.restart:
            verdict_or_none = Verdict(kind="failed", reason=decision.reason, failure=failure)
        self._begin_stop(now, cause="a worker failed", failure=failure, verdict=verdict_or_none)

    def _begin_stop(
        self, now: float, *, cause: str, failure: Failure | None = None, verdict: Verdict | None = None
    ) -> None:
        run = self._run
        assert run is not None
        if self._stop_deadline is not None and verdict is None:
            verdict = Verdict(kind="stopped", reason=f"{cause} while the job was being stopped")
        run.verdict = verdict
        run.stop_since = now
        run.stop_sequence = 0
        self._ballot, self._ballot_since = self._ballot + self._stride, now
        self._leaving |= {n.report.node.node_id for n in self._roster.nodes.values() if self._leaves_with(n.report)}
        self._regroup_since, self._leaves = None, False
        self._phase = Phase.STOP
        self._session = False
        self._note("stopping", cause, failure)

    def _leaves_with(self, report: Report) -> bool:
        """Whether the node leaves with the end of this generation: it was prepared for it, or there is no reason to
        stay. A generation that ends for another reason is followed by one from which the node leaves."""
        waits = report.session.waiting == report.node.num_workers
        return report.drain is not Drain.NONE and ((self._leaves and waits) or not self._seen_session)

    def _advance_stop(self, now: float) -> None:
        run = self._run
        assert run is not None
        if run.stop_sequence == 0:
            self._renew_plan()
            run.stop_sequence = self._sequence
        waiting = [n for n in self._members() if n.report.alive or self._seen(n.report) < run.stop_sequence]
        if waiting and now - run.stop_since <= self._limits.stop_timeout_s:
            return
        if waiting:
            hosts = ", ".join(node.report.node.host for node in waiting)
            self._end(
                run.verdict or Verdict(kind="failed", reason=f"workers on {hosts} do not end, not even by SIGKILL")
            )
            return
        self._note("stopped", "no worker is left")
        if run.verdict is not None:
            self._end(run.verdict)
            return
        self._phase = Phase.GATHER
        self._gather_since = now

    def _seen(self, report: Report) -> int:
        """Newest of this leader's plans that the member has acted on."""
        return report.seen if report.leader_id == self._leader_id else 0

    def _heed_stop_requests(self, now: float) -> None:
        requests = [node.report.stop for node in self._roster.nodes.values() if node.report.stop is not None]
        if self._too_few_would_stay():
            requests.append(StopRequest(signal=signal.SIGTERM))
        if not requests:
            return
        urgent = any(request.urgent for request in requests)
        ending = self._phase == Phase.END
        if urgent and not (ending and self._verdict is not None and self._verdict.grace_s == 0.0):
            kind = self._verdict.kind if self._verdict is not None else "stopped"
            failure = self._verdict.failure if self._verdict is not None else None
            self._end(
                Verdict(kind=kind, reason="stopped at once, as asked twice", failure=failure, signal=9, grace_s=0.0)
            )
        elif ending or self._stop_deadline is not None:
            return
        elif self._session:
            self._stop_deadline = now + self._limits.grace_s
            self._note("asked_to_stop", f"asked to stop at an agreed step, within {self._limits.grace_s:g} s")
        else:
            self._end(
                Verdict(
                    kind="stopped",
                    reason="stopped by a signal",
                    signal=requests[0].signal,
                    grace_s=self._limits.grace_s,
                )
            )

    def _end(self, verdict: Verdict) -> None:
        self._verdict = verdict
        self._session = False
        self._phase = Phase.END

    def _advance_end(self) -> None:
        if not self._finished and all(node.report.ended for node in self._roster.nodes.values()):
            self._finished = True
            self._out.append(Finished())

    # --- what members see

    def _plan(self) -> Plan:
        run = self._run
        hidden = self._phase in (FORMING, CLAIMING)
        shown = run is not None and not hidden
        return Plan(
            leader_id=self._leader_id,
            sequence=self._sequence,
            phase=Phase.GATHER if hidden else Phase(self._phase),
            address=self._node.address,
            ballot=self._ballot,
            newest=self._standing.generation if self._standing is not None else None,
            seniority=self._seniority(),
            generation=run.generation if run is not None and shown else None,
            restart_count=self._restarts,
            failures=self._budget.used,
            fresh=run is not None and self._fresh,
            run_id=self._run_id,
            places=run.places if run is not None and shown else (),
            proposed=self._run_standing() if self._phase == FORMING else None,
            store=run.store if run is not None else "",
            session=self._session,
            regroup=self._regroup_since is not None,
            leaves=self._leaves,
            leaving=self._leaving_ids(),
            released=self._released(),
            stopping=self._stop_deadline is not None,
            proof=self._proof,
            verdict=self._verdict,
            dump=self._dump,
        )

    def _seniority(self) -> int:
        if self._standing is not None and self._leader_id in self._standing.members:
            return self._standing.members.index(self._leader_id)
        return _STRANGER + (self._endpoint if self._endpoint >= 0 else _STRANGER)

    def _renew_plan(self) -> None:
        self._sequence += 1
        self._sent = self._plan()
        self._unsent = True

    def _publish(self, now: float) -> None:
        """Send the plan where it has changed, where a node has just joined, and every heartbeat."""
        if self._sent is None or _differ(self._sent, self._plan()):
            self._renew_plan()
        assert self._sent is not None, "a plan was just made"
        if self._unsent or now >= self._next_beat:
            self._unsent = False
            self._next_beat = now + self._limits.heartbeat_s
            self._out.append(Broadcast(self._sent))

    def _note(self, kind: str, text: str, failure: Failure | None = None) -> None:
        number = self._run.generation.generation if self._run is not None else 0
        self._out.append(Note(kind, text, number, failure))


def _leaves(reports: list[Report]) -> str:
    hosts = ", ".join(report.node.host for report in reports)
    return f"{hosts} {'leaves' if len(reports) == 1 else 'leave'} the job"


def _differ(old: Plan, new: Plan) -> bool:
    """Whether two plans differ in anything but their sequence number."""
    return msgspec.structs.replace(old, sequence=0) != msgspec.structs.replace(new, sequence=0)
