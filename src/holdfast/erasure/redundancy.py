"""What ``--hold-redundancy`` may say: ``auto``, ``K+M`` (as in ``4+2``), ``mirror`` or ``none``."""

from __future__ import annotations

import enum
import re

import msgspec

from holdfast.errors import UsageError

MAX_SHARDS = 255
"""Largest k + m."""

_CODE = re.compile(r"([0-9]{1,3})\+([0-9]{1,3})")


class Scheme(enum.Enum):
    """Who chooses k and m."""

    AUTO = "auto"
    """The number of nodes does; see `holdfast.erasure.groups`."""
    CODE = "code"
    """The user did."""
    NONE = "none"
    """No node protects another."""


class Redundancy(msgspec.Struct, frozen=True):
    """The redundancy that the user asked for."""

    scheme: Scheme
    num_data: int = 0
    """k, with `Scheme.CODE`."""
    num_parity: int = 0
    """m, with `Scheme.CODE`: how many nodes of a group may be lost."""

    @classmethod
    def parse(cls, text: str) -> Redundancy:
        """Read ``auto``, ``K+M``, ``mirror`` (the same as ``1+1``) or ``none``.

        Raises:
            UsageError: anything else, or a code that does not exist.
        """
        word = text.strip().lower()
        if word in ("auto", "none"):
            return cls(Scheme(word))
        if word == "mirror":
            return cls(Scheme.CODE, 1, 1)
        match = _CODE.fullmatch(word)
        if match is None:
            raise UsageError(f"redundancy {text!r} is none of auto, K+M (for example 4+2), mirror, none")
        num_data, num_parity = int(match[1]), int(match[2])
        if num_data < 1 or num_parity < 1 or num_data + num_parity > MAX_SHARDS:
            raise UsageError(f"redundancy {text!r}: K and M are at least 1, K + M at most {MAX_SHARDS}")
        return cls(Scheme.CODE, num_data, num_parity)

    def __str__(self) -> str:
        return self.scheme.value if self.scheme is not Scheme.CODE else f"{self.num_data}+{self.num_parity}"
