"""Agreement of a Session's ranks through the store of their process group: set, get and wait, never a collective."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import timedelta

import msgspec

from holdfast.checkpoint.saving import Ranks
from holdfast.errors import PeerError, PeerTimeout

_FIRST_PAUSE_S = 0.0005
_LAST_PAUSE_S = 0.05


_sessions: Counter[tuple[int, ...]] = Counter()


def session_name(ranks: tuple[int, ...]) -> str:
    """Names a Session of these ranks so that no two of this process are named alike, and all ranks the same.

    Counted for each set of ranks, which open their Sessions in the same order; in others' they take no part.
    """
    _sessions[ranks] += 1
    return f"session/{'-'.join(map(str, ranks[:8]))}/{_sessions[ranks]}"


class Huddle:
    """What the ranks of one Session tell each other. Every rank makes the same calls in the same order."""

    def __init__(self, ranks: Ranks, name: str, *, timeout: timedelta = timedelta(minutes=10)) -> None:
        """Begin.

        Args:
            ranks: who takes part.
            name: the same on all ranks, different for each Session of the process.
            timeout: after which a missing rank is an error.
        """
        self._ranks = ranks
        self._name = name
        self._timeout = timeout
        self._round = 0

    def from_first(self, make: Callable[[], str]) -> str:
        """What `make` gives on the first rank, on all of them.

        Raises:
            PeerTimeout: the first rank did not say.
            PeerError: `make` raised there (there, what it raised goes up).
        """
        if self._ranks.world_size == 1:
            return make()
        key = self._next()
        if self._ranks.rank != 0:
            ok, text = msgspec.json.decode(self._get(key, 0), type=tuple[bool, str])
            if not ok:
                raise PeerError(f"rank 0 of the Session failed: {text}")
            return text
        try:
            text = make()
        except Exception as error:
            self._set(key, msgspec.json.encode((False, str(error))))
            raise
        self._set(key, msgspec.json.encode((True, text)))
        return text

    def gather(self, text: str) -> list[str]:
        """What each rank says, by rank; waits for all. The first rank collects, so that each text is sent twice only.

        Raises:
            PeerTimeout: a rank did not say; it is named.
        """
        if self._ranks.world_size == 1:
            return [text]
        key = self._next()
        if self._ranks.rank != 0:
            self._set(f"{key}/{self._ranks.rank}", text.encode())
            ok, texts = msgspec.json.decode(self._get(f"{key}/all", 0, 1.1), type=tuple[bool, list[str]])
            if not ok:
                raise PeerTimeout(texts[0])
            return texts
        try:
            others = [self._get(f"{key}/{rank}", rank).decode() for rank in range(1, self._ranks.world_size)]
        except PeerTimeout as error:
            self._set(f"{key}/all", msgspec.json.encode((False, [str(error)])))
            raise
        self._set(f"{key}/all", msgspec.json.encode((True, [text, *others])))
        return [text, *others]

    def hear(self, speakers: Sequence[int], text: str) -> list[str]:
        """What each of `speakers` (the same on all ranks) says; `text` counts where this rank is one of them.

        Raises:
            PeerTimeout: a speaker did not say; it is named.
        """
        key = self._next()
        if self._ranks.rank in speakers:
            self._set(f"{key}/{self._ranks.rank}", text.encode())
        return [text if rank == self._ranks.rank else self._get(f"{key}/{rank}", rank).decode() for rank in speakers]

    def _next(self) -> str:
        self._round += 1
        return f"{self._name}/{self._round}"

    def _set(self, key: str, value: bytes) -> None:
        try:
            self._ranks.store.set(key, value)
        except RuntimeError as error:
            raise PeerError(f"the store of the process group does not answer: {error}") from error

    def _get(self, key: str, rank: int, patience: float = 1.0) -> bytes:
        """Poll, because the store's own wait keeps its connection from every other thread of the process.

        Args:
            key: what to wait for.
            rank: who says it.
            patience: factor on the timeout, for who waits for one that waits for others.
        """
        deadline = time.monotonic() + patience * self._timeout.total_seconds()
        pause_s = _FIRST_PAUSE_S
        try:
            while not self._ranks.store.check([key]):
                if time.monotonic() > deadline:
                    raise PeerTimeout(f"rank {rank} of the Session has not answered within {self._timeout} ({key})")
                time.sleep(pause_s)
                pause_s = min(pause_s * 1.5, _LAST_PAUSE_S)
            return bytes(self._ranks.store.get(key))
        except RuntimeError as error:  # torch's DistStoreError is one
            raise PeerError(f"the store of the process group does not answer: {error}") from error
