"""A restore from storage: all ranks read the checkpoint together; where they cannot meet, each reads for itself."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

from holdfast.checkpoint.commit import open_checkpoint
from holdfast.checkpoint.saving import Ranks
from holdfast.errors import PeerError
from holdfast.runtime.capture import TrainingState

log = logging.getLogger(__name__)

_PATIENCE = timedelta(minutes=1)
"""How long ranks wait for each other, or for bytes of each other, before each reads for itself."""


class StoredStates:
    """Restores a Session's state from checkpoints. Training thread only; all ranks make the same calls."""

    def __init__(
        self,
        state: TrainingState,
        ranks: Ranks,
        name: str,
        *,
        session_rank: int,
        tagger: Callable[[bytes, memoryview], bytes] | None = None,
        together: bool = True,
    ) -> None:
        """Begin.

        Args:
            state: is filled.
            ranks: of the Session.
            name: the same on all ranks, different for each Session of the process.
            session_rank: this rank's place in the Session.
            tagger: guards what ranks send each other; None: a digest.
            together: whether they may send each other anything.
        """
        self._state = state
        self._ranks = ranks
        self._name = name
        self._session_rank = session_rank
        self._tagger = tagger
        self._together = together and ranks.world_size > 1
        self._attempts = itertools.count(1)

    def restore(self, path: Path) -> int:
        """Take the state from a step directory; its step.

        Raises:
            CorruptError, StorageError: it cannot be read, on this rank or on another.
            MismatchError: it is of another training state.
        """
        attempt = next(self._attempts)
        if self._together:
            try:
                return self._restore_together(path, f"{self._name}/restore/{attempt}")
            except PeerError as error:
                log.warning("%s: the ranks cannot read it together, each does for itself: %s", path, error)
        with open_checkpoint(path) as catalog:
            return self._state.restore(catalog)

    def _restore_together(self, path: Path, name: str) -> int:
        from holdfast.checkpoint.joint import JointReading  # with sockets, which a process alone does without
        from holdfast.runtime.joint_fetcher import JointFetcher

        with JointReading(
            path, self._ranks, name=name, what="the restore", timeout=_PATIENCE, tagger=self._tagger
        ) as reading:
            first, own = reading.catalog.object_images(self._session_rank)
            reading.objects({first, *own})
            return self._state.restore(reading.catalog, JointFetcher(reading))
