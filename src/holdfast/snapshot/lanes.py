"""Named threads for the daemon's blocking work; results come back to its event loop.

A *lane* is one thread with a queue: its jobs run one after another, in order. What a job returned or raised is handed
to its callback in the event loop, never in the lane, so the daemon's state has one thread.

Storage may hang for ever, in a call that nothing can end. So a job may have a limit: when that is over, its callback
gets a `StorageError`, the thread is left to itself, and the lane goes on with another one. What the job does when its
call returns after all is its own affair: it is given a way to learn that it has been given up, where that matters.
"""

from __future__ import annotations

import functools
import logging
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from holdfast.errors import StorageError

_log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(eq=False)
class _Job:
    run: Callable[[], Any]  # Any: a job's type is known to its own callback only
    done: Callable[[Any], None]
    limit_s: float
    begun: float = 0.0
    """`time.monotonic()`; set by the lane."""


@dataclass(eq=False)
class _Lane:
    """A thread and its queue. `running` and `given_up` are guarded by `lock`: whoever takes it first, the thread that
    has ended its job or the event loop that gives it up, decides which of the two it was."""

    name: str
    jobs: queue.SimpleQueue[_Job | None] = field(default_factory=queue.SimpleQueue)
    lock: threading.Lock = field(default_factory=threading.Lock)
    running: _Job | None = None
    given_up: bool = False
    thread: threading.Thread | None = None


class Lanes:
    """The threads of one daemon. Made, used and closed by the event loop's thread.

    `wakeup` is a file descriptor that becomes readable when results wait for `deliver`.
    """

    def __init__(self) -> None:
        self.wakeup = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._results: deque[Callable[[], None]] = deque()  # lanes append, the event loop takes
        self._lanes: dict[str, _Lane] = {}
        self._unfinished: dict[str, int] = {}

    def submit(
        self, lane: str, job: Callable[[], T], done: Callable[[T | Exception], None], *, limit_s: float = float("inf")
    ) -> None:
        """Run `job` in `lane`; `done` gets what it returned or raised, in the event loop; a `StorageError` where it has
        not ended `limit_s` after it began (`expire`)."""
        if lane not in self._lanes:
            self._start(_Lane(lane))
        self._unfinished[lane] = self._unfinished.get(lane, 0) + 1
        self._lanes[lane].jobs.put(_Job(job, done, limit_s))

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

    def expire(self, now: float) -> None:
        """Give up the jobs whose limit is over at `now` (`time.monotonic()`). Event loop only."""
        for lane in list(self._lanes.values()):
            job = lane.running
            if job is not None and now - job.begun > job.limit_s:
                self._give_up(lane, job)

    def hurry(self, lane: str, limit_s: float) -> None:
        """Whoever wanted the job that `lane` runs is gone: it has `limit_s` more, then the next one waits no longer.
        Event loop only."""
        job = self._lanes[lane].running if lane in self._lanes else None
        if job is not None:
            job.limit_s = min(job.limit_s, time.monotonic() - job.begun + limit_s)

    def close(self, timeout_s: float) -> None:
        """Let the lanes end; one that is stuck in storage is left behind (daemon thread) after `timeout_s`."""
        for lane in self._lanes.values():
            lane.jobs.put(None)
        for lane in self._lanes.values():
            assert lane.thread is not None
            lane.thread.join(timeout_s)
            if lane.thread.is_alive():
                _log.warning("thread %s did not end within %.1f s", lane.thread.name, timeout_s)

    def _start(self, lane: _Lane) -> None:
        self._lanes[lane.name] = lane
        lane.thread = threading.Thread(target=self._run, args=(lane,), name=f"holdfast-{lane.name}", daemon=True)
        lane.thread.start()

    def _give_up(self, lane: _Lane, job: _Job) -> None:
        with lane.lock:
            if lane.running is not job:
                return  # it has just ended
            lane.given_up = True
        _log.warning("a job of lane %s does not end; another thread takes its place", lane.name)
        successor = _Lane(lane.name)
        while not lane.jobs.empty():  # the thread takes no more from it
            successor.jobs.put(lane.jobs.get_nowait())
        self._start(successor)
        self._finish(lane.name, job, StorageError(f"no answer within {time.monotonic() - job.begun:.0f} s"))

    def _run(self, lane: _Lane) -> None:
        while (job := lane.jobs.get()) is not None:
            job.begun = time.monotonic()
            lane.running = job
            try:
                result = job.run()
            except Exception as error:  # noqa: BLE001  a thread's border: the callback decides what it means
                result = error
            with lane.lock:
                lane.running = None
                if lane.given_up:
                    return
            self._results.append(functools.partial(self._finish, lane.name, job, result))
            os.eventfd_write(self.wakeup, 1)

    def _finish(self, lane: str, job: _Job, result: Any) -> None:
        self._unfinished[lane] -= 1
        job.done(result)
