"""Where the ranks of a save or a load meet: names in the process group's store (set, get, check), never a collective.

What ranks say goes up a tree: each waits for at most `FANOUT` others and passes on what its subtree said, so that ten
thousand ranks do not meet at one. Rank 0 is the root; what it answers lies under one name that all read.

- An error goes up like a record, at once, and comes down to all: every rank raises it, with the rank that met it.
- A rank that does not come is named by its parent. Those further up are more patient, so that they hear of it instead
  of naming the parent.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import msgspec
import zstandard

from holdfast.errors import (
    DECODE_ERRORS,
    CheckpointError,
    CorruptError,
    HoldfastError,
    MismatchError,
    PeerError,
    PeerTimeout,
    StateError,
    StorageError,
    UsageError,
)

__all__ = ["Meeting", "Ranks", "agree"]

logger = logging.getLogger(__name__)

FANOUT = 16
_GRACE_LIMIT = timedelta(seconds=30)
_ANSWER_GRACE = timedelta(seconds=30)
_ERRORS: dict[str, type[HoldfastError]] = {
    error.__name__: error
    for error in (
        UsageError,
        StateError,
        CheckpointError,
        CorruptError,
        MismatchError,
        StorageError,
        PeerError,
        PeerTimeout,
    )
}


@dataclass(frozen=True)
class Ranks:
    """The ranks that save or load together."""

    rank: int
    """This one, in the group: 0 <= rank < world_size. Images are named by it."""
    world_size: int
    store: Any
    """torch.distributed.Store; None where world_size is 1. Any: torch ships no usable type for its stores."""

    @classmethod
    def alone(cls) -> Ranks:
        """One process."""
        return cls(0, 1, None)

    @classmethod
    def of(cls, process_group: Any = None) -> Ranks:
        """Of a process group (None: the default one; alone where torch.distributed is not initialised).

        Raises:
            UsageError: this rank is not in the group.
        """
        import torch.distributed as dist

        if not dist.is_available() or not dist.is_initialized():
            return cls.alone()
        rank = dist.get_rank(process_group)
        if rank < 0:
            raise UsageError("this rank is not in the process group: only its ranks may save and load")
        world_size = dist.get_world_size(process_group)
        if world_size == 1:
            return cls.alone()
        store = dist.distributed_c10d._get_process_group_store(
            process_group or dist.distributed_c10d._get_default_group()
        )
        return cls(rank, world_size, store)


class _Part(msgspec.Struct, frozen=True, array_like=True):
    """What a rank says: its subtree's data by rank, or the first error that it knows of."""

    data: dict[int, bytes] = {}
    error: str = ""
    kind: str = ""
    rank: int = 0
    """Who met the error."""

    @classmethod
    def of_error(cls, error: Exception, rank: int) -> _Part:
        text = (str(error) or repr(error)).encode("utf-8", "backslashreplace").decode()  # paths need be no text
        return cls({}, text, type(error).__name__, rank)

    def check(self) -> None:
        if self.error:
            raise _ERRORS.get(self.kind, PeerError)(f"rank {self.rank}: {self.error}")


