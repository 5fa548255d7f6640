"""Restores from storage: ranks, here threads, hand on what they read; where they cannot meet, each reads for itself."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from holdfast.checkpoint.handing import Post
from holdfast.checkpoint.meeting import Ranks
from holdfast.checkpoint.saving import save_pieces
from holdfast.checkpoint.source import FileSource
from holdfast.checkpoint.tensors import tensor_bytes
from holdfast.checkpoint.version import GenerationId
from holdfast.errors import CorruptError, MismatchError, UsageError
from holdfast.runtime import init_from, stored
from holdfast.runtime.capture import PerRank, TrainingState
from holdfast.runtime.huddle import Huddle
from holdfast.runtime.init_from import InitFrom, agree_on
from holdfast.runtime.stored import StoredStates
from support.ranks import together

_lock = threading.Lock()


class Ticks:
    """Per-rank state with a tensor of its own."""

    def __init__(self, rank: int) -> None:
        self.here = torch.full((40_000,), float(rank))

    def state_dict(self) -> dict[str, Any]:
        return {"here": self.here, "name": f"rank {self.here[0]:.0f}"}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.here = state["here"]


def _all(states: list[Any], rank: int, world: int) -> Any:
    return {"here": torch.cat([state["here"] for state in states]), "name": f"{rank} of {world}"}


class Trained:
    """What one rank trains: 12 MB that all share, and a little of its own."""

    def __init__(self, rank: int, world: int, *, seed: int = 0, width: int = 1000) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(width, 1000), nn.Linear(1000, 3))
        for parameter in self.model.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)
        self.optimizer = torch.optim.Adam(self.model.parameters())
        self.ticks = Ticks(rank)
        self._place = rank, world
        if seed:
            for parameter in self.model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            self.optimizer.step()

    def state(self) -> TrainingState:
        rank, world = self._place
        extra = {"ticks": PerRank(self.ticks, on_resize=_all), "mean": Mean(self.model[0].bias.detach())}
        return TrainingState(
            model=self.model, optimizer=self.optimizer, extra=extra, ranks=tuple(range(world)), global_rank=rank
        )

    def tensors(self) -> list[torch.Tensor]:
        moments = [value for state in self.optimizer.state.values() for value in state.values()]
        return [*self.model.parameters(), *moments]


class Mean:
    """State in `extra` that is the same on all ranks."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def state_dict(self) -> dict[str, Any]:
        return {"tensor": self.tensor}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.tensor = state["tensor"]


def _saved(path: Path, world: int) -> Path:
    def save(ranks: Ranks) -> None:
        state = Trained(ranks.rank, world, seed=7).state()
        pieces = state.pieces(state.entries(), node_of=lambda rank: 0)
        tensors = {piece.piece.key: piece.tensor for piece in pieces}
        save_pieces(
            path,
            ranks=ranks,
            version=GenerationId(incarnation=1, nonce="5eed0005", generation=1).at(3),
            pieces=[piece.piece for piece in pieces],
            data=lambda piece: tensor_bytes(tensors[piece.key].contiguous()),
            objects=state.objects(3),
            timeout=timedelta(seconds=120),
        )

    assert together(world, save) == [None] * world
    return path


