"""Kill things at every instant of a step; the run must end as if nothing had happened.

`make test` runs a pairwise subset, `make chaos` the whole matrix (marker ``campaign``).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from support.jobs import TRAIN, Job, fingerprints, job_in, leftovers

INSTANTS = ("begin", "forward", "loss", "backward", "optimizer", "updated", "boundary", "copy", "copied", "commit")
STEPS = 12
KILL_STEP = 7
"""Steps are paced: by then there is a version on a machine of any speed; a kill before the first one ends the job."""

Reference = Callable[..., list[dict[str, str]]]


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """What each rank ends with without holdfast, computed once for a layout."""
    known: dict[tuple[str, int, int], list[dict[str, str]]] = {}

    def reference(parallel: str, world: int, steps: int = STEPS) -> list[dict[str, str]]:
        key = (parallel, world, steps)
        if key not in known:
            job = Job(tmp_path_factory.mktemp(f"plain-{parallel}-{world}"))
            options = ["--plain", "--parallel", parallel, "--steps", str(steps), "--out", str(job.root / "out")]
            assert job.plain(TRAIN, *options, ranks=world) == 0, job.output()
            known[key] = fingerprints(job.root / "out", world)
        return known[key]

    return reference


def script(job: Job, parallel: str) -> list[str]:
    """The script and its arguments for one run of the matrix."""
    return [
        str(TRAIN),
        "--parallel",
        parallel,
        "--steps",
        str(STEPS),
        "--out",
        str(job.root / "out"),
        "--step-seconds",
        "0.1",
        "--paced",
    ]


def check(job: Job, world: int, expected: list[dict[str, str]], *, fired: int, at_most_lost: int = 2) -> None:
    """The faults fired, recoveries came from memory and lost little, the end is the undisturbed one, nothing stays."""
    assert len(job.fired()) == fired, job.output()
    recoveries = [event for event in job.events() if event["kind"] == "recovery"]
    assert recoveries, job.output()
    for event in recoveries:
        assert event["tier"] == "memory", (event, job.output())
        assert 0 <= event["steps_lost"] <= at_most_lost, (event, job.output())
    assert fingerprints(job.root / "out", world) == expected
    assert leftovers(job) == []


def kill_one(root: Path, undisturbed: Reference, *, parallel: str, world: int, rank: int, instant: str) -> None:
    with job_in(root) as job:
        faults = f"kill:rank={rank},step={KILL_STEP},when={instant}"
        flags = ["--standalone", "--nproc-per-node", str(world), "--hold-faults", faults]
        code = job.run(job.holdfast(*flags, *script(job, parallel)))
        assert code == 0, job.output()
        check(job, world, undisturbed(parallel, world), fired=1)
        assert len([event for event in job.events() if event["kind"] == "recovery"]) == 1  # no address of the dead


# In `make test`: one run for each layout, whose failures come one after another, three steps apart; the first once the
# standby is ready, as it is in a job of any length (`kill_one` shows a failure before that).
FIRST_KILL = 6
IN_ONE_RUN = {
    ("ddp", 2): (
        "kill:rank=0,when=begin",
        "kill:rank=1,when=backward",
        "raise:rank=0,when=forward",
        "kill:rank=1,when=boundary",
        "kill:rank=0,when=commit",
    ),
    ("fsdp2", 2): (
        "kill:rank=1,when=forward",
        "kill:rank=0,when=optimizer",
        "raise:rank=1,when=forward",
        "kill:rank=1,when=copy",
    ),
    ("none", 1): ("kill:rank=0,when=updated", "kill:rank=0,when=copied"),
}
WHOLE = [
    (parallel, world, rank)
    for parallel, world in (("none", 1), ("ddp", 2), ("fsdp2", 2), ("ddp", 4), ("fsdp2", 4))
    for rank in range(world)
]


@pytest.mark.parametrize(
    ("parallel", "world"), [("ddp", 2), ("fsdp2", 2), pytest.param("none", 1, marks=pytest.mark.campaign)]
)
def test_failures_at_many_instants_of_one_run_change_nothing(
    tmp_path: Path, undisturbed: Reference, parallel: str, world: int
) -> None:
    failures = IN_ONE_RUN[parallel, world]
    steps = FIRST_KILL + 3 * len(failures) + 3
    with job_in(tmp_path) as job:
        faults = ";".join(f"{failure},step={FIRST_KILL + 3 * number}" for number, failure in enumerate(failures))
        flags = ["--standalone", "--nproc-per-node", str(world), "--hold-standby", "1", "--hold-faults", faults]
        longer = [*script(job, parallel), "--steps", str(steps), "--standby-at", str(FIRST_KILL - 1)]
        assert job.run(job.holdfast(*flags, *longer)) == 0, job.output()
        check(job, world, undisturbed(parallel, world, steps), fired=len(failures))


@pytest.mark.parametrize(("parallel", "world", "rank", "instant"), [("ddp", 4, 3, "loss")])
def test_a_rank_killed_soon_after_the_start_changes_nothing(
    tmp_path: Path, undisturbed: Reference, parallel: str, world: int, rank: int, instant: str
) -> None:
    kill_one(tmp_path, undisturbed, parallel=parallel, world=world, rank=rank, instant=instant)


@pytest.mark.campaign
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("parallel", "world", "rank"), WHOLE)
def test_a_rank_killed_at_every_instant_one_after_another_changes_nothing(
    tmp_path: Path, undisturbed: Reference, parallel: str, world: int, rank: int
) -> None:
    """One run, ten failures: at each instant once, two steps apart."""
    steps = KILL_STEP + 2 * len(INSTANTS) + 1
    with job_in(tmp_path) as job:
        faults = ";".join(
            f"kill:rank={rank},step={KILL_STEP + 2 * number},when={instant}" for number, instant in enumerate(INSTANTS)
        )
        flags = ["--standalone", "--nproc-per-node", str(world), "--hold-standby", "1", "--hold-faults", faults]
        longer = [*script(job, parallel), "--steps", str(steps), "--step-seconds", "0.1"]
        assert job.run(job.holdfast(*flags, *longer), timeout_s=1100) == 0, job.output()
        check(job, world, undisturbed(parallel, world, steps), fired=len(INSTANTS))


@pytest.mark.campaign
@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_three_failures_in_one_run_change_nothing(tmp_path: Path, undisturbed: Reference, parallel: str) -> None:
    with job_in(tmp_path) as job:
        faults = "kill:rank=1,step=6,when=backward;raise:rank=0,step=8,when=forward;kill:rank=0,step=10,when=copy"
        flags = ["--standalone", "--nproc-per-node", "2", "--hold-faults", faults]
        assert job.run(job.holdfast(*flags, *script(job, parallel))) == 0, job.output()
        check(job, 2, undisturbed(parallel, 2), fired=3)


def test_a_failure_during_recovery_changes_nothing(tmp_path: Path, undisturbed: Reference) -> None:
    with job_in(tmp_path) as job:
        faults = f"kill:rank=1,step={KILL_STEP},when=backward;kill:rank=0,step=0,when=restore"
        flags = ["--standalone", "--nproc-per-node", "2", "--hold-faults", faults]
        assert job.run(job.holdfast(*flags, *script(job, "ddp"))) == 0, job.output()
        check(job, 2, undisturbed("ddp", 2), fired=2)


def test_training_goes_on_without_its_daemon_and_the_next_failure_resumes_from_its_slots(
    tmp_path: Path, undisturbed: Reference
) -> None:
    with job_in(tmp_path) as job:
        faults = "kill-daemon:node=0,step=4;kill:rank=0,step=9,when=backward"
        flags = ["--standalone", "--nproc-per-node", "2", "--hold-faults", faults]
        slow = [*script(job, "ddp"), "--step-seconds", "0.2"]
        assert job.run(job.holdfast(*flags, *slow)) == 0, job.output()
        check(job, 2, undisturbed("ddp", 2), fired=2, at_most_lost=3)


def test_a_killed_agent_is_started_again_and_resumes_from_memory(tmp_path: Path, undisturbed: Reference) -> None:
    with job_in(tmp_path) as job:
        flags = ["--standalone", "--nproc-per-node", "2", "--hold-faults", f"kill-agent:node=0,step={KILL_STEP}"]
        slow = [*script(job, "ddp"), "--step-seconds", "0.1"]
        assert job.run(job.holdfast(*flags, *slow)) == -9, job.output()
        assert job.run(job.holdfast(*flags, *slow)) == 0, job.output()
        check(job, 2, undisturbed("ddp", 2), fired=1)


@pytest.mark.parametrize("parallel", [pytest.param("ddp", marks=pytest.mark.campaign), "fsdp2"])
def test_two_agents_restart_together(tmp_path: Path, undisturbed: Reference, parallel: str) -> None:
    with job_in(tmp_path) as job:
        faults = f"kill:rank=1,step={KILL_STEP},when=backward"
        flags = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", job.name]
        flags += ["--rdzv-endpoint", f"127.0.0.1:{job.port}", "--hold-dead-after", "20s", "--hold-faults", faults]
        agents = [job.start(job.holdfast(*flags, *script(job, parallel)), log=f"agent{i}.txt") for i in range(2)]
        codes = [agent.wait(400) for agent in agents]
        assert codes == [0, 0], job.output("agent0.txt") + job.output("agent1.txt")
        check(job, 2, undisturbed(parallel, 2), fired=1)