class Meeting:
    """One attempt of all ranks at one thing. Every rank makes the same calls in the same order, from one thread."""

    def __init__(self, ranks: Ranks, name: str, *, what: str, timeout: timedelta) -> None:
        """
        Args:
            ranks: who meet.
            name: the same on all ranks, another for each attempt.
            what: for messages: "/ckpt/step-00000100: the save".
            timeout: how long a rank that has come waits for one that has not.
        """
        self._ranks = ranks
        self._prefix = f"holdfast/meeting/{name}"
        self._what = what
        self._timeout = timeout
        self._round = 0
        self._is_open = False
        """Whether this round's answer is still to come."""
        self._failed = False
        self._down: str | None = None

    def collect(self, data: bytes, *, join: Callable[[Sequence[bytes]], bytes] | None = None) -> list[bytes] | None:
        """Tell rank 0 something, which waits for all: what each rank said, by rank; None on the others.

        Args:
            data: what this rank says.
            join: makes one of what several ranks said, in the order of their ranks; then each rank passes on one for
                its subtree, and rank 0 gets one for all ranks.

        Raises:
            PeerTimeout: ranks of this one's subtree did not come; names them.
            HoldfastError: what one of them met; from `join`.
        """
        self._round += 1
        if self._ranks.world_size == 1:
            return [data]
        self._is_open = True
        rank = self._ranks.rank
        said = {rank: data}
        try:
            for part in self._children():
                said.update(part.data)
            if join is not None and len(said) > 1:
                said = {rank: join([said[other] for other in sorted(said)])}
        except HoldfastError as error:
            self.fail(error)
            raise
        if rank == 0:
            return [said[rank] for rank in sorted(said)]
        self._set(self._up(rank), _Part(said))
        return None

    def announce(self, data: bytes = b"") -> None:
        """Rank 0: answer what `collect` gave."""
        if self._ranks.world_size > 1:
            name = f"{self._round}/down"
            self._set(name, _Part({0: data}))
            if self._down is not None:
                self._forget(self._down)  # all have taken part in this round, so all have read the last one's
            self._down = name
            self._is_open = False

    def wait(self) -> bytes:
        """Other ranks: what rank 0 answered.

        Raises:
            PeerTimeout: it did not answer.
            HoldfastError: what it or another rank met.
        """
        patience = self._patience(0) + max(_ANSWER_GRACE, self._timeout / 10)
        name = f"{self._round}/down"
        for _ in polls(patience, self._ranks.world_size):
            if self._is_there(name):
                part = self._get(name)
                part.check()
                self._is_open = False
                return part.data[0]
        raise PeerTimeout(f"{self._what}: rank 0 did not answer within {patience}")

    def gather(self, data: bytes) -> list[bytes]:
        """What each rank says, by rank, on all of them.

        Raises:
            PeerTimeout: a rank did not come; names it.
            HoldfastError: what a rank met.
        """
        said = self.collect(data)
        if self._ranks.world_size == 1:
            return [data]
        if said is not None:
            # Compressed because replicas say the same.
            self.announce(zstandard.compress(msgspec.msgpack.encode(said), 1))
            return said
        return msgspec.msgpack.decode(zstandard.decompress(self.wait()), type=list[bytes])

    def fail(self, error: Exception) -> None:
        """Tell the others, which wait in the round that this rank is in or should begin next, that it cannot; a store
        that does not answer any more is not waited for."""
        if self._ranks.world_size > 1 and not self._failed:
            part = _Part.of_error(error, self._ranks.rank)
            self._tell(part, self._round + (not self._is_open))

    def alarm(self, error: Exception) -> None:
        """The same, also to ranks that are between two rounds and call `check`."""
        if self._ranks.world_size > 1 and not self._failed:
            with suppress(PeerError):
                self._set("alarm", _Part.of_error(error, self._ranks.rank))
            self.fail(error)

    def check(self) -> None:
        """
        Raises:
            HoldfastError: what a rank called `alarm` about.
        """
        if self._ranks.world_size > 1 and self._is_there("alarm"):
            self._get("alarm").check()

    # --- inside

    def _tell(self, part: _Part, number: int) -> None:
        self._failed = True
        name = f"{number}/down" if self._ranks.rank == 0 else f"{number}/up/{self._ranks.rank}"
        try:
            self._set(name, part)
        except PeerError as silent:
            logger.warning("%s: the other ranks could not be told that it failed: %s", self._what, silent)

    def _children(self) -> Iterator[_Part]:
        rank, world_size = self._ranks.rank, self._ranks.world_size
        missing = [child for child in range(rank * FANOUT + 1, (rank + 1) * FANOUT + 1) if child < world_size]
        if not missing:
            return
        patience = self._patience(rank)
        for _ in polls(patience, FANOUT, of=world_size):
            for child in [child for child in missing if self._is_there(self._up(child))]:
                part = self._get(self._up(child))
                self._forget(self._up(child))
                if part.error:
                    self._tell(part, self._round)  # as it is, with the rank that met it
                part.check()
                missing.remove(child)
                yield part
            if not missing:
                return
        names = ", ".join(map(str, missing[:10]))
        raise PeerTimeout(f"{self._what}: rank {names} did not come within {patience}")

    def _patience(self, rank: int) -> timedelta:
        """Longer by a grace for each level below, whose own limit ends first."""
        levels, first = 0, rank * FANOUT + 1
        while first < self._ranks.world_size:
            levels, first = levels + 1, first * FANOUT + 1
        return self._timeout + max(levels - 1, 0) * min(_GRACE_LIMIT, self._timeout / 2)

    def _up(self, rank: int) -> str:
        return f"{self._round}/up/{rank}"

    @property
    def _store(self) -> Any:  # see Ranks.store
        return self._ranks.store

    def _set(self, name: str, part: _Part) -> None:
        with store_errors():
            self._store.set(f"{self._prefix}/{name}", msgspec.msgpack.encode(part))

    def _is_there(self, name: str) -> bool:
        with store_errors():
            return bool(self._store.check([f"{self._prefix}/{name}"]))

    def _get(self, name: str) -> _Part:
        with store_errors():
            data = self._store.get(f"{self._prefix}/{name}")
        try:
            return msgspec.msgpack.decode(data, type=_Part)
        except DECODE_ERRORS as error:
            raise PeerError(f"what another rank left under {name} does not parse: {error}") from error

    def _forget(self, name: str) -> None:
        with store_errors():
            self._store.delete_key(f"{self._prefix}/{name}")