def _restored(path: Path, world: int, **options: Any) -> list[Any]:
    def restore(ranks: Ranks) -> Any:
        trained = Trained(ranks.rank, world)
        state = trained.state()
        step = StoredStates(state, ranks, "s", session_rank=ranks.rank, **options).restore(path)
        assert step == 3
        return trained

    return together(world, restore)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of what is read of images."""
    sizes: list[int] = []
    read_into = FileSource.read_into

    def counted(source: FileSource, offset: int, view: memoryview) -> None:
        with _lock:
            sizes.append(len(view))
        read_into(source, offset, view)

    monkeypatch.setattr(FileSource, "read_into", counted)
    return sizes


def _size(path: Path) -> int:
    return sum(image.stat().st_size for image in path.glob("*.safetensors"))


@pytest.mark.parametrize("world", [2, 3])
def test_each_byte_is_read_once_by_ranks_of_which_all_want_it(tmp_path: Path, reads: list[int], world: int) -> None:
    path = _saved(tmp_path / "step-00000003", 2)
    expected = Trained(0, 2, seed=7)
    reads.clear()
    found = _restored(path, world)
    for rank, trained in enumerate(found):
        assert isinstance(trained, Trained), trained
        assert all(map(torch.equal, trained.tensors(), expected.tensors()))
        here = torch.full((40_000,), float(rank)) if world == 2 else torch.arange(2.0).repeat_interleave(40_000)
        assert torch.equal(trained.ticks.here, here)
    # The block in which an image's objects lie is read once for them, and once for the tensors before them; a rank of
    # another world asks for those of all old ranks when it has seen its own.
    assert _size(path) <= sum(reads) <= _size(path) + (2 if world == 2 else 3) * (1 << 20)


def test_ranks_that_cannot_hear_each_other_read_for_themselves(
    tmp_path: Path, reads: list[int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = _saved(tmp_path / "step-00000003", 2)
    expected = Trained(0, 2, seed=7)
    monkeypatch.setattr(stored, "_PATIENCE", timedelta(seconds=0.5))
    monkeypatch.setattr(Post, "ask", lambda post, rank, unit: None)
    reads.clear()
    with caplog.at_level(logging.WARNING):
        found = _restored(path, 2)
    assert [all(map(torch.equal, trained.tensors(), expected.tensors())) for trained in found] == [True, True]
    assert sum(reads) > 1.5 * _size(path)
    assert "each does for itself" in caplog.text


def test_ranks_that_may_send_nothing_read_for_themselves(tmp_path: Path, reads: list[int]) -> None:
    path = _saved(tmp_path / "step-00000003", 2)
    reads.clear()
    assert all(isinstance(trained, Trained) for trained in _restored(path, 2, together=False))
    assert sum(reads) > 1.5 * _size(path)


def test_damage_that_one_rank_reads_is_an_error_of_all(tmp_path: Path) -> None:
    path = _saved(tmp_path / "step-00000003", 2)
    image = sorted(path.glob("*.safetensors"))[1]
    data = bytearray(image.read_bytes())
    data[len(data) // 2] ^= 1
    image.write_bytes(data)
    assert [type(error) for error in _restored(path, 2)] == [CorruptError] * 2


def test_another_model_on_one_rank_is_an_error_of_all(tmp_path: Path) -> None:
    path = _saved(tmp_path / "step-00000003", 2)

    def restore(ranks: Ranks) -> int:
        state = Trained(ranks.rank, 2, width=1000 + ranks.rank).state()
        return StoredStates(state, ranks, "s", session_rank=ranks.rank).restore(path)

    first, second = together(2, restore)
    assert isinstance(first, MismatchError)
    assert "rank 1: " in str(first)
    assert isinstance(second, MismatchError)


def _initialised(world: int, found: Callable[[int], Path], *, to: torch.dtype = torch.float32) -> list[Any]:
    """What each rank trains, or its error, after it began with the weights of another run."""

    def initialise(ranks: Ranks) -> Trained:
        trained = Trained(ranks.rank, world)
        trained.model.to(to)
        init, huddle = InitFrom(path=found(ranks.rank)), _huddle(ranks)
        path, same = agree_on(init, huddle)
        assert path is not None
        StoredStates(trained.state(), ranks, "s", session_rank=ranks.rank).initialise(init, path, together=same)
        return trained

    return together(world, initialise)


@pytest.mark.parametrize("to", [torch.float32, torch.bfloat16])
def test_weights_of_another_run_are_read_once_by_ranks_of_which_all_want_them(
    tmp_path: Path, reads: list[int], to: torch.dtype
) -> None:
    _saved(tmp_path / "step-00000003", 2)
    expected = Trained(0, 2, seed=7)
    reads.clear()
    for trained in _initialised(3, lambda rank: tmp_path, to=to):
        assert isinstance(trained, Trained), trained
        assert all(map(torch.equal, trained.model.parameters(), (one.to(to) for one in expected.model.parameters())))
        assert not trained.optimizer.state
    weights = sum(one.numel() * one.element_size() for one in expected.model.parameters())
    assert weights <= sum(reads) <= weights + (4 << 20)  # whole blocks, of two images


def test_ranks_that_begin_from_different_places_read_for_themselves(tmp_path: Path) -> None:
    for name in ("one", "two"):
        _saved(tmp_path / name / "step-00000003", 2)
    first, second = _initialised(2, lambda rank: tmp_path / ("one", "two")[rank], to=torch.bfloat16)
    assert all(map(torch.equal, first.model.parameters(), second.model.parameters()))
    assert torch.equal(first.model[0].weight, Trained(0, 2, seed=7).model[0].weight.bfloat16())


def test_a_step_that_is_saved_meanwhile_does_not_part_the_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = iter(("step-00000003", "step-00000004"))
    monkeypatch.setattr(init_from, "_step_path", lambda where: where / next(found))
    ranks = together(2, lambda ranks: agree_on(InitFrom(path=tmp_path), _huddle(ranks)))
    assert [one[1] for one in ranks] == [True, True]
    assert ranks[0] == ranks[1]


def test_a_place_without_a_checkpoint_is_an_error_of_all_ranks(tmp_path: Path) -> None:
    errors = together(2, lambda ranks: agree_on(InitFrom(path=tmp_path / "no") if ranks.rank else None, _huddle(ranks)))
    assert [type(error) for error in errors] == [UsageError] * 2
    assert all("no complete checkpoint" in str(error) for error in errors)


def test_a_rank_that_begins_from_nothing_leaves_the_others_to_themselves(tmp_path: Path) -> None:
    path = _saved(tmp_path / "step-00000003", 2)
    ranks = together(2, lambda ranks: agree_on(InitFrom(path=path) if ranks.rank else None, _huddle(ranks)))
    assert ranks == [(None, False), (path, False)]


def _huddle(ranks: Ranks) -> Huddle:
    return Huddle(ranks, "h", timeout=timedelta(seconds=120))
