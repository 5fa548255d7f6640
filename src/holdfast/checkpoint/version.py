"""Names of things in time: incarnation, generation, version.

An *incarnation* is a start of the job by new agents, numbered, with a random 32-bit nonce (after a total loss nothing
is found, so the number alone would repeat). A *generation* is one membership within it. A *version* is all images of
one step of one generation.
"""

from __future__ import annotations

import re
import secrets

import msgspec

from holdfast.errors import UsageError

_GENERATION = re.compile(r"i(\d+)-([0-9a-f]{8})-g(\d+)")


class GenerationId(msgspec.Struct, frozen=True, order=True, kw_only=True):
    """One membership of one incarnation; ``str()`` gives ``i01-7f3a9c02-g0004``, as in file names."""

    incarnation: int
    nonce: str
    """Eight lower-case hexadecimal digits."""
    generation: int

    def __str__(self) -> str:
        return f"i{self.incarnation:02d}-{self.nonce}-g{self.generation:04d}"

    @classmethod
    def parse(cls, text: str) -> GenerationId:
        """Read back what ``str()`` gave.

        Raises:
            UsageError: `text` is no generation.
        """
        match = _GENERATION.fullmatch(text)
        if match is None:
            raise UsageError(f"{text!r} is no generation: expected the form i01-7f3a9c02-g0004")
        return cls(incarnation=int(match[1]), nonce=match[2], generation=int(match[3]))

    def at(self, step: int) -> Version:
        """The version of this generation at `step` (completed steps)."""
        return Version(generation=self, step=step)


class Version(msgspec.Struct, frozen=True, order=True, kw_only=True):
    """All images of one step of one generation. Ordered by generation, then step; only a chain makes that order mean
    "newer" (see `holdfast.snapshot.chain`)."""

    generation: GenerationId
    step: int
    """Completed steps."""

    def __str__(self) -> str:
        return f"{self.generation}-step-{self.step:08d}"


def new_nonce() -> str:
    """A fresh incarnation nonce."""
    return secrets.token_hex(4)
