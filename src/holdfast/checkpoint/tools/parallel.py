"""Work on several images at a time, within the memory bound."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from queue import SimpleQueue
from typing import TypeVar

from holdfast.checkpoint.object_storage import PART_BYTES, PARTS_AT_ONCE
from holdfast.checkpoint.places import UrlPath
from holdfast.checkpoint.tools.units import Progress
from holdfast.errors import UsageError

T = TypeVar("T")
R = TypeVar("R")

LEAST_MEMORY_BYTES = 64 << 20
"""For one worker."""
_MOST_WORKERS = 256
_UPLOAD_BYTES = (PARTS_AT_ONCE + 2) * PART_BYTES


def workers_within(asked: int, max_memory_bytes: int, destination: Path | None = None) -> int:
    """How many may work at the same time.

    Args:
        asked: for by ``--workers``.
        max_memory_bytes: for all of them.
        destination: where they write; parts of uploads are in memory until they are sent.

    Raises:
        UsageError: no worker is asked for, or the bound is too small for one.
    """
    if asked < 1:
        raise UsageError(f"--workers {asked}: give at least 1")
    each = worker_bytes(destination)
    if max_memory_bytes < each:
        raise UsageError(f"--max-memory {max_memory_bytes}: at least {each >> 20}MiB are needed")
    return min(asked, max_memory_bytes // each, _MOST_WORKERS)


def worker_bytes(destination: Path | None = None) -> int:
    """The least that one worker needs."""
    return LEAST_MEMORY_BYTES + (_UPLOAD_BYTES if isinstance(destination, UrlPath) else 0)


def share_of(max_memory_bytes: int, workers: int, destination: Path | None = None) -> int:
    """What of the bound one worker may use for reading and cutting."""
    return max_memory_bytes // workers - (_UPLOAD_BYTES if isinstance(destination, UrlPath) else 0)


def in_parallel(
    work: Callable[[T, R], object],
    items: Iterable[T],
    tools: Iterable[R],
    name: str,
    progress: Progress | None = None,
) -> None:
    """Do ``work(item, tool)`` for every item, with as many threads as there are tools: no two use one at a time.

    The first error ends it, an interruption too: what has not begun is not begun, what is under way is waited for; with
    a `progress` that all of it adds to, that is until it next does.

    Raises:
        Exception: the first one of `work`.
    """
    free: SimpleQueue[R] = SimpleQueue()
    for tool in tools:
        free.put(tool)
    failed = threading.Event()

    def one(item: T) -> None:
        tool = free.get(timeout=60.0)  # there are as many as threads, so one is free
        try:
            if not failed.is_set():
                work(item, tool)
        except BaseException:
            failed.set()
            raise
        finally:
            free.put(tool)

    with ThreadPoolExecutor(max(free.qsize(), 1), name) as pool:
        futures = [pool.submit(one, item) for item in items]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
            for future in futures:
                if future.done():
                    future.result()
        except BaseException:
            failed.set()
            if progress is not None:
                progress.stop()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
