"""`ElasticSampler` in jobs: killed, resumed by another number of ranks, and the same samples all the while."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from holdfast import ElasticSampler
from support import elastic
from support.history import History, assert_exactly_once
from support.jobs import Job, job_in, leftovers

SCRIPT = Path(__file__).parent.parent / "support" / "elastic.py"
BATCH, SAMPLES = 7, 20


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    with job_in(tmp_path) as found:
        yield found


def train(job: Job, ranks: int, steps: int, *flags: str) -> None:
    script = [SCRIPT, "--steps", str(steps), "--batch", str(BATCH), "--samples", str(SAMPLES), "--loader-workers", "1"]
    script += ["--checkpoints", job.checkpoints, "--out", job.root / "out", "--step-seconds", "0.1", "--paced"]
    code = job.run(job.holdfast("--standalone", "--nproc-per-node", str(ranks), *flags, *script))
    assert code == 0, job.output()


def losses_of_one_process(steps: int) -> dict[int, float]:
    """The same training without ranks, loaders or holdfast's Session."""
    model, _ = elastic.build("none")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    _, inputs, targets = elastic.dataset(SAMPLES).tensors
    sampler = ElasticSampler(SAMPLES, global_batch_size=BATCH, seed=5, rank=0, world_size=1)
    losses = {}
    for step in range(steps):
        numbers = sampler.share_at(step * BATCH)
        loss = torch.nn.functional.mse_loss(model(inputs[numbers]), targets[numbers])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses[step + 1] = loss.item()
    return losses


@pytest.mark.parametrize(
    ("worlds", "kill"),
    [((2, 1), 1), pytest.param((4, 3), 1, marks=pytest.mark.campaign)],
)
def test_a_killed_rank_and_a_smaller_world_change_no_sample_and_no_mean(
    job: Job, worlds: tuple[int, int], kill: int
) -> None:
    train(job, worlds[0], 8, "--hold-faults", f"kill:rank={kill},step=6,when=backward")
    train(job, worlds[1], 12)
    assert len(job.fired()) == 1
    history = History.read(job.root / "out")
    recovery, resize = history.restored
    assert (recovery["tier"], recovery["world_size"]) == ("memory", worlds[0])
    assert (resize["tier"], resize["world_size"], resize["step"]) == ("storage", worlds[1], 8)
    for line in (recovery, resize):
        assert line["samples"] == line["step"] * BATCH
        assert {line["digest"]} == history.digests(line["step"])
    alone = ElasticSampler(SAMPLES, global_batch_size=BATCH, seed=5)
    assert history.samples() == [sample for step in range(12) for sample in alone.share_at(step * BATCH)]
    assert_exactly_once(history.samples(), SAMPLES)

    assert history.losses() == pytest.approx(losses_of_one_process(12), rel=1e-4)
    assert leftovers(job, besides="/pymp-") == []  # Python cannot remove it where a rank with loader workers is killed
