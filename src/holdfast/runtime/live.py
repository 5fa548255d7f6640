"""A Session under ``holdfast run``: versions in memory, persisted by the daemons.

What happens at a boundary, in this order: the step is published; messages of the daemon are passed on; an agreed step
is honoured; a granted step is copied. None of it waits for another process, except at an agreed step.

Where the state does not fit into memory the ranks write to storage themselves, as without ``holdfast run``. Ranks learn
that at different times; they settle it together, at a step that all know beforehand.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import NoReturn

from holdfast.checkpoint.places import place
from holdfast.checkpoint.saving import Ranks
from holdfast.environment import WorkerEnvironment
from holdfast.errors import CorruptError, PeerError, PeerTimeout, StorageError
from holdfast.faults import When
from holdfast.runtime.beats import Beats, StackWriter
from holdfast.runtime.census import Census, HolderWatch, meet
from holdfast.runtime.huddle import Huddle, session_name
from holdfast.runtime.init_from import agree_on
from holdfast.runtime.mode import Context, Mode
from holdfast.runtime.requests import LiveSave, Wanted, first_wanted, name_stored, persisted_of
from holdfast.runtime.results import Persisted, Restored, SaveHandle
from holdfast.runtime.say import plural, say, size
from holdfast.runtime.snapshotter import Snapshotter
from holdfast.runtime.storage_tier import StorageTier
from holdfast.runtime.stored import StoredStates
from holdfast.snapshot.client import SnapshotClient
from holdfast.snapshot.control import Phase, stack_file
from holdfast.snapshot.copier import Ticket
from holdfast.snapshot.messages import Notice, PersistedMessage, PersistFailedMessage, Restore
from holdfast.snapshot.records import SessionConfig

log = logging.getLogger(__name__)

_OPEN_TIMEOUT = timedelta(minutes=30)
_GRANT_TIMEOUT = timedelta(minutes=2)
_PERSIST_TIMEOUT = timedelta(hours=2)
_END_TIMEOUT = timedelta(minutes=30)
_SLOTS_TIMEOUT_S = 600.0
_SETTLE_AFTER_STEPS = 20
"""So many steps after the start, then at twice as many each time, the ranks ask each other whether memory is there."""
_MEET_EVERY_STEPS = 20
"""Where the ranks write to storage themselves: how often they tell each other of saves that were asked for."""
_FAILED_COPY_S = 10.0
"""How long the script's own exception waits for a copy that runs: it may make a newer version whole."""
_HOLDERS_AFTER_STEPS = 20
"""Slots are asked for after so many steps even where it is not clear yet which ranks share which new tensors."""
_KEPT_METRICS = 64
_POLL_S = 0.01
_SAY_AGAIN_S = 1.0
_FINAL_POLL = timedelta(milliseconds=20)
_SECURE_S = 3.0
"""How long training waits, after the loss of a node, for the grant of the restored step. It comes as soon as the slots
of all nodes are there; where these take longer to make, a step may as well be done meanwhile."""

