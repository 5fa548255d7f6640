"""Keep a training script in step with its node, so that a failure at a given step finds what it is about.

On a busy machine a script of quick steps would be past that step before the memory of its node is ready, before the
daemon has granted a copy, or before a standby waits: then the job has nothing to go back to, or more to lose than a
test allows.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from holdfast.checkpoint.version import Version
from holdfast.environment import WorkerEnvironment, worker_environment
from holdfast.snapshot.arena import SlotState, read_header_of
from holdfast.snapshot.control import ControlPage

LIMIT_S = 30.0
"""Where no grant has come for so long there is no memory tier: the steps go on without."""
VERSION_LIMIT_S = 200.0
STANDBY_LIMIT_S = 200.0
FIRST = 2
"""Steps that wait for nothing: after them the sizes are known, and the arena is made."""


def paced(steps: Iterator[int], *, standby_at: int | None = None) -> Iterator[int]:
    """The same steps; each waits until the daemon has granted a copy of what it ends with, or of a later step.

    Args:
        steps: of a Session.
        standby_at: the step before which a standby has to be ready besides.
    """
    environment = worker_environment()
    if environment is None:
        yield from steps
        return
    waits = True
    with ControlPage.open(environment.arena / "control") as page:
        for number, step in enumerate(steps):
            deadline = time.monotonic() + LIMIT_S
            while waits and number >= FIRST and not any(granted > step for _, granted in page.grants()):
                waits = time.monotonic() < deadline
                time.sleep(0.002)
            if step == standby_at:
                _wait_for_standby(environment)
            yield step


def wait_for_version(step: int) -> None:
    """Wait until every rank of this node has a whole image of one version of `step`: a failure then goes back to it.

    And until the daemon has seen that, and told the agent: it takes the grants of older steps back then.
    """
    environment = worker_environment()
    assert environment is not None, "a worker of holdfast run"
    deadline = time.monotonic() + VERSION_LIMIT_S
    with ControlPage.open(environment.arena / "control") as page:
        while environment.local_world_size not in _images(environment.arena, step).values() or any(
            granted < step for _, granted in page.grants()
        ):
            if time.monotonic() > deadline:
                raise TimeoutError(f"no version of step {step} within {VERSION_LIMIT_S} s")
            time.sleep(0.01)


def _images(arena: Path, step: int) -> dict[Version, int]:
    """How many ranks have a whole image of the versions of that step."""
    ranks: dict[Version, set[int]] = {}
    for path in arena.glob("slot-*"):
        with suppress(FileNotFoundError):
            header, _ = read_header_of(path)
            if header.state is SlotState.CLEAN and header.version is not None and header.version.step == step:
                ranks.setdefault(header.version, set()).add(header.global_rank)
    return {version: len(found) for version, found in ranks.items()}


def _wait_for_standby(environment: WorkerEnvironment) -> None:
    deadline = time.monotonic() + STANDBY_LIMIT_S
    while b'"kind":"standby"' not in (environment.run_dir / "events.jsonl").read_bytes():
        if time.monotonic() > deadline:
            raise TimeoutError(f"no standby within {STANDBY_LIMIT_S} s")
        time.sleep(0.02)
