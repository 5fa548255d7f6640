"""Whole jobs of which a worker is killed while a standby is ready: the next generation is forked, no bit differs."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.jobs import TRAIN, Job, fingerprints, job_in, leftovers

WAIT_S = 400.0

GATED = f"""
import os, sys, time, types
sys.path.insert(0, {str(TRAIN.parent)!r})
import train

calls = 0
def gate(seconds):
    global calls
    calls += 1
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":  # time for a first version, and at last for the test to kill
        time.sleep(0.1 if calls < 30 else 600)
train.time = types.SimpleNamespace(sleep=gate)

if __name__ == "__main__":
    if sys.argv[-1] == "ungated":
        sys.argv.pop()
        train.time.sleep = lambda seconds: None
    train.main()
"""

LOADER = f"""
import os, sys, time
import torch, holdfast
sys.path.insert(1, {str(TRAIN.parents[1])!r})
from support.pacing import paced

class Squares(torch.utils.data.Dataset):
    def __len__(self): return 64
    def __getitem__(self, index): return Item(index)

class Item:
    def __init__(self, value): self.value = value

def collate(items): return torch.tensor([[float(item.value) ** 2] for item in items])

def main():
    torch.set_num_threads(1)
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    seen = []
    with holdfast.Session(model=model, optimizer=optimizer, checkpoint_dir="checkpoints", snapshot_every=1) as session:
        for method in ("spawn", "fork"):
            loader = torch.utils.data.DataLoader(
                Squares(), batch_size=16, num_workers=1, collate_fn=collate, multiprocessing_context=method
            )
            seen.append(float(sum(batch.sum() for batch in loader)))
        sys.stdout.write(f"seen {{seen}} {{__name__}} {{sys.argv[1:]}}\\n")  # in one piece: the agent writes there too
        for step in paced(session.steps(until=36)):
            model(torch.ones(1, 1)).sum().backward()
            optimizer.step()
            if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
                time.sleep(0.1 if step < 30 else 600)

if __name__ == "__main__":
    main()
"""


@pytest.fixture
def job() -> Iterator[Job]:
    # A short name: a DataLoader makes Unix sockets in $TMPDIR, whose paths must stay below 108 bytes.
    with tempfile.TemporaryDirectory(prefix="hf-", dir="/tmp") as folder, job_in(Path(folder)) as found:
        yield found


def kill_when_ready(job: Job, command: list[str], rank: int) -> None:
    """Run the job; once its standby is ready, kill a rank of the first generation."""
    agent = job.start(command)
    deadline = time.monotonic() + WAIT_S
    while not (ready := [event for event in job.events() if event["kind"] == "standby"]):
        assert agent.poll() is None, job.output()
        assert time.monotonic() < deadline, job.output()
        time.sleep(0.05)
    assert ready[0]["change"] == "ready", ready
    (first,) = [event for event in job.events() if event["kind"] == "generation_started"]
    os.kill(first["pids"][rank], signal.SIGKILL)
    assert agent.wait(WAIT_S) == 0, job.output()
    _, second = [event for event in job.events() if event["kind"] == "generation_started"]
    assert second["forked"] == len(second["pids"])
    (recovery,) = [event for event in job.events() if event["kind"] == "recovery"]
    assert recovery["tier"] == "memory"
    assert "standby for restarts" not in job.output()
    assert leftovers(job) == []


@pytest.mark.campaign  # the kill matrix has restarts by the standby in `make test`
@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_a_forked_generation_ends_with_the_bits_of_an_undisturbed_run(job: Job, parallel: str) -> None:
    script = job.root / "gated.py"
    script.write_text(GATED)
    flags = ["--nproc-per-node", "2", "--hold-standby", "1"]
    arguments = ["--parallel", parallel, "--steps", "36", "--out"]
    kill_when_ready(job, job.holdfast(*flags, script, *arguments, job.root / "killed"), rank=1)
    assert job.plain(script, *arguments, job.root / "plain", "ungated", ranks=2) == 0, job.output()
    assert fingerprints(job.root / "killed", 2) == fingerprints(job.root / "plain", 2)


def test_data_loaders_of_a_forked_module_find_its_classes(job: Job) -> None:
    (job.root / "loading.py").write_text(LOADER)
    job.environment = {"PYTHONPATH": str(job.root)}
    kill_when_ready(job, job.holdfast("--hold-standby", "1", "-m", "loading", "x${local_rank}"), rank=0)
    expected = float(sum(value**2 for value in range(64)))
    assert job.output().count(f"seen {[expected, expected]} __main__ ['x0']") == 2
