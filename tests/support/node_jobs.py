"""One job over the nodes of a cluster: an agent on each, what they wrote, and how it ended."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from holdfast.launcher.events import read_events
from support.jobs import Job, job_in
from support.node_memory import protected
from support.nodes import PORT, Cluster, Node, cluster_of

WAIT_S = 300.0


@dataclass
class NodeJob:
    """The agents of one job; the folder of `job` is the storage that all nodes share."""

    cluster: Cluster
    job: Job
    flags: Sequence[str]
    """Of `holdfast run`, on every node."""
    script: Sequence[str]
    agents: dict[Node, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self, *nodes: Node, flags: Sequence[str] = ()) -> None:
        """Start the agent of each node."""
        variables = {**self.job.variables(), "TMPDIR": "/tmp"}
        for node in nodes:
            command = self.job.holdfast(*self.flags, *flags, *self.script)
            log = self.job.root / f"agent-{node.name}.txt"
            self.agents[node] = node.start(command, log=log, environment=variables)

    def power_off(self, *nodes: Node) -> float:
        """Power off; the time at which it happened."""
        at = time.time()
        self.cluster.power_off(*nodes)
        for node in nodes:
            self.agents.pop(node, None)
        return at

    def replace(self, node: Node) -> Node:
        """A newly started machine in place of one that is off, and an agent on it."""
        newcomer = self.cluster.replace(node)
        self.start(newcomer)
        return newcomer

    # --- the storage that the nodes share

    def lose_storage(self) -> None:
        """From now on nothing under the checkpoint directory can be read, written or listed."""
        self.job.checkpoints.rename(self._away)
        self.job.checkpoints.write_text("a file where the directory was: every use of it fails")

    def return_storage(self) -> None:
        """The checkpoint directory is there again, as it was."""
        self.job.checkpoints.unlink()
        self._away.rename(self.job.checkpoints)

    @property
    def _away(self) -> Path:
        return self.job.root / "checkpoints-away"

    # --- what happens

    def wait_protected(self, above: int) -> int:
        """Until a version above that step is whole on all nodes that are on, parity and all; its step."""
        found = above

        def newer() -> bool:
            nonlocal found
            found = protected(self.cluster.nodes)
            return found > above

        self.wait(newer, f"the protection of a version above step {above}")
        return found

    def events(self, kind: str) -> list[dict[str, Any]]:
        """Events of one kind that all agents wrote, in order of time; a line cut short by a loss is left out."""
        found: list[dict[str, Any]] = [event for event in read_events(self.job.run_dir) if event["kind"] == kind]
        return sorted(found, key=lambda event: event["time"])

    def step(self) -> int:
        """The newest step that any rank has told of (`--progress` of the script)."""
        return self.job.progress()

    def wait(self, condition: Callable[[], object], what: str, *, within_s: float = WAIT_S) -> None:
        """Until something is so.

        Raises:
            AssertionError: it did not come to be, or every agent ended meanwhile; with what the agents said.
        """
        deadline = time.monotonic() + within_s
        while not condition():
            ended = {node.name: process.poll() for node, process in self.agents.items()}
            assert None in ended.values() or condition(), (
                f"{what} did not happen before the agents ended: {ended}\n{self.told()}"
            )
            assert time.monotonic() < deadline, f"{what} did not happen within {within_s} s\n{self.told()}"
            time.sleep(0.02)

    def wait_step(self, step: int) -> None:
        """Until any rank has finished so many steps."""
        self.wait(lambda: self.step() >= step, f"step {step}")

    def finish(self, *, within_s: float = WAIT_S) -> dict[str, int]:
        """Wait for all living agents: exit codes by node name."""
        deadline = time.monotonic() + within_s
        codes = {}
        for node, process in self.agents.items():
            try:
                codes[node.name] = process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise AssertionError(f"{node.name} has not ended within {within_s} s\n{self.told()}") from None
        return codes

    def told(self) -> str:
        """What all agents, workers and daemons wrote."""
        paths = [*sorted(self.job.root.glob("agent-*.txt")), *sorted(self.job.run_dir.glob("daemon*.log"))]
        return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')[-6000:]}" for path in paths)

    def leftovers(self) -> list[str]:
        """What the job left on nodes that are on: processes, shared memory, temporary files."""
        deadline = time.monotonic() + 60
        while (found := self._traces()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return found

    def _traces(self) -> list[str]:
        found = []
        for node in self.cluster.nodes:
            if node.is_on:
                found += [f"{node.name}: process {command}" for command in node.processes().values()]
                listed = node.run("find", "/dev/shm", "/tmp", "-maxdepth", "2", "-name", "*holdfast*", "-not", "-empty")
                found += [f"{node.name}: {path}" for path in listed.stdout.split()]
        return found


@contextmanager
def node_job(
    num_nodes: int,
    root: Path,
    script: Sequence[str],
    *,
    nnodes: str | None = None,
    flags: Sequence[str] = (),
    **more: Any,
) -> Iterator[NodeJob]:
    """A cluster, and a job with one worker on each node that is yet to be started.

    Args:
        num_nodes: nodes at the start.
        root: the shared folder.
        script: and its arguments.
        nnodes: as for `holdfast run`; None: exactly `num_nodes`.
        flags: more of `holdfast run`.
        more: of the `Cluster`.
    """
    with cluster_of(num_nodes, root, **more) as cluster, job_in(root) as job:
        own = ["--nnodes", nnodes or str(num_nodes), "--nproc-per-node", "1", "--rdzv-backend", "c10d"]
        own += ["--rdzv-endpoint", f"n0:{PORT}", "--rdzv-id", job.name, "--rdzv-conf", "last_call_timeout=1"]
        yield NodeJob(cluster, job, [*own, *flags], script)
