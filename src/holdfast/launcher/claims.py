"""The claim store: who may have the next generation, decided by names that can be created once.

    DIR/successors/<generation>           the claim for what comes after that generation ("first": after none)
    DIR/generations/<incarnation>-<n>     the same claim under the name of what it claims
    DIR/proofs/<nonce>                    written by a leader, read by every member: the store is the same one for all

A claim is the `Standing` that it lists, as JSON. It is won under the name of its predecessor: two sides of a split may
give the successor different names, as one of them may have met nodes that remember a later incarnation. So claims are a
chain, and whoever died between the two names has claimed: others read it, and the members that it lists go on.

A directory that all agents share, or a place in an object store (`holdfast.checkpoint.storage`).
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from holdfast.checkpoint.places import place
from holdfast.checkpoint.storage import Storage, storage_of
from holdfast.checkpoint.version import GenerationId
from holdfast.errors import DECODE_ERRORS, CorruptError, HoldfastError
from holdfast.launcher.wire import Standing

logger = logging.getLogger(__name__)

PROOF_S = 5.0
_LIMIT_BYTES = 1 << 20


class ClaimStore:
    """The store itself. Every call may block on the storage; one thread at a time."""

    def __init__(self, url: str, storage: Storage | None = None) -> None:
        """Nothing is opened.

        Args:
            url: a directory, file:// or what `holdfast.checkpoint.places` knows.
            storage: where it lies; None: what the URL says.

        Raises:
            UsageError: nothing here opens such a URL.
        """
        self._root = place(url)
        self._storage = storage if storage is not None else storage_of(self._root)
        self._generations, self._successors = self._root / "generations", self._root / "successors"

    def newest(self) -> Standing | None:
        """The newest claim.

        Raises:
            StorageError: the store cannot be read.
        """
        found = self._storage.list(self._generations)
        numbers = [number for entry in found if (number := _number(entry.name)) is not None]
        newest = self._read(self._generations / _name(*max(numbers))) if numbers else None
        followed = {entry.name for entry in self._storage.list(self._successors)}
        while (name := _successor_of(newest.generation if newest is not None else None)) in followed:
            followed.remove(name)
            newest = self._read(self._successors / name)
        return newest

    def create(self, claim: Standing, after: GenerationId | None) -> bool:
        """Whether the claim is there and is this one: the only one that comes after that generation.

        Args:
            claim: of the same leader always the same, however often it asks.
            after: the newest generation that was claimed before, None where there was none.

        Raises:
            StorageError: the store can be neither written nor read.
        """
        name = _name(claim.generation.incarnation, claim.generation.generation)
        places = (self._successors / _successor_of(after), self._generations / name)
        return all(self._is_first(path, claim) for path in places)

    def _is_first(self, path: Path, claim: Standing) -> bool:
        try:
            self._storage.write(path, [msgspec.json.encode(claim)], exclusive=True)
        except HoldfastError as error:
            found = self._read(path)  # somebody was first; or the answer to our own write was lost
            logger.info("claim %s: %s", path, error)
            return found == claim
        return True

    def prove(self, nonce: str) -> None:
        """Write the proof that members read.

        Raises:
            StorageError: the store cannot be written.
        """
        self._storage.write(self._root / "proofs" / nonce, [nonce.encode()])

    def has_proof(self, nonce: str) -> bool:
        """Whether a leader has written it."""
        return any(entry.name == nonce for entry in self._storage.list(self._root / "proofs"))

    def awaits_proof(self, nonce: str) -> bool:
        """As `has_proof`, but waits for it a while: file systems differ in how soon others see a new name."""
        deadline = time.monotonic() + PROOF_S
        while not self.has_proof(nonce):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)
        return True

    def _read(self, path: Path) -> Standing:
        data = self._storage.read(path, limit=_LIMIT_BYTES)
        try:
            return msgspec.json.decode(data, type=Standing)
        except DECODE_ERRORS as error:  # a file system without links and exclusive renames, and a sudden death
            raise CorruptError(f"{path} is no claim ({error}): remove it while no launcher of this job runs") from error


def _successor_of(generation: GenerationId | None) -> str:
    return str(generation) if generation is not None else "first"


def _name(incarnation: int, generation: int) -> str:
    return f"{incarnation}-{generation}"


def _number(name: str) -> tuple[int, int] | None:
    incarnation, _, generation = name.partition("-")
    return (int(incarnation), int(generation)) if incarnation.isdigit() and generation.isdigit() else None


class ClaimDesk:
    """Works on a `ClaimStore` in a thread of its own, so that a storage that hangs stops no heartbeat.

    `ask` takes what to do with the store; its result is what `answers` calls back with, on the caller's thread. The
    descriptor is readable when there are answers.
    """

    def __init__(self, store: ClaimStore, complain: Callable[[str], None]) -> None:
        """`complain` takes a line about a failure, on the thread that calls `answers`."""
        self._store = store
        self._complain = complain
        self._said = ""
        self._asked: queue.SimpleQueue[tuple[Callable[[ClaimStore], object], Callable[[object], None]] | None] = (
            queue.SimpleQueue()
        )
        self._answered: queue.SimpleQueue[tuple[Callable[[object], None], object]] = queue.SimpleQueue()
        self.descriptor = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._work, name="holdfast-claims", daemon=True)
        self._thread.start()

    def ask(self, work: Callable[[ClaimStore], object], then: Callable[[object], None]) -> None:
        """Do `work` in the thread; `then` gets its result in `answers`, or nothing where it failed."""
        self._asked.put((work, then))

    def answers(self) -> None:
        """Call back with all results that are there."""
        try:
            os.eventfd_read(self.descriptor)
        except BlockingIOError:
            return
        while not self._answered.empty():
            then, result = self._answered.get()
            if isinstance(result, Exception):
                self._say(str(result))
            else:
                then(result)

    def close(self) -> None:
        """End the thread; one that hangs in the storage is left to the end of the process."""
        self._asked.put(None)
        self._thread.join(1.0)
        if not self._thread.is_alive():
            os.close(self.descriptor)

    def _say(self, text: str) -> None:
        if text != self._said:
            self._said = text
            self._complain(f"the claim store: {text}")

    def _work(self) -> None:
        while (order := self._asked.get()) is not None:
            work, then = order
            try:
                result = work(self._store)
            except Exception as error:  # noqa: BLE001 - the thread's border: the agent says it, and asks again
                result = error
            self._answered.put((then, result))
            os.eventfd_write(self.descriptor, 1)
