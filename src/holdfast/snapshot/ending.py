"""How a daemon ends: at once, after lingering, and with the newest complete version in storage.

    SERVING ──agent gone──▶ LINGERING ──no new agent in time──▶ RESCUING ──▶ OVER
       │  ▲                     │                                  ▲
       │  └─────agent came──────┘                                  │
       └──Shutdown(persist)────────────────────────────────────────┘
       └──Shutdown(no persist)──▶ OVER

*Rescuing* writes the newest complete version to storage if it is not there. The leader of the last generation gathers
the inventories of all nodes, chooses as for a restore, and orders the parts; the others do their part and wait for its
word. Everything has a deadline: a node that does not answer costs the rescue, never a process that stays.
"""

from __future__ import annotations

import enum
import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import msgspec

from holdfast.checkpoint.commit import StepInfo
from holdfast.checkpoint.places import place
from holdfast.errors import HoldfastError
from holdfast.snapshot import chain, survey
from holdfast.snapshot.messages import (
    AnyMessage,
    AskNode,
    Bye,
    Inventory,
    Notice,
    PersistEnded,
    PersistOrder,
    PersistPart,
    StartGeneration,
)
from holdfast.snapshot.persister import LIMIT_S, Commit, commit, step_directory
from holdfast.snapshot.records import SessionConfig

if TYPE_CHECKING:
    from holdfast.snapshot.daemon import Daemon

_log = logging.getLogger(__name__)
_ATTEMPT: Final = 1 << 60
"""Attempt number of a rescue: above those of every leader."""
_INVENTORY_LIMIT_S: Final = 5.0
_RESCUE_LIMIT_S: Final = 600.0
_LEADER_LIMIT_S: Final = 60.0
_STORAGE_S: Final = 60.0
"""How long listing the checkpoints may take."""


def too_slow(ended: Sequence[PersistEnded], grace_s: float) -> float | None:
    """Seconds that a persist will take where that is more than `grace_s`, else None; as the last one took. Pure.

    Without an earlier one nobody knows, and it is tried.
    """
    written = [done.seconds for done in ended if done.path is not None]
    return written[-1] if written and 0 < grace_s < written[-1] else None


class _State(enum.Enum):
    SERVING = "serving"
    LINGERING = "lingering"
    RESCUING = "rescuing"
    OVER = "over"


