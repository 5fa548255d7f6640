"""The elastic sampler: one stream of samples, whoever reads it, continued anywhere."""

from __future__ import annotations

from collections import Counter
from itertools import chain, islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from holdfast import ElasticSampler
from holdfast.errors import StateError, UsageError
from holdfast.runtime.capture import TrainingState
from holdfast.runtime.order import shuffled
from support.images import catalog_of, save_image


def sampler_of(num_samples: int, batch: int, rank: int = 0, world_size: int = 1, **options: object) -> ElasticSampler:
    return ElasticSampler(num_samples, global_batch_size=batch, rank=rank, world_size=world_size, **options)


def global_batch(num_samples: int, batch: int, samples: int, world_size: int, seed: int = 0) -> list[int]:
    """The shares of all ranks, in order."""
    ranks = [sampler_of(num_samples, batch, rank, world_size, seed=seed) for rank in range(world_size)]
    return [index for rank in ranks for index in rank.share_at(samples)]


# --- the order


@settings(deadline=None)
@given(st.integers(1, 3000), st.integers(-(2**70), 2**70), st.integers(0, 2**40))
def test_each_epoch_is_a_permutation_of_the_dataset(num_samples: int, seed: int, epoch: int) -> None:
    order = shuffled(np.arange(num_samples, dtype=np.uint64), num_samples, seed=seed, epoch=epoch)
    assert sorted(order.tolist()) == list(range(num_samples))


def test_orders_of_epochs_and_seeds_have_nothing_in_common() -> None:
    positions = np.arange(1000, dtype=np.uint64)
    orders = [
        shuffled(positions, 1000, seed=seed, epoch=epoch)
        for seed, epoch in [(0, 0), (0, 1), (1, 0), (1, 1), (2**64 - 1, 0), (-2, 0)]
    ]
    for i, one in enumerate(orders):
        for other in [positions, *orders[:i]]:
            assert (one == other).sum() < 12  # random permutations agree at one place on average
            assert (np.diff(one.astype(np.int64)) == np.diff(other.astype(np.int64))).sum() < 12


def test_every_sample_comes_first_about_equally_often() -> None:
    first = np.array([0], dtype=np.uint64)
    for num_samples in (3, 5, 6):
        counts = Counter(int(shuffled(first, num_samples, seed=seed, epoch=0)[0]) for seed in range(200 * num_samples))
        assert all(abs(counts[sample] - 200) < 60 for sample in range(num_samples)), counts


def test_a_dataset_of_billions_takes_no_memory_and_the_order_never_changes() -> None:
    assert sampler_of(10**13, 4, seed=7).share_at(3 * 10**12) == [
        5384502778187,
        8740454040048,
        2288433278433,
        2506057577763,
    ]


# --- exactly once


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_sample_counts_exactly_once_whatever_resizes_and_rollbacks_come(data: st.DataObject) -> None:
    """History is a stack of steps: a failure rolls back any number of them, and any world size goes on."""
    num_samples, batch = data.draw(st.integers(1, 60)), data.draw(st.integers(1, 24))
    seed = data.draw(st.integers(0, 2**32))
    history: list[list[int]] = []
    for _ in range(data.draw(st.integers(1, 6), label="generations")):
        del history[data.draw(st.integers(0, len(history)), label="rollback to") :]
        world_size = data.draw(st.integers(1, batch), label="world size")
        state = {"samples": len(history) * batch}
        ranks = [sampler_of(num_samples, batch, rank, world_size, seed=seed) for rank in range(world_size)]
        loaders = [DataLoader(range(num_samples), batch_sampler=rank, collate_fn=list) for rank in ranks]
        for rank in ranks:
            rank.load_state_dict(state)
            assert rank.loss_scale == rank.share_size * world_size / batch
        steps = data.draw(st.integers(0, 5), label="steps")
        streams = [islice(rank.batches(loader), steps) for rank, loader in zip(ranks, loaders, strict=True)]
        history += [list(chain(*shares)) for shares in zip(*streams, strict=True)]
        assert {rank.state_dict()["samples"] for rank in ranks} == {len(history) * batch}
    stream = list(chain(*history))
    assert all(len(step) == batch for step in history)
    for begin in range(0, len(stream), num_samples):
        epoch = stream[begin : begin + num_samples]
        assert len(set(epoch)) == len(epoch)
        assert len(epoch) < num_samples or set(epoch) == set(range(num_samples))
    undisturbed = [global_batch(num_samples, batch, step * batch, 1, seed) for step in range(len(history))]
    assert history == undisturbed


