"""The leader's half of membership: which nodes form which generation, and when one ends. Pure.

Rules
-----
1. A generation runs on a fixed set of nodes. Anything that changes the set, or a failure of any worker, ends it on all
   of them; the next one has a larger number. Restart count, ranks and store address come from one `Plan`, so they are
   equal everywhere, whatever the rendezvous backend is.
2. A new generation starts only when every living node of the old one has acknowledged its end and has no worker left.
3. A node that has been silent for `dead_after_s` is gone; this one is not, which was only suspended. If the remaining
   nodes are enough (``--nnodes min:max``, ``--hold-node-multiple``) and may go on (`holdfast.launcher.quorum`) they do
   so at once; else the job waits up to `join_timeout_s` for others.
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

from holdfast.checkpoint.version import GenerationId
from holdfast.launcher.leader_forming import FENCE_S, FormingLeader
from holdfast.launcher.leader_orders import Finished, HostStore, Instruction, TurnAway
from holdfast.launcher.leader_state import CLAIMING, FORMING
from holdfast.launcher.wire import (
    Drain,
    Failure,
    Phase,
    Report,
    Standing,
    StopRequest,
    Verdict,
    WorkerState,
)


class Leader(FormingLeader):
    """See the module's head. One instance per time that an agent leads, used by one thread; `now` never goes back."""

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
        if self._phase == CLAIMING and run is not None and claim == self._run_standing():
            if won:
                self._fenced_until = now + FENCE_S if run.overtakes else now
                self._standing = run.known = claim
                self._phase = FORMING
                self._out.append(HostStore(run.generation))
            else:
                self._claim_lost(run, now)
        return self._advance(now)

    def ticked(self, now: float) -> list[Instruction]:
        """Time has passed: at least every heartbeat."""
        for node_id in self._roster.silent(now):
            if node_id != self._leader_id:  # it may have been suspended; others then go on without it, it is not lost
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

    def _heard(self, report: Report, now: float) -> None:
        info = report.node
        if report.ended and self._phase != Phase.END and (self._run is None or info.node_id not in self._run.ids):
            if self._roster.nodes.pop(info.node_id, None) is not None:
                self._note("node_left", f"{info.host} (agent {info.pid})")
            return
        self._growths = max(self._growths, report.growths)
        if report.grown_ago_s:
            self._grown = max(now - report.grown_ago_s, self._grown or 0.0)
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
        self._grown, self._growths = now, self._growths + 1
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

    def _advance_end(self) -> None:
        if not self._finished and all(node.report.ended for node in self._roster.nodes.values()):
            self._finished = True
            self._out.append(Finished())


def _leaves(reports: list[Report]) -> str:
    hosts = ", ".join(report.node.host for report in reports)
    return f"{hosts} {'leaves' if len(reports) == 1 else 'leave'} the job"
