"""The launcher and a Session together: agreed stops, progress, endings. Kills at every instant are in tests/chaos."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.jobs import Job, job_in, leftovers

WAIT_S = 400.0
SCRIPT = f"""
import os, sys, time
import torch, holdfast
from torch.distributed.elastic.multiprocessing.errors import record
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from support.light_torch import spare_compiler
from support.pacing import paced, wait_for_version

def say(line):
    sys.stdout.write(line + "\\n")  # in one piece: the other rank and the agent write there too

@record
def main():
    torch.set_num_threads(1)
    spare_compiler()
    torch.distributed.init_process_group("gloo")
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fails_at = int(sys.argv[1])
    with holdfast.Session(model=model, optimizer=optimizer, checkpoint_dir="checkpoints", snapshot_every=1) as session:
        say(f"from {{session.step}} {{session.restored and session.restored.tier}}")
        for step in paced(session.steps(until=int(sys.argv[2]))):
            if step == fails_at and os.environ["RANK"] == "1":
                wait_for_version(step)
                raise ValueError("always here")
            model(torch.ones(1, 4)).sum().backward()
            optimizer.step()
            time.sleep(0.05)
            if step == 5:
                open("under-way", "w").close()
    say(f"to {{session.step}}")
    torch.distributed.destroy_process_group()

main()
"""


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    with job_in(tmp_path) as found:
        (tmp_path / "train.py").write_text(SCRIPT)
        yield found


def command(job: Job, fails_at: int, until: int, *flags: str) -> list[str]:
    return job.holdfast("--nproc-per-node", "2", *flags, str(job.root / "train.py"), str(fails_at), str(until))


def test_a_stop_signal_ends_at_an_agreed_step_in_storage_and_a_new_run_goes_on_from_it(job: Job) -> None:
    agent = job.start(command(job, -1, 100_000, "--hold-requeue-code", "75"))
    deadline = time.monotonic() + WAIT_S
    while not (job.root / "under-way").exists():
        assert time.monotonic() < deadline, job.output()
        time.sleep(0.05)
    agent.terminate()
    assert agent.wait(WAIT_S) == 75, job.output()
    [last] = {int(line.removeprefix("to ")) for line in job.output().splitlines() if line.startswith("to ")}
    assert last >= 6
    assert (job.root / "checkpoints" / f"step-{last:08d}" / "root").exists()
    assert leftovers(job) == []
    assert job.run(command(job, -1, last + 3), log="again.txt") == 0, job.output("again.txt")
    assert f"from {last} storage" in job.output("again.txt")
    assert f"to {last + 3}" in job.output("again.txt")
    assert leftovers(job) == []


def test_the_same_exception_at_the_same_step_stops_the_job_with_its_newest_version_in_storage(job: Job) -> None:
    assert job.run(command(job, 12, 60)) == 1
    assert "the same failure came twice at step 12" in job.output()
    assert "ValueError: always here" in job.output().split("Root Cause")[1]
    assert "from 12 memory" in job.output()
    assert (job.root / "checkpoints" / "step-00000012" / "root").exists()
    (recovery,) = [event for event in job.events() if event["kind"] == "recovery"]
    assert (recovery["tier"], recovery["step"]) == ("memory", 12)
    (end,) = [event for event in job.events() if event["kind"] == "run_ended"]
    assert (end["outcome"], end["exit_code"]) == ("failed", 1)
    assert leftovers(job) == []
