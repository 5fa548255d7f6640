"""The worker's side of the snapshot tier: one object through which a Session talks to its node's daemon.

The training thread writes and reads the control page (`publish_step`, `beat`, `grant`, `agreed`): no lock, no message,
no system call, microseconds. Everything else is messages. One named thread owns the request socket; doorbells
(`committed`, `missed`) are sent at once by whoever calls, through a second socket under a lock, so that a commit does
not wait for a thread to wake up.

When the daemon dies, its successor raises the epoch on the control page. The thread notices, says again what the daemon
must know (open session, slots, final step, requests), and training goes on.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from holdfast.checkpoint.catalog import Catalog
from holdfast.checkpoint.version import Version
from holdfast.environment import WorkerEnvironment
from holdfast.snapshot.arena import Slot
from holdfast.snapshot.control import Phase
from holdfast.snapshot.messages import Notice, PersistedMessage, PersistFailedMessage, Restore, SessionConfig


@dataclass(frozen=True)
class AgreedAt:
    """The step that has just ended is an agreed one."""

    kind: str
    """save or stop."""
    step: int
    tag: str | None = None


class PendingSave:
    """A save that was asked for; thread-safe."""

    @property
    def step(self) -> int | None:
        """The agreed step, None until there is one."""
        raise NotImplementedError

    def done(self) -> bool:
        """Whether it is persisted or failed."""
        raise NotImplementedError

    def result(self, timeout: timedelta) -> PersistedMessage:
        """Wait for the checkpoint.

        Raises:
            StorageError: it could not be written; older checkpoints are as they were.
            PeerTimeout: not within `timeout`.
        """
        raise NotImplementedError


class SnapshotClient:
    """A worker's connection. Made by `connect`; the training thread calls everything that is not marked thread-safe."""

    @classmethod
    def connect(cls, environment: WorkerEnvironment, *, timeout: timedelta) -> SnapshotClient:
        """Map the control page, take the worker's seat there and reach the daemon.

        Raises:
            PeerTimeout: no daemon within `timeout`.
            FenceError: the node is in another generation already.
        """
        raise NotImplementedError

    def open(self, config: SessionConfig, *, timeout: timedelta) -> Restore:
        """Open the Session; blocks until all its ranks have opened and the leader has chosen.

        Raises:
            UsageError, StateError, MismatchError, StorageError, FenceError, PeerError: as `Refused.kind` says.
            PeerTimeout: not within `timeout`.
        """
        raise NotImplementedError

    def restore_failed(self, version: Version, reason: str, *, timeout: timedelta) -> Restore:
        """An image of `version` cannot be read: the next candidate, the same on all ranks. Raises as `open`."""
        raise NotImplementedError

    def catalog(self, restore: Restore) -> Catalog:
        """The images of `restore`: local slots by mmap, those of other nodes by ranges, storage by files."""
        raise NotImplementedError

    def need_slots(self, size_bytes: int, until: int | None) -> None:
        """This rank's image takes `size_bytes`; `until`: last step of the loop where known. Again when it has grown."""
        raise NotImplementedError

    def slots(self) -> tuple[Slot, ...] | None:
        """The slots, mapped and faulted in; None until they are ready (and again while the arena grows); () where
        there is no memory tier. The same object until the daemon announces others."""
        raise NotImplementedError

    def publish_step(self, step: int) -> None:
        """`step` steps are finished; called once with the restored step too."""
        raise NotImplementedError

    def beat(self) -> None:
        """A sign of life."""
        raise NotImplementedError

    def reached(self, phase: Phase, step: int) -> None:
        """The Session reached `phase`."""
        raise NotImplementedError

    def grant(self, step: int) -> int | None:
        """Index of the slot into which `step` is to be copied, None where it is not granted. Microseconds."""
        raise NotImplementedError

    def wait_grant(self, step: int, timeout: timedelta) -> int | None:
        """As `grant`, but waits: for final and agreed steps, whose grant is sure to come.

        Raises:
            FenceError: the generation has ended meanwhile.
        """
        raise NotImplementedError

    def committed(self, version: Version, slot: int, wait_s: float, step_s: float) -> None:
        """Doorbell: `Slot.finish` was called. Thread-safe, does not block."""
        raise NotImplementedError

    def missed(self, version: Version) -> None:
        """A granted step passed without a copy. Thread-safe, does not block."""
        raise NotImplementedError

    def agreed(self, step: int) -> AgreedAt | None:
        """Called at the boundary at which `step` steps are finished, after `publish_step(step)`: acknowledges
        proposals; waits where `step` is proposed and not confirmed yet; tells what is agreed for exactly this step.

        Raises:
            FenceError: the generation has ended meanwhile.
        """
        raise NotImplementedError

    def request_save(self, tag: str | None, metrics: dict[str, float]) -> PendingSave:
        """Ask for a persisted version at an agreed step."""
        raise NotImplementedError

    def request_end(self, persist: bool) -> None:
        """Ask for the end of training at an agreed step."""
        raise NotImplementedError

    def final(self, step: int, persist: bool) -> None:
        """The loop has ended at `step` on this rank: that step will be granted and, where `persist`, persisted."""
        raise NotImplementedError

    def wait_persisted(self, version: Version, timeout: timedelta) -> PersistedMessage:
        """Wait until `version` is in storage.

        Raises:
            StorageError: it could not be written.
            PeerTimeout: not within `timeout`.
            FenceError: the generation has ended meanwhile.
        """
        raise NotImplementedError

    def poll(self) -> list[PersistedMessage | PersistFailedMessage | Notice]:
        """What the daemon has said since the last call; never blocks."""
        raise NotImplementedError

    def close(self, step: int, outcome: str) -> None:
        """The Session is over on this rank; `outcome` is done or failed. Ends the thread; may be called twice."""
        raise NotImplementedError