_SEVERITY = {"info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


class LiveMode(Mode):
    """Memory tier, and storage through the daemons."""

    def __init__(self, context: Context, environment: WorkerEnvironment) -> None:
        self._context = context
        self._environment = environment
        self._ranks = Ranks.alone() if context.alone else Ranks.of(context.process_group)
        name = f"holdfast/{environment.generation}/{session_name(context.ranks)}"
        self._huddle = Huddle(self._ranks, name)
        self._client = SnapshotClient.connect(environment, timeout=_OPEN_TIMEOUT)
        self._stored = StoredStates(
            context.state,
            self._ranks,
            name,
            session_rank=context.session_rank,
            tagger=self._client.tagger,
            together=self._client.tagger is not None,
        )
        self._shots = Snapshotter(
            context.state,
            node_of=environment.node_of,
            global_rank=context.global_rank,
            world_size=environment.world_size,
            session_rank=context.session_rank,
            session_size=len(context.ranks),
            injector=context.injector,
            on_done=self._on_done,
        )
        self._census = Census(self._ranks, name)
        self._watch = None if context.alone else HolderWatch(context.state, context.ranks, self._census)
        self._storage: StorageTier | None = None
        """Set once the ranks have settled that there is no memory tier."""
        self._settled = False
        self._grew = False
        """Whether the state has changed its tensors since the holders were last looked at."""
        self._asked_bytes = 0
        self._until: int | None = None
        self._step = 0
        self._start_step = 0
        self._exposed = False
        """`Restore.exposed`, until something was done about it."""
        self._stored_step: int | None = None
        self._requests: list[LiveSave] = []
        self._metrics: dict[int, dict[str, float]] = {}
        """By step; the copying thread reads."""
        self._stopping = False
        self._persist_end = True
        self._said_start = False
        self._boundary_at = time.monotonic()
        self._beats: Beats | None = None
        self._stacks: StackWriter | None = None
        self._sections = 0
        """Depth of `section` blocks."""
        # Written by the training thread, read by the copying thread for the doorbell; off by one wait at worst.
        self._wait_s = 0.0
        self._step_s = 0.0

    # --- Mode

    def open(self) -> Restored | None:
        """Restore what the leader's daemon chooses, or initialise."""
        options, rank = self._context.options, self._ranks.rank
        self._stacks = StackWriter(stack_file(self._environment.arena, self._environment.local_rank))
        self._client.answers_to(self._stacks.signal)
        chosen = self._client.open(self._config(), timeout=_OPEN_TIMEOUT)
        meet(self._context, self._huddle)
        restore = self._restore(chosen)
        self._start_step, self._exposed = self._step, restore.exposed
        if restore.tier == "none":
            if options.init_from is not None:
                path, same = agree_on(options.init_from, self._huddle)
                assert path is not None
                self._stored.initialise(options.init_from, path, together=same)
                say(log, f"weights initialised from {path}", rank=rank)
            meet(self._context, self._huddle, sample=True)
            self._beats = Beats(self._client, self._context.state.models)
            return None
        meet(self._context, self._huddle)
        self._beats = Beats(self._client, self._context.state.models)
        if restore.tier == "storage":
            self._stored_step = self._step
        self._ask_for_slots()
        say(log, self._restored_line(restore), rank=rank)
        return _restored(restore, self._step, self._environment.generation.generation)

    def expect(self, until: int) -> None:
        """The last step is always granted."""
        self._until = until
        if self._asked_bytes:
            self._client.need_slots(self._asked_bytes, until)

    def secure(self) -> None:
        """A further loss might take what this generation started from: wait a moment until the restored state can be
        copied, which overlaps the first step as always."""
        deadline = time.monotonic() + _SECURE_S
        while self._exposed and time.monotonic() < deadline:
            slots = self._client.slots()
            if slots == () or (slots and self._client.grant(self._step) is not None):
                self._exposed = False
                self._copy(self._step, must=False)
                return
            self._client.beat()
            time.sleep(_POLL_S / 5)
        self._exposed = False

    def boundary(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Publish, listen, agree, copy."""
        now = time.monotonic()
        self._step_s, self._boundary_at = now - self._boundary_at, now
        self._wait_s = 0.0
        self._keep_metrics(step, metrics)
        previous, self._step = self._step, step
        self._client.publish_step(step)
        self._client.beat()
        if self._beats is not None:
            self._beats.step_ended()
        self._listen()
        if previous == self._start_step:
            self._client.reached(Phase.FIRST_STEP, step)
        self._watch_holders(step)
        agreed = self._client.agreed(step)
        if agreed is not None and agreed.kind == "stop":
            self._persist_end = agreed.persist
        if self._storage is None:
            begun = time.monotonic()
            self._copy(step, must=agreed is not None)
            self._wait_s += time.monotonic() - begun
            self._settle_where_due(previous, step)
        if self._storage is not None:
            self._store(self._storage, previous, step, metrics)
        if agreed is not None and agreed.kind == "regroup":
            self._await_end(step)
        return (agreed is not None and agreed.kind == "stop") or self._stopping

    def save(self, tag: str | None, metrics: Mapping[str, float]) -> SaveHandle:
        """At an agreed step; where the ranks write to storage themselves, at the next one at which they meet."""
        pending = self._client.request_save(tag, dict(metrics)) if self._storage is None else None
        request = LiveSave(pending, Wanted(tag=tag, metrics=dict(metrics)))
        self._requests = [*(old for old in self._requests if not old.done()), request]
        return SaveHandle(request)

    def stop(self, *, persist: bool) -> None:
        """At once where this rank is alone, else at an agreed step."""
        self._persist_end = persist
        if self._context.alone:
            self._stopping = True
        else:
            self._client.request_end(persist)

    def before_update(self) -> None:
        """Wait for the running copy."""
        self._client.beat()
        self._wait_s += self._shots.before_update()

    @contextlib.contextmanager
    def section(self, limit: timedelta | None) -> Iterator[None]:
        """Said on the control page; what is nested belongs to the outermost one."""
        self._sections += 1
        if self._sections == 1:
            self._client.in_section(limit)
        try:
            yield
        finally:
            self._sections -= 1
            if self._sections == 0:
                self._client.out_of_section()

    def close(self, step: int, *, failed: bool) -> None:
        """Make the final step a version and wait until it is in storage; where `failed`, just leave."""
        outcome = "failed"
        if self._beats is not None:
            self._beats.close()
        try:
            if not failed:
                self._finish(step)
                self._name_late(step)
                outcome = "done"
        finally:
            for request in self._requests:
                request.give_up("the Session ended before it was made")
            self._census.close()
            self._shots.close(_FAILED_COPY_S if failed else _SLOTS_TIMEOUT_S)
            if self._stacks is not None:
                self._client.answers_to(0)
                self._stacks.close()
            self._client.close(step, outcome)

    # --- opening

    def _config(self) -> SessionConfig:
        options = self._context.options
        return SessionConfig(
            ranks=self._context.ranks,
            checkpoint_dir=None if options.checkpoint_dir is None else str(options.checkpoint_dir),
            snapshot_every=options.snapshot_every,
            persist_every_steps=options.persist_every_steps,
            persist_every_s=options.persist_every_s,
            keep=options.keep.encode(),
            resume=options.resume,
            has_init_from=options.init_from is not None,
        )

    def _restore(self, restore: Restore) -> Restore:
        """Read the chosen version, or the next one where any rank cannot; the one that all have read."""
        while True:
            problem = self._read(restore)
            if problem:
                assert restore.version is not None, "a checkpoint has a version"
                log.warning("%s from %s cannot be used: %s", restore.version, restore.tier, problem)
                restore = self._client.restore_failed(restore.version, problem, timeout=_OPEN_TIMEOUT)
                continue
            self._client.publish_step(self._step)
            self._client.reached(Phase.RESTORED, self._step)
            other = self._client.all_restored(_OPEN_TIMEOUT)
            if other is None:
                return restore
            log.warning("another rank cannot use %s from %s", restore.version, restore.tier)
            restore = other

    def _read(self, restore: Restore) -> str:
        """Restore in place; what went wrong, "" where nothing did. A state of another model raises."""
        if restore.tier == "none":
            self._step = 0
            return ""
        try:
            self._context.injector.at(When.RESTORE, restore.step)
            if restore.path is not None:
                self._step = self._stored.restore(place(restore.path))
            else:
                with self._client.catalog(restore) as catalog:
                    self._step = self._context.state.restore(catalog)
        except (CorruptError, StorageError, PeerError) as error:
            return str(error)
        return ""

    def _restored_line(self, restore: Restore) -> str:
        where = {"storage": f"storage ({restore.path})", "peers": "the memory of other nodes"}
        lost = f", {plural(restore.steps_lost, 'step')} to do again" if restore.steps_lost else ""
        number = self._environment.generation.generation
        return f"generation {number} resumes from {where.get(restore.tier, 'memory')} at step {self._step}{lost}"

    # --- at a boundary

    def _watch_holders(self, step: int) -> None:
        """See who holds what by now; ask for slots once that is clear, lest each rank asks for room for everything."""
        watch = self._watch
        if watch is not None and (not self._asked_bytes or watch.has_news or self._grew):
            watch.look()
            self._grew = False
        if not self._asked_bytes and (
            watch is None or watch.is_settled or step >= self._start_step + _HOLDERS_AFTER_STEPS
        ):
            self._ask_for_slots()

    def _listen(self) -> None:
        for message in self._client.poll():
            match message:
                case PersistedMessage():
                    self._tell(message)
                case PersistFailedMessage():
                    if self._ranks.rank == 0:
                        log.warning("step %d was not persisted: %s", message.version.step, message.reason)
                case Notice():
                    if self._environment.local_rank == 0:
                        log.log(_SEVERITY.get(message.severity, logging.WARNING), "%s", message.text)

    def _tell(self, message: PersistedMessage) -> None:
        self._stored_step = max(self._stored_step or 0, message.version.step)
        persisted = persisted_of(message)
        say(
            log,
            f"step {persisted.step} is in storage: {persisted.path} ({persisted.seconds:.2f} s)",
            rank=self._ranks.rank,
        )
        self._context.callbacks.call(persisted)

    def _keep_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Until the version of the step is clean, which may be some steps later; the final one is copied again."""
        if metrics:
            self._metrics[step] = dict(metrics)
        for old in list(self._metrics)[:-_KEPT_METRICS]:
            del self._metrics[old]

    def _ask_for_slots(self) -> None:
        self._asked_bytes = self._shots.size_bytes(self._step)
        self._client.need_slots(self._asked_bytes, self._until)

    def _copy(self, step: int, *, must: bool) -> None:
        """Copy `step` where it is granted."""
        slots = self._client.slots()
        slot = self._client.grant(step)
        version = self._environment.generation.at(step)
        if not slots:
            if slot is not None:
                self._client.missed(version)
            return
        self._use(slots)
        if slot is None and must:
            slot = self._client.wait_grant(step, _GRANT_TIMEOUT)
        if slot is None:
            self._shots.check()
            return
        before = self._shots.entries
        if self._shots.take(version, slot) is None:
            self._client.missed(version)
            self._ask_for_slots()
        self._grew = self._grew or self._shots.entries is not before

    def _use(self, slots: tuple[object, ...]) -> None:
        self._shots.use(slots)  # type: ignore[arg-type]
        if self._said_start:
            return
        self._said_start = True
        every = self._context.options.snapshot_every
        interval = (
            "as often as it is free (auto)" if every == 0 else "every step" if every == 1 else f"every {every} steps"
        )
        room = f"{plural(len(slots), 'slot')} of {size(self._asked_bytes)} on each rank"
        if self._environment.generation.generation <= 1:
            say(log, f"memory tier: {room}, a version {interval}", rank=self._ranks.rank)

    def _on_done(self, ticket: Ticket) -> None:
        """Copying thread: ring the doorbell."""
        if ticket.whole:
            metrics = self._metrics.get(ticket.version.step)
            self._client.committed(ticket.version, ticket.slot, self._wait_s, self._step_s, metrics)
        else:
            self._client.missed(ticket.version)

    def _await_end(self, step: int) -> NoReturn:
        """The membership changes at `step`: save it, say that this rank waits, and wait to be ended.

        Raises:
            FenceError: the generation is over, though nobody has ended this process.
            PeerTimeout: nobody ends it.
        """
        deadline = time.monotonic() + _END_TIMEOUT.total_seconds()
        safe, said = not self._becomes_a_version(step), float("-inf")
        while time.monotonic() < deadline:
            if not safe:
                self._copy_final(step)  # again where another rank missed it
            safe = self._client.is_settled(step) or safe
            self._client.beat()
            if safe and time.monotonic() - said > _SAY_AGAIN_S:  # a daemon that dies may not have passed it on
                said = time.monotonic()
                self._client.reached(Phase.WAITING, step)
            time.sleep(_POLL_S / 5)
        raise PeerTimeout(f"step {step} was agreed for a change of nodes, which did not come within {_END_TIMEOUT}")

    def _becomes_a_version(self, step: int) -> bool:
        """Whether `step` is kept in memory. Otherwise all ranks write it to storage here, where there is one."""
        if not self._settled and self._context.options.checkpoint_dir is not None:
            self._settle(wait=True)
        if self._storage is None:
            return self._wait_for_slots()
        if self._storage.saved_step != step:
            try:
                self._storage.save(step)
            except StorageError as error:
                log.warning("step %d could not be saved, training resumes from an older one: %s", step, error)
        return False

    # --- where there is no memory tier

    def _settle_where_due(self, previous: int, step: int) -> None:
        """At steps that all ranks know beforehand, settle whether all of them have slots.

        Where a checkpoint is due this waits until that is known; else it only asks, ever more rarely.
        """
        options = self._context.options
        if self._settled or options.checkpoint_dir is None:
            return
        every = options.persist_every_steps
        if every is not None and step // every > previous // every:
            self._settle(wait=True)
        elif _rounds(step - self._start_step) > _rounds(previous - self._start_step):
            self._settle(wait=False)

    def _settle(self, *, wait: bool) -> None:
        if wait:
            self._wait_for_slots()
        slots = self._client.slots()
        answers = self._huddle.gather("unknown" if slots is None and not wait else "yes" if slots else "no")
        self._settled = "no" in answers or "unknown" not in answers
        if "no" not in answers:
            return
        assert self._context.options.checkpoint_dir is not None
        generation = self._environment.generation
        self._storage = StorageTier(self._context, self._ranks, generation, self._huddle)
        for request in self._requests:
            request.withdraw()  # the daemons cannot make it
        # Why there is no memory (bytes and limit) is the daemon's notice, which `_listen` passes on.
        log.info("no memory tier for %s: the ranks write to storage themselves", size(self._asked_bytes))

    def _store(self, storage: StorageTier, previous: int, step: int, metrics: Mapping[str, float]) -> None:
        """Save what is due, and at steps that all ranks know beforehand what any of them was asked for."""
        every = self._context.options.persist_every_steps or _MEET_EVERY_STEPS
        meets = self._context.alone or step // every > previous // every or step % _MEET_EVERY_STEPS == 0
        wanted = self._wanted() if meets else None
        outcome = storage.boundary(previous, step, metrics, wanted)
        if wanted is not None and outcome is not None:
            self._answer(wanted, outcome)

    def _wanted(self) -> Wanted | None:
        """The first open request of all ranks, one with a tag before those without."""
        self._requests = [request for request in self._requests if not request.done()]
        return first_wanted(self._huddle, [request.wanted for request in self._requests])

    def _answer(self, wanted: Wanted, outcome: Persisted | StorageError) -> None:
        for request in self._requests:
            if request.wanted.tag in (None, wanted.tag):
                request.answer(outcome)

    def _wait_for_slots(self) -> bool:
        """Whether this rank has slots, once that is known."""
        if not self._asked_bytes:
            self._ask_for_slots()
        deadline = time.monotonic() + _SLOTS_TIMEOUT_S
        while (slots := self._client.slots()) is None and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        return bool(slots)

    # --- the end

    def _finish(self, step: int) -> None:
        persist = self._persist_end and self._context.options.checkpoint_dir is not None
        if step == 0 or (step == self._start_step and step == self._stored_step):
            return
        if not self._settled and persist:
            self._settle(wait=True)
        if self._storage is not None:
            if persist and self._storage.saved_step != step:
                wanted = self._wanted() or Wanted()
                self._answer(wanted, self._storage.save(step, tag=wanted.tag, metrics=wanted.metrics))
            return
        if not self._wait_for_slots():
            return
        self._client.final(step, persist)
        with self.section(_PERSIST_TIMEOUT if persist else _GRANT_TIMEOUT):
            self._final_version(step, persist=persist)
        self._listen()

    def _name_late(self, step: int) -> None:
        """Answer saves that were asked for too late for any other step than the final one, which is in storage."""
        directory = self._context.options.checkpoint_dir
        stored = self._stored_step if self._storage is None else self._storage.saved_step
        if directory is not None and stored == step:
            for request in self._requests:
                if not request.done():
                    request.answer(name_stored(directory, step, request.wanted.tag))

    def _final_version(self, step: int, *, persist: bool) -> None:
        """Copy the final step wherever it is granted (again, where another rank missed it) until it is safe."""
        version = self._environment.generation.at(step)
        limit = _PERSIST_TIMEOUT if persist else _GRANT_TIMEOUT
        deadline = time.monotonic() + limit.total_seconds()
        while time.monotonic() < deadline:
            if self._copy_final(step) and not persist:
                return
            try:
                message = self._client.wait_persisted(version, _FINAL_POLL)
            except PeerTimeout:
                continue
            self._listen()
            if self._stored_step is None or self._stored_step < step:
                self._tell(message)
            return
        if persist:
            raise PeerTimeout(f"the final step {step} was not in storage within {limit}")
        log.warning("the final step %d is no version in memory: it was not granted within %s", step, limit)

    def _copy_final(self, step: int) -> bool:
        """Copy `step` where it is granted and not there yet, inline: nothing overlaps. Whether its slot is clean."""
        slot, version = self._client.grant(step), self._environment.generation.at(step)
        ticket = self._shots.last
        if ticket is not None and ticket.version == version and slot in (None, ticket.slot):
            ticket.wait(_FINAL_POLL.total_seconds())
            if not ticket.done() or ticket.clean:
                return ticket.clean
            self._shots.check()
        slots = self._client.slots()
        if slot is None or not slots:
            return False
        self._use(slots)
        ticket = self._shots.take(version, slot, inline=True)
        if ticket is None:  # it has grown since the last boundary
            self._client.missed(version)
            self._ask_for_slots()
        return False


def _rounds(steps: int) -> int:
    """How often the ranks have asked each other, `steps` after the start."""
    return (steps // _SETTLE_AFTER_STEPS).bit_length()


def _restored(restore: Restore, step: int, generation: int) -> Restored:
    return Restored(
        step=step,
        tier=restore.tier,
        generation=generation,
        path=None if restore.path is None else place(restore.path),
        steps_lost=restore.steps_lost,
    )
