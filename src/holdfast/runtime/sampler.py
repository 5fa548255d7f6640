"""`ElasticSampler`: the order of the data, whatever happens to the ranks.

All ranks together read one endless stream of samples: a fresh permutation of the dataset for each epoch, one after the
other. Which sample stands at place n of the stream follows from the seed and n alone. A global batch is the next
`global_batch_size` places, cut into one share for each rank; so the whole state is one number, the samples that were
consumed, and any number of ranks can go on from it. A batch may straddle two epochs; within an epoch no sample comes
twice and none is missed.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist

from holdfast.environment import announced_world_size
from holdfast.errors import StateError, UsageError
from holdfast.runtime.order import shuffled

Batch = TypeVar("Batch")


class ElasticSampler:
    """A batch sampler whose state is the number of samples that training has consumed.

    Example::

        sampler = holdfast.ElasticSampler(dataset, global_batch_size=512, seed=7)
        loader = DataLoader(dataset, batch_sampler=sampler, num_workers=4)
        with holdfast.Session(model=model, optimizer=optimizer, extra={"sampler": sampler}) as session:
            for step, (inputs, targets) in zip(session.steps(until=10_000), sampler.batches(loader)):
                loss = loss_function(model(inputs), targets) * sampler.loss_scale

    `batches` is what counts: a batch is consumed once the loop has received it, not when a worker of the loader has
    fetched it ahead. ``session.steps()`` comes first in the ``zip``: a step ends before the next batch is taken.

    Where the number of ranks does not divide the global batch, shares differ by one sample. A rank's mean loss then has
    to be weighted by its share, since DDP and FSDP average the gradients of ranks; `loss_scale` is that weight (1.0
    where shares are equal). Training on unequal shares without having read it is an error.

    Args:
        dataset: anything with a length, or that length itself.
        global_batch_size: samples of one batch over all ranks. It stays when the number of ranks changes.
        shuffle: whether each epoch has an order of its own; False: 0, 1, 2, ...
        seed: of the order; the same on all ranks and in all starts of a job.
        rank: of this process among those that share batches; None: its rank in torch.distributed. Ranks that work on
            the same samples (tensor parallel ones) give the same.
        world_size: how many share batches; None: all.

    Raises:
        UsageError: the dataset has no length or is empty, or the numbers cannot work.
    """

    def __init__(
        self,
        dataset: Sized | int,
        *,
        global_batch_size: int,
        shuffle: bool = True,
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        self._num_samples = _length(dataset)
        if global_batch_size < 1:
            raise UsageError(f"global_batch_size is {global_batch_size}: it is a number of samples, at least 1")
        if (rank is None) != (world_size is None):
            raise UsageError(f"rank ({rank}) and world_size ({world_size}) are given together or not at all")
        if rank is not None and world_size is not None and not 0 <= rank < world_size:
            raise UsageError(f"rank {rank} is not one of {world_size} ranks")
        self._global_batch_size = global_batch_size
        self._shuffle, self._seed = shuffle, seed
        self._given = None if rank is None or world_size is None else (rank, world_size)
        self._consumed = 0
        self._loads = 0
        """How often a state was loaded: iterators that began before start anew."""
        self._beginning = False
        """Whether `batches` is starting a loader: only then may one draw from us."""
        self._received = False
        """Whether the loop has got a batch in this process."""
        self._scale_read = False

    # --- the state

    def state_dict(self) -> dict[str, int]:
        """The number of samples that training has consumed, over all ranks, since the start of the job.

        Raises:
            UsageError: unequal shares were trained on with equal weight.
        """
        if self._received:
            self._check_scale()
        return {"samples": self._consumed}

    def load_state_dict(self, state_dict: Mapping[str, int], /) -> None:
        """Go on after so many samples; iterators that exist already go on there, too.

        Raises:
            StateError: it is not the state of an ElasticSampler.
        """
        samples = state_dict.get("samples")
        if not isinstance(samples, int) or samples < 0:
            raise StateError(f"not the state of an ElasticSampler, which has a number of samples: {dict(state_dict)}")
        self._consumed = samples
        self._loads += 1

    @property
    def samples(self) -> int:
        """Consumed over all ranks since the start of the job."""
        return self._consumed

    @property
    def epoch(self) -> int:
        """0-based: which pass over the dataset the next sample belongs to."""
        return self._consumed // self._num_samples

    # --- shares

    @property
    def share_size(self) -> int:
        """Samples of each global batch that this rank gets.

        Raises:
            UsageError: there are more ranks than samples in a global batch.
        """
        begin, end = self._share()
        return end - begin

    @property
    def loss_scale(self) -> float:
        """What this rank's mean loss is multiplied by, so that the mean over ranks is the mean over samples."""
        self._scale_read = True
        return self.share_size * self._place()[1] / self._global_batch_size

    def _place(self) -> tuple[int, int]:
        """Rank and world size, asked for when needed: torch.distributed may start after the sampler was made."""
        if self._given is not None:
            return self._given
        if dist.is_available() and dist.is_initialized():
            return dist.get_rank(), dist.get_world_size()
        if (announced := announced_world_size()) > 1:
            raise UsageError(
                f"there are {announced} ranks and torch.distributed is not initialised: "
                "call init_process_group() first, or give rank and world_size to ElasticSampler"
            )
        return 0, 1

    def _share(self) -> tuple[int, int]:
        """Begin and end of this rank's part of every global batch: contiguous, sizes differ by at most one."""
        rank, world_size = self._place()
        if world_size > self._global_batch_size:
            raise UsageError(
                f"{world_size} ranks cannot share a global batch of {self._global_batch_size}: each needs a sample"
            )
        return rank * self._global_batch_size // world_size, (rank + 1) * self._global_batch_size // world_size

    def _check_scale(self) -> None:
        rank, world_size = self._place()
        if self._global_batch_size % world_size and not self._scale_read:
            raise UsageError(
                f"a global batch of {self._global_batch_size} over {world_size} ranks gives shares of unequal size "
                f"(rank {rank} has {self.share_size}): multiply the mean loss by sampler.loss_scale, or choose a "
                "global_batch_size that the number of ranks divides"
            )

    # --- batches

    def share_at(self, samples: int) -> list[int]:
        """This rank's share of the global batch that begins at place `samples` of the stream, as dataset indices."""
        begin, end = self._share()
        places = np.arange(samples + begin, samples + end, dtype=np.uint64)
        positions = places % np.uint64(self._num_samples)
        epochs = places // np.uint64(self._num_samples)
        for epoch in np.unique(epochs).tolist() if self._shuffle else ():
            here = epochs == epoch
            positions[here] = shuffled(positions[here], self._num_samples, seed=self._seed, epoch=epoch)
        return [int(position) for position in positions]

    def __iter__(self) -> Iterator[list[int]]:
        """For the loader inside `batches`: this rank's shares from here on, without end. Counts nothing.

        Raises:
            UsageError: a loop over the loader itself, whose batches nobody would count.
        """
        if not self._beginning:
            raise UsageError(
                "iterate over sampler.batches(loader), not over the loader: else nobody counts the samples"
            )
        return self._shares(self._consumed)

    def _shares(self, samples: int) -> Iterator[list[int]]:
        while True:
            yield self.share_at(samples)
            samples += self._global_batch_size

    def batches(self, loader: Iterable[Batch]) -> Iterator[Batch]:
        """Iterate over a loader that draws from this sampler, and count what the loop receives.

        Works with workers, with prefetching and with torchdata's StatefulDataLoader, whose own state is not needed. The
        loader's iterator is made when the first batch is asked for, with random numbers that depend on the seed and the
        place in the stream, and without moving torch's generator: a resumed run draws the same ones. Numbers that
        workers draw for their own transforms begin anew there.

        Args:
            loader: made with ``batch_sampler=`` this sampler.

        Raises:
            UsageError: the loader does not draw from this sampler, or the second batch of unequal shares is asked for
                while nobody has read `loss_scale`.
        """
        drawn_from: object = getattr(loader, "batch_sampler", None)
        if drawn_from is not self:
            raise UsageError("batches() needs a loader that was made with batch_sampler= this sampler")
        return self._count(loader)

    def _count(self, loader: Iterable[Batch]) -> Iterator[Batch]:
        iterator, loads = self._begin(loader), self._loads
        while True:
            if loads != self._loads:
                iterator, loads = self._begin(loader), self._loads
            batch = next(iterator)
            self._consumed += self._global_batch_size
            self._received = True
            yield batch
            self._check_scale()

    def _begin(self, loader: Iterable[Batch]) -> Iterator[Batch]:
        """Start the loader here. It draws a seed for its workers from torch's generator; another stands in for it."""
        self._beginning = True
        try:
            with torch.random.fork_rng(devices=()):
                torch.manual_seed(zlib.crc32(f"{self._seed} {self._consumed}".encode()))
                return iter(loader)
        finally:
            self._beginning = False


def _length(dataset: Sized | int) -> int:
    try:
        num_samples = dataset if isinstance(dataset, int) else len(dataset)
    except TypeError as error:
        raise UsageError(
            f"ElasticSampler needs a dataset with a length: {type(dataset).__name__} has none (an iterable dataset "
            "cannot go on at a given sample)"
        ) from error
    if num_samples < 1:
        raise UsageError("ElasticSampler needs a dataset with at least one sample")
    return num_samples
