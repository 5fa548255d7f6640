"""Trying again: how long to wait between attempts, and saying so."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Backoff:
    """Waits between attempts: each up to `factor` times as long as the one before, with jitter, so that the ranks of a
    job that a store slows down do not come back all at once (full jitter, AWS Architecture Blog, 2015)."""

    attempts: int = 9
    first_s: float = 0.2
    factor: float = 2.0
    most_s: float = 15.0

    def waits(self, rng: random.Random) -> Iterator[float]:
        """Seconds before the second attempt, the third, and so on."""
        for number in range(self.attempts - 1):
            limit = min(self.first_s * self.factor**number, self.most_s)
            yield limit * (0.5 + 0.5 * rng.random())


def retry(
    call: Callable[[int], T],
    what: str,
    *,
    backoff: Backoff,
    passing: Callable[[Exception], bool],
    sleep: Callable[[float], None] = time.sleep,
) -> T:
    """Call until it succeeds, an error is none that passes, or all attempts are used up.

    Args:
        call: gets the number of the attempt, from 0.
        what: for the log: the operation and the object.
        backoff: how often and how fast.
        passing: whether an error may pass by itself.
        sleep: waits so many seconds.

    Raises:
        Exception: the last attempt's.
    """
    waits = backoff.waits(random.Random())
    attempt = 0
    while True:
        try:
            result = call(attempt)
        except Exception as error:
            wait = next(waits, None) if passing(error) else None
            if wait is None:
                raise
            attempt += 1
            logger.warning(
                "%s failed, attempt %d of %d follows in %.2f s: %s",
                what,
                attempt + 1,
                backoff.attempts,
                wait,
                first_line(error),
            )
            sleep(wait)
        else:
            if attempt:
                logger.info("%s succeeded at attempt %d", what, attempt + 1)
            return result


def first_line(error: BaseException) -> str:
    """An error in one line."""
    return (str(error).strip().splitlines() or [repr(error)])[0][:500]
