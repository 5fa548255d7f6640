"""The leader's part in protecting versions: which one is being protected, which one is (pure).

Rules
-----
1. One version at a time, a complete one of this generation: the newest when the one before is protected.
2. It is protected when every node says that the parity which it holds of it is whole, nodes without images too. Until
   then data and parity of the protected one before stay on every node (no RAID write hole).
3. Over a change of generations the protected version of an older one stays in the same way. Only where a node has fewer
   than three slots, and the version that the generation started from is another one, is it given up: the two would
   leave no slot for a new version.
4. A version whose parity some node can never make is given up; the next newer one is taken. Where there are fewer than
   three slots, the older protected one goes with it: the two would leave no slot for a new version.
5. While a persist decodes images of lost nodes (`held`), no newer version takes the place of the protected one, whose
   parity these are decoded from. The newer one stays whole beside it; the next has to wait.
6. Where a node has no room for so many parities, all groups get as many as there is room for, on every node
   (`ParityLowered`): no version is protected before all say that they follow. A node that has no room for a single one
   ends it for the generation: versions are then kept as without redundancy.

Theory of operation
-------------------
As everything between the ledgers (`holdfast.snapshot.reports`): derived anew from the newest reports. A restarted
leader takes for protected what all nodes have whole, or what some node has been told, and is given the rest with its
configuration.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from holdfast.checkpoint.version import GenerationId, Version
from holdfast.snapshot.reports import NodeState


@dataclass(frozen=True, kw_only=True)
class VersionProtected:
    """Parity is whole on every node. Every node says so too (`ledger_events.Protected`); for the leader's own log."""

    version: Version


@dataclass(frozen=True, kw_only=True)
class ParityLowered:
    """Groups have at most so many parities from now on."""

    num_parity: int


class Protection:
    """Owned by the leader's ledger.

    Args:
        coded: there is redundancy.
        parent: what the generation started from, where that was in memory.
        protected: the protected version of an older generation.
    """

    lowered = 0
    """The most parities of a group, 0: as formed."""

    def __init__(self, *, coded: bool, parent: Version | None, protected: Version | None) -> None:
        self.protected = protected
        self.current: Version | None = None
        """The one being protected."""
        self.held = False
        """The parity of the protected one is being read."""
        self._coded, self._parent = coded, parent

    def restore(self, reports: Collection[NodeState], generation: GenerationId) -> None:
        """A restarted leader: some node may have been told already that a version is protected."""
        told = [state.protected for state in reports if state.protected is not None]
        own = [version for version in told if version.generation == generation]
        self.protected = max(own, default=self.protected)

    def lower(self, reports: Collection[NodeState]) -> list[ParityLowered]:
        """Look for nodes without room for so many parities; to be called before `advance`."""
        short = [state.most_parity for state in reports if state.parity is False and state.lowered == self.lowered]
        if not self._coded or not short or min(short) < 1:
            return []
        self.lowered, self.current = min(short), None
        return [ParityLowered(num_parity=self.lowered)]

    def advance(
        self, reports: Collection[NodeState], complete: Version | None, num_slots: int
    ) -> list[VersionProtected]:
        """Look at the reports again; `current` and `protected` may change.

        Args:
            reports: the newest one of every node.
            complete: the newest complete version of the generation.
            num_slots: the fewest slots of any node.
        """
        if self._hopeless(reports, complete, num_slots):
            self.protected = None
        if not self._coded or self._impossible(reports):
            self.current = None
        if not self._coded or not all(state.parity and state.lowered == self.lowered for state in reports):
            return []
        done: list[VersionProtected] = []
        if self.current is not None and all(state.coded == self.current for state in reports):
            if self.held:
                return []
            self.protected, self.current = self.current, None
            done.append(VersionProtected(version=self.protected))
        elif self.current is not None and _uncodable(self.current, reports):
            self.current = None
        if self.current is None and complete not in (None, self.protected) and not _uncodable(complete, reports):
            self.current = complete
        return done

    def can(self, version: Version, reports: Collection[NodeState]) -> bool:
        """Whether `version` is protected or may still be."""
        possible = self._coded and not any(state.parity is False for state in reports)
        return self.protected == version or (possible and not _uncodable(version, reports))

    def _hopeless(self, reports: Collection[NodeState], complete: Version | None, num_slots: int) -> bool:
        """Whether the protected version stands in the way of new ones, or nothing will ever take its place."""
        if self.protected is None or self.protected == complete:
            return False
        if complete is None:
            return 0 < num_slots < 3 and self.protected != self._parent
        never = not self._coded or self._impossible(reports)
        return never or (0 < num_slots < 3 and _uncodable(complete, reports))

    def _impossible(self, reports: Collection[NodeState]) -> bool:
        """Whether some node has room for no parity at all; what it said before the last lowering does not count."""
        return any(state.parity is False and state.lowered == self.lowered for state in reports)


def _uncodable(version: Version | None, reports: Collection[NodeState]) -> bool:
    return version is not None and any(state.uncodable == version for state in reports)
