"""Half an hour of faults: four nodes, something of a random kind breaks every 10 to 20 s, and the end is torchrun's.

`make soak` runs it; HOLDFAST_SOAK_S (about how long it is struck, in seconds) makes it shorter. Goodput and what struck
are printed.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from support.jobs import BIN, TRAIN, fingerprints, job_in
from support.node_jobs import NodeJob, node_job
from support.nodes import Node

SOAK_S = float(os.environ.get("HOLDFAST_SOAK_S", "1800"))
NODES = 4
STEP_S = 0.2
GOODPUT = 0.55
"""Expected, of what nobody disturbs: by it the number of steps is such that the job is struck for about SOAK_S."""
STEPS = max(50, round(SOAK_S * GOODPUT / STEP_S))
KINDS = ("kill", "stop", "daemon", "power")


def script(root: Path, *more: str) -> list[str]:
    own = [str(TRAIN), "--parallel", "ddp", "--steps", str(STEPS), "--out", str(root / "out")]
    return [*own, "--progress", str(root / "progress"), *more]


def undisturbed(root: Path) -> list[dict[str, str]]:
    """What the ranks end with under torchrun, without holdfast."""
    root.mkdir()
    with job_in(root) as job:
        command = [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", str(NODES), *script(root, "--plain")]
        assert job.run(command, timeout_s=3600) == 0, job.output()
    return fingerprints(root / "out", NODES)


def pids(job: NodeJob, node: Node, kind: str) -> list[int]:
    """Our numbers of the node's daemon, or of its workers: a forked one looks like the standby that it came from."""
    if kind == "daemon":
        return [pid for pid, line in node.processes().items() if "holdfast.snapshot.daemon" in line]
    told = [event["pids"] for event in job.events("generation_started") if event["host"] == node.name]
    return [found for pid in (told[-1] if told else ()) if (found := node.seen_as(pid))]


def strike(job: NodeJob, kind: str, node: Node) -> bool:
    """Break something; whether there was anything to break."""
    if kind == "power":
        job.power_off(node)
        job.replace(node)
        return True
    found = pids(job, node, kind)
    for pid in found:
        os.kill(pid, signal.SIGSTOP if kind == "stop" else signal.SIGKILL)
    return bool(found)


@pytest.mark.campaign
@pytest.mark.timeout(0)
def test_a_job_that_is_struck_again_and_again_ends_as_if_nothing_had_happened(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = undisturbed(tmp_path / "stock")
    chance = random.Random(2)
    struck: Counter[str] = Counter()
    root = tmp_path / "soak"
    root.mkdir()
    held = ["--checkpoints", str(root / "checkpoints"), "--persist-every", "50", "--step-seconds", str(STEP_S)]
    with node_job(NODES, root, script(root, *held), flags=["--hold-standby", "1"]) as job:
        job.start(*job.cluster.nodes)
        job.wait_step(5)
        began, first = time.monotonic(), job.step()
        upcoming = began + 5.0
        while any(process.poll() is None for process in job.agents.values()) and job.step() < STEPS:
            assert time.monotonic() - began < 4 * SOAK_S + 300, job.told()
            if time.monotonic() >= upcoming:
                kind, node = chance.choice(KINDS), chance.choice(job.cluster.nodes)
                struck[kind] += strike(job, kind, node)
                upcoming = time.monotonic() + chance.uniform(10, 20)
            time.sleep(0.05)
        seconds = time.monotonic() - began
        assert set(job.finish(within_s=300).values()) == {0}, job.told()
        assert fingerprints(root / "out", NODES) == expected
        assert job.leftovers() == []
        assert sum(struck.values()) > 0
        lost = sum(event.get("steps_lost", 0) for event in job.events("recovery"))
    with capsys.disabled():
        sys.stdout.write(
            f"\n{STEPS} steps in {seconds:.0f} s, struck by {dict(struck)}: goodput "
            f"{(STEPS - first) * STEP_S / seconds:.2f} of steps of {STEP_S} s, {lost} steps lost\n"
        )
