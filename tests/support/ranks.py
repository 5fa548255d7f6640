"""Several ranks as threads of one process, which meet in one store."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch.distributed as dist

from holdfast.checkpoint.meeting import Ranks


def together(world: int, act: Callable[[Ranks], Any]) -> list[Any]:
    """Run `act` as each of `world` ranks; results or errors."""
    store = dist.HashStore()

    def one(rank: int) -> Any:
        try:
            return act(Ranks(rank, world, store))
        except Exception as error:  # noqa: BLE001  # the test looks at it
            return error

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(one, range(world)))
