"""The shell of a node's ledger: it reads headers, pages and processes, and does what the ledger says.

One per daemon. It owns the control page, the workers' connections and their pidfds. Decisions are the ledger's
(`holdfast.snapshot.ledger`); here is what happens to files, memory and sockets. Event loop only.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from holdfast.checkpoint.version import GenerationId, Version
from holdfast.snapshot import ledger
from holdfast.snapshot.arena import Arena, process_start
from holdfast.snapshot.control import Phase, generation_word
from holdfast.snapshot.damage import DamageLog
from holdfast.snapshot.headers import SlotHeaders
from holdfast.snapshot.keys import JobKeys
from holdfast.snapshot.lanes import Lanes
from holdfast.snapshot.messages import (
    Ack,
    AnyMessage,
    CloseSession,
    Committed,
    DaemonMoved,
    Diverged,
    FinalStep,
    Inventory,
    LeaderRestore,
    Missed,
    NeedSlots,
    NodeReport,
    Notice,
    OpenSession,
    PersistEnded,
    Progress,
    RanksOpened,
    Reached,
    Refused,
    RequestEnd,
    RequestSave,
    SaveAgreed,
    SessionPhase,
    SlotsMapped,
    SlotsReady,
    StartGeneration,
)
from holdfast.snapshot.protecting import Protector
from holdfast.snapshot.records import Member, Parentage
from holdfast.snapshot.reports import NodeState as LedgerState
from holdfast.snapshot.reports import Request, SlotRef
from holdfast.snapshot.room import Room
from holdfast.snapshot.shelf import Shelf
from holdfast.snapshot.telling import inventory, local_restore, outcome, parent_of, session_locals, session_ranks
from holdfast.snapshot.transport import Peer, Transport
from holdfast.snapshot.workers import Deaths, Generation, Looks, Worker, heard

_log = logging.getLogger(__name__)
_ENDED: Final = 4
_KEPT_GENERATIONS: Final = 1000
_PROGRESS_S: Final = 0.02
"""Steps may be shorter; the agent needs to know that there is progress, not each step of it."""


class Node:
    """What this node holds and what its workers do.

    Args:
        arena: ours.
        keys: of the job.
        shelf: what other nodes may read.
        to_agent: sends a message to the agent, if there is one.
        stop_persist: a version must not be read any more.
    """

    def __init__(
        self,
        arena: Arena,
        transport: Transport,
        lanes: Lanes,
        *,
        keys: JobKeys,
        shelf: Shelf,
        to_agent: Callable[[AnyMessage], None],
        stop_persist: Callable[[Version], None],
    ) -> None:
        self.arena, self.page = arena, arena.control
        self.ledger = ledger.NodeLedger(epoch=self.page.daemon_epoch)
        self.restore: LeaderRestore | None = None
        self.complete: Version | None = None
        """Newest complete version of this generation."""
        self.protected: Version | None = None
        """Newest protected version of this generation."""
        self._transport, self._to_agent, self._stop_persist = transport, to_agent, stop_persist
        self._generation: Generation | None = None
        self._report: LedgerState | None = None
        self._told: tuple[Version | None, Version | None] = (None, None)  # what the agent was told of both
        self._told_at = 0.0
        self._headers = SlotHeaders(arena)
        self._looks = Looks(arena, self._headers, self.ledger)
        self._deaths = Deaths(transport)
        self.damage = DamageLog(self.say)
        self._room = Room(
            arena,
            lanes,
            announce=self._announce_slots,
            notice=self.say,
            unused=lambda: [row.ref for row in self.ledger.table.free()],
            ready=self._pool_ready,
        )

        self.protector = Protector(
            arena,
            transport.context,
            keys,
            shelf,
            lanes,
            send=transport.send_node,
            feed=self._feed,
            images=self._headers.images_of,
            say=self.say,
            found=self.damage.found,
            to_agent=to_agent,
        )

    # --- generations

    @property
    def start(self) -> StartGeneration | None:
        """The generation that runs here."""
        return self._generation.start if self._generation else None

    def member(self, node_rank: int) -> Member:
        """A member of the generation."""
        assert self._generation is not None
        return next(member for member in self._generation.start.members if member.node_rank == node_rank)

    def moved(self, message: DaemonMoved) -> None:
        """The daemon of another node listens elsewhere now."""
        generation = self._generation
        if generation is None or message.generation != generation.start.generation:
            return
        members = tuple(
            msgspec.structs.replace(one, daemon=message.daemon) if one.node_rank == message.node_rank else one
            for one in generation.start.members
        )
        if members != generation.start.members:
            _log.info("the daemon of node %d listens at %s now", message.node_rank, message.daemon)
            generation.start = msgspec.structs.replace(generation.start, members=members)
            self._save(start=generation.start)
            self._transport.meet(members, generation.start.node_rank)
        self.protector.moved(message.node_rank, message.bulk)

    def start_generation(self, start: StartGeneration) -> None:
        """Fence everything older; the leader gets our inventory."""
        former, living = self._generation, self._living()
        self.protector.begin(start)  # before node ranks mean other daemons
        self._leave()
        self.restore = self.complete = self.protected = None
        self._enter(start)
        generations = (*self.arena.state.generations, start.generation)[-_KEPT_GENERATIONS:]
        self._save(
            generations=generations, start=start, running=True, run_id=start.run_id, restore=None, agreed=None, ended=()
        )
        self._feed(
            ledger.GenerationStarted(
                generation=start.generation,
                node_rank=start.node_rank,
                local_ranks=self._generation.local_ranks if self._generation else (),
                headers=self._headers.all(),
            )
        )
        if former is not None:  # grants that came after their death count them as writers
            for global_rank in set(former.local_ranks) - living:
                self._writer_died(former.start.generation, global_rank)

    def _living(self) -> set[int]:
        """Global ranks of the generation whose process runs; each is watched from now on."""
        generation, living = self._generation, set()
        for local, global_rank in enumerate(generation.local_ranks if generation else ()):
            assert generation is not None
            worker = generation.workers.get(global_rank)
            if worker is not None:
                if worker.pidfd is not None:
                    living.add(global_rank)
            elif self._sits(local) and process_start(self.page.rank(local).pid) is not None:
                died = functools.partial(self._writer_died, generation.start.generation, global_rank)
                self._deaths.watch(self.page.rank(local).pid, died)  # it never spoke to this daemon
                living.add(global_rank)
        return living

    def _enter(self, start: StartGeneration) -> None:
        me = next(member for member in start.members if member.node_rank == start.node_rank)
        ranks = tuple(range(me.first_global_rank, me.first_global_rank + me.num_ranks))
        self._generation = Generation(start, generation_word(start.generation), me.first_global_rank, ranks)
        self._transport.meet(start.members, start.node_rank)
        self._room.start(tuple(range(me.num_ranks)))

    def end_generation(self) -> None:
        """All workers are dead: what they published last is noted, their slots have no writer."""
        if self._generation is None or not self.arena.state.running:
            return
        self._leave()
        for global_rank in self._generation.local_ranks:
            self._forget_pidfd(self._generation.workers.get(global_rank))
            self._writer_died(self._generation.start.generation, global_rank)

    def _leave(self) -> None:
        """The generation counts no more. Workers that live nevertheless stay watched: they may still write."""
        generation = self._generation
        if generation is None or not self.arena.state.running:
            return
        self.poll_page()
        steps = [self.page.rank(local).step for local in range(len(generation.local_ranks)) if self._sits(local)]
        newest = max(steps, default=-1)
        self._save(running=False, newest_step=newest if newest >= 0 else self.arena.state.newest_step)
        self.page.end_generation()
        for local in range(len(generation.local_ranks)):
            self.page.rank(local).clear()

    def adopt(self) -> None:
        """A successor of the daemon: go on where the predecessor stood."""
        state = self.arena.state
        self.protector.adopt()
        if state.start is None:
            return
        self._enter(state.start)
        assert self._generation is not None
        self.restore = state.restore
        self.protector.begin(state.start)
        if state.running and state.restore is not None:
            self._protect_as(state.restore)
        pool = self.page.pool
        self._feed(
            ledger.Adopted(
                generation=state.start.generation,
                node_rank=state.start.node_rank,
                local_ranks=self._generation.local_ranks,
                parent=parent_of(state.restore),
                headers=self._headers.all(),
                published=tuple(
                    ledger.Published(slot=SlotRef(pool, slot), step=step) for slot, step in self.page.grants()
                ),
                agreed=state.agreed,
                session_ranks=session_ranks(state.restore),
                requests=state.requests,
                pinned=state.pinned,
                protected=state.protected,
            )
        )
        if not state.running:
            return
        if state.restore is None:  # the leader may have chosen meanwhile: it answers with its choice
            self._transport.send_node(state.start.leader, self.inventory())
        self._room.adopt(session_locals(state.restore, self._generation.local_ranks))
        self._tell_parity(ready=state.pool >= 0)
        if state.pool >= 0 and state.pool == pool:
            self._feed(ledger.PoolReady(pool=pool, num_slots=state.num_slots))
        for local, global_rank in enumerate(self._generation.local_ranks):
            if self._sits(local):
                self._adopt_rank(local, global_rank)
        self._feed(ledger.LeaderConnected())

    def _adopt_rank(self, local: int, global_rank: int) -> None:
        assert self._generation is not None
        part, generation = self.page.rank(local), self._generation.start.generation
        restored = self.restore.restore.step if self.restore else 0
        if part.phase >= Phase.RESTORED:
            self._feed(ledger.RankEntered(generation=generation, global_rank=global_rank, step=restored))
        if part.step >= 0:
            self._feed(ledger.RankStepped(generation=generation, global_rank=global_rank, step=part.step))
        self._feed(ledger.RankAcknowledged(generation=generation, global_rank=global_rank, number=part.acknowledged))
        if process_start(part.pid) is None:
            self._writer_died(generation, global_rank)

    def _sits(self, local: int) -> bool:
        """Whether a worker of this generation has taken the seat."""
        return self._generation is not None and self.page.rank(local).generation == self._generation.word

    # --- the leader's answers

    def decided(self, message: LeaderRestore) -> None:
        """The leader has chosen: note the parent, then tell the workers."""
        start, generation = self.start, self._generation
        if start is None or generation is None or message.generation != start.generation or message == self.restore:
            return
        lowered = self.restore is not None and message.lowered != self.restore.lowered
        self.restore = message
        if lowered:
            self._save(restore=message)
            self._protect_as(message)
            self._tell_parity(ready=self._room.lowered() if session_locals(message, generation.local_ranks) else True)
            return
        parent = parent_of(message)
        parents = [one for one in self.arena.state.parents if one.generation != start.generation]
        parents.append(
            Parentage(
                generation=start.generation,
                parent=message.restore.version,
                step=message.restore.step,
                session_ranks=session_ranks(message),
            )
        )
        self._save(restore=message, parents=tuple(parents)[-_KEPT_GENERATIONS:], history=message.history)
        self._protect_as(message)
        self._room.start(session_locals(message, generation.local_ranks))
        self._feed(
            ledger.RestoreDecided(
                generation=start.generation,
                protected=message.protected,
                parent=parent,
                step=message.restore.step,
                session_ranks=session_ranks(message),
            )
        )
        self._tell_parity(ready=not session_locals(message, generation.local_ranks))
        for worker in generation.workers.values():
            self._transport.send(worker.peer, local_restore(message.restore, start.node_rank))

    def _protect_as(self, decided: LeaderRestore) -> None:
        """Groups are formed: parity, and room for it, follow them."""
        self.protector.decided(decided)
        self._room.parity_shares = self.protector.shares

    def _tell_parity(self, *, ready: bool) -> None:
        """Whether there is room for parity, once the slots are made; nobody asks where nothing is coded."""
        if self.protector.coded and ready and self._generation is not None:
            generation = self._generation.start.generation
            most = self._room.most_parity
            self._feed(
                ledger.ParityAvailable(
                    generation=generation,
                    available=self._room.parity_fits,
                    most=0 if self._room.parity_fits else most,
                    lowered=self.restore.lowered if self.restore is not None else 0,
                )
            )

    def orders(self, event: ledger.OrdersReceived) -> None:
        """The leader's ledger has spoken. Between generations nobody is there who could obey."""
        if not self.arena.state.running:
            return
        self._feed(event)
        if event.orders.running and self.start and event.orders.generation == self.start.generation:
            self.page.running = True

    def inventory(self) -> Inventory:
        """What this node holds and knows."""
        assert self._generation is not None
        return inventory(
            self._generation.start, self.arena.state, self.ledger, self._headers, parity=self.protector.held
        )

    def opened(self) -> RanksOpened:
        """Sessions that opened here."""
        assert self._generation is not None
        start = self._generation.start
        workers = sorted(self._generation.workers.items())
        return RanksOpened(
            generation=start.generation,
            node_rank=start.node_rank,
            opened=tuple((rank, worker.config) for rank, worker in workers if worker.pid),
        )

    def slots_of(self, version: Version) -> tuple[Path, ...]:
        """The slot files that hold `version` clean."""
        images = self.ledger.slots_of(version)
        return tuple(self.arena.slot_path(image.slot.pool, image.local_rank, image.slot.index) for image in images)

    # --- workers

    def open_session(self, peer: Peer, message: OpenSession) -> None:
        """A worker opens its Session, or says so again to a successor of the daemon."""
        generation = self._generation
        if generation is None or message.generation != generation.start.generation or not self.arena.state.running:
            now = generation.start.generation if generation else "none"
            reason = f"rank {message.global_rank} belongs to generation {message.generation}, this node is in {now}"
            self._transport.send(peer, Refused(reason=reason, kind="fence"))
            return
        local = message.global_rank - generation.first_rank
        if message.global_rank not in generation.local_ranks or local != message.local_rank:
            reason = f"rank {message.global_rank} with local rank {message.local_rank} has no place on this node"
            self._transport.send(peer, Refused(reason=reason, kind="peer"))
            return
        self._admit(generation, peer, message)
        if self.restore is not None:
            self._transport.send(peer, local_restore(self.restore.restore, generation.start.node_rank))
        self._transport.send_node(generation.start.leader, self.opened())

    def _admit(self, generation: Generation, peer: Peer, message: OpenSession) -> None:
        known = generation.workers.get(message.global_rank)
        self._forget_pidfd(known)
        worker = Worker(message.generation, message.global_rank, message.local_rank, message.pid, peer, message.config)
        generation.workers[message.global_rank] = worker
        worker.pidfd = self._deaths.watch(message.pid, lambda: self._worker_exited(worker))
        self.poll_page()
        if self.page.rank(message.local_rank).phase >= Phase.RESTORED:  # it reconnects: doorbells may have been lost
            self._feed(*self._looks.rank(worker))
        for ended in self.arena.state.ended:
            self._transport.send(peer, outcome(ended))

    def _worker_exited(self, worker: Worker) -> None:
        worker.pidfd = None
        _log.info("rank %d (pid %d) is gone", worker.global_rank, worker.pid)
        died = ledger.WriterDied(generation=worker.generation, global_rank=worker.global_rank)
        self._feed(*self._looks.page(self._generation), died)

    def _writer_died(self, generation: GenerationId, global_rank: int) -> None:
        self._feed(ledger.WriterDied(generation=generation, global_rank=global_rank))

    def _forget_pidfd(self, worker: Worker | None) -> None:
        if worker is not None and worker.pidfd is not None:
            self._deaths.forget(worker.pidfd)
            worker.pidfd = None

    def from_worker(self, peer: Peer, message: AnyMessage) -> None:
        """A message of a worker, less OpenSession. What belongs to another generation is the ledger's to refuse."""
        match message:
            case Committed() | Missed() | FinalStep():
                self._feed(*self._looks.page(self._generation), heard(message))
            case NeedSlots() if self._current(message.generation):
                self._need_slots(message)
            case SlotsMapped() if self._current(message.generation):
                self._room.mapped(message.global_rank - self._first_rank(), message.pool)
            case Diverged() if self._current(message.generation):
                text = f"{message.version}: {message.text}"
                self._to_agent(Notice(severity=message.severity, text=text, about="divergence"))
            case Reached() if self._current(message.generation):
                self._reached(message)
            case RequestSave(tag=tag, metrics=metrics, request=identity):
                self.request(Request(id=identity, kind="save", tag=tag, metrics=metrics))
            case RequestEnd(persist=persist, request=identity):
                self.request(Request(id=identity, kind="stop", persist=persist))
            case CloseSession():
                self._closed(peer, message)
            case _:
                _log.debug("a worker sent %s, which does not count here", type(message).__name__)

    def request(self, request: Request) -> None:
        """Somebody wants an agreed step."""
        self._feed(ledger.Requested(request=request))

    def _current(self, generation: object) -> bool:
        return self._generation is not None and self._generation.start.generation == generation

    def _first_rank(self) -> int:
        assert self._generation is not None
        return self._generation.first_rank

    def _need_slots(self, message: NeedSlots) -> None:
        if message.until is not None:
            self._feed(
                ledger.RankUntil(generation=message.generation, global_rank=message.global_rank, until=message.until)
            )
        if self._room.need(message.local_rank, message.size_bytes):
            self._feed(ledger.PoolPaused())

    def _reached(self, message: Reached) -> None:
        if message.phase == "restored":
            self._feed(
                ledger.RankEntered(generation=message.generation, global_rank=message.global_rank, step=message.step)
            )
        self._to_agent(
            SessionPhase(
                generation=message.generation,
                global_rank=message.global_rank,
                phase=message.phase,
                step=message.step,
                seconds=message.seconds,
            )
        )

    def _closed(self, peer: Peer, message: CloseSession) -> None:
        if self._generation is not None and message.global_rank in self._generation.workers:
            self._generation.workers[message.global_rank].closed = True
        self._transport.send(peer, Ack())

    def _announce_slots(self, local: int, message: SlotsReady) -> None:
        assert self._generation is not None
        worker = self._generation.workers.get(self._generation.local_ranks[local])
        if worker is not None:
            self._transport.send(worker.peer, message)

    def _pool_ready(self, pool: int, num_slots: int) -> None:
        self.page.use_pool(pool)
        self._feed(ledger.PoolReady(pool=pool, num_slots=num_slots))
        self._tell_parity(ready=True)
        used = {row.ref for row in self.ledger.table}
        former = (found for found in self.arena.scan() if found.pool != pool)
        self.arena.drop(found.path for found in former if SlotRef(found.pool, found.index) not in used)

    def persist_ended(self, message: PersistEnded) -> None:
        """Tell the workers, and note it for those that are connecting to a successor of this daemon."""
        if message in self.arena.state.ended:
            return
        self._save(ended=(*self.arena.state.ended, message)[-_ENDED:])
        self.to_workers(outcome(message))
        if message.error is not None:
            text = f"step {message.version.step} is not in storage: {message.error}; older checkpoints are as they were"
            self._to_agent(Notice(severity="warning", text=text))

    def to_workers(self, message: AnyMessage) -> None:
        """Send to every worker of this node that has opened and not closed."""
        if self._generation is not None:
            for worker in self._generation.workers.values():
                if not worker.closed:
                    self._transport.send(worker.peer, message)

    def say(self, notice: Notice) -> None:
        """A line for people."""
        _log.info("%s: %s", notice.severity, notice.text)
        self._to_agent(notice)

    # --- the control page and the slot headers

    def poll_page(self) -> None:
        """Tell the ledger what workers have published since the last time."""
        self._feed(*self._looks.page(self._generation))

    # --- what the ledger says

    def flush(self, now: float) -> None:
        """Send the newest report, at most one per turn of the event loop, and the newest progress, at most one per
        `_PROGRESS_S`; `now`: `time.monotonic()`."""
        news = (self.complete, self.protected)
        if news != self._told and now - self._told_at >= _PROGRESS_S:
            self._told, self._told_at = news, now
            if self.complete is not None:
                self._to_agent(Progress(version=self.complete, protected=self.protected))
        if self._report is not None and self._generation is not None:
            report, self._report = self._report, None
            self._transport.send_node(self._generation.start.leader, NodeReport(state=report))

    def repeat_report(self) -> None:
        """Report although nothing has changed: the last one may be lost."""
        self._feed(ledger.LeaderConnected())

    def _feed(self, *events: ledger.NodeEvent) -> None:
        """Tell the ledger what was seen at one moment, and obey."""
        if not events:
            return
        instructions = self.ledger.handle(*events)
        for instruction in instructions:
            self._carry_out(instruction)
        if instructions and isinstance(instructions[-1], ledger.ReadRanks) and self._generation is not None:
            living = [worker for worker in self._generation.workers.values() if worker.pidfd is not None]
            self._feed(*(event for worker in living for event in self._looks.rank(worker)))

    def _carry_out(self, instruction: ledger.NodeInstruction) -> None:
        match instruction:
            case ledger.ClearGrants(generation=generation):
                self.page.start_generation(generation)
            case ledger.SendInventory():
                assert self._generation is not None
                self._transport.send_node(self._generation.start.leader, self.inventory())
            case ledger.PublishGrant(slot=slot, version=version):
                self.page.publish_grant(slot.index, version.step)
            case ledger.WithdrawGrant(slot=slot, version=version):
                if slot.pool == self.page.pool:
                    self.page.withdraw_grant(slot.index, version.step)
            case ledger.ReadRanks():
                pass  # the last of its list: `_feed` does it, events are fed between lists only
            case ledger.PublishAgreed(agreed=agreed):
                self._save(agreed=agreed)
                self.page.publish_agreed(agreed)
                if agreed.confirmed and agreed.kind in ("save", "regroup"):
                    self.to_workers(SaveAgreed(step=agreed.step, tag=agreed.tag, requests=agreed.requests))
            case ledger.Settled(step=step):
                self.page.settled = step
            case ledger.SendReport(state=state):
                ask = state.ask or (self._report is not None and self._report.ask)
                self._report = msgspec.structs.replace(state, ask=ask)
            case ledger.StoreRequests(requests=requests):
                self._save(requests=requests)
            case ledger.StorePins(pinned=pinned):
                self._save(pinned=pinned)
            case ledger.DropSlot(slot=slot):
                found = [one for one in self.arena.scan() if (one.pool, one.index) == (slot.pool, slot.index)]
                self.arena.drop(one.path for one in found)
            case ledger.StopPersist(version=version):
                self._stop_persist(version)
            case ledger.Completed(version=version):
                self.complete = version
            case ledger.Protect(version=version):
                self.protector.protect(version)
            case ledger.Protected(version=version):
                self._save(protected=version)
                self.protector.keep(version)
                self.protected = version if version and version.generation == self.ledger.generation else None

    def _save(self, **changes: object) -> None:
        self.arena.save_state(msgspec.structs.replace(self.arena.state, **changes))