class Ending:
    """Decides when the daemon goes, and sees to the rescue. Event loop only."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._state = _State.SERVING
        self._deadline = float("inf")
        self._rescue: Rescue | None = None
        self._hopeless = False
        """Persisting takes longer than we are given."""
        self.keep_arena = False
        """We were told to go while an agent lives: a successor adopts the arena."""

    @property
    def over(self) -> bool:
        """Whether the process may end."""
        return self._state is _State.OVER

    def agent_came(self) -> None:
        """An agent said Hello."""
        self._hopeless = False
        if self._state is _State.LINGERING:
            self._state, self._deadline = _State.SERVING, float("inf")

    def agent_went(self) -> None:
        """Our agent's process has ended."""
        if self._state is _State.SERVING:
            self._state = _State.LINGERING
            self._deadline = time.monotonic() + self._daemon.arena.state.linger_s

    def persist_wanted(self, grace_s: float) -> bool:
        """Asked to stop within `grace_s`: whether the last step is persisted; if not, say so."""
        seconds = too_slow(self._daemon.arena.state.ended, grace_s)
        self._hopeless = seconds is not None
        if seconds is not None:
            self._daemon.to_agent(
                Notice(
                    severity="warning",
                    text=f"the last step is not persisted: that takes {seconds:.0f} s, as the last time, and the grace "
                    f"is {grace_s:.0f} s; the newest checkpoint stays as it is (see --hold-grace)",
                )
            )
        return seconds is None

    def shutdown(self, *, persist: bool) -> None:
        """The job has ended."""
        persist = persist and not self._hopeless
        if self._state in (_State.RESCUING, _State.OVER):
            return
        if persist:
            self._begin_rescue()
        else:
            self._finish(Bye())

    def stop_now(self) -> None:
        """SIGTERM: with an agent there, a successor goes on; without one, nobody would."""
        if self._state is _State.SERVING:
            self.keep_arena = True
            self._state = _State.OVER
        elif self._state is _State.LINGERING:
            self._begin_rescue()

    def tick(self, now: float) -> None:
        """Called in every turn of the event loop."""
        if self._state is _State.LINGERING and now >= self._deadline:
            self._begin_rescue()
        if self._state is _State.RESCUING and self._rescue is not None:
            self._rescue.tick(now)
            if self._rescue.bye is not None:
                self._finish(self._rescue.bye)

    def receive(self, message: AnyMessage) -> None:
        """An answer of a node's daemon to the leader."""
        if self._rescue is not None:
            self._rescue.receive(message)

    def leader_said(self, message: PersistEnded | Bye) -> None:
        """The leader's daemon has ended a persist, or goes."""
        if self._rescue is not None:
            self._rescue.leader_said(message)

    def _begin_rescue(self) -> None:
        _log.info("writing the newest complete version to storage before the memory goes")
        self._daemon.node.end_generation()
        if self._daemon.leading is not None:
            self._daemon.leading.persisting.finishing = True
        self._state = _State.RESCUING
        self._rescue = Rescue(self._daemon)

    def _finish(self, bye: Bye) -> None:
        if bye.error is not None:
            _log.error("the newest version is not in storage: %s", bye.error)
        elif bye.persisted is not None:
            _log.info("%s is in storage: %s", bye.persisted, bye.path)
        self._daemon.to_agent(bye)
        self._state = _State.OVER


