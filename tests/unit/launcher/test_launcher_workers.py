"""Ending workers: by signal, by SIGKILL after the grace, and what is done about those that outlive even that."""

from __future__ import annotations

import contextlib
import os
import select
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs

from holdfast.checkpoint.version import GenerationId
from holdfast.launcher.processes import Child, Guard
from holdfast.launcher.wire import Phase, Place, Plan
from holdfast.launcher.workers import SURVIVED_S, WorkerGroup, WorkerSpec

PLACE = Place(
    node_id="n",
    node_rank=0,
    host="h",
    daemon="",
    role="default",
    num_ranks=2,
    first_global_rank=0,
    first_role_rank=0,
    role_world_size=2,
)
PLAN = Plan(
    leader_id="n",
    sequence=1,
    phase=Phase.RUN,
    generation=GenerationId(incarnation=1, nonce="00000001", generation=1),
    places=(PLACE,),
    store="127.0.0.1:1",
)


@pytest.fixture
def group(tmp_path: Path) -> Iterator[WorkerGroup]:
    """Two workers that sleep."""
    spec = WorkerSpec(
        command="sleep",
        arguments=("600",),
        num_workers=2,
        role="default",
        run_id="r",
        max_restarts=0,
        virtual_local_rank=False,
        signals_to_handle="SIGTERM",
        log_prefix=None,
        logs_specs=DefaultLogsSpecs(log_dir=str(tmp_path)),
        numa_options=None,
    )
    with Guard() as guard:
        made = WorkerGroup(spec, PLAN, PLACE, guard=guard, extra_variables={}, inherited={"PATH": "/usr/bin:/bin"})
        made.start()
        children = dict(made._children)
        yield made
        for child in children.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            if child._process is not None:
                child._process.wait()


def test_workers_that_outlive_sigkill_are_named_after_a_while_and_then_let_be(
    group: WorkerGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    pids = group.pids()
    sent: list[tuple[int, int]] = []
    monkeypatch.setattr(Child, "signal_group", lambda child, number: sent.append((child.pid, number)))  # state D
    group.begin_stop(signal.SIGTERM, 30.0, now=100.0)
    assert not group.tick(129.0)
    assert group.survivors(129.0 + SURVIVED_S) == {}  # the grace of the script is no part of it
    assert not group.tick(130.0)
    assert {number for _, number in sent} == {signal.SIGTERM, signal.SIGKILL}
    assert group.survivors(130.0 + SURVIVED_S - 0.1) == {}
    assert group.survivors(130.0 + SURVIVED_S) == pids
    group.abandon()
    assert group.tick(200.0)
    assert group.descriptors() == {}
    group.finish_logs(5.0)


def test_workers_that_end_by_sigkill_are_no_survivors(group: WorkerGroup) -> None:
    pidfds = list(group.descriptors().values())
    group.begin_stop(signal.SIGKILL, 0.0, now=100.0)
    group.tick(100.0)
    for pidfd in pidfds:
        poller = select.poll()
        poller.register(pidfd, select.POLLIN)
        assert poller.poll(10_000), "a worker did not end"
    assert len(group.collect()) == 2
    assert group.survivors(100.0 + SURVIVED_S) == {}
    assert group.tick(101.0)
    group.finish_logs(5.0)
