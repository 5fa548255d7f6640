"""A state or weights from storage: all ranks read the checkpoint together; where they cannot meet, each for itself."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

from holdfast.checkpoint.catalog import Catalog
from holdfast.checkpoint.commit import open_checkpoint
from holdfast.checkpoint.saving import Ranks
from holdfast.errors import PeerError
from holdfast.runtime.capture import TrainingState
from holdfast.runtime.init_from import InitFrom, init_weights
from holdfast.runtime.reader import Fetcher, OwnFetcher

T = TypeVar("T")
log = logging.getLogger(__name__)

_PATIENCE = timedelta(minutes=1)
"""How long ranks wait for each other, or for bytes of each other, before each reads for itself."""


class StoredStates:
    """Takes a Session's state, or its first weights, from checkpoints. Training thread only; all ranks make the same
    calls."""

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
        name = f"{self._name}/restore/{next(self._attempts)}"
        return self._read(path, name, self._state.restore, objects=True, together=True)

    def initialise(self, init_from: InitFrom, path: Path, *, together: bool) -> None:
        """Take weights of another run from a step directory (`agree_on`). Once.

        Args:
            init_from: which ones.
            path: of the step directory.
            together: whether all ranks take them from there.

        Raises:
            CorruptError, StorageError: they cannot be read, on this rank or on another.
            MismatchError: they are of another model.
        """

        def take(catalog: Catalog, fetcher: Fetcher) -> None:
            init_weights(init_from, self._state.entries(), path, catalog, fetcher)

        self._read(path, f"{self._name}/init", take, objects=False, together=together)

    def _read(
        self, path: Path, name: str, take: Callable[[Catalog, Fetcher], T], *, objects: bool, together: bool
    ) -> T:
        if self._together and together:
            try:
                return self._read_together(path, name, take, objects=objects)
            except PeerError as error:
                log.warning("%s: the ranks cannot read it together, each does for itself: %s", path, error)
        with open_checkpoint(path) as catalog:
            return take(catalog, OwnFetcher(catalog))

    def _read_together(self, path: Path, name: str, take: Callable[[Catalog, Fetcher], T], *, objects: bool) -> T:
        from holdfast.checkpoint.joint import JointReading  # with sockets, which a process alone does without
        from holdfast.runtime.joint_fetcher import JointFetcher

        with JointReading(
            path, self._ranks, name=name, what="the restore", timeout=_PATIENCE, tagger=self._tagger
        ) as reading:
            if objects:
                first, own = reading.catalog.object_images(self._session_rank)
                reading.objects({first, *own})
            return take(reading.catalog, JointFetcher(reading))
