"""What a node keeps ready for its next generation: a standby that warms up in time, or none. Main thread of the agent.

A standby that ends, or that the job cannot have, is missed by nobody: workers are then spawned as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from holdfast.launcher import events
from holdfast.launcher.arguments import Launch
from holdfast.launcher.console import say
from holdfast.launcher.processes import Guard
from holdfast.launcher.seats import Seat
from holdfast.launcher.standby import SPARE_MODULES, Standby, can_stand_by, user_path


class Reserve:
    """See the module's head. One per agent, which closes it."""

    def __init__(
        self,
        launch: Launch,
        *,
        seat: Seat,
        guard: Guard,
        num_workers: int,
        wanted: bool,
        write: Callable[[events.AnyEvent], None],
    ) -> None:
        """Nothing is started here.

        Args:
            launch: the command line.
            seat: of this node, whose directory keeps the standby's files.
            guard: ends the spawner when the agent was killed.
            num_workers: how many forked workers wait.
            wanted: there can be Sessions: without one there is no first finished step to warm up for.
            write: takes events.
        """
        self._num_workers = num_workers
        self._write = write
        wanted = wanted and launch.hold.standby and can_stand_by(launch.arguments)
        self.standby = (
            Standby(
                launch.command,
                guard=guard,
                names=seat.directory / "imports",
                log=seat.directory / "standby.log",
                user_path=user_path(launch.arguments),
            )
            if wanted
            else None
        )

    @property
    def pids(self) -> frozenset[int]:
        """Children of the agent whose end is waited for here."""
        return self.standby.pids if self.standby is not None else frozenset()

    @property
    def descriptor(self) -> int | None:
        """Readable when `hear` has something to do."""
        return self.standby.descriptor if self.standby is not None else None

    def close(self) -> None:
        """End the standby."""
        if self.standby is not None:
            self.standby.close()

    def stepped(self, variables: Mapping[str, str]) -> None:
        """All workers have finished a step: what the script needs has been imported, the standby may import it too."""
        if self.standby is not None:
            self.standby.warm_up(variables)
            self.standby.hold(self._num_workers)

    def waits(self, variables: Mapping[str, str]) -> None:
        """This node waits until it is needed, and should not have to import torch then."""
        if self.standby is not None:
            self.standby.warm_up(variables, SPARE_MODULES)

    def hear(self) -> None:
        """The standby is ready, or lost."""
        change = self.standby.changed() if self.standby is not None else None
        if change is None or self.standby is None:
            return
        word = "ready" if change.ready else "failed"
        self._write(events.StandbyEvent(change=word, pid=change.pid, modules=change.num_modules, text=change.text))
        if change.ready:
            self.standby.hold(self._num_workers)
        else:
            say(f"no standby for restarts: {change.text}")
            self.standby = None
