"""How the ranks of a Session learn who holds which plain tensors (`holdfast.runtime.holdings` says what follows).

Before training, and at saves that all ranks make together, they meet (`meet`). While training goes on nobody waits for
anybody: a rank whose optimizer has created state posts its table in the store of the process group, and a thread looks
from time to time what the others have posted.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping

import xxhash

from holdfast.checkpoint.saving import Ranks
from holdfast.runtime.capture import TrainingState
from holdfast.runtime.holdings import Table, exchange
from holdfast.runtime.huddle import Huddle
from holdfast.runtime.mode import Context

log = logging.getLogger(__name__)

_FIRST_PAUSE_S = 0.002
_LAST_PAUSE_S = 1.0
_PATIENCE_S = 600.0
"""How long after its last post a rank looks for the posts of others; a tensor not proven by then stays its own."""
_SHOWN = 3


def meet(context: Context, huddle: Huddle, *, sample: bool = False) -> None:
    """Compare tables with all ranks, which call this at the same point; waits for them.

    Args:
        context: of the Session.
        huddle: of its ranks.
        sample: compare values too; only where training starts from nothing.

    Raises:
        PeerTimeout: a rank did not come; it is named.
    """
    if context.alone:
        return
    state = context.state
    state.entries()
    holders = exchange(state.table(sample=sample), huddle, ranks=context.ranks, global_rank=context.global_rank)
    state.hold(holders)
    if holders.differing and context.session_rank == 0:
        log.warning(
            "%d plain tensors differ between ranks (%s): every rank's are kept as its own, which another number of "
            "ranks cannot take over; shard with DTensor, or give different tensors different names",
            len(holders.differing),
            ", ".join(holders.differing[:_SHOWN]),
        )


class Census:
    """Tables that ranks post while they train. The training thread calls every method.

    The thread ``holdfast-census`` is started by the first `post` and ended by `close`.
    """

    def __init__(self, ranks: Ranks, name: str) -> None:
        """Begin.

        Args:
            ranks: of the Session.
            name: the same on all ranks, different for each Session of the process.
        """
        self._ranks = ranks
        self._name = name
        self._thread: threading.Thread | None = None
        self._wake = threading.Event()
        # The training thread writes, the census thread takes; assignments are atomic.
        self._posted: Table | None = None
        self._closing = False
        self._looking = True
        # The census thread writes a new mapping each time, the training thread reads.
        self._news: Mapping[int, Table] = {}

    def post(self, table: Table) -> None:
        """Tell the others what this rank has now; returns at once."""
        self._posted, self._looking = table, True
        self._wake.set()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="holdfast-census", daemon=True)
            self._thread.start()

    def rest(self) -> None:
        """Nothing that others may still post matters here."""
        self._looking = False

    @property
    def news(self) -> Mapping[int, Table]:
        """The newest table of each other rank that has posted one, by rank in the Session; the same object while
        nothing has come."""
        return self._news

    def close(self, timeout_s: float = 5.0) -> None:
        """End the thread."""
        self._closing = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                log.error("the census thread did not end within %.0f s", timeout_s)

    # --- the thread

    def _run(self) -> None:
        pause, deadline = _FIRST_PAUSE_S, 0.0
        digests: dict[int, bytes] = {}
        tables: dict[bytes, Table] = {}
        try:
            while not self._closing:
                table, self._posted = self._posted, None
                if table is not None:
                    self._say(table)
                    pause, deadline = _FIRST_PAUSE_S, time.monotonic() + _PATIENCE_S
                if self._looking and time.monotonic() < deadline:
                    self._look(digests, tables)
                    pause = min(1.5 * pause, _LAST_PAUSE_S)
                else:
                    pause = _PATIENCE_S
                self._wake.wait(pause)
                self._wake.clear()
        except Exception:  # the thread's border: what is not proven stays with each rank
            log.info("the census has ended early; what optimizers create now stays with each rank", exc_info=True)

    def _say(self, table: Table) -> None:
        text = table.encode()
        digest = xxhash.xxh3_128_hexdigest(text.encode())
        self._ranks.store.set(f"{self._name}/table/{digest}", text)
        self._ranks.store.set(f"{self._name}/rank/{self._ranks.rank}", digest)

    def _look(self, digests: dict[int, bytes], tables: dict[bytes, Table]) -> None:
        """Never waits: a store's own wait would keep its connection from the training thread."""
        store, changed = self._ranks.store, False
        for rank in range(self._ranks.world_size):
            key = f"{self._name}/rank/{rank}"
            if rank == self._ranks.rank or self._closing or not store.check([key]):
                continue
            digest = bytes(store.get(key))
            if digests.get(rank) != digest:
                digests[rank], changed = digest, True
                if digest not in tables:
                    tables[digest] = Table.decode(store.get(f"{self._name}/table/{digest.decode()}").decode())
        if changed:
            self._news = {rank: tables[digest] for rank, digest in digests.items()}


class HolderWatch:
    """Keeps a state's holders up to date while it trains, from boundary to boundary. Training thread only."""

    def __init__(self, state: TrainingState, ranks: tuple[int, ...], census: Census) -> None:
        self._state = state
        self._session_ranks = ranks
        self._census = census
        self._entries: object = None
        self._table: Table | None = None
        self._news: object = None
        self.is_settled = True
        """Whether nothing this rank has may still turn out to be shared."""

    def look(self) -> None:
        """Post what is new here and take in what others posted; reads the state anew only where that may matter."""
        entries = self._state.entries()
        news = self._census.news
        if entries is self._entries and news is self._news:
            return
        if entries is not self._entries:
            self._post()
        assert self._table is not None
        others = {self._session_ranks[rank]: table for rank, table in news.items()}
        holders = self._state.holders.prove(self._table, others, self._state.parameters)
        if holders is not self._state.holders:
            self._state.hold(holders)
        self.is_settled = not holders.has_open_names(self._table)
        if self.is_settled:
            self._census.rest()
        self._entries, self._news = self._state.entries(), news

    @property
    def has_news(self) -> bool:
        """Whether others have posted since the last look."""
        return self._census.news is not self._news

    def _post(self) -> None:
        table = self._state.table()
        if table == self._table:
            return
        self._table = table
        known = self._state.holders.known
        if known is not None and not table.tensors.keys() <= known.keys():
            self._census.post(table)
