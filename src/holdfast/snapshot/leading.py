"""The shell of the leader: it gathers inventories and openings, has the restore chosen, and carries out its ledger.

The daemon of the generation's leader node owns one `Leading` per generation. What it knows is rebuilt by a successor:
before the choice from the nodes' answers to `AskNode`, after it from the record in `node.state` and the nodes' reports.
Persists are `holdfast.snapshot.persisting`. Event loop only; storage is touched in the lane ``storage``.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Final

import msgspec

from holdfast.checkpoint.version import Version
from holdfast.erasure.groups import Grouping, form_groups, lower_parity
from holdfast.erasure.redundancy import Redundancy
from holdfast.errors import HoldfastError, StateError, StorageError, UsageError
from holdfast.snapshot import chain, leader, survey
from holdfast.snapshot.coding import Rebuild
from holdfast.snapshot.lanes import Lanes
from holdfast.snapshot.messages import (
    AnyMessage,
    AskNode,
    Inventory,
    LeaderOrders,
    LeaderRestore,
    NodeReport,
    Notice,
    PersistPart,
    RanksOpened,
    Refused,
    Restore,
    RestoreChosen,
    RestoreFailed,
    StartGeneration,
)
from holdfast.snapshot.persisting import Persisting
from holdfast.snapshot.records import ImageLocation, SessionConfig
from holdfast.snapshot.reports import Pin

_log = logging.getLogger(__name__)
_ASK_EVERY_S: Final = 0.5
_WARN_AFTER_S: Final = 60.0
_STORAGE_S: Final = 15.0
"""How long a generation of an incarnation that runs waits for its checkpoint storage before memory alone must do."""


class Leading:
    """Leads one generation.

    Args:
        start: the generation.
        epoch: of this daemon.
        send: sends to the daemon of a node rank.
        to_agent: sends to our own agent.
        redundancy: how nodes protect each other (`Redundancy.parse`).
    """

    def __init__(
        self,
        start: StartGeneration,
        epoch: int,
        lanes: Lanes,
        *,
        send: Callable[[int, AnyMessage], None],
        to_agent: Callable[[AnyMessage], None],
        redundancy: str = "auto",
    ) -> None:
        self._redundancy = redundancy
        self.start, self._epoch, self._lanes = start, epoch, lanes
        self.send, self._to_agent = send, to_agent
        self.closed = False
        self.config: SessionConfig | None = None
        self.history: str | None = None
        self.ledger: leader.LeaderLedger | None = None
        self._inventories: dict[int, Inventory] = {}
        self._opened: dict[int, SessionConfig] = {}
        self._choosing = False
        self._stop_survey = threading.Event()
        self._refused: Refused | None = None
        self._excluded: set[Version] = set()
        self._attempt = 0
        self._bad_images: set[tuple[Version, int]] = set()
        self._excluded_paths: set[str] = set()
        self._chosen: LeaderRestore | None = None
        self._fed: deque[leader.LeaderEvent] = deque()  # the first one is being carried out
        self.worlds: dict[Version, int] = {}
        """How many images the versions of older generations have."""
        self._orders: dict[int, LeaderOrders] = {}
        self._epochs: dict[int, int] = {}
        self._asked = self._first_opened = 0.0
        self._repeated = 0.0
        self.persisting = Persisting(self, lanes)
        self._warned = False

    @property
    def members(self) -> tuple[int, ...]:
        """Node ranks."""
        return tuple(member.node_rank for member in self.start.members)

    @property
    def inventories(self) -> tuple[Inventory, ...]:
        """Those that have come."""
        return tuple(self._inventories.values())

    @property
    def bulk(self) -> dict[int, str]:
        """Node rank -> endpoint of its bulk server."""
        return {node_rank: inventory.bulk for node_rank, inventory in self._inventories.items()}

    def resume(self, chosen: LeaderRestore, config: SessionConfig) -> None:
        """A successor of the leader's daemon: the choice stands. Once all nodes have said what they hold, the ledger
        is rebuilt from their reports."""
        self._chosen, self.config, self.history = chosen, config, chosen.history
        self._attempt = chosen.restore.attempt

    def close(self) -> None:
        """Another generation starts, or the daemon goes: results of lanes that come later count no more."""
        self.closed = True
        self._stop_survey.set()
        self._lanes.hurry("storage", _STORAGE_S)

    # --- before the choice

    def receive(self, message: AnyMessage) -> None:
        """A message of a node's daemon for the leader."""
        match message:
            case Inventory() if message.generation == self.start.generation:
                self._inventories[message.node_rank] = message
                if self._chosen is not None:  # it has not heard of the choice
                    self.send(message.node_rank, self._chosen)
                if self._chosen is not None and self.ledger is None:
                    self._resume_where_known(self._chosen.restore)
                self._try_choose()
            case RanksOpened() if message.generation == self.start.generation:
                self._take_openings(message)
            case RestoreFailed() if message.generation == self.start.generation:
                self._take_failure(message)
            case NodeReport(state=state) if state.generation == self.start.generation:
                if self._epochs.setdefault(state.node_rank, state.epoch) != state.epoch:
                    self._epochs[state.node_rank] = state.epoch
                    for ended in self.persisting.ended:  # its daemon was replaced, and may not have heard of them
                        self.send(state.node_rank, ended)
                if self.ledger is not None:
                    self.feed(leader.ReportReceived(state=state))
            case PersistPart():
                self.persisting.take_part(message)
            case _:
                _log.debug("the leader of %s ignores %s", self.start.generation, type(message).__name__)

    def tick(self, now: float) -> None:
        """Called every few milliseconds with `time.monotonic()`."""
        if self.ledger is None and now - self._asked > _ASK_EVERY_S:
            self._asked = now
            for node_rank in self._silent():
                self.send(node_rank, AskNode(generation=self.start.generation, leader_epoch=self._epoch))
        if self._first_opened and not self._warned and now - self._first_opened > _WARN_AFTER_S:
            self._warned = True
            self._warn_of_missing()
        if self.ledger is not None:
            self.persisting.tick(now)
            if now - self._repeated > _ASK_EVERY_S:  # orders may have been lost with a connection
                self._repeated = now
                for node_rank, orders in self._orders.items():
                    if node_rank != self.start.node_rank:
                        self.send(node_rank, orders)

    def _silent(self) -> list[int]:
        wanted = set(self.config.ranks) if self.config and self._chosen is None else set()
        return [
            member.node_rank
            for member in self.start.members
            if member.node_rank not in self._inventories
            or not (wanted & set(range(member.first_global_rank, member.first_global_rank + member.num_ranks)))
            <= set(self._opened)
        ]

    def _warn_of_missing(self) -> None:
        missing = sorted(set(self.config.ranks) - set(self._opened)) if self.config else []
        if missing:
            ranks = ", ".join(map(str, missing[:20]))
            self.say(
                "warning", f"a Session waits since {_WARN_AFTER_S:.0f} s for rank {ranks}: no snapshots until then"
            )

    def _take_openings(self, message: RanksOpened) -> None:
        self._first_opened = self._first_opened or time.monotonic()
        for rank, config in message.opened:
            if self.config is None:
                self.config = config
            if config != self.config:
                self._refuse(UsageError(_difference(rank, config, self.config)))
            self._opened[rank] = config
        self._try_choose()

    def _take_failure(self, message: RestoreFailed) -> None:
        """The same report comes from every rank that saw it; only the first one changes anything."""
        chosen = self._chosen.restore if self._chosen else None
        failed = (message.version, message.path, message.attempt)
        if chosen is None or (chosen.version, chosen.path, chosen.attempt) != failed:
            return
        self._attempt += 1
        text = f"{message.version} cannot be restored ({message.reason}); the next candidate is taken"
        damaged = message.damaged
        self.say("warning", text, about="damage" if damaged else "", number=max(1, damaged))
        bad = {(message.version, rank) for rank in message.bad_images} - self._bad_images
        if chosen.path is not None:
            self._excluded_paths.add(chosen.path)
        elif bad and self._chosen is not None and self._chosen.grouping is not None:
            self._bad_images |= bad  # once as if they were lost: they may be decoded
        else:
            self._excluded.add(message.version)
        self._chosen, self.ledger = None, None
        self._try_choose()

    def _try_choose(self) -> None:
        ready = (
            self.config is not None
            and set(self._inventories) >= set(self.members)
            and set(self._opened) >= set(self.config.ranks)
        )
        if not ready or self._choosing or self._chosen is not None or self._refused is not None:
            return
        assert self.config is not None
        self._choosing = True
        question = survey.Question(
            generation=self.start.generation,
            fresh=self.start.fresh,
            config=self.config,
            inventories=tuple(self._inventories[node_rank] for node_rank in sorted(self._inventories)),
            excluded=tuple(sorted(self._excluded)),
            bad_images=tuple(sorted(self._bad_images)),
            excluded_paths=tuple(sorted(self._excluded_paths)),
        )
        self._survey(question, limit_s=math.inf if self.start.fresh else _STORAGE_S)

    def _survey(self, question: survey.Question, limit_s: float) -> None:
        """Choose, in the lane that touches storage. One that hangs is given up where memory alone does."""
        stop, raised = threading.Event(), list[Exception]()
        self._stop_survey = stop

        def job() -> survey.Answer:
            try:
                return survey.decide(question, wanted=lambda: not stop.is_set())
            except Exception as error:
                raised.append(error)
                raise

        def done(answer: survey.Answer | Exception) -> None:
            if self.closed or isinstance(answer, survey.Answer) or answer in raised:
                self._decided(answer)
                return
            stop.set()
            alone = survey.from_memory_alone(question, problem=str(answer))
            if alone is not None:
                self._decided(alone)
                return
            self.say("warning", f"the checkpoint storage hangs, and memory alone does not do: {answer}; waiting on")
            self._survey(question, math.inf)

        self._lanes.submit("storage", job, done, limit_s=limit_s)

    def _decided(self, answer: survey.Answer | Exception) -> None:
        self._choosing = False
        if self.closed:
            return
        if isinstance(answer, Exception):
            self._refuse(answer)
            return
        self.history = answer.history
        choice = answer.choice
        if answer.problem:
            self.say("warning", f"the checkpoint storage cannot be used, memory is all there is: {answer.problem}")
        for rejected in choice.rejected:
            _log.info("%s was not taken: %s", rejected.candidate, rejected.reason)
        restore = Restore(
            tier=choice.tier,
            version=choice.version,
            step=choice.step,
            path=choice.path,
            images=self.locations(choice.version, choice.rebuilds) if choice.tier == "memory" else (),
            attempt=self._attempt,
            bulk=self.bulk,
            steps_lost=choice.steps_lost,
            first_of_incarnation=self.start.fresh,
        )
        domains = {node_rank: inventory.domain for node_rank, inventory in self._inventories.items()}
        grouping = self._grouping(domains)
        self._chosen = LeaderRestore(
            generation=self.start.generation,
            restore=msgspec.structs.replace(restore, exposed=choice.exposed and grouping is not None),
            history=answer.history,
            config=self.config,
            grouping=grouping,
            domains=domains,
            protected=choice.protected,
        )
        self._note_worlds()
        for node_rank in self.members:
            self.send(node_rank, self._chosen)
        inventories = self.inventories
        world_size = sum(member.num_ranks for member in self.start.members)
        tiers = {chain.tier_of(choice, inventories, member, world_size) for member in self.start.members}
        self._to_agent(
            RestoreChosen(
                generation=self.start.generation,
                tier="peers" if "peers" in tiers else choice.tier,
                version=choice.version,
                step=choice.step,
                steps_lost=choice.steps_lost,
                reason=choice.reason,
            )
        )
        self._lead(carried=chain.carried_persists(inventories, choice, generation=self.start.generation))

    def _note_worlds(self) -> None:
        """How many images the versions of older generations have."""
        inventories = self.inventories
        for image in (image for inventory in inventories for image in inventory.clean):
            self.worlds[image.version] = len(chain.writers(image.version, image.world_size, inventories))

    def _grouping(self, domains: dict[int, str]) -> Grouping | None:
        """Which nodes protect each other, None where none does."""
        members = {node_rank: domains[node_rank] for node_rank in self.members}
        grouping = form_groups(members, Redundancy.parse(self._redundancy))
        for note in grouping.notes if self.start.fresh else ():
            self.say("info", note)
        return grouping if any(group.num_parity for group in grouping.groups) else None

    def locations(self, version: Version | None, rebuilds: Iterable[Rebuild]) -> tuple[ImageLocation, ...]:
        """Images that lie somewhere, then those that are decoded."""
        return tuple(
            ImageLocation(
                node_rank=inventory.node_rank,
                daemon=inventory.bulk,
                path=image.path,
                offset=image.offset,
                size_bytes=image.size_bytes,
                local=False,
                global_rank=image.global_rank,
            )
            for inventory in self._inventories.values()
            for image in sorted(inventory.clean, key=lambda image: image.global_rank)
            if image.version == version and (version, image.global_rank) not in self._bad_images
        ) + tuple(
            ImageLocation(
                node_rank=-1,
                daemon="",
                path="",
                offset=0,
                size_bytes=rebuild.image.size_bytes,
                local=False,
                global_rank=rebuild.global_rank,
                rebuild=rebuild,
            )
            for rebuild in rebuilds
        )

    def _refuse(self, error: Exception) -> None:
        """Every rank gets the same error; the generation has no Session."""
        kind = next((kind for kind, classes in _KINDS if isinstance(error, classes)), "peer")
        reason = str(error) if isinstance(error, HoldfastError) else f"{type(error).__name__}: {error}"
        if not isinstance(error, HoldfastError):
            _log.error("the restore could not be chosen", exc_info=error)
        self._refused = Refused(reason=reason, kind=kind)
        for node_rank in self.members:
            self.send(node_rank, self._refused)

    # --- after the choice

    def _resume_where_known(self, restore: Restore) -> None:
        """Lead on as soon as all nodes have answered: persists that were carried into the generation go on."""
        if not set(self._inventories) >= set(self.members):
            return
        self._note_worlds()
        choice = chain.Choice(tier=restore.tier, version=restore.version, step=restore.step)
        inventories = self.inventories
        self._lead(carried=chain.carried_persists(inventories, choice, generation=self.start.generation))

    def _lead(self, carried: tuple[Pin, ...]) -> None:
        inventories = self.inventories
        decoded = tuple(pin.version for pin in carried if chain.lost_images(pin.version, inventories))
        assert self.config is not None
        assert self._chosen is not None
        self.ledger = leader.LeaderLedger(
            leader.LeaderConfig(
                generation=self.start.generation,
                epoch=self._epoch,
                nodes=self.members,
                num_ranks=len(self.config.ranks),
                start_step=self._chosen.restore.step,
                snapshot_every=self.config.snapshot_every,
                persist_every_steps=self.config.persist_every_steps if self.config.checkpoint_dir else None,
                carried=carried,
                decoded=decoded,
                coded=self._chosen.grouping is not None,
                parent=self._chosen.restore.version if self._chosen.restore.tier == "memory" else None,
                protected=self._chosen.protected,
                lowered=self._chosen.lowered,
                exposed=self._chosen.restore.exposed,
            )
        )
        self._carry_out(self.ledger.start())

    def feed(self, event: leader.LeaderEvent) -> None:
        """Tell the ledger; where that is called while its instructions are carried out, after these."""
        self._fed.append(event)
        if len(self._fed) > 1:
            return
        while self._fed:
            try:
                if self.ledger is not None:
                    self._carry_out(self.ledger.handle(self._fed[0]))
            finally:
                self._fed.popleft()

    def _carry_out(self, instructions: list[leader.LeaderInstruction]) -> None:
        for instruction in instructions:
            match instruction:
                case leader.SendOrders(node_rank=node_rank, orders=orders):
                    self._orders[node_rank] = LeaderOrders(orders=orders)
                    self.send(node_rank, self._orders[node_rank])
                case leader.OrderPersist():
                    self.persisting.order(instruction)
                case leader.CommitPersist():
                    self.persisting.commit(instruction)
                case leader.PersistSettled():
                    self.persisting.settled(instruction)
                case leader.VersionCompleted(version=version):
                    _log.debug("%s is complete", version)
                case leader.VersionProtected(version=version):
                    _log.debug("%s is protected", version)
                case leader.ParityLowered(num_parity=num_parity):
                    self._lower(num_parity)
                case leader.IntervalChosen(every=every, wait_s=wait_s, step_s=step_s):
                    self.say(
                        "info",
                        f"a snapshot every {every} steps: training waits {wait_s * 1e3:.1f} ms for one, "
                        f"a step takes {step_s * 1e3:.0f} ms",
                    )

    def _lower(self, num_parity: int) -> None:
        """Some node has no room for more: groups as formed, with fewer parities, for all nodes."""
        assert self._chosen is not None
        assert self._chosen.grouping is not None
        grouping = lower_parity(self._chosen.grouping, num_parity)
        self._chosen = msgspec.structs.replace(self._chosen, grouping=grouping, lowered=num_parity)
        self.say(
            "warning",
            f"snapshots: memory for the parity of other nodes is short: {num_parity} of a group may be lost at a time",
        )
        for node_rank in self.members:
            self.send(node_rank, self._chosen)

    def say(self, severity: str, text: str, *, about: str = "", number: int = 1) -> None:
        """A line for people, at our own agent."""
        _log.info("%s: %s", severity, text)
        self._to_agent(Notice(severity=severity, text=text, about=about, number=number))


_KINDS: Final = (("state", StateError), ("usage", UsageError), ("storage", (StorageError, OSError)))


def _difference(rank: int, config: SessionConfig, other: SessionConfig) -> str:
    names = [name for name in config.__struct_fields__ if getattr(config, name) != getattr(other, name)]
    return f"Sessions differ between ranks: {', '.join(names)} of rank {rank} are not those of the others"
