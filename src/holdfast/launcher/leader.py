"""The leader's half of membership: which nodes form which generation, and when one ends. Pure.

Rules
-----
1. A generation runs on a fixed set of nodes. Anything that changes the set, or a failure of any worker, ends it on all
   of them; the next one has the next number. Restart count, ranks and store address come from one `Plan`, so they are
   equal everywhere, whatever the rendezvous backend is.
2. A new generation starts only when every living node of the old one has acknowledged its end and has no worker left.
3. A node that has been silent for `dead_after_s` is gone. If the remaining nodes are enough (``--nnodes min:max``) they
   go on at once; else the job waits up to `join_timeout_s` for others.
4. The first generation forms when all `max_nodes` are there, or `last_call_s` after `min_nodes` were. Later ones form
   at once from the nodes that are known: no last call.
5. Nodes beyond `max_nodes` wait and step in. A node that joins while there is room makes the world larger.
6. Only failures of workers are put to the restart budget.
7. Asked to stop while every rank is in a Session, the job gets `grace_s` to end by itself (its workers agree on a
   step); otherwise its workers get the signal at once.

States: GATHER (no generation, or the old one has gone) -> FORMING (the store is being made) -> RUN -> STOP -> GATHER,
and END from anywhere. `handle` takes an event and the time and returns instructions; `Broadcast` carries the whole
state, so lost messages heal with the next heartbeat. What happens when the *leader* is lost is decided by members
(`holdfast.launcher.member`): a plan says who leads, and a new leader must name a newer generation.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from holdfast.checkpoint.version import GenerationId
from holdfast.launcher.budget import RestartBudget
from holdfast.launcher.ranks import node_ranks, places
from holdfast.launcher.wire import (
    PROTOCOL,
    Failure,
    NodeInfo,
    Phase,
    Place,
    Plan,
    Report,
    Verdict,
    WorkerState,
)

FORMING = "forming"
"""A generation is chosen and waits for its store; members still see GATHER."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Numbers that membership follows; times in seconds."""

    min_nodes: int = 1
    max_nodes: int = 1
    join_timeout_s: float = 600.0
    last_call_s: float = 30.0
    heartbeat_s: float = 0.5
    dead_after_s: float = 2.0
    stop_timeout_s: float = 60.0
    """A node whose workers survive SIGKILL for that long (uninterruptible sleep) ends the job."""
    grace_s: float = 30.0

    def __post_init__(self) -> None:
        """Check the combination."""
        if not 0 < self.min_nodes <= self.max_nodes:
            raise ValueError(f"nnodes {self.min_nodes}:{self.max_nodes} is not MIN:MAX with 0 < MIN <= MAX")
        if not 0 < self.heartbeat_s < self.dead_after_s:
            raise ValueError(
                f"a node silent for {self.dead_after_s} s would be dead between beats of {self.heartbeat_s} s"
            )


# --- instructions ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Broadcast:
    """Send the plan to every member."""

    plan: Plan


@dataclass(frozen=True)
class TurnAway:
    """Tell this agent that it cannot belong to the job."""

    node_id: str
    reason: str


@dataclass(frozen=True)
class HostStore:
    """Make a new store for the generation and answer with `stored`."""

    generation: GenerationId


@dataclass(frozen=True)
class Note:
    """Something for the event log: what happened, in which generation."""

    kind: str
    """node_joined, node_lost, forming, running, stopping, stopped, asked_to_stop."""
    text: str
    generation: int = 0
    failure: Failure | None = None


@dataclass(frozen=True)
class Finished:
    """Every member has carried out the end, or is gone: the leader may leave."""


Instruction = Broadcast | TurnAway | HostStore | Note | Finished


@dataclass
class _Node:
    """What the leader knows of one member."""

    report: Report
    heard: float
    joined: int
    """Order of joining."""
    since: float


@dataclass
class _Run:
    """The generation that runs, forms or ends."""

    generation: GenerationId
    places: tuple[Place, ...]
    store: str = ""
    running_noted: bool = False
    stop_sequence: int = 0
    stop_since: float = 0.0
    verdict: Verdict | None = None
    """Set while STOP leads to the END."""
    ids: frozenset[str] = field(default_factory=frozenset)


