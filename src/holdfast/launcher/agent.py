"""The agent of one node: one loop on the main thread that waits for events and carries out what the machines decide.

Events come from worker exits (pidfd), signals (a pipe), other agents (ZeroMQ), the snapshot daemon (ZeroMQ, pidfd) and
time. They go to the `Council`, this agent's place among the others; what is to be done on this node is carried out
here, in order. The loop never blocks for longer than a heartbeat, because a silent agent is a dead one to its peers.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import zmq

from holdfast import environment
from holdfast.checkpoint.version import GenerationId
from holdfast.errors import PeerError
from holdfast.launcher import events, member
from holdfast.launcher.arguments import Launch
from holdfast.launcher.console import say
from holdfast.launcher.council import Council, NodeInstruction
from holdfast.launcher.daemons import ANSWER_S, DaemonDied, DaemonLink
from holdfast.launcher.hangs import HangLimits
from holdfast.launcher.notices import HealthCheck, NoticeFile
from holdfast.launcher.orders import OURS, holdfast_variables, start_message, worker_spec
from holdfast.launcher.processes import Guard, reap_orphans
from holdfast.launcher.rehearsal import Rehearsal, StepReader
from holdfast.launcher.reserves import Reserve
from holdfast.launcher.seats import RunRecord, Seat
from holdfast.launcher.sessions import SessionBook
from holdfast.launcher.signals import SignalPipe
from holdfast.launcher.timeline import signal_name
from holdfast.launcher.vigil import DumpStacks, Vigil, WorkerHangs
from holdfast.launcher.watching import NodeWatch
from holdfast.launcher.wire import (
    DaemonInfo,
    Failure,
    Place,
    Plan,
    StopRequest,
    Verdict,
)
from holdfast.launcher.workers import WorkerExit, WorkerGroup, cannot_run, message_of
from holdfast.snapshot.messages import (
    Bye,
    EndGeneration,
    Notice,
    Progress,
    Refused,
    RequestRegroup,
    RequestStop,
    RestoreChosen,
    SessionPhase,
    StartGeneration,
)

logger = logging.getLogger(__name__)

DAEMON_START_S = 20.0
"""How long a daemon may take to answer before the job goes on without snapshots in memory."""
BYE_S = 600.0
"""How long the daemon may take to write the newest version at the end of a failed job."""
FAULT_POLL_S = 0.005
"""How often steps are read while a rehearsed kill of agent or daemon is due."""


@dataclass(frozen=True)
class Ending:
    """How the job ended on this node."""

    verdict: Verdict
    failures: Mapping[int, Any]
    """torch's ProcessFailure by global rank, of this node's workers in the last generation."""
    bye: Bye | None


class Agent:
    """See the module's head. `run` is called once, on the main thread."""

    def __init__(
        self,
        launch: Launch,
        *,
        seat: Seat,
        run_id: str,
        run_dir: Path,
        log: events.EventLog,
        guard: Guard,
        signals: SignalPipe,
        link: DaemonLink | None,
        context: zmq.Context[zmq.Socket[bytes]],
        address: str,
    ) -> None:
        self._launch = launch
        self._seat = seat
        self._run_id = run_id
        self._run_dir = run_dir
        self._log = log
        self._guard = guard
        self._signals = signals
        self._link = link
        self._spec = worker_spec(launch)
        self._inherited = {k: v for k, v in os.environ.items() if k not in OURS}
        self._faults = launch.hold.faults or environment.fault_schedule()
        self._rehearsal = Rehearsal(self._faults, run_dir, self._write)
        self._queue: deque[NodeInstruction] = deque()
        self._watch = NodeWatch(seat.arena, run_dir)
        self._vigil = Vigil(HangLimits(hang_timeout_s=launch.hold.hang_timeout_s), self._write)
        self._council = Council(
            launch,
            address=address,
            run_id=run_id,
            context=context,
            write=self._write,
            observe_report=self._vigil.observe,
            observe_plan=self._vigil.planned,
        )
        self._group: WorkerGroup | None = None
        self._generation: GenerationId | None = None
        self._reserve = Reserve(
            launch,
            seat=seat,
            guard=guard,
            num_workers=self._spec.num_workers,
            wanted=link is not None and self._spec.numa_options is None,
            write=self._write,
        )
        self._starting: tuple[Plan, Place, StartGeneration | None] | None = None
        self._old_groups: deque[WorkerGroup] = deque(maxlen=1)
        self._steps = StepReader(seat.arena) if link is not None else None
        self._sessions = SessionBook()
        self._counted: Counter[str] = Counter()
        """Lines of the daemon that are counted, by what they are about."""
        self._notice = NoticeFile(launch.hold.notice_file)
        self._health = HealthCheck(launch.hold.health, (run_dir,), self._write)
        self._stops = 0
        self._leaving = False
        """This node is asked to leave the job, which goes on."""
        self._verdict: Verdict | None = None
        self._bye: Bye | None = None
        self._bye_deadline = 0.0
        self._leaving_again = False

    def run(self) -> Ending:
        """Run the job to its end.

        Raises:
            PeerError: the rendezvous endpoint cannot be served.
        """
        self._health.before_the_first_generation()
        self._settle_daemon()
        while not self._done():
            self._step()
        failures = self._old_groups[0].failures() if self._old_groups else {}
        for group in self._old_groups:
            group.finish_logs(5.0)
        self._watch.close()
        if self._steps is not None:
            self._steps.close()
        self._reserve.close()
        self._health.close()
        if self._link is not None:
            self._link.finish(5.0)
        self._council.close()
        assert self._verdict is not None, "the loop ends with a verdict"
        return Ending(self._verdict, failures, self._bye)

    # --- set-up

    def _settle_daemon(self) -> None:
        record = self._seat.record()
        info = DaemonInfo()
        if self._link is not None:
            try:
                self._link.wait_welcome(DAEMON_START_S)
            except PeerError as error:
                self._without_daemon(str(error))
            else:
                change = "adopted" if self._link.adopted else "started"
                self._write(events.DaemonChanged(change=change, pid=self._link.pid))
                info = self._link.info
        if record is not None:
            info = msgspec.structs.replace(info, generation=record.generation, nodes=record.nodes)
        self._tell(lambda machine: machine.daemon(info, time.monotonic()))

    def _without_daemon(self, reason: str) -> None:
        assert self._link is not None, "there was a daemon"
        say(f"no snapshots in memory: {reason}")
        self._write(events.DaemonChanged(change="failed", text=reason))
        self._link.let_go()
        self._link = None
        if self._generation is not None:
            self._sessions.begin(self._generation)
            self._session_changed()

    # --- the loop

    def _done(self) -> bool:
        if self._verdict is None or self._council.leads:
            return False
        return self._link is None or self._bye is not None or time.monotonic() > self._bye_deadline

    def _step(self) -> None:
        ready = self._wait()
        for number in self._signals.drain():
            self._signalled(number)
        if self._notice.arrived(time.monotonic()):
            say(f"{self._notice.path} is there")
            self._noticed("notice file")
        if self._group is not None:
            for exit_ in self._group.collect():
                self._worker_ended(exit_)
        if any(socket in ready for socket in self._council.sockets):
            self._do(self._council.hear())
        if self._link is not None:
            self._hear_daemon(self._link)
        self._reserve.hear()
        if self._group is not None and self._rehearsal.due:
            self._rehearsal.fire(self._group.pids(), self._steps, self._link.pid if self._link is not None else 0)
        now = time.monotonic()
        if self._link is not None and self._link.lost_patience(now):
            self._without_daemon("its daemon does not answer")
        if self._starting is not None:
            self._try_start()
        self._keep_watch(now)
        if self._group is not None and self._group.tick(now):
            self._group_gone(self._group)
        elif self._group is not None and (survivors := self._group.survivors(now)):
            self._give_up(self._group, survivors)
        self._do(self._council.ticked(now))
        self._warm_up_spare()

    def _wait(self) -> dict[Any, int]:
        poller = zmq.Poller()
        poller.register(self._signals.descriptor, zmq.POLLIN)
        if self._group is not None:
            for descriptor in self._group.descriptors().values():
                poller.register(descriptor, zmq.POLLIN)
        for socket in self._council.sockets:
            poller.register(socket, zmq.POLLIN)
        if self._link is not None and self._link.socket is not None:
            poller.register(self._link.socket, zmq.POLLIN)
            if self._link.pidfd is not None:
                poller.register(self._link.pidfd, zmq.POLLIN)
        if self._reserve.descriptor is not None:
            poller.register(self._reserve.descriptor, zmq.POLLIN)
        return dict(poller.poll(math.ceil(self._timeout_s() * 1000)))

    def _timeout_s(self) -> float:
        now = time.monotonic()
        wakes = [self._council.next_wake(now)]
        if self._group is not None:
            wake = self._group.next_wake(now)
            wakes += [wake] if wake is not None else []
        if self._rehearsal.due:
            wakes.append(FAULT_POLL_S)
        return max(0.0, min(wakes))

    # --- events

    def _signalled(self, number: int) -> None:
        plan = self._council.plan
        in_session = plan is not None and plan.session
        if number == signal.SIGUSR2 or (number == signal.SIGUSR1 and not in_session):
            if self._group is not None:
                self._group.signal_all(number)
            return
        if self._launch.meeting.max_nodes > 1 and (self._leaving or number == signal.SIGUSR1):
            self._noticed(signal_name(number))
            return
        self._stops += 1
        urgent = self._stops > 1
        self._write(events.StopRequested(signal=signal_name(number), urgent=urgent))
        if self._verdict is not None:
            if self._link is not None and urgent:
                say("leaving at once, as asked twice")
                self._bye_deadline = 0.0
            return
        how = "at once" if urgent else "at an agreed step" if in_session else f"by {signal_name(number)} to its workers"
        say(f"got {signal_name(number)}: the job is stopped {how}")
        request = StopRequest(signal=number, urgent=urgent)
        self._tell(lambda machine: machine.asked_to_stop(request, time.monotonic()))

    def _noticed(self, by: str) -> None:
        """This host is about to be taken away: only this node leaves. A job of one node stops."""
        if self._launch.meeting.max_nodes == 1:
            self._signalled(signal.SIGTERM)
            return
        urgent, self._leaving = self._leaving, True
        self._write(events.StopRequested(signal=by, urgent=urgent, node_only=True))
        say(f"{by}: this node leaves the job {'at once' if urgent else 'at an agreed step'}")
        if self._verdict is not None and urgent:
            self._bye_deadline = 0.0
        self._tell(lambda machine: machine.asked_to_drain(time.monotonic(), urgent=urgent))

    def _worker_ended(self, exit_: WorkerExit) -> None:
        assert self._group is not None, "an exit without a group"
        if exit_.exit_code == 0 or self._generation is None or self._group.stopping:
            return
        record = self._group.failure(exit_)
        failure = Failure(
            host=self._council.node.host,
            global_rank=self._group.global_rank(exit_.local_rank),
            local_rank=exit_.local_rank,
            pid=exit_.pid,
            exit_code=exit_.exit_code,
            message=message_of(record),
            step=self._steps.step(exit_.local_rank, exit_.pid) if self._steps is not None else -1,
            time_s=time.time(),
        )
        self._write(
            events.WorkerFailed(
                global_rank=failure.global_rank,
                local_rank=failure.local_rank,
                pid=failure.pid,
                exit_code=failure.exit_code,
                signal=signal_name(-failure.exit_code) if failure.exit_code < 0 else "",
                message=failure.message,
                step=failure.step,
            )
        )
        generation = self._generation
        self._tell(lambda machine: machine.failed(generation, failure, time.monotonic()))

    def _keep_watch(self, now: float) -> None:
        """Look at our own workers; where this agent leads, over the whole job."""
        if not self._watch.due(now):
            return
        pids = self._group.pids() if self._group is not None and not self._group.stopping else {}
        plan = self._council.plan
        if plan is not None and plan.generation == self._generation:
            self._watch.dump(plan.dump, pids, now)
        self._council.membership.member.pulses(self._watch.look(pids, now))
        if self._health.look(now):
            self._noticed("health check")
        for order in self._vigil.ticked(now) if self._council.leads else ():
            self._order(order)

    def _order(self, order: DumpStacks | WorkerHangs) -> None:
        match order:
            case DumpStacks(generation, number):
                self._do(self._council.answer(lambda leads: leads.dump_ordered(generation, number, time.monotonic())))
            case WorkerHangs(generation, failure):
                self._do(self._council.answer(lambda leads: leads.hung(generation, failure, time.monotonic())))

    def _group_gone(self, group: WorkerGroup) -> None:
        assert self._generation is not None, "a group without a generation"
        self._group = None
        self._old_groups.append(group)
        self._reap_orphans()
        generation = self._generation
        if self._link is not None:
            self._link.request(EndGeneration(generation=generation))
        if group.failures() or group.stopping:
            self._health.after_a_failure(time.monotonic())
            self._tell(lambda machine: machine.gone(generation, time.monotonic()))
        else:
            self._tell(lambda machine: machine.done(generation, time.monotonic()))

    def _give_up(self, group: WorkerGroup, survivors: Mapping[int, int]) -> None:
        """Go on without them: what SIGKILL does not end waits in the kernel, for a device or a file server."""
        assert self._generation is not None, "a group without a generation"
        names = ", ".join(f"rank {group.global_rank(rank)} (pid {pid})" for rank, pid in survivors.items())
        text = f"SIGKILL does not end {names}: this host waits in its kernel for a device or a file server"
        say(text)
        self._write(events.Noticed(severity="error", text=text))
        group.abandon()
        self._group = None
        self._old_groups.append(group)
        generation = self._generation
        self._tell(lambda machine: machine.stuck(generation, text, time.monotonic()))

    def _reap_orphans(self) -> None:
        daemon = {self._link.pid} if self._link is not None else set()
        reap_orphans(frozenset({self._guard.pid} | self._reserve.pids | daemon))

    def _hear_daemon(self, link: DaemonLink) -> None:
        for message in link.receive():
            match message:
                case DaemonDied():
                    self._daemon_died(link, message)
                case Progress():
                    self._progressed(message)
                case RestoreChosen():
                    if self._sessions.chosen(message):
                        self._session_changed()
                case SessionPhase():
                    if self._sessions.reached(message):
                        self._warm_up()
                        self._session_changed()
                case Notice():
                    self._counted[message.about] += message.number if message.about else 0
                    self._write(
                        events.Noticed(
                            severity=message.severity,
                            text=message.text,
                            about=message.about,
                            count=self._counted[message.about],
                        )
                    )
                    say(message.text)
                case Bye():
                    self._bye = message
                case Refused():
                    self._refused(message)
                case _:
                    pass

    def _progressed(self, message: Progress) -> None:
        step, safe = message.version.step, message.protected
        protected = safe is not None and safe.generation == self._generation
        self._tell(lambda machine: machine.progressed(step, time.monotonic(), protected=protected))

    def _session_changed(self) -> None:
        state = self._sessions.state
        self._tell(lambda machine: machine.session(state, time.monotonic()))

    def _warm_up(self) -> None:
        if self._group is not None and self._sessions.state.first_step == self._spec.num_workers:
            self._reserve.stepped(self._group.common_variables())

    def _warm_up_spare(self) -> None:
        if self._group is None and self._starting is None and self._council.waits:
            self._reserve.waits(self._inherited)

    def _refused(self, message: Refused) -> None:
        self._write(events.Noticed(severity="error", text=message.reason))
        if self._starting is not None:
            self._without_daemon(f"its daemon refused the generation: {message.reason}")
        else:
            say(f"the snapshot daemon refused: {message.reason}")

    def _daemon_died(self, link: DaemonLink, message: DaemonDied) -> None:
        if self._bye is not None:
            return
        text = f"snapshot daemon {message.pid} ended with code {message.exit_code}: {link.last_words()}"
        self._write(events.DaemonChanged(change="died", pid=message.pid, text=text))
        if self._verdict is not None:
            self._daemon_died_leaving(link, text)
            return
        if not link.died(time.monotonic()):
            self._without_daemon("its daemon died, and no other one lives")
            return
        self._write(events.DaemonChanged(change="started", pid=link.pid))

    def _daemon_died_leaving(self, link: DaemonLink, text: str) -> None:
        """It died while it was to write the newest version: its successor finds the same memory and tries once more."""
        assert self._verdict is not None, "the job has ended"
        self._leaving_again = not self._leaving_again
        if self._leaving_again and self._verdict.kind != "done" and link.died(time.monotonic()):
            link.shut_down(persist=True)
        else:
            self._bye = Bye(error=text)

    # --- instructions

    def _tell(self, event: Callable[[member.Member], list[member.Instruction]]) -> None:
        self._do(self._council.tell(event))

    def _do(self, instructions: list[NodeInstruction]) -> None:
        """Carry out instructions in order; those that they lead to come after them."""
        idle = not self._queue
        self._queue.extend(instructions)
        while idle and self._queue:
            self._carry_out(self._queue[0])
            self._queue.popleft()

    def _carry_out(self, instruction: NodeInstruction) -> None:
        match instruction:
            case member.StartWorkers(plan, place):
                self._begin_generation(plan, place)
            case member.StopWorkers():
                self._stop_workers(instruction)
            case member.AskStop():
                if self._link is not None:
                    self._link.request(
                        RequestStop(reason="a signal asked the job to stop", grace_s=self._launch.hold.grace_s)
                    )
            case member.AskRegroup(generation, leaves):
                if self._link is not None:
                    self._link.request(RequestRegroup(generation=generation, leaves=leaves))
            case member.LostLeader():
                say("the leader is silent: workers end, asking on")
                self._write(events.Membership(change="leader_lost", text="no plan within the limit"))
            case member.Leave(verdict):
                self._leave(verdict)

    def _begin_generation(self, plan: Plan, place: Place) -> None:
        assert plan.generation is not None, "workers belong to a generation"
        self._generation = plan.generation
        self._seat.write_record(
            RunRecord(
                run_id=plan.run_id,
                run_dir=str(self._run_dir),
                generation=plan.generation,
                nodes=len(plan.places),
            )
        )
        self._sessions.begin(plan.generation)
        self._log.enter(place.node_rank, str(plan.generation))
        self._rehearsal.begin(plan.generation, place.node_rank)
        self._watch.begin(plan.generation, place.first_global_rank)
        message = None
        if self._link is not None:
            message = start_message(plan, place)
            self._link.start_generation(message)
        self._starting = (plan, place, message)
        self._health.generation_begins(plan, place, time.monotonic())
        self._try_start()

    def _try_start(self) -> None:
        """Spawn the workers once the daemon has fenced what came before."""
        assert self._starting is not None, "nothing starts"
        plan, place, message = self._starting
        if self._link is not None and (message is None or self._link.acked is not message):
            return
        self._starting = None
        assert plan.generation is not None, "workers belong to a generation"
        try:
            group = self._make_group(plan, place)
            group.start()
        except (OSError, ValueError) as error:  # ValueError: what the command line says of devices
            self._cannot_spawn(plan.generation, place, error)
            return
        started_s = time.time()
        self._group = group
        self._write(
            events.GenerationStarted(
                members=tuple(other.host for other in plan.places),
                world_size=sum(other.num_ranks for other in plan.places),
                restart_count=plan.restart_count,
                store=plan.store,
                pids=tuple(group.pids().values()),
                forked=group.num_forked,
            )
        )
        generation = plan.generation
        self._tell(lambda machine: machine.started(generation, started_s, time.monotonic()))

    def _make_group(self, plan: Plan, place: Place) -> WorkerGroup:
        return WorkerGroup(
            self._spec,
            plan,
            place,
            guard=self._guard,
            extra_variables={
                local_rank: holdfast_variables(
                    plan,
                    place,
                    local_rank,
                    seat=self._seat,
                    run_dir=self._run_dir,
                    daemon=self._link.endpoint if self._link is not None else "",
                    faults=self._faults,
                )
                for local_rank in range(self._spec.num_workers)
            },
            inherited=self._inherited,
            standby=self._reserve.standby,
        )

    def _cannot_spawn(self, generation: GenerationId, place: Place, error: OSError | ValueError) -> None:
        text = cannot_run(self._spec.command, error)
        say(text)
        failure = Failure(
            host=self._council.node.host,
            global_rank=place.first_global_rank,
            local_rank=0,
            pid=0,
            exit_code=127,
            message=text,
            time_s=time.time(),
        )
        self._tell(lambda machine: machine.failed(generation, failure, time.monotonic()))
        self._tell(lambda machine: machine.gone(generation, time.monotonic()))

    def _stop_workers(self, order: member.StopWorkers) -> None:
        if self._starting is not None and self._generation == order.generation:
            self._starting = None
            self._tell(lambda machine: machine.gone(order.generation, time.monotonic()))
            return
        if self._group is None:
            return
        grace_s = self._launch.stop_grace_s if order.grace_s is None else order.grace_s
        self._group.begin_stop(order.signal or signal.SIGTERM, grace_s, time.monotonic())

    def _leave(self, verdict: Verdict) -> None:
        self._verdict = verdict
        if self._link is not None:
            persist = verdict.kind not in ("done", "drained")
            self._bye_deadline = time.monotonic() + (BYE_S if persist else ANSWER_S)
            self._link.shut_down(persist=persist)

    def _write(self, event: events.AnyEvent) -> None:
        self._log.write(event, time.time())
