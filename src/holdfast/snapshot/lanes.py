"""Named threads for the daemon's blocking work; results come back to its event loop.

A *lane* is one thread with a queue: its jobs run one after another, in order. What a job returned or raised is handed
to its callback in the event loop, never in the lane, so the daemon's state has one thread.
"""

from __future__ import annotations

import functools
import logging
import os
import queue
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

_log = logging.getLogger(__name__)
T = TypeVar("T")


class Lanes:
    """The threads of one daemon. Made, used and closed by the event loop's thread.

    `wakeup` is a file descriptor that becomes readable when results wait for `deliver`.
    """

    def __init__(self) -> None:
        self.wakeup = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._results: deque[Callable[[], None]] = deque()  # lanes append, the event loop takes
        # Any: a job's type is known to its own callback only
        self._queues: dict[str, queue.SimpleQueue[tuple[Callable[[], Any], Callable[[Any], None]] | None]] = {}
        self._threads: dict[str, threading.Thread] = {}
        self._unfinished: dict[str, int] = {}

    def submit(self, lane: str, job: Callable[[], T], done: Callable[[T | Exception], None]) -> None:
        """Run `job` in `lane`; `done` gets what it returned or raised, in the event loop."""
        if lane not in self._threads:
            self._queues[lane] = queue.SimpleQueue()
            self._threads[lane] = threading.Thread(target=self._run, args=(lane,), name=f"holdfast-{lane}", daemon=True)
            self._threads[lane].start()
        self._unfinished[lane] = self._unfinished.get(lane, 0) + 1
        self._queues[lane].put((job, done))

    def post(self, callback: Callable[[], None]) -> None:
        """Have `callback` called in the event loop. Any thread."""
        self._results.append(callback)
        os.eventfd_write(self.wakeup, 1)

    def busy(self, lane: str) -> bool:
        """Whether jobs of `lane` have not been delivered yet."""
        return self._unfinished.get(lane, 0) > 0

    def deliver(self) -> None:
        """Call the callbacks of finished jobs. Event loop only."""
        try:
            os.eventfd_read(self.wakeup)
        except BlockingIOError:
            return
        while self._results:
            self._results.popleft()()

    def close(self, timeout_s: float) -> None:
        """Let the lanes end; one that is stuck in storage is left behind (daemon thread) after `timeout_s`."""
        for lane in self._queues.values():
            lane.put(None)
        for thread in self._threads.values():
            thread.join(timeout_s)
            if thread.is_alive():
                _log.warning("thread %s did not end within %.1f s", thread.name, timeout_s)

    def _run(self, lane: str) -> None:
        jobs = self._queues[lane]
        while (item := jobs.get()) is not None:
            job, done = item
            try:
                result = job()
            except Exception as error:  # noqa: BLE001  a thread's border: the callback decides what it means
                result = error
            self._results.append(functools.partial(self._finish, lane, done, result))
            os.eventfd_write(self.wakeup, 1)

    def _finish(self, lane: str, done: Callable[[Any], None], result: Any) -> None:
        self._unfinished[lane] -= 1
        done(result)