@settings(deadline=None)
@given(st.integers(1, 200), st.integers(1, 40))
def test_shares_differ_by_one_sample_at_most(batch: int, world_size: int) -> None:
    if world_size > batch:
        with pytest.raises(UsageError, match="cannot share a global batch"):
            _ = sampler_of(10, batch, 0, world_size).share_size
        return
    ranks = [sampler_of(10, batch, rank, world_size) for rank in range(world_size)]
    sizes = [rank.share_size for rank in ranks]
    assert sum(sizes) == batch
    assert max(sizes) - min(sizes) <= 1
    assert (max(sizes) == min(sizes)) == (batch % world_size == 0)
    assert sum(rank.loss_scale for rank in ranks) == pytest.approx(world_size)


# --- loaders


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")  # torchdata 0.11 with torch 2.13
@pytest.mark.parametrize("kind", [DataLoader, StatefulDataLoader])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_state_counts_what_the_loop_received_not_what_was_prefetched(
    kind: type[DataLoader], num_workers: int
) -> None:
    data = TensorDataset(torch.arange(50))
    options = {"num_workers": num_workers, "prefetch_factor": 3} if num_workers else {}
    sampler = sampler_of(50, 4, seed=3)
    batches = sampler.batches(kind(data, batch_sampler=sampler, **options))
    assert sampler.state_dict() == {"samples": 0}
    seen = []
    for step, (batch,) in zip(range(5), batches, strict=False):
        seen += batch.tolist()
        assert sampler.state_dict() == {"samples": 4 * (step + 1)}
    again = sampler_of(50, 4, seed=3)
    again.load_state_dict({"samples": 8})
    (batch,) = next(again.batches(kind(data, batch_sampler=again, **options)))
    assert batch.tolist() == seen[8:12]


def test_an_iterator_made_before_the_restore_goes_on_where_the_restored_state_says() -> None:
    sampler = sampler_of(50, 4)
    batches = sampler.batches(DataLoader(range(50), batch_sampler=sampler, collate_fn=list))
    first = [next(batches) for _ in range(3)]
    sampler.load_state_dict({"samples": 4})
    assert next(batches) == first[1]
    assert sampler.samples == 8


def test_starting_a_loader_draws_nothing_from_the_generator_of_the_training_loop() -> None:
    sampler = sampler_of(50, 4)
    before = torch.get_rng_state()
    next(sampler.batches(DataLoader(range(50), batch_sampler=sampler)))
    assert torch.equal(before, torch.get_rng_state())


def test_epochs_are_counted_and_an_unshuffled_stream_goes_round() -> None:
    sampler = sampler_of(5, 3, shuffle=False)
    batches = sampler.batches(DataLoader(range(5), batch_sampler=sampler, collate_fn=list))
    assert [next(batches) for _ in range(4)] == [[0, 1, 2], [3, 4, 0], [1, 2, 3], [4, 0, 1]]
    assert (sampler.samples, sampler.epoch) == (12, 2)


# --- the mean