class Leader:
    """See the module's head. One instance per agent that leads, used by one thread; `now` never goes back."""

    def __init__(
        self,
        *,
        leader_id: str,
        job: str,
        nonce: str,
        run_id: str,
        limits: Limits,
        budget: RestartBudget,
        now: float,
    ) -> None:
        self._leader_id = leader_id
        self._job = job
        self._nonce = nonce
        self._run_id = run_id
        self._limits = limits
        self._budget = budget
        self._phase: Phase | str = Phase.GATHER
        self._nodes: dict[str, _Node] = {}
        self._asking: dict[str, float] = {}
        """Since when agents ask for a node rank that another one holds."""
        self._joined = 0
        self._run: _Run | None = None
        self._incarnation = 0
        self._first_number = 0
        self._restarts = 0
        self._previous_ranks: dict[str, int] = {}
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

    # --- events

    def reported(self, report: Report, now: float) -> list[Instruction]:
        """A report arrived, from this agent's own member too."""
        node = self._nodes.get(report.node.node_id)
        if node is None:
            self._admit(report, now)
        elif report.sequence > node.report.sequence:
            node.report, node.heard = report, now
        return self._advance(now)

    def stored(self, generation: GenerationId, address: str, now: float) -> list[Instruction]:
        """The store of `generation` answers at `address` (host:port)."""
        run = self._run
        if self._phase == FORMING and run is not None and run.generation == generation:
            run.store = address
            self._phase = Phase.RUN
            self._note("forming", f"{len(run.places)} nodes, {sum(p.num_ranks for p in run.places)} ranks")
        return self._advance(now)

    def ticked(self, now: float) -> list[Instruction]:
        """Time has passed: at least every heartbeat."""
        for node_id in [n for n, node in self._nodes.items() if now - node.heard > self._limits.dead_after_s]:
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

    def _admit(self, report: Report, now: float) -> None:
        reason = self._objection(report.node, now)
        if reason is None:
            self._joined += 1
            self._nodes[report.node.node_id] = _Node(report=report, heard=now, joined=self._joined, since=now)
            self._unsent = True
            self._note(
                "node_joined", f"{report.node.host} (agent {report.node.pid}, {report.node.num_workers} workers)"
            )
        elif reason:
            self._out.append(TurnAway(report.node.node_id, reason))

    def _objection(self, node: NodeInfo, now: float) -> str | None:
        """Why the node cannot belong to the job; "" where it shall ask again, None where it may join."""
        if node.protocol != PROTOCOL:
            return f"this agent speaks protocol {node.protocol}, the leader {PROTOCOL}: use one release on all nodes"
        if node.job != self._job:
            return (
                f"the leader at this endpoint serves job {self._job!r}, not {node.job!r}: use another --rdzv-endpoint"
            )
        for other in self._nodes.values():
            if node.rank_hint is not None and other.report.node.rank_hint == node.rank_hint:
                return self._same_rank(node, other.report.node, now)
        return None

    def _same_rank(self, node: NodeInfo, other: NodeInfo, now: float) -> str:
        """Two agents of one rank: the older may be dead and not yet missed, so the newer asks for a while."""
        since = self._asking.setdefault(node.node_id, now)
        if now - since < 2 * self._limits.dead_after_s:
            return ""
        return f"node rank {node.rank_hint} is taken by agent {other.pid} on {other.host}"

    def _lost(self, node_id: str, now: float) -> None:
        node = self._nodes.pop(node_id)
        text = f"{node.report.node.host} (agent {node.report.node.pid}) silent for {self._limits.dead_after_s:g} s"
        self._note("node_lost", text)
        if self._phase in (Phase.RUN, FORMING) and self._run is not None and node_id in self._run.ids:
            self._begin_stop(now, cause=f"lost node {text}")

    def _members(self) -> list[_Node]:
        """Living nodes of the current generation."""
        assert self._run is not None
        return [self._nodes[place.node_id] for place in self._run.places if place.node_id in self._nodes]

    # --- the machine

    def _advance(self, now: float) -> list[Instruction]:
        before: Phase | str | None = None
        while before != self._phase:
            before = self._phase
            self._heed_stop_requests(now)
            match self._phase:
                case Phase.GATHER:
                    self._advance_gather(now)
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
        idle = [node for node in self._nodes.values() if not node.report.alive]
        chosen = sorted(idle, key=lambda n: (n.report.node.node_id not in self._previous_ranks, n.joined))
        chosen = chosen[: self._limits.max_nodes]
        if len(chosen) < self._limits.min_nodes:
            self._enough_since = None
            if now - self._gather_since > self._limits.join_timeout_s:
                self._end(self._too_few(len(chosen)))
            return
        if self._run is None:
            self._enough_since = now if self._enough_since is None else self._enough_since
            full = len(chosen) == self._limits.max_nodes
            if not full and now - self._enough_since < self._limits.last_call_s:
                return
        self._form(sorted(chosen, key=lambda n: n.joined))

    def _too_few(self, count: int) -> Verdict:
        reason = (
            f"{count} of at least {self._limits.min_nodes} nodes were there within {self._limits.join_timeout_s:g} s"
        )
        return Verdict(kind="failed" if self._run is None else "stopped", reason=reason)

    def _form(self, chosen: list[_Node]) -> None:
        if self._run is None:
            self._found_incarnation(chosen)
        else:
            self._outnumber_strangers(chosen)
        number = self._first_number if self._run is None else self._run.generation.generation + 1
        infos = [node.report.node for node in chosen]
        ranks = node_ranks(infos, self._previous_ranks)
        self._run = _Run(
            generation=GenerationId(incarnation=self._incarnation, nonce=self._nonce, generation=number),
            places=places(infos, ranks, {n.report.node.node_id: n.report.daemon.endpoint for n in chosen}),
            ids=frozenset(ranks),
        )
        self._restarts = number - self._first_number
        self._previous_ranks = ranks
        self._session = False
        self._dump = 0
        self._phase = FORMING
        self._out.append(HostStore(self._run.generation))

    def _found_incarnation(self, chosen: list[_Node]) -> None:
        """One more than the largest number that any node has seen, in memory or under another leader."""
        known = [node.report.daemon.newest_incarnation for node in self._nodes.values()]
        known += [seen.incarnation for node in self._nodes.values() for seen in _seen_by(node.report)]
        self._incarnation = max(known) + 1
        self._first_number = 1
        self._budget.carry_over(max(node.report.restart_count for node in self._nodes.values()))
        newest = max(chosen, key=lambda n: (n.report.daemon.run_id is not None, n.report.daemon.newest_incarnation))
        self._run_id = newest.report.daemon.run_id or self._run_id

    def _outnumber_strangers(self, chosen: list[_Node]) -> None:
        """A node that comes from another incarnation with a number like ours would take our generations for old."""
        others = [seen for node in chosen for seen in _seen_by(node.report) if seen.nonce != self._nonce]
        newest = max((seen.incarnation for seen in others), default=0)
        self._incarnation = max(self._incarnation, newest + 1)

    def _advance_run(self, now: float) -> None:
        run = self._run
        assert run is not None
        members = self._members()
        if len(members) < len(run.places):
            self._begin_stop(now, cause="a node was lost")
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
        elif self._has_newcomer() and all(report.state is WorkerState.RUNNING for report in current):
            self._begin_stop(now, cause="a node joined")

    def _has_newcomer(self) -> bool:
        assert self._run is not None
        waiting = [n for i, n in self._nodes.items() if i not in self._run.ids and not n.report.alive]
        return bool(waiting) and len(self._run.places) < self._limits.max_nodes and self._stop_deadline is None

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
        self._phase = Phase.STOP
        self._session = False
        self._note("stopping", cause, failure)

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
        requests = [node.report.stop for node in self._nodes.values() if node.report.stop is not None]
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
        if not self._finished and all(node.report.ended for node in self._nodes.values()):
            self._finished = True
            self._out.append(Finished())

    # --- what members see

    def _plan(self) -> Plan:
        run = self._run
        return Plan(
            leader_id=self._leader_id,
            sequence=self._sequence,
            phase=Phase.GATHER if self._phase == FORMING else Phase(self._phase),
            generation=run.generation if run is not None and self._phase != FORMING else None,
            restart_count=self._restarts,
            fresh=run is not None and run.generation.generation == self._first_number,
            run_id=self._run_id,
            places=run.places if run is not None and self._phase != FORMING else (),
            store=run.store if run is not None else "",
            session=self._session,
            verdict=self._verdict,
            dump=self._dump,
        )

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


def _seen_by(report: Report) -> list[GenerationId]:
    """Newest generations that the node knows, under this agent and before."""
    return [generation for generation in (report.generation, report.daemon.generation) if generation is not None]


def _differ(old: Plan, new: Plan) -> bool:
    """Whether two plans differ in anything but their sequence number."""
    return msgspec.structs.replace(old, sequence=0) != msgspec.structs.replace(new, sequence=0)
