"""What was found damaged in memory or on the wire, told to people and counted.

Whatever is found was noticed by a checksum and has reached nobody: another source, another version or another try has
taken its place. But memory that flips bits will do it again, so each place is said once, with a number that the event
log adds up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from holdfast.snapshot.messages import Notice

_KEPT: Final = 1000


class DamageLog:
    """Of one daemon. Event loop only.

    Args:
        say: a line for people.
    """

    def __init__(self, say: Callable[[Notice], None]) -> None:
        self._say = say
        self._told: set[str] = set()

    def found(self, text: str, number: int = 1) -> None:
        """`number` things are damaged, as `text` says with their place; nothing happens where it was said before."""
        if text in self._told or len(self._told) >= _KEPT:
            return
        self._told.add(text)
        self._say(Notice(severity="warning", text=text, about="damage", number=number))