def agree(ranks: Ranks, name: str, make: Callable[[], str], timeout: timedelta) -> str:
    """A short text of rank 0's that all ranks get.

    Args:
        ranks: who agree.
        name: of the text; a new one each time.
        make: called on rank 0.
        timeout: how long other ranks wait for it.

    Raises:
        PeerTimeout: rank 0 did not come.
        PeerError: the store does not answer.
    """
    if ranks.world_size == 1:
        return make()
    key = f"holdfast/agree/{name}"
    if ranks.rank == 0:
        text = make()
        with store_errors():
            ranks.store.set(key, text.encode())
        return text
    return await_key(ranks, key, timeout, lambda: f"rank 0 did not come to {name} within {timeout}").decode()


def await_key(ranks: Ranks, key: str, timeout: timedelta, missing: Callable[[], str]) -> bytes:
    """The value of a name in the store, once it is there.

    Raises:
        PeerTimeout: it did not come; says what `missing` gives.
        PeerError: the store does not answer.
    """
    for _ in polls(timeout, ranks.world_size):
        with store_errors():
            if ranks.store.check([key]):
                return bytes(ranks.store.get(key))
    raise PeerTimeout(missing())


@contextmanager
def store_errors() -> Iterator[None]:
    """The store's own errors (it lives in one of the ranks or in the launcher) as ours."""
    try:
        yield
    except RuntimeError as error:
        raise PeerError(f"the store of the process group does not answer: {error}") from error


def polls(timeout: timedelta, num_waiting: int = 1, *, of: int = 1) -> Iterator[None]:
    """Once at the start, then after fractions of a millisecond (2 ms in large jobs), later every 0.1 s (more where
    thousands ask the same store), and once more at the end. What comes is noticed after a sixteenth of the time that it
    took, or sooner.

    Polling, because a store's own wait holds its connection, and writes a warning for each time-out.

    Args:
        timeout: how long.
        num_waiting: ranks that ask for the same.
        of: ranks that may ask the store for something at the same time, where they are more.
    """
    began = time.monotonic()
    deadline = began + timeout.total_seconds()
    shortest = min(0.002, max(0.0002, max(num_waiting, of) / 40_000))
    longest = max(0.1, num_waiting / 5000)
    while (now := time.monotonic()) < deadline:
        yield
        pause = min(max(shortest, (now - began) / 16), longest)
        time.sleep(max(0.0, min(pause, deadline - time.monotonic())))
    yield
