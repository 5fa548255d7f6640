"""Signs of life: where they come from, and that they leave models, loaders and signals as they were."""

from __future__ import annotations

import copy
import os
import pickle
import signal
import time
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from holdfast.runtime import beats as beating
from holdfast.runtime.beats import Beats, StackWriter, free_signal


class Seat:
    def __init__(self) -> None:
        self.beats = 0
        self.times: list[tuple[float, float]] = []

    def beat(self) -> None:
        self.beats += 1

    def timed(self, step_s: float, lead_s: float) -> None:
        self.times.append((step_s, lead_s))


def test_forward_passes_and_batches_are_signs_of_life_until_the_end() -> None:
    seat, model = Seat(), nn.Linear(2, 2)
    beats = Beats(seat, [model])
    model(torch.zeros(1, 2))
    after_forward = seat.beats
    list(DataLoader(TensorDataset(torch.zeros(3, 1))))
    after_loader = seat.beats
    beats.close()
    model(torch.zeros(1, 2))
    list(DataLoader(TensorDataset(torch.zeros(3, 1))))
    assert (after_forward, after_loader, seat.beats) == (2, 5, 5)
    assert not model._forward_pre_hooks
    assert not model._forward_hooks


def test_an_evaluation_of_what_ddp_wraps_is_a_sign_of_life() -> None:
    class Wrapper(nn.Module):  # as DDP and FSDP1 keep the model
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(2, 2)

    seat, model = Seat(), Wrapper()
    beats = Beats(seat, [model])
    model.module(torch.zeros(1, 2))
    beats.close()
    model.module(torch.zeros(1, 2))
    assert seat.beats == 2


def test_a_step_is_timed_with_the_part_before_its_first_forward_had_ended() -> None:
    seat, model = Seat(), nn.Linear(2, 2)
    beats = Beats(seat, [model])
    model(torch.zeros(1, 2))
    beats.step_ended()
    beats.step_ended()
    beats.close()
    (first, lead), (_, none) = seat.times
    assert 0 < lead <= first
    assert none == 0


def test_a_forked_child_gives_no_sign_for_its_parent() -> None:
    read, write = os.pipe()
    seat, model = Seat(), nn.Linear(2, 2)
    seat.beat = lambda: os.write(write, b"x")  # type: ignore[method-assign]
    beats = Beats(seat, [model])
    child = os.fork()
    if child == 0:
        beating._life.sign()
        os._exit(0)
    os.waitpid(child, 0)
    beats.close()
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        assert pipe.read() == b""


def test_a_watched_model_is_copied_pickled_and_compiled_in_one_piece() -> None:
    seat, model = Seat(), nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    beats = Beats(seat, [model])
    expected = model(torch.ones(1, 2))
    assert copy.deepcopy(model)(torch.ones(1, 2)).equal(expected)
    assert pickle.loads(pickle.dumps(model))(torch.ones(1, 2)).equal(expected)
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        graphs.append(len([node for node in graph.graph.nodes if node.op.startswith("call")]))
        return graph.forward

    compiled = torch.compile(lambda inputs: model(inputs), backend=backend, fullgraph=True)
    assert compiled(torch.ones(1, 2)).equal(expected)
    assert graphs == [2], "two layers and nothing of ours"
    beats.close()


def test_stacks_come_at_a_signal_that_nobody_uses(tmp_path: Path) -> None:
    used = signal.signal(signal.SIGRTMAX - 1, lambda *_: None)
    try:
        writer = StackWriter(tmp_path / "stacks")
        assert writer.signal not in (0, signal.SIGRTMAX - 1)
        assert signal.getsignal(writer.signal) == signal.SIG_DFL
        os.kill(os.getpid(), writer.signal)
        deadline = time.monotonic() + 120
        while "test_stacks_come_at_a_signal" not in (tmp_path / "stacks").read_text():
            assert time.monotonic() < deadline, (tmp_path / "stacks").read_text()
            time.sleep(0.01)
        writer.close()
        os.kill(os.getpid(), writer.signal)  # one that was under way: ignored
        signal.signal(writer.signal, signal.SIG_DFL)
    finally:
        signal.signal(signal.SIGRTMAX - 1, used)


def test_without_a_free_signal_there_is_none(tmp_path: Path) -> None:
    status = tmp_path / "status"
    status.write_text(f"SigBlk:\t{0:016x}\nSigCgt:\t{(1 << 64) - 1:016x}\nSigIgn:\t{0:016x}\n")
    assert free_signal(status) == 0
