"""The numbers that membership follows."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Numbers that membership follows; times in seconds."""

    min_nodes: int = 1
    max_nodes: int = 1
    node_multiple: int = 1
    """A world has a multiple of so many nodes."""
    join_timeout_s: float = 600.0
    last_call_s: float = 30.0
    heartbeat_s: float = 0.5
    dead_after_s: float = 2.0
    grow_s: float = 600.0
    """Shortest time between two generations that only make the world larger."""
    stop_timeout_s: float = 60.0
    """Workers of a node that go on reporting, but do not end within that time, end the job."""
    grace_s: float = 30.0

    def __post_init__(self) -> None:
        """Check the combination."""
        if not 0 < self.min_nodes <= self.max_nodes:
            raise ValueError(f"nnodes {self.min_nodes}:{self.max_nodes} is not MIN:MAX with 0 < MIN <= MAX")
        if not 0 < self.heartbeat_s < self.dead_after_s:
            raise ValueError(
                f"a node silent for {self.dead_after_s} s would be dead between beats of {self.heartbeat_s} s"
            )
        if not 0 < self.node_multiple <= self.max_nodes or self.legal(self.max_nodes) < self.min_nodes:
            raise ValueError(
                f"--hold-node-multiple {self.node_multiple}: nnodes {self.min_nodes}:{self.max_nodes} "
                "contains no such number"
            )

    def legal(self, num_nodes: int) -> int:
        """The largest world that so many nodes can form; 0 where they are too few."""
        size = min(num_nodes, self.max_nodes)
        size -= size % self.node_multiple
        return size if size >= self.min_nodes else 0
