"""Room for images: which pool of slots the ranks of a node use, and when a new one is made.

Every local rank says how large its image is. When all have said so, the pool at hand is used again if its slots are
large enough; else a new pool is reserved in a lane of its own, as large as the memory limit allows. The pool counts
when every rank has mapped it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Final

import msgspec

from holdfast.erasure.redundancy import MAX_SHARDS
from holdfast.snapshot.arena import SLOT_HEADER_BYTES, Arena, round_capacity
from holdfast.snapshot.lanes import Lanes
from holdfast.snapshot.limits import LEAST_SLOTS, WANTED_SLOTS, Limit, SlotPlan, least_limit, plan_slots, size_of
from holdfast.snapshot.messages import Notice, SlotsReady
from holdfast.snapshot.reports import SlotRef

_log = logging.getLogger(__name__)
_LANE: Final = "reserve"


class Room:
    """The pools of one node. Event loop only.

    Args:
        arena: where the slots are made.
        lanes: whose ``reserve`` lane does the blocking part.
        announce: sends a message to a local rank.
        notice: says a line to people.
        unused: slots of the pool at hand that hold nothing needed; they go before a new pool is made.
        ready: all ranks have mapped the slots (pool, number of slots).
    """

    def __init__(
        self,
        arena: Arena,
        lanes: Lanes,
        *,
        announce: Callable[[int, SlotsReady], None],
        notice: Callable[[Notice], None],
        unused: Callable[[], list[SlotRef]],
        ready: Callable[[int, int], None],
    ) -> None:
        self._arena, self._lanes = arena, lanes
        self._announce, self._notice, self._unused, self._ready = announce, notice, unused, ready
        self._local_ranks: tuple[int, ...] = ()
        self._needs: dict[int, int] = {}
        self._mapped: set[int] = set()
        self._round = 0  # a reservation that ends after a newer round has begun announces nothing
        self._making = 0  # capacity of the slots that are being made in this round
        self._announced = False
        self._said = ""
        self.parity_shares: tuple[tuple[int, float], ...] = ()
        """Parities of a group, m, most first, and bytes of one generation of them for each byte of state (m / k); set
        before ranks say what they need, and again where the first ones are given up."""
        self.most_parity = MAX_SHARDS
        """For so many of these at most two generations fit beside the slots, as far as is known."""

    @property
    def parity_fits(self) -> bool:
        """Whether there is room for as many parities as wanted."""
        return not self.parity_shares or self.most_parity >= self.parity_shares[0][0]

    def lowered(self) -> bool:
        """Fewer parities are wanted than before. Whether it is known that they fit: the slots are made."""
        return self._announced

    def start(self, local_ranks: tuple[int, ...]) -> None:
        """A generation starts: nobody has said anything yet."""
        self._local_ranks, self._needs, self._mapped = local_ranks, {}, set()
        self._announced, self._making = False, 0
        self._round += 1

    def adopt(self, local_ranks: tuple[int, ...]) -> None:
        """A successor of the daemon: the ranks map the pool already, and use it."""
        self.start(local_ranks)
        self._announced = True
        self._mapped = set(local_ranks)

    def need(self, local_rank: int, size_bytes: int) -> bool:
        """A rank's image takes `size_bytes`. True: it is larger than the slots in use, grants must pause."""
        if local_rank not in self._local_ranks:
            return False
        state = self._arena.state
        self._needs[local_rank] = max(size_bytes, self._needs.get(local_rank, 0))
        if self._announced and size_bytes <= state.capacity_bytes:
            self._announce(local_rank, self._slots_ready(local_rank))  # it has reconnected, or asks again
            return False
        paused, self._announced = self._announced, False
        if set(self._needs) >= set(self._local_ranks) and max(self._needs.values()) > self._making:
            self._plan()
        return paused

    def mapped(self, local_rank: int, pool: int) -> None:
        """A rank has mapped the slots of `pool`."""
        if not self._announced or pool != self._arena.state.pool or self._mapped >= set(self._local_ranks):
            return
        self._mapped.add(local_rank)
        if self._mapped >= set(self._local_ranks):
            self._ready(pool, self._arena.state.num_slots)

    # --- planning and making

    def _plan(self) -> None:
        state, needed = self._arena.state, max(self._needs.values())
        self._round += 1
        whole = self._whole_slots(state.pool) if needed <= state.capacity_bytes else 0
        if whole >= WANTED_SLOTS:
            self._have(self._round, state.pool, state.capacity_bytes, whole)
            return
        if needed <= state.capacity_bytes:
            pool, capacity = state.pool, state.capacity_bytes
        else:
            for slot in self._unused():
                self._arena.drop(self._arena.slot_path(slot.pool, rank, slot.index) for rank in self._all_ranks(slot))
            pool = max((found.pool for found in self._arena.scan()), default=state.pool) + 1
            capacity = round_capacity(needed)
        plan = self._affordable(capacity, whole)
        if plan.line:
            self._say(plan)
        elif self.parity_shares and self.parity_fits:
            parity = size_of(self._parity_bytes(capacity, self.parity_shares[0][1]))
            self._say(SlotPlan(plan.num_slots, f"snapshots: {parity} for the parity of other nodes", "info"))
        if plan.num_slots == 0:
            self._have(self._round, pool, 0, 0)
            return
        number, ranks, self._making = self._round, self._local_ranks, capacity
        self._lanes.submit(
            _LANE,
            lambda: self._arena.reserve(pool, ranks, plan.num_slots, capacity),
            lambda made: self._reserved(number, pool, capacity, made),
        )

    def _affordable(self, capacity: int, whole: int) -> SlotPlan:
        """How many slots: as many as fit beside two generations of parity; where these leave fewer than two slots,
        beside those of fewer parities; where even one leaves too few, as many as fit without."""
        slot_bytes = (capacity + SLOT_HEADER_BYTES) * len(self._local_ranks)
        allowed = self._arena.state.memory_limit_bytes
        limit = least_limit(self._arena.directory, used_bytes=self._arena.used_bytes(), allowed_bytes=allowed)
        room_bytes = limit.room_bytes + whole * slot_bytes
        for number, share in self.parity_shares:
            parity_bytes = max(0, self._parity_bytes(capacity, share) - self._arena.parity_bytes())
            plan = plan_slots(slot_bytes, Limit(room_bytes - parity_bytes, limit.name))
            if plan.num_slots >= LEAST_SLOTS or not parity_bytes:
                self.most_parity = number
                return plan if number == self.parity_shares[0][0] else self._with_fewer(plan, number)
        self.most_parity = 0
        without = plan_slots(slot_bytes, Limit(room_bytes, limit.name))
        if without.num_slots < LEAST_SLOTS or not self.parity_shares:
            return without
        return SlotPlan(
            without.num_slots,
            f"snapshots: {without.num_slots} slots of {size_of(slot_bytes)}; {size_of(parity_bytes)} of parity do not "
            f"fit beside into {size_of(room_bytes)} of {limit.name}: nothing in memory survives the loss of a node",
        )

    def _with_fewer(self, plan: SlotPlan, number: int) -> SlotPlan:
        wanted = self.parity_shares[0][0]
        line = f"snapshots: {plan.num_slots} slots beside {number} parities of a group; {wanted} have no room"
        return SlotPlan(plan.num_slots, line)

    def _parity_bytes(self, capacity: int, share: float) -> int:
        """Of two generations: the old one stays until the new one is whole everywhere."""
        return 2 * math.ceil(share * capacity * len(self._local_ranks))

    def _reserved(self, number: int, pool: int, capacity: int, made: int | Exception) -> None:
        if isinstance(made, Exception):
            _log.error("slots could not be reserved", exc_info=made)
            made = 0
        if made < LEAST_SLOTS:
            self._arena.drop(found.path for found in self._arena.scan() if found.pool == pool)
            self._say(
                SlotPlan(0, f"no snapshots in memory: {made} slots could be reserved; checkpoints go to storage only")
            )
            capacity = made = 0
        self._have(number, pool, capacity, made)

    def _have(self, number: int, pool: int, capacity: int, num_slots: int) -> None:
        if number != self._round:
            return
        changes = {"pool": pool, "capacity_bytes": capacity, "num_slots": num_slots}
        self._arena.save_state(msgspec.structs.replace(self._arena.state, **changes))
        self._announced, self._making, self._mapped = True, 0, set()
        for local_rank in self._local_ranks:
            self._announce(local_rank, self._slots_ready(local_rank))

    # --- helpers

    def _slots_ready(self, local_rank: int) -> SlotsReady:
        state = self._arena.state
        paths = tuple(str(self._arena.slot_path(state.pool, local_rank, index)) for index in range(state.num_slots))
        return SlotsReady(paths=paths, capacity_bytes=state.capacity_bytes, pool=state.pool)

    def _whole_slots(self, pool: int) -> int:
        """Slots of `pool` that every local rank has."""
        have = {(found.local_rank, found.index) for found in self._arena.scan() if found.pool == pool}
        index = 0
        while all((local_rank, index) in have for local_rank in self._local_ranks):
            index += 1
        return index

    def _all_ranks(self, slot: SlotRef) -> set[int]:
        return {
            found.local_rank for found in self._arena.scan() if (found.pool, found.index) == (slot.pool, slot.index)
        }

    def _say(self, plan: SlotPlan) -> None:
        if plan.line != self._said:
            self._said = plan.line
            self._notice(Notice(severity=plan.severity, text=plan.line))
