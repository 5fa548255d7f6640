"""How far the Sessions of one node's workers have come, gathered from what the daemon pushes. Pure."""

from __future__ import annotations

import msgspec

from holdfast.checkpoint.version import GenerationId
from holdfast.launcher.wire import SessionState
from holdfast.snapshot.messages import RestoreChosen, SessionPhase

_COUNTED = ("opened", "restored", "first_step", "waiting", "closed")
_TIMED = ("opened", "restored", "first_step")


class SessionBook:
    """One per agent; forgets everything when a generation starts."""

    def __init__(self) -> None:
        self._generation: GenerationId | None = None
        self._ranks: dict[str, set[int]] = {}
        self.state = SessionState()

    def begin(self, generation: GenerationId) -> None:
        """A generation starts."""
        self._generation = generation
        self._ranks = {phase: set() for phase in _COUNTED}
        self.state = SessionState()

    def reached(self, message: SessionPhase) -> bool:
        """A worker reached a phase; True where the state changed."""
        ranks = self._ranks.get(message.phase)
        if message.generation != self._generation or ranks is None or message.global_rank in ranks:
            return False
        ranks.add(message.global_rank)
        changes: dict[str, object] = {message.phase: len(ranks)}
        if message.phase in _TIMED:
            changes[f"{message.phase}_s"] = max(message.seconds, getattr(self.state, f"{message.phase}_s"))
        self.state = msgspec.structs.replace(self.state, **changes)
        return True

    def chosen(self, message: RestoreChosen) -> bool:
        """The leader's daemon has chosen what the generation starts from; True where the state changed."""
        if message.generation != self._generation:
            return False
        self.state = msgspec.structs.replace(
            self.state, tier=message.tier, step=message.step, steps_lost=message.steps_lost, reason=message.reason
        )
        return True
