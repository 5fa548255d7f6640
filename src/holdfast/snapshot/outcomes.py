"""What became of the versions that this worker waits for: agreed steps, checkpoints, failures."""

from __future__ import annotations

import threading
from datetime import timedelta

from holdfast.errors import FenceError, PeerTimeout, StorageError
from holdfast.snapshot.messages import PersistedMessage, PersistFailedMessage


class Outcomes:
    """What became of versions that are persisted: the client's thread writes, any thread waits."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._by_step: dict[int, PersistedMessage | PersistFailedMessage] = {}
        self._agreed: dict[str, int] = {}
        self._over: str | None = None

    def put(self, message: PersistedMessage | PersistFailedMessage) -> bool:
        """Take it; False where it is old news."""
        with self._changed:
            known = self._by_step.get(message.version.step)
            if isinstance(known, PersistedMessage) or known == message:
                return False
            self._by_step[message.version.step] = message
            self._changed.notify_all()
            return True

    def agree(self, request: str, step: int) -> None:
        """The save `request` is made at `step`."""
        with self._changed:
            self._agreed[request] = step
            self._changed.notify_all()

    def end(self, reason: str) -> None:
        """Nothing will come any more."""
        with self._changed:
            self._over = self._over or reason
            self._changed.notify_all()

    def agreed(self, request: str) -> int | None:
        """The step of `request`, None until there is one."""
        with self._changed:
            return self._agreed.get(request)

    def of(self, step: int | None) -> PersistedMessage | PersistFailedMessage | None:
        """What became of `step`, None until that is known."""
        with self._changed:
            return None if step is None else self._by_step.get(step)

    def wait(self, request: str | None, step: int | None, timeout: timedelta) -> PersistedMessage:
        """Wait for the checkpoint of `step`, or of the step that was agreed for `request`."""

        def ready() -> bool:
            at = self._agreed.get(request) if request is not None else step
            return (at is not None and at in self._by_step) or self._over is not None

        with self._changed:
            if not self._changed.wait_for(ready, timeout.total_seconds()):
                raise PeerTimeout(f"the checkpoint was not there within {timeout.total_seconds():.0f} s")
            at = self._agreed.get(request) if request is not None else step
            message = self._by_step.get(at) if at is not None else None
        if message is None:
            raise FenceError(self._over or "the Session is over")
        if isinstance(message, PersistFailedMessage):
            raise StorageError(f"step {message.version.step} could not be written: {message.reason}")
        return message


class PendingSave:
    """A save that was asked for; thread-safe."""

    def __init__(self, request: str, outcomes: Outcomes) -> None:
        self._request, self._outcomes = request, outcomes

    @property
    def step(self) -> int | None:
        """The agreed step, None until there is one."""
        return self._outcomes.agreed(self._request)

    def done(self) -> bool:
        """Whether it is persisted or failed."""
        return self._outcomes.of(self.step) is not None

    def result(self, timeout: timedelta) -> PersistedMessage:
        """Wait for the checkpoint.

        Raises:
            StorageError: it could not be written; older checkpoints are as they were.
            PeerTimeout: not within `timeout`.
            FenceError: the generation has ended meanwhile.
        """
        return self._outcomes.wait(self._request, None, timeout)
