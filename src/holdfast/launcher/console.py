"""One line for people, on standard error."""

from __future__ import annotations

import contextlib
import sys


def say(text: str) -> None:
    """Print the line; a standard error that is gone is no reason to fail."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # closed since, or before we began
        sys.stderr.write(f"holdfast: {text}\n")
        sys.stderr.flush()
