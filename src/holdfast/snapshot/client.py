"""The worker's side of the snapshot tier: one object through which a Session talks to its node's daemon.

The training thread writes and reads the control page (`publish_step`, `beat`, `grant`, `agreed`): no lock, no message,
no system call, microseconds. Everything else is messages. One named thread owns the request socket; doorbells
(`committed`, `missed`) are sent at once by whoever calls, through a second socket under a lock, so that a commit does
not wait for a thread to wake up.

When the daemon dies, its successor raises the epoch on the control page. The thread notices, says again what the daemon
must know (open session, slots, final step, requests), and training goes on.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Final

import zmq

from holdfast.checkpoint.catalog import Catalog
from holdfast.checkpoint.handing import Tagger
from holdfast.checkpoint.version import Version
from holdfast.environment import WorkerEnvironment, encrypts_all, job_token
from holdfast.errors import (
    CorruptError,
    FenceError,
    HoldfastError,
    MismatchError,
    PeerError,
    PeerTimeout,
    StateError,
    StorageError,
    UsageError,
)
from holdfast.snapshot.agreement import AgreedAt, Decision, at_boundary
from holdfast.snapshot.arena import Slot
from holdfast.snapshot.control import NO_LIMIT, ControlPage, Phase, generation_word
from holdfast.snapshot.keys import JobKeys
from holdfast.snapshot.messages import (
    MAX_MESSAGE_BYTES,
    Ack,
    AnyMessage,
    CloseSession,
    Committed,
    FinalStep,
    Missed,
    NeedSlots,
    Notice,
    OpenSession,
    PersistedMessage,
    PersistFailedMessage,
    Reached,
    Refused,
    RequestEnd,
    RequestSave,
    Restore,
    RestoreFailed,
    SaveAgreed,
    SlotsMapped,
    SlotsReady,
    decode,
    encode,
)
from holdfast.snapshot.opened import OpenedImages
from holdfast.snapshot.outcomes import Outcomes, PendingSave
from holdfast.snapshot.records import SessionConfig
from holdfast.snapshot.reports import Agreed

__all__ = ["AgreedAt", "PendingSave", "SnapshotClient"]

_log = logging.getLogger(__name__)
_WATCH_S: Final = 0.05
"""How often the thread looks whether the daemon was replaced or the generation has ended."""
_CLOSE_TIMEOUT_S: Final = 5.0
_AGREED_LIMIT_S: Final = 1800.0
_KEPT_EVENTS: Final = 1000
_ERRORS: Final[dict[str, type[HoldfastError]]] = {
    "usage": UsageError,
    "state": StateError,
    "mismatch": MismatchError,
    "corrupt": CorruptError,
    "storage": StorageError,
    "fence": FenceError,
    "peer": PeerError,
}


class SnapshotClient:
    """A worker's connection. Made by `connect`; the training thread calls everything that is not marked thread-safe."""

    def __init__(self, environment: WorkerEnvironment, page: ControlPage) -> None:
        self._environment, self._page = environment, page
        self._generation = environment.generation
        self._word = generation_word(environment.generation)
        self._part = page.rank(environment.local_rank)
        self._context = zmq.Context()
        self._keys = JobKeys(job_token(), encrypt_all=encrypts_all())
        self._sending = threading.Lock()
        self._out = self._socket()  # under _sending: any thread
        self._commands: queue.SimpleQueue[AnyMessage | None] = queue.SimpleQueue()
        self._wakeup = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._answers: queue.SimpleQueue[Restore | Refused | Ack] = queue.SimpleQueue()
        self._events: deque[PersistedMessage | PersistFailedMessage | Notice] = deque(maxlen=_KEPT_EVENTS)
        self._outcomes = Outcomes()
        self._slots: tuple[Slot, ...] | None = None  # the thread writes, the training thread reads
        self._said: dict[str, AnyMessage] = {}  # what a successor of the daemon must hear again; under _sending
        self._opened: OpenSession | None = None
        self._restore: Restore | None = None
        self._images = OpenedImages(self._context, self._keys, environment, self._tell)
        self._needed = 0
        self._taken: set[int] = set()
        self._agreed: tuple[int, Agreed | None] = (-1, None)
        self._requests = 0
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="holdfast-client", daemon=True)

    def _socket(self) -> zmq.Socket[bytes]:
        socket = self._context.socket(zmq.DEALER)
        socket.setsockopt(zmq.LINGER, 500)
        socket.setsockopt(zmq.RECONNECT_IVL, 10)
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        socket.setsockopt(zmq.SNDHWM, 0)
        socket.connect(self._environment.daemon)
        return socket

    @classmethod
    def connect(cls, environment: WorkerEnvironment, *, timeout: timedelta) -> SnapshotClient:
        """Map the control page, take the worker's seat there and start to talk to the daemon.

        Raises:
            PeerTimeout: no daemon within `timeout`.
            FenceError: the node is in another generation already.
        """
        deadline = time.monotonic() + timeout.total_seconds()
        page = ControlPage.wait(environment.arena / "control", deadline)
        while page.generation == 0 and time.monotonic() < deadline:
            time.sleep(0.005)
        if page.generation != generation_word(environment.generation):
            page.close()
            raise FenceError(f"this node has left generation {environment.generation}: this worker must stop")
        client = cls(environment, page)
        client._part.enter(environment.generation, os.getpid())
        client._thread.start()
        return client

    @property
    def tagger(self) -> Tagger | None:
        """See `JobKeys.between_workers`."""
        return self._keys.between_workers()

    # --- opening

    def open(self, config: SessionConfig, *, timeout: timedelta) -> Restore:
        """Open the Session; blocks until all its ranks have opened and the leader has chosen.

        Raises:
            UsageError, StateError, MismatchError, StorageError, FenceError, PeerError: as `Refused.kind` says.
            PeerTimeout: not within `timeout`.
        """
        environment = self._environment
        self._opened = OpenSession(
            generation=self._generation,
            global_rank=environment.global_rank,
            local_rank=environment.local_rank,
            pid=os.getpid(),
            config=config,
        )
        self._ask(self._opened)
        restore = self._answer("all ranks of the Session to open", timeout)
        self.reached(Phase.OPENED, restore.step)
        return restore

    def restore_failed(self, version: Version, reason: str, *, timeout: timedelta) -> Restore:
        """An image of `version` cannot be read: the next candidate, the same on all ranks. Raises as `open`."""
        self._ask(
            RestoreFailed(
                generation=self._generation,
                global_rank=self._environment.global_rank,
                version=version,
                reason=reason,
                path=self._restore.path if self._restore else None,
                attempt=self._restore.attempt if self._restore else 0,
                bad_images=self._images.bad,
                damaged=self._images.num_damaged,
            )
        )
        return self._answer("another version to restore", timeout)

    def _answer(self, what: str, timeout: timedelta) -> Restore:
        """The next `Restore` that is another one than the last; a version may be in memory and in storage."""
        deadline = time.monotonic() + timeout.total_seconds()
        while True:
            try:
                answer = self._answers.get(timeout=min(0.2, max(0.001, deadline - time.monotonic())))
            except queue.Empty:
                self._check_fence()
                if time.monotonic() >= deadline:
                    raise PeerTimeout(f"waited {timeout.total_seconds():.0f} s for {what}") from None
                continue
            if isinstance(answer, Refused):
                raise _ERRORS.get(answer.kind, PeerError)(answer.reason)
            if isinstance(answer, Restore) and not _same(answer, self._restore):
                self._restore = answer
                return answer

    def all_restored(self, timeout: timedelta) -> Restore | None:
        """Wait until every rank of the Session has reached RESTORED; another `Restore` where one of them could not.

        Raises:
            FenceError: the generation has ended meanwhile.
            PeerTimeout: not within `timeout`.
        """
        deadline = time.monotonic() + timeout.total_seconds()
        while not self._page.running:
            self._check_fence()
            with contextlib.suppress(queue.Empty):
                answer = self._answers.get(timeout=0.002)
                if isinstance(answer, Restore) and not _same(answer, self._restore):
                    self._restore = answer
                    return answer
            if time.monotonic() >= deadline:
                raise PeerTimeout(f"not all ranks had restored their state within {timeout.total_seconds():.0f} s")
        return None

    def catalog(self, restore: Restore) -> Catalog:
        """The images of `restore`; see `OpenedImages.catalog`."""
        return self._images.catalog(restore)

    # --- slots

    def need_slots(self, size_bytes: int, until: int | None) -> None:
        """This rank's image takes `size_bytes`; `until`: last step of the loop where known. Again when it has grown."""
        slots = self._slots
        if slots and slots[0].capacity_bytes < size_bytes:
            self._slots = None
        self._needed = size_bytes
        self._tell(
            NeedSlots(
                generation=self._generation,
                global_rank=self._environment.global_rank,
                local_rank=self._environment.local_rank,
                size_bytes=size_bytes,
                until=until,
            ),
            again="slots",
        )

    def slots(self) -> tuple[Slot, ...] | None:
        """The slots, mapped and faulted in; None until they are ready (and again while the arena grows); () where
        there is no memory tier. The same object until the daemon announces others."""
        return self._slots

    # --- steps

    def publish_step(self, step: int) -> None:
        """`step` steps are finished; called once with the restored step too. Granted steps that were passed without a
        copy are declared missed.

        Raises:
            FenceError: the generation is over; another worker may sit here.
        """
        self._check_seat()
        self._part.step = step
        for granted in self._page.granted_before(self._word, step):
            if granted not in self._taken:
                self.missed(self._generation.at(granted))

    def beat(self) -> None:
        """A sign of life."""
        if self._part.generation == self._word:
            self._part.beat()

    def timed(self, step_s: float, lead_s: float) -> None:
        """The newest step took `step_s`; `lead_s` until its first forward pass had ended, 0 where there was none."""
        if self._part.generation == self._word:
            self._part.timed(int(step_s * 1e9), int(lead_s * 1e9))

    def in_section(self, limit: timedelta | None) -> None:
        """A stretch without steps begins; it is exempt from hang detection for `limit`, or however long it lasts."""
        if self._part.generation == self._word:
            self._part.beat()
            limit_ns = 0 if limit is None else int(limit.total_seconds() * 1e9)
            self._part.section_until = NO_LIMIT if limit is None else time.monotonic_ns() + limit_ns

    def out_of_section(self) -> None:
        """It has ended."""
        if self._part.generation == self._word:
            self._part.section_until = 0
            self._part.beat()

    def answers_to(self, number: int) -> None:
        """The worker writes its stacks when signal `number` arrives; 0: no more."""
        if self._part.generation == self._word:
            self._part.stack_signal = number

    def reached(self, phase: Phase, step: int) -> None:
        """The Session reached `phase`."""
        if self._part.generation == self._word:
            self._part.reached(phase, step)
        message = Reached(
            generation=self._generation,
            global_rank=self._environment.global_rank,
            phase=phase.name.lower(),
            step=step,
            seconds=time.time(),
        )
        self._tell(message)

    def grant(self, step: int) -> int | None:
        """Index of the slot into which `step` is to be copied, None where it is not granted. Microseconds.

        Who gets a slot copies into it (`Slot.begin` before the boundary is left) or calls `missed`.
        """
        slot = self._page.grant(self._word, step)
        if slot is not None:
            if len(self._taken) > 1000:
                self._taken = {taken for taken in tuple(self._taken) if taken > step - 500}
            self._taken.add(step)
        return slot

    def wait_grant(self, step: int, timeout: timedelta) -> int | None:
        """As `grant`, but waits: for final and agreed steps, whose grant is sure to come. None after `timeout`.

        Raises:
            FenceError: the generation has ended meanwhile.
        """
        deadline = time.monotonic() + timeout.total_seconds()
        while (slot := self.grant(step)) is None and time.monotonic() < deadline:
            self._check_fence()
            time.sleep(0.0005)
        return slot

    def committed(
        self, version: Version, slot: int, wait_s: float, step_s: float, metrics: Mapping[str, float] | None = None
    ) -> None:
        """Doorbell: `Slot.finish` was called. `metrics` of the step go into its checkpoint, where it gets one.
        Thread-safe, does not block."""
        self._tell(
            Committed(
                version=version,
                global_rank=self._environment.global_rank,
                slot=slot,
                wait_s=wait_s,
                step_s=step_s,
                metrics=dict(metrics or {}),
            )
        )

    def missed(self, version: Version) -> None:
        """A granted step passed without a copy. Thread-safe, does not block."""
        self._taken.add(version.step)
        self._tell(Missed(version=version, global_rank=self._environment.global_rank))

    def agreed(self, step: int) -> AgreedAt | None:
        """Called at the boundary at which `step` steps are finished, after `publish_step(step)`: acknowledges
        proposals; waits where `step` is proposed and not confirmed yet; tells what is agreed for exactly this step.

        Raises:
            FenceError: the generation has ended meanwhile.
            PeerTimeout: the leader did not confirm.
        """
        deadline = 0.0
        while True:
            agreed = self._read_agreed()
            match at_boundary(step, agreed, self._part.acknowledged):
                case Decision.GO_ON:
                    return None
                case Decision.ACKNOWLEDGE:
                    assert agreed is not None
                    self._check_seat()
                    self._part.acknowledged = agreed.number
                case Decision.PERFORM:
                    assert agreed is not None
                    return AgreedAt(agreed.kind, step, None, agreed.persist)
                case Decision.WAIT:
                    self._check_fence()
                    deadline = deadline or time.monotonic() + _AGREED_LIMIT_S
                    if time.monotonic() > deadline:
                        raise PeerTimeout(f"step {step} was proposed and neither confirmed nor given up")
                    time.sleep(0.0005)

    def is_settled(self, step: int) -> bool:
        """Whether the version of `step`, at which all ranks wait for another membership, outlives the generation.

        Raises:
            FenceError: the generation has ended.
        """
        self._check_fence()
        return self._page.settled >= step

    def _read_agreed(self) -> Agreed | None:
        sequence = self._page.agreed_sequence
        if sequence != self._agreed[0]:
            self._agreed = (sequence, self._page.agreed())
        return self._agreed[1] if self._page.generation == self._word else None

    # --- requests and ends

    def request_save(self, tag: str | None, metrics: dict[str, float]) -> PendingSave:
        """Ask for a persisted version at an agreed step."""
        request = self._request_id()
        message = RequestSave(
            generation=self._generation,
            global_rank=self._environment.global_rank,
            tag=tag,
            metrics=metrics,
            request=request,
        )
        self._tell(message, again=request)
        return PendingSave(request, self._outcomes)

    def request_end(self, persist: bool) -> None:
        """Ask for the end of training at an agreed step."""
        request = self._request_id()
        message = RequestEnd(
            generation=self._generation,
            global_rank=self._environment.global_rank,
            persist=persist,
            request=request,
        )
        self._tell(message, again=request)

    def _request_id(self) -> str:
        self._requests += 1
        return f"{self._generation}-rank-{self._environment.global_rank}-{self._requests}"

    def final(self, step: int, persist: bool) -> None:
        """The loop has ended at `step` on this rank: that step will be granted and, where `persist`, persisted."""
        message = FinalStep(
            generation=self._generation, global_rank=self._environment.global_rank, step=step, persist=persist
        )
        self._tell(message, again="final")

    def wait_persisted(self, version: Version, timeout: timedelta) -> PersistedMessage:
        """Wait until `version`, of the final step, is in storage.

        Raises:
            StorageError: it could not be written.
            PeerTimeout: not within `timeout`.
            FenceError: the generation has ended meanwhile.
        """
        return self._outcomes.wait(None, version.step, timeout)

    def poll(self) -> list[PersistedMessage | PersistFailedMessage | Notice]:
        """What the daemon has said since the last call; never blocks."""
        events: list[PersistedMessage | PersistFailedMessage | Notice] = []
        while self._events:
            events.append(self._events.popleft())
        return events

    def close(self, step: int, outcome: str) -> None:
        """The Session is over on this rank; `outcome` is done or failed. Ends the thread; may be called twice."""
        if self._closed:
            return
        self._closed = True
        self.reached(Phase.CLOSED, step)
        if self._page.generation == self._word:
            message = CloseSession(
                generation=self._generation,
                global_rank=self._environment.global_rank,
                step=step,
                outcome=outcome,
            )
            self._ask(message)
            self._wait_for_ack()
        self._commands.put(None)
        os.eventfd_write(self._wakeup, 1)
        self._thread.join(_CLOSE_TIMEOUT_S)
        self._outcomes.end("the Session is over on this rank")
        with self._sending:
            self._out.close()
        self._context.term()
        os.close(self._wakeup)

    def _wait_for_ack(self) -> None:
        deadline = time.monotonic() + _CLOSE_TIMEOUT_S
        while time.monotonic() < deadline and self._page.generation == self._word:
            with contextlib.suppress(queue.Empty):
                if isinstance(self._answers.get(timeout=0.05), Ack):
                    return

    def _check_seat(self) -> None:
        """Nobody writes into the words of a worker of a newer generation."""
        if self._part.generation != self._word:
            raise FenceError(f"generation {self._generation} is over on this node: this worker must stop")

    def _check_fence(self) -> None:
        if self._page.generation != self._word:
            raise FenceError(f"generation {self._generation} is over on this node: this worker must stop")

    # --- sending

    def _tell(self, message: AnyMessage, again: str | None = None) -> None:
        """Send at once, from any thread. `again`: a successor of the daemon hears it too."""
        with self._sending:
            if again is not None:
                self._said[again] = message
            if not self._out.closed:
                self._out.send(encode(message), zmq.NOBLOCK)

    def _ask(self, message: AnyMessage) -> None:
        """Send through the thread, which gets the answer."""
        self._commands.put(message)
        os.eventfd_write(self._wakeup, 1)

    # --- the thread

    def _run(self) -> None:
        socket = self._socket()
        poller = zmq.Poller()
        poller.register(socket, zmq.POLLIN)
        poller.register(self._wakeup, zmq.POLLIN)
        epoch = self._page.daemon_epoch
        try:
            while True:
                ready = dict(poller.poll(round(_WATCH_S * 1000)))
                if self._wakeup in ready:
                    os.eventfd_read(self._wakeup)
                while not self._commands.empty():
                    command = self._commands.get_nowait()
                    if command is None:
                        return
                    socket.send(encode(command), zmq.NOBLOCK)
                while socket.poll(0):
                    self._receive(socket.recv())
                if self._page.daemon_epoch != epoch:
                    epoch = self._page.daemon_epoch
                    self._introduce_again(socket)
                if self._page.generation != self._word:
                    self._outcomes.end(f"generation {self._generation} is over on this node: this worker must stop")
        except Exception as error:  # noqa: BLE001  a thread's border: whoever waits learns of it
            _log.exception("rank %d: the snapshot client has failed", self._environment.global_rank)
            self._outcomes.end(f"the snapshot client has failed: {error}")
            self._answers.put(Refused(reason=f"the snapshot client has failed: {error}", kind="peer"))
        finally:
            socket.close()

    def _introduce_again(self, socket: zmq.Socket[bytes]) -> None:
        """The daemon was replaced: what it must know of this rank, in the order in which it was said."""
        _log.info("rank %d: the snapshot daemon was replaced", self._environment.global_rank)
        if self._opened is not None:
            socket.send(encode(self._opened), zmq.NOBLOCK)
        with self._sending:
            for message in self._said.values():
                socket.send(encode(message), zmq.NOBLOCK)

    def _receive(self, data: bytes) -> None:
        try:
            message = decode(data)
        except PeerError as error:
            _log.warning("garbage from the daemon is dropped: %s", error)
            return
        match message:
            case Restore() | Ack():
                self._answers.put(message)
            case Refused():
                self._answers.put(message)
                self._events.append(Notice(severity="error", text=message.reason))
            case SlotsReady():
                self._map(message)
            case SaveAgreed(step=step, tag=tag, requests=requests):
                for request in requests:
                    self._outcomes.agree(request, step, tag)
                    with self._sending:
                        self._said.pop(request, None)
            case PersistedMessage() | PersistFailedMessage():
                if self._outcomes.put(message):
                    self._events.append(message)
            case Notice():
                self._events.append(message)
            case _:
                _log.debug("the daemon sent %s, which does not count here", type(message).__name__)

    def _map(self, message: SlotsReady) -> None:
        if message.paths and message.capacity_bytes < self._needed:
            return  # of before the state had grown
        slots = self._slots
        if slots is None or tuple(str(slot.path) for slot in slots) != message.paths:
            fresh = tuple(Slot.open(Path(path)) for path in message.paths)
            for slot in fresh:
                slot.prefault()
            self._slots = fresh  # those of before are unmapped when the last copy into them has ended
        self._tell(
            SlotsMapped(generation=self._generation, global_rank=self._environment.global_rank, pool=message.pool)
        )


def _same(one: Restore, other: Restore | None) -> bool:
    return other is not None and (one.version, one.path, one.attempt) == (other.version, other.path, other.attempt)
