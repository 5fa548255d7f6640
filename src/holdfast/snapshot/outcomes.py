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
        self._tags: dict[int, str] = {}
        """Tags that agreed steps are to have."""
        self._over: str | None = None

    def put(self, message: PersistedMessage | PersistFailedMessage) -> bool:
        """Take it; False where it is old news."""
        with self._changed:
            step = message.version.step
            known = self._by_step.get(step)
            if known == message or (isinstance(known, PersistedMessage) and self._settles(known)):
                return False
            self._by_step[step] = message
            self._changed.notify_all()
            return not isinstance(known, PersistedMessage) or isinstance(message, PersistFailedMessage)

    def agree(self, request: str, step: int, tag: str | None = None) -> None:
        """The save `request` is made at `step`, which is to have `tag`."""
        with self._changed:
            self._agreed[request] = step
            if tag is not None:
                self._tags[step] = tag
            self._changed.notify_all()

    def _settles(self, message: PersistedMessage | PersistFailedMessage) -> bool:
        """Whether nothing more comes for its step: it may be in storage, and not have its tag yet."""
        tag = self._tags.get(message.version.step)
        return isinstance(message, PersistFailedMessage) or tag is None or message.tag is not None

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
            message = None if step is None else self._by_step.get(step)
            return message if message is not None and self._settles(message) else None

    def wait(self, request: str | None, step: int | None, timeout: timedelta) -> PersistedMessage:
        """Wait for the checkpoint of the final `step`, or of the step that was agreed for `request`, with its tag.

        The final step is tried again for minutes: a failure from before that was known to be the last one is no answer.
        """

        def found() -> PersistedMessage | PersistFailedMessage | None:
            at = self._agreed.get(request) if request is not None else step
            message = self._by_step.get(at) if at is not None else None
            if message is None:
                return None
            if request is not None:
                return message if self._settles(message) else None
            return message if isinstance(message, PersistedMessage) or message.final else None

        with self._changed:
            if not self._changed.wait_for(lambda: found() or self._over is not None, timeout.total_seconds()):
                raise PeerTimeout(f"the checkpoint was not there within {timeout.total_seconds():.0f} s")
            message = found()
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
