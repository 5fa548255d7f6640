"""What a leader knows, and what it tells its members: the base of `holdfast.launcher.leader`. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from holdfast.checkpoint.version import GenerationId
from holdfast.launcher.budget import RestartBudget
from holdfast.launcher.leader_orders import Broadcast, Instruction, Note, ReadClaims
from holdfast.launcher.limits import Limits
from holdfast.launcher.roster import Node, Roster
from holdfast.launcher.wire import Drain, Failure, NodeInfo, Phase, Place, Plan, Report, Standing, Verdict

CLAIMING = "claiming"
"""A generation is chosen and its number is being claimed; members still see GATHER."""
FORMING = "forming"
"""A generation is chosen and waits for its store; members still see GATHER."""
CLAIM_AGAIN_S = 2.0
"""How often the claim store is read."""
_STRANGER = 1 << 20
"""Seniority of a leader without a generation, before the number of its endpoint."""


@dataclass
class Run:
    """The generation that runs, forms or ends."""

    generation: GenerationId
    places: tuple[Place, ...]
    follows: Standing | None
    """The generation before; None for the first one of an incarnation."""
    known: Standing | None = None
    """Newest generation that the leader knew when it chose this one, or the claim for it."""
    overtakes: bool = False
    """See `Standing`."""
    store: str = ""
    running_noted: bool = False
    stop_sequence: int = 0
    stop_since: float = 0.0
    verdict: Verdict | None = None
    """Set while STOP leads to the END."""
    ids: frozenset[str] = field(default_factory=frozenset)


class LeaderState:
    """See the module's head; `Leader` is made of it."""

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
        self._founded: list[str] = []
        """Nonces of the incarnations that this leader has begun to found."""
        self._run_id = run_id
        self._limits = limits
        self._budget = budget
        self._endpoint = endpoint
        self._claims = claims
        self._missing = missing
        self._phase: Phase | str = Phase.GATHER
        self._roster = Roster(job=node.job, limits=limits)
        self._run: Run | None = None
        self._before: Run | None = None
        """The one before `_run`, to go back to."""
        self._standing: Standing | None = None
        """Newest generation that anybody here knows."""
        self._proposals: set[GenerationId] = set()
        """What this leader has proposed and not let run; never what it has claimed."""
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
        self._growths = 0
        self._grown: float | None = None
        """When the world last grew, or was about to."""
        self._waiting_noted = self._few_noted = ""
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

    def _members(self) -> list[Node]:
        """Living nodes of the current generation."""
        assert self._run is not None
        return [self._roster.nodes[place.node_id] for place in self._run.places if place.node_id in self._roster.nodes]

    def _learn(self, now: float) -> None:
        """Take over the newest generation, the largest ballot and the failures that any node knows of."""
        for node in self._roster.nodes.values():
            report = node.report
            self._budget.carry_over(report.failures)
            standing = self._known_to(report)
            if standing is not None and self._is_newer(standing):
                self._standing = standing
        rivals = [
            node.report.promised + (node.report.promised_to != self._leader_id)
            for node in self._roster.nodes.values()
            if node.report.promised >= self._ballot
        ]
        number = self._newest_number() if self._standing is not None and self._ours() else 0
        needed = max([number + 1, *rivals]) if self._phase == Phase.GATHER else 0
        if needed > self._ballot:
            self._ballot, self._ballot_since = needed, now

    def _known_to(self, report: Report) -> Standing | None:
        """Newest generation that the node knows, but for what this leader has proposed and never let run."""
        standing = report.standing
        return standing if standing is not None and standing.generation not in self._proposals else None

    def _is_new(self, report: Report) -> bool:
        """Whether the node never had a place, nor knows who had, but for an incarnation that this leader gave up."""
        known = report.standing
        given_up = known is not None and known.generation in self._proposals and not known.bases
        return known is None or (given_up and report.generation is None)

    def _newest_number(self) -> int:
        """The largest number in the incarnation: one of two nodes that lost each other is not followed, but counts."""
        assert self._standing is not None, "a generation is known"
        nonce = self._standing.generation.nonce
        seats = [node.report.daemon.generation for node in self._roster.nodes.values()]
        return max(g.generation for g in (self._standing.generation, *seats) if g is not None and g.nonce == nonce)

    def _ours(self) -> bool:
        """Whether a successor of the newest known generation would belong to its incarnation.

        A claim that this leader made does, though it gave up what it claimed: the store may have had it already.
        """
        if self._run is None or self._standing is None:
            return True
        nonce = self._standing.generation.nonce
        return nonce == self._nonce or (self._claims and nonce in self._founded)

    def _is_newer(self, standing: Standing) -> bool:
        """Whether it is newer than what is known; a leader with generations of its own heeds no other incarnation."""
        if self._run is not None and standing.generation.nonce != self._nonce:
            return False
        return standing.is_news_after(self._standing)

    def _is_leaving(self, node: Node) -> bool:
        return node.report.drain in (Drain.READY, Drain.GOING) or node.report.node.node_id in self._leaving

    def _leaving_ids(self) -> tuple[str, ...]:
        return tuple(sorted(name for name, node in self._roster.nodes.items() if self._is_leaving(node)))

    def _previous_ranks(self) -> dict[str, int]:
        if self._standing is None:
            return {}
        return {node_id: rank for rank, node_id in enumerate(self._standing.members)}

    def _run_standing(self) -> Standing:
        run = self._run
        assert run is not None
        ordered = sorted(run.places, key=lambda place: place.node_rank)
        before = run.follows if run.generation in self._proposals else None
        return Standing(
            generation=run.generation,
            members=tuple(place.node_id for place in ordered),
            addresses=tuple(place.address for place in ordered),
            run_id=self._run_id,
            restart_count=self._restarts,
            bases=tuple(dict.fromkeys((before.members, *before.bases))) if before is not None else (),
            overtakes=run.overtakes,
        )

    def _read_claims(self, now: float) -> bool:
        """Whether the newest claim is known; asks for it at first, and while this side waits."""
        if now >= self._claims_next:
            self._claims_next = now + CLAIM_AGAIN_S
            self._out.append(ReadClaims(self._proof))
        return self._claims_known

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

    def _end(self, verdict: Verdict) -> None:
        self._verdict = verdict
        self._session = False
        self._phase = Phase.END

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
            growths=self._growths,
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


def _differ(old: Plan, new: Plan) -> bool:
    """Whether two plans differ in anything but their sequence number."""
    return msgspec.structs.replace(old, sequence=0) != msgspec.structs.replace(new, sequence=0)
