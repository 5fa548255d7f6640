"""A member's half of membership: what this node does about the leader's plan. Pure.

Every agent has one, the leader's too. It is level-triggered: whatever the newest plan says is compared with what this
node's workers are doing, and the difference becomes instructions. So it does not matter which plans were lost.

Rules
-----
1. Workers of a generation start only when those of the one before have gone from this node.
2. Plans of a leader count in the order of their sequence numbers. Another leader's plan counts where this node has
   none, or where it outranks the one that it follows (`authority`). Older ones are
   ignored: they cannot call anything back.
3. A leader that is silent for `dead_after_s` is gone: this node's workers end (they could not make progress), and the
   node asks on, for `join_timeout_s`. A leader that answers is followed.
4. A member promises every ballot once, to one leader. It accepts only proposals, and starts only generations, of the
   newest ballot that it promised.
5. Workers that survive SIGKILL are waited for no longer: the node leaves, and the others miss it as a lost one.
6. Asked to leave (a notice that this host will be taken away), a node goes on until the leader has a generation end for
   it, and stays without workers until it is released. When its grace is over it is in a hurry, and soon after it goes.
7. A stop request outlives its generation: it is repeated to the leader in every report, and to the snapshot daemon in
   every generation whose ranks are all in a Session.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from holdfast.checkpoint.version import GenerationId
from holdfast.launcher.limits import Limits
from holdfast.launcher.wire import (
    DaemonInfo,
    Drain,
    Failure,
    NodeInfo,
    Phase,
    Place,
    Plan,
    Pulse,
    Rejected,
    Report,
    SessionState,
    Standing,
    StopRequest,
    Verdict,
    WorkerState,
)

_DRAINED = Verdict(kind="drained", reason="this host is to be taken away, as asked; the job goes on without it")


@dataclass(frozen=True)
class StartWorkers:
    """Start this node's workers of the plan's generation."""

    plan: Plan
    place: Place


@dataclass(frozen=True)
class StopWorkers:
    """End this node's workers of the generation; `gone` is awaited."""

    generation: GenerationId
    reason: str
    signal: int = 0
    """0: the default one."""
    grace_s: float | None = None
    """None: as after a failure."""


@dataclass(frozen=True)
class AskStop:
    """Ask the snapshot daemon to end the job at an agreed step."""

    generation: GenerationId


@dataclass(frozen=True)
class AskRegroup:
    """Ask the snapshot daemon for an agreed step at which all workers wait for their end."""

    generation: GenerationId
    leaves: bool = False
    """A node leaves the job with what it holds."""


@dataclass(frozen=True)
class ReadProof:
    """Look whether this nonce stands in the claim store, and answer with `proved`."""

    nonce: str


@dataclass(frozen=True)
class SendReport:
    """Send to the leader; while there is none, to all that may know of one."""

    report: Report


@dataclass(frozen=True)
class LostLeader:
    """The leader is silent; for the event log."""


@dataclass(frozen=True)
class SeeksOn:
    """No leader has answered for the last-call time; for people, once."""


@dataclass(frozen=True)
class Leave:
    """The job is over on this node: persist and shut down as the verdict says, then exit."""

    verdict: Verdict


Instruction = StartWorkers | StopWorkers | AskStop | AskRegroup | ReadProof | SendReport | LostLeader | SeeksOn | Leave


def authority(plan: Plan) -> tuple[bool, int, int, int, str]:
    """Of two leaders that hear each other the one with the smaller authority yields.

    One whose generation runs comes before one that gathers nodes; then the newer generation decides, then the lower
    node rank in it, or the lower endpoint where there is none.
    """
    newest = plan.newest
    numbers = (newest.incarnation, newest.generation) if newest is not None else (0, 0)
    return (plan.phase is Phase.RUN, *numbers, -plan.seniority, plan.leader_id)