class Rescue:
    """Writes the newest complete version to storage, together with the other nodes. `bye` is set when it is over."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self.bye: Bye | None = None
        self._start: StartGeneration | None = daemon.node.start
        self._config: SessionConfig | None = daemon.arena.state.config
        self._begun = time.monotonic()
        self._asked = 0.0
        self._inventories: dict[int, Inventory] = {}
        self._chosen: chain.Choice | None = None
        self._parts: dict[int, PersistPart] = {}
        self._choosing = self._committing = False
        if self._start is None or self._config is None or self._config.checkpoint_dir is None:
            self.bye = Bye()

    @property
    def _leads(self) -> bool:
        return self._start is not None and self._start.leader == self._start.node_rank

    def tick(self, now: float) -> None:
        """Go on where nothing but time is needed."""
        if self.bye is not None or self._start is None:
            return
        waited = now - self._begun
        if waited > (_RESCUE_LIMIT_S if self._leads else _LEADER_LIMIT_S) and not self._daemon.lanes.busy("persist"):
            self.bye = Bye(error=f"the daemons of this job did not agree within {waited:.0f} s")
        elif self._leads and not self._choosing and not self._busy():
            self._gather(now, waited)

    def _busy(self) -> bool:
        """Persists that the leader has begun are ended first: they may be of this version."""
        return any(self._daemon.lanes.busy(lane) for lane in ("persist", "commit", "storage"))

    def _gather(self, now: float, waited: float) -> None:
        assert self._start is not None
        members = {member.node_rank for member in self._start.members}
        self._inventories[self._start.node_rank] = self._daemon.node.inventory()
        missing = members - set(self._inventories)
        if missing and waited < _INVENTORY_LIMIT_S:
            if now - self._asked > 0.5:
                self._asked = now
                for node_rank in missing:
                    ask = AskNode(
                        generation=self._start.generation, leader_epoch=self._daemon.arena.control.daemon_epoch
                    )
                    self._daemon.transport.send_node(node_rank, ask)
            return
        self._choosing = True
        self._daemon.lanes.submit("storage", self._choose, self._choice_made, limit_s=_STORAGE_S)

    def _choose(self) -> tuple[chain.Choice, str | None]:
        assert self._start is not None
        assert self._config is not None
        directory = self._config.checkpoint_dir
        after = msgspec.structs.replace(self._start.generation, generation=self._start.generation.generation + 1)
        history = survey.history_of(directory)
        question = chain.ChainQuestion(
            generation=after,
            fresh=True,  # memory of another life of the checkpoint directory is not written into it
            resume="auto",
            inventories=tuple(self._inventories.values()),
            stored=survey.stored_steps(directory, "auto"),
            history=history,
        )
        choice = chain.choose(question)
        while choice.rebuilds and choice.version is not None:  # nodes write the images that they hold
            question = replace(question, excluded=(*question.excluded, choice.version))
            choice = chain.choose(question)
        return choice, history

    def _choice_made(self, result: tuple[chain.Choice, str | None] | Exception) -> None:
        assert self._start is not None
        assert self._config is not None
        assert self._config.checkpoint_dir is not None
        if isinstance(result, Exception):
            self._end(Bye(error=str(result)))
            return
        self._chosen, self._history = result
        version = self._chosen.version
        if self._chosen.tier != "memory" or version is None:
            self._end(Bye(persisted=version, path=self._chosen.path))
            return
        directory = survey.stored_path(self._config.checkpoint_dir, version)
        if directory is not None:
            self._end(Bye(persisted=version, path=directory))
            return
        order = PersistOrder(
            version=version,
            directory=str(step_directory(self._config.checkpoint_dir, version.step)),
            attempt=_ATTEMPT,
        )
        for node_rank in self._inventories:
            self._daemon.transport.send_node(node_rank, order)

    def receive(self, message: AnyMessage) -> None:
        """An inventory or a part of another node (or our own)."""
        match message:
            case Inventory() if self._start is not None and message.generation == self._start.generation:
                self._inventories[message.node_rank] = message
            case PersistPart() if message.attempt == _ATTEMPT:
                self._parts[message.node_rank] = message
                if set(self._parts) >= set(self._inventories) and not self._committing:
                    self._commit()

    def _commit(self) -> None:
        assert self._chosen is not None
        assert self._chosen.version is not None
        assert self._config is not None
        assert self._config.checkpoint_dir is not None
        errors = [part.error for part in self._parts.values() if part.error is not None]
        if errors:
            self._end(Bye(error=errors[0]))
            return
        version = self._chosen.version
        inventories = tuple(self._inventories.values())
        images = [image for inventory in inventories for image in inventory.clean]
        world = next(image.world_size for image in images if image.version == version)
        job = Commit(
            version=version,
            directory=step_directory(self._config.checkpoint_dir, version.step),
            records=tuple(record for _, part in sorted(self._parts.items()) for record in part.records),
            world_size=len(chain.writers(version, world, inventories)),
            metrics={},
            tag=None,
            history=self._history,
            keep=self._config.keep,
        )
        self._committing = True
        self._daemon.lanes.submit("commit", lambda: commit(job), self._committed, limit_s=LIMIT_S)

    def _committed(self, result: StepInfo | Exception) -> None:
        assert self._chosen is not None
        if isinstance(result, Exception):
            if not isinstance(result, HoldfastError):
                _log.error("the commit failed", exc_info=result)
            self._end(Bye(error=str(result)))
        else:
            self._end(Bye(persisted=self._chosen.version, path=str(place(result.path))))

    def _end(self, bye: Bye) -> None:
        """Tell the other nodes, which wait for us."""
        assert self._start is not None
        for member in self._start.members:
            if member.node_rank != self._start.node_rank:
                self._daemon.transport.send_node(member.node_rank, bye)
        self.bye = bye

    def leader_said(self, message: PersistEnded | Bye) -> None:
        """A node that does not lead goes when the leader goes."""
        if isinstance(message, Bye) and not self._leads:
            self.bye = message