def test_the_scaled_gradients_of_4_then_3_ranks_are_those_of_one_process() -> None:
    torch.manual_seed(0)
    inputs, targets = torch.randn(40, 6, dtype=torch.float64), torch.randn(40, 2, dtype=torch.float64)

    def trained(worlds: list[int], *, scaled: bool = True) -> torch.Tensor:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)).double()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        for step, world_size in enumerate(worlds):
            optimizer.zero_grad()
            for rank in range(world_size):
                sampler = sampler_of(40, 10, rank, world_size)
                share = sampler.share_at(10 * step)
                scale = sampler.loss_scale if scaled else 1.0
                mean = nn.functional.mse_loss(model(inputs[share]), targets[share])
                (mean * scale / world_size).backward()  # DDP and FSDP divide by the number of ranks
            optimizer.step()
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    alone = trained([1] * 8)
    assert torch.allclose(trained([4] * 4 + [3] * 4), alone, rtol=0, atol=1e-12)
    assert not torch.allclose(trained([4] * 4 + [3] * 4, scaled=False), alone, rtol=0, atol=1e-6)


def test_unequal_shares_without_the_scale_are_an_error_before_a_second_step() -> None:
    sampler = sampler_of(50, 4, 0, 3)
    batches = sampler.batches(DataLoader(range(50), batch_sampler=sampler))
    assert sampler.state_dict() == {"samples": 0}
    next(batches)
    with pytest.raises(UsageError, match=r"multiply the mean loss by sampler\.loss_scale"):
        sampler.state_dict()
    with pytest.raises(UsageError, match=r"4 over 3 ranks gives shares of unequal size \(rank 0 has 1\)"):
        next(batches)


def test_equal_shares_need_no_scale() -> None:
    sampler = sampler_of(50, 4, 1, 2)
    assert sampler.loss_scale == 1.0
    sampler = sampler_of(50, 4, 1, 2)
    assert len(list(islice(sampler.batches(DataLoader(range(50), batch_sampler=sampler)), 3))) == 3
    assert sampler.state_dict() == {"samples": 12}


# --- in a Session's state, and mistakes


def test_the_count_is_saved_with_the_training_state_and_restored_from_it() -> None:
    model = nn.Linear(2, 2)
    sampler = sampler_of(50, 4)
    next(sampler.batches(DataLoader(range(50), batch_sampler=sampler)))
    state = TrainingState(model=model, optimizer=None, extra={"sampler": sampler}, ranks=(0,), global_rank=0)
    again = sampler_of(50, 4)
    restored = TrainingState(model=model, optimizer=None, extra={"sampler": again}, ranks=(0,), global_rank=0)
    restored.restore(catalog_of([save_image(state, 1)]))
    assert again.samples == 4


@pytest.mark.parametrize("state", [{}, {"samples": -1}, {"samples": "4"}, {"epoch": 3}])
def test_the_state_of_something_else_is_refused(state: dict[str, int]) -> None:
    with pytest.raises(StateError, match="not the state of an ElasticSampler"):
        sampler_of(50, 4).load_state_dict(state)


def test_mistakes_are_named() -> None:
    with pytest.raises(UsageError, match="has none"):
        ElasticSampler(iter([1]), global_batch_size=4)
    with pytest.raises(UsageError, match="at least one sample"):
        ElasticSampler([], global_batch_size=4)
    with pytest.raises(UsageError, match="global_batch_size is 0"):
        ElasticSampler(10, global_batch_size=0)
    with pytest.raises(UsageError, match="rank 2 is not one of 2"):
        sampler_of(10, 4, 2, 2)
    with pytest.raises(UsageError, match="given together"):
        ElasticSampler(10, global_batch_size=4, rank=1)
    sampler = sampler_of(10, 4)
    with pytest.raises(UsageError, match=r"sampler\.batches\(loader\)"):
        next(iter(DataLoader(range(10), batch_sampler=sampler)))
    with pytest.raises(UsageError, match="batch_sampler= this sampler"):
        sampler.batches(DataLoader(range(10), batch_size=2))


def test_ranks_without_torch_distributed_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match=r"torch\.distributed is not initialised"):
        ElasticSampler(10, global_batch_size=4).share_at(0)