class Member:
    """See the module's head. One per agent, used by one thread."""

    def __init__(self, *, node: NodeInfo, limits: Limits, now: float) -> None:
        self._limits = limits
        self._report = Report(node=node, sequence=0)
        self._plan: Plan | None = None
        self._heard = now
        self._seeking_since = now
        self._stopping: tuple[GenerationId, bool] | None = None
        """Generation whose end was ordered, and whether at once."""
        self._asked: GenerationId | None = None
        self._regroup_asked: tuple[GenerationId, bool] | None = None
        self._drain_until = float("inf")
        """When a node that is asked to leave is in a hurry, and then when it goes at last."""
        self._grown: float | None = None
        """When this node heard that the world grows, None where it grew last before that."""
        self._lost_leader = ""
        self._seeks_on = False
        """It was told that this node goes on to seek a leader."""
        self._left = False
        self._lonely_verdict: Verdict | None = None
        """How the node leaves once its workers have ended, where no leader says so."""
        self._dirty = True
        self._next_beat = now
        self._out: list[Instruction] = []

    @property
    def plan(self) -> Plan | None:
        """The newest plan, None while no leader is known."""
        return self._plan

    @property
    def report(self) -> Report:
        """What the leader is told."""
        return self._report

    @property
    def left(self) -> bool:
        """The job is over on this node."""
        return self._left

    @property
    def seeking_since(self) -> float:
        """Since when there has been no leader."""
        return self._seeking_since

    @property
    def lost_leader(self) -> str:
        """Node id of the leader that was last found silent, "" where there was none."""
        return self._lost_leader

    # --- events

    def planned(self, plan: Plan, now: float) -> list[Instruction]:
        """A plan arrived."""
        if self._counts(plan):
            self._heard = now
            if self._plan is None or plan.sequence != self._plan.sequence or plan.leader_id != self._plan.leader_id:
                self._take(plan, now)
        return self._advance(now)

    def _take(self, plan: Plan, now: float) -> None:
        if self._plan is None or self._plan.leader_id != plan.leader_id:
            self._dirty = True
        self._plan = plan
        if plan.ballot > self._report.promised:
            self._update(promised=plan.ballot, promised_to=plan.leader_id)
        if plan.growths > self._report.growths:
            self._grown = now if self._report.standing is not None else None
            self._update(growths=plan.growths)
        for standing in (_standing(plan), plan.proposed if self._is_promised(plan) else None):
            if standing is not None and standing.is_news_after(self._report.standing):
                self._update(standing=standing)
        self._update(leader_id=plan.leader_id, seen=plan.sequence, failures=max(plan.failures, self._report.failures))
        if self._report.node.node_id in plan.leaving and self._report.drain is Drain.ASKED:
            waited = self._report.session.waiting == self._report.node.num_workers
            self._update(drain=Drain.READY if waited else Drain.GOING)
        if plan.proof and plan.proof != self._report.proof:
            self._out.append(ReadProof(plan.proof))

    def led_away(self, now: float) -> list[Instruction]:
        """The leader has yielded to another one, which will call: this is no loss, and nobody has to be missed."""
        if self._plan is not None and self._plan.phase is not Phase.END:
            self._seek(now)
        return self._advance(now)

    def proved(self, nonce: str, now: float) -> list[Instruction]:
        """The nonce stands in the claim store."""
        self._update(proof=nonce)
        return self._advance(now)

    def rejected(self, rejected: Rejected, now: float) -> list[Instruction]:
        """The leader turned this node away; it does not do that to a node with a place."""
        if self._plan is None or self._place(self._plan) is None:
            self._leave(Verdict(kind="failed", reason=rejected.reason))
        return self._advance(now)

    def daemon(self, info: DaemonInfo, now: float) -> list[Instruction]:
        """The snapshot daemon has told who it is."""
        self._update(daemon=info)
        return self._advance(now)

    def started(self, generation: GenerationId, started_s: float, now: float) -> list[Instruction]:
        """All workers of the generation have been spawned (at `started_s`, time.time())."""
        if generation == self._report.generation:
            self._update(started_s=started_s)
        return self._advance(now)

    def failed(self, generation: GenerationId, failure: Failure, now: float) -> list[Instruction]:
        """A worker of the generation failed."""
        if generation == self._report.generation and self._report.state is WorkerState.RUNNING:
            self._update(state=WorkerState.FAILED, failure=failure)
        return self._advance(now)

    def done(self, generation: GenerationId, now: float) -> list[Instruction]:
        """All workers of the generation ended with exit code 0, and none is left."""
        if generation == self._report.generation and self._report.state is WorkerState.RUNNING:
            self._update(state=WorkerState.DONE, alive=False)
        return self._advance(now)

    def gone(self, generation: GenerationId, now: float) -> list[Instruction]:
        """No process of the generation is left on this node."""
        if generation == self._report.generation:
            running = self._report.state is WorkerState.RUNNING
            self._update(alive=False, state=WorkerState.STOPPED if running else self._report.state)
            self._stopping = None
        return self._advance(now)

    def stuck(self, generation: GenerationId, reason: str, now: float) -> list[Instruction]:
        """Workers of the generation outlive SIGKILL: this node is of no use any more, and leaves as it is."""
        if generation == self._report.generation and not self._left:
            self._left = True
            self._update(ended=True)
            self._out.append(Leave(Verdict(kind="failed", reason=reason)))
        return self._advance(now)

    @property
    def in_session(self) -> bool:
        """Whether workers of this node have opened a Session in the newest generation."""
        return self._report.session.opened > 0

    def session(self, state: SessionState, now: float) -> list[Instruction]:
        """The Sessions of this node's workers came further."""
        self._update(session=state)
        return self._advance(now)

    def progressed(self, step: int, now: float, *, protected: bool = False) -> list[Instruction]:
        """The version of `step` is complete; `protected`: it, or an older one of the generation, is protected."""
        self._update(progress=max(step, self._report.progress), protected=protected)
        return self._advance(now)

    def pulses(self, pulses: tuple[Pulse, ...]) -> None:
        """What is seen of this node's workers; goes out with the next report, and is no reason for one."""
        self._report = msgspec.structs.replace(self._report, pulses=pulses)

    def asked_to_stop(self, request: StopRequest, now: float) -> list[Instruction]:
        """Somebody wants the job to end."""
        self._update(stop=request)
        if self._plan is None:
            self._leave(Verdict(kind="stopped", reason="stopped by a signal", signal=request.signal, grace_s=0.0))
        return self._advance(now)

    def asked_to_drain(self, now: float, *, urgent: bool = False) -> list[Instruction]:
        """This host is about to be taken away: only this node leaves, at once where `urgent`."""
        if self._report.drain is Drain.NONE:
            self._drain_until = now + self._limits.grace_s
            self._update(drain=Drain.ASKED)
        if urgent:
            self._hurry(now)
        if self._plan is None and self._report.generation is None:
            self._leave(_DRAINED)
        return self._advance(now)

    def _hurry(self, now: float) -> None:
        if self._report.drain is not Drain.GOING:
            self._drain_until = now + 3 * self._limits.dead_after_s
            self._update(drain=Drain.GOING)

    def _drains(self, plan: Plan | None, now: float) -> bool:
        """Whether this node goes now: it is released, or nobody has let it go in time."""
        late, hurries = now >= self._drain_until, self._report.drain is Drain.GOING
        if late and not hurries:
            self._hurry(now)
        released = plan is not None and self._report.node.node_id in plan.released and not self._report.alive
        return released or (late and hurries)

    def ticked(self, now: float) -> list[Instruction]:
        """Time has passed: at least every heartbeat."""
        following = self._plan is not None and self._plan.phase is not Phase.END
        if following and now - self._heard > self._limits.dead_after_s:
            assert self._plan is not None, "it was followed"
            self._lost_leader = self._plan.leader_id
            self._seek(now)
            self._out.append(LostLeader())
        if self._plan is None and now - self._seeking_since > self._limits.join_timeout_s:
            reason = f"no leader answered at the rendezvous endpoint for {self._limits.join_timeout_s:g} s"
            kind = "failed" if self._report.generation is None else "stopped"
            self._leave(Verdict(kind=kind, reason=reason))  # type: ignore[arg-type]  # both are literals
        elif self._plan is None and not self._seeks_on and now - self._seeking_since >= self._limits.last_call_s:
            self._seeks_on = True
            self._out.append(SeeksOn())
        return self._advance(now)

    def _seek(self, now: float) -> None:
        self._plan = None
        self._seeking_since = now
        self._seeks_on = False
        self._update(leader_id="", seen=0)

    def next_wake(self, now: float) -> float:
        """Seconds until `ticked` has something to do."""
        return max(0.0, self._next_beat - now)

    # --- the machine

    def _counts(self, plan: Plan) -> bool:
        known = self._plan
        if known is None:
            return plan.phase is not Phase.END or self._may_heed_end(plan)
        if plan.leader_id == known.leader_id:
            return plan.sequence >= known.sequence
        if Phase.END in (known.phase, plan.phase):
            return False
        return authority(plan) > authority(known)

    def _may_heed_end(self, plan: Plan) -> bool:
        """A leader that knows less than this node ends only those that follow it."""
        standing = self._report.standing
        return standing is None or (plan.newest is not None and plan.newest >= standing.generation)

    def _advance(self, now: float) -> list[Instruction]:
        plan = self._plan
        if not self._left:
            self._act(plan, now)
        if self._dirty or now >= self._next_beat:
            self._dirty = False
            self._next_beat = now + self._limits.heartbeat_s
            grown_ago_s = now - self._grown if self._grown is not None else 0.0
            self._report = msgspec.structs.replace(
                self._report, sequence=self._report.sequence + 1, grown_ago_s=grown_ago_s
            )
            self._out.append(SendReport(self._report))
        out, self._out = self._out, []
        return out

    def _act(self, plan: Plan | None, now: float) -> None:
        if self._lonely_verdict is not None:
            self._leave(self._lonely_verdict)
        elif self._report.drain is not Drain.NONE and not _is_over(plan) and self._drains(plan, now):
            self._leave(_DRAINED)
        elif plan is None:
            self._stop("the leader is silent")
        else:
            self._follow(plan)

    def _place(self, plan: Plan) -> Place | None:
        return next((place for place in plan.places if place.node_id == self._report.node.node_id), None)

    def _follow(self, plan: Plan) -> None:
        place = self._place(plan)
        current = self._report.generation
        match plan.phase:
            case Phase.RUN if place is not None:
                if current == plan.generation:
                    self._ask_stop(plan)
                elif not self._is_promised(plan):
                    self._stop("another leader was promised more")
                elif self._report.alive:
                    self._stop("a new generation starts")
                else:
                    self._start(plan, place)
            case Phase.END:
                assert plan.verdict is not None, "an end without a verdict"
                self._stop(plan.verdict.reason, plan.verdict.signal, plan.verdict.grace_s)
                if not self._report.alive:
                    self._leave(plan.verdict)
            case Phase.STOP:
                self._stop("the generation has ended")
            case _:
                self._stop("this node is not in the generation")

    def _is_promised(self, plan: Plan) -> bool:
        return plan.ballot == self._report.promised and plan.leader_id == self._report.promised_to

    def _start(self, plan: Plan, place: Place) -> None:
        assert plan.generation is not None, "a run without a generation"
        self._stopping = None
        self._update(
            generation=plan.generation,
            restart_count=plan.restart_count,
            state=WorkerState.RUNNING,
            alive=True,
            failure=None,
            session=SessionState(),
            started_s=0.0,
            pulses=(),
            standing=_standing(plan),
            protected=False,
        )
        self._out.append(StartWorkers(plan, place))

    def _stop(self, reason: str, signal: int = 0, grace_s: float | None = None) -> None:
        generation = self._report.generation
        if not self._report.alive or generation is None:
            return
        order = (generation, grace_s == 0.0)
        if self._stopping in (order, (generation, True)):
            return
        self._stopping = order
        self._out.append(StopWorkers(generation, reason, signal, grace_s))

    def _ask_stop(self, plan: Plan) -> None:
        wanted = self._report.stop is not None or (plan.stopping and self._report.drain is not Drain.NONE)
        if plan.session and wanted and self._asked != plan.generation:
            assert plan.generation is not None, "a run without a generation"
            self._asked = plan.generation
            self._out.append(AskStop(plan.generation))
        if plan.regroup and plan.generation is not None:
            asked = (plan.generation, plan.leaves)
            if self._regroup_asked not in (asked, (plan.generation, True)):
                self._regroup_asked = asked
                self._out.append(AskRegroup(*asked))

    def _leave(self, verdict: Verdict) -> None:
        if self._left:
            return
        if self._report.alive:  # only without a leader: with one, `_follow` waits for the workers first
            self._stop(verdict.reason, verdict.signal, verdict.grace_s)
            self._lonely_verdict = verdict
            return
        self._left = True
        self._update(ended=True)
        self._out.append(Leave(verdict))

    def _update(self, **changes: object) -> None:
        self._report = msgspec.structs.replace(self._report, **changes)
        self._dirty = True


def _is_over(plan: Plan | None) -> bool:
    return plan is not None and plan.phase is Phase.END


def _standing(plan: Plan) -> Standing | None:
    """The generation of the plan and who it is made of."""
    if plan.generation is None or not plan.places:
        return None
    ordered = sorted(plan.places, key=lambda place: place.node_rank)
    return Standing(
        generation=plan.generation,
        members=tuple(place.node_id for place in ordered),
        addresses=tuple(place.address for place in ordered),
        run_id=plan.run_id,
        restart_count=plan.restart_count,
    )
