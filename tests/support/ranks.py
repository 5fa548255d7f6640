"""Several ranks: threads of one process, which meet in one store, or processes that need not import torch anew."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch.distributed as dist
import torch.multiprocessing as mp

from holdfast.checkpoint.meeting import Ranks

PRELOADED = ["torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor.parallel", "holdfast.checkpoint"]


def processes(act: Callable[..., None], arguments: tuple[Any, ...], world: int) -> None:
    """Run `act(rank, *arguments)` in each of `world` processes, forks of one that has imported torch: it takes seconds.

    Raises:
        torch.multiprocessing.ProcessException: what the first one raised, or how it died; the others are ended.
    """
    multiprocessing.set_forkserver_preload(PRELOADED)
    mp.start_processes(act, arguments, nprocs=world, start_method="forkserver")


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
