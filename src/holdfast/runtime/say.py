"""Lines for the person who watches the job: few, each said once, by one rank.

They go to the log (INFO); where nobody has set up logging, to stderr as well, because a line that tells where a run
resumed is worth nothing unseen.
"""

from __future__ import annotations

import logging
import sys


def say(log: logging.Logger, text: str, *, rank: int = 0) -> None:
    """Say `text` once for the job: only rank 0 of the Session does."""
    if rank != 0:
        return
    log.info("%s", text)
    if not (log.isEnabledFor(logging.INFO) and log.hasHandlers()):
        sys.stderr.write(f"holdfast: {text}\n")
        sys.stderr.flush()


def size(num_bytes: int) -> str:
    """`num_bytes` for people: ``1.02 GB``."""
    value, unit = float(num_bytes), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.3g} {unit}"


def plural(count: int, noun: str) -> str:
    """``1 step``, ``2 steps``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
