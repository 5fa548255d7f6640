"""How long a job stands still when a node loses its power without a word and a spare one waits.

    python benchmarks/node_loss.py            # 10 losses of a follower's node, 10 of the leader's
    python benchmarks/node_loss.py --quick    # one of each: judged is whether it was recovered from, not how fast

Needs root: nodes are namespaces (`tests/support/nodes.py`). Two nodes train with DDP on gloo, a third one waits. The
driver takes the power off one of the two and waits until both ranks have finished a step in the next generation; that
time, less one median step, is what the loss cost. A new machine then becomes the spare. Heartbeats are the default
(every 0.5 s, dead after 2 s). Bar: at most 3.5 s, and every loss recovered from; the exit code is 1 where it is missed.
torchrun is not here: it never notices a node that is silent.
"""

from __future__ import annotations

import itertools
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from goodput import BIN, PHASES, ROOT, read_log
from measure import Bar, as_json, estimate, exit_code, keep, lines_of, machine, options_of, table

sys.path.insert(0, str(ROOT / "tests"))  # the nodes are those of the tests

from holdfast.launcher.events import read_events
from support.nodes import PORT, Cluster, Node, why_impossible

NODES = 3
RANKS = 2
STEPS_BETWEEN = 25
LIMIT_S = 120.0


class Job:
    """Two nodes that train and one that waits."""

    def __init__(self, folder: Path, cluster: Cluster) -> None:
        self._folder, self._cluster = folder, cluster
        self._started: dict[str, float] = {}

    def start(self, node: Node) -> None:
        """The agent of a node."""
        endpoints = ",".join(f"n{number}:{PORT}" for number in range(NODES))
        command = [str(BIN / "holdfast"), "run", "--nnodes", str(RANKS), "--nproc-per-node", "1"]
        command += ["--rdzv-backend", "c10d", "--rdzv-id", "loss", "--rdzv-endpoint", endpoints]
        command += ["--rdzv-conf", "last_call_timeout=1", "--hold-job", "loss", "--hold-linger", "1s"]
        command += ["--hold-run-dir", str(self._folder / "run"), str(ROOT / "benchmarks" / "goodput.py")]
        command += ["worker", "holdfast", str(self._folder), "1000000", "60"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": "/tmp"}
        self._started[node.name] = time.time()
        node.start(command, log=self._folder / f"agent-{node.name}.txt", environment=environment)

    def events(self, kind: str) -> list[dict[str, Any]]:
        """Events of one kind, in order of time."""
        found = [event for event in read_events(self._folder / "run") if event["kind"] == kind]
        return sorted(found, key=lambda event: event["time"])

    def steps(self, after: float) -> list[list[float]]:
        """Times of the steps that each rank has finished after some time."""
        logs = (read_log(self._folder / f"rank-{rank}.log") for rank in range(RANKS))
        return [[at for _, at in log if at > after] for log in logs]

    def began(self) -> float:
        """When the newest generation started."""
        return max((event["time"] for event in self.events("generation_started")), default=0.0)

    def leader(self) -> str:
        """Host of the agent that leads: it says that the generation runs."""
        return [event["host"] for event in self.events("membership") if event["change"] == "running"][-1]

    def members(self) -> list[str]:
        """Hosts of the newest generation."""
        return list(self.events("generation_started")[-1]["members"])

    def wait(self, condition: object) -> None:
        """Until something is so.

        Raises:
            TimeoutError: it is not.
        """
        deadline = time.monotonic() + LIMIT_S
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError
            time.sleep(0.05)

    def settled(self) -> bool:
        """Enough steps of this generation, and every node's standby is ready."""
        if not self.began() or any(len(steps) < STEPS_BETWEEN for steps in self.steps(self.began())):
            return False
        ready = [event for event in self.events("standby") if event["change"] == "ready"]
        return all(
            any(event["host"] == name and event["time"] > started for event in ready)
            for name, started in self._started.items()
        )

    def lose(self, which: str) -> float:
        """Power off the leader's node, or the other; the seconds that it cost."""
        steps = self.steps(self.began())[0]
        median = statistics.median(b - a for a, b in itertools.pairwise(steps))
        leader = self.leader()
        name = next(host for host in self.members() if (host == leader) == (which == "leader"))
        node = next(node for node in self._cluster.nodes if node.name == name)
        number, before = self._cluster.nodes.index(node), self.began()
        at = time.time()
        self._cluster.power_off(node)
        self.wait(lambda: self.began() > before and all(self.steps(self.began())))
        cost = max(steps[0] for steps in self.steps(self.began())) - at - median
        self.start(self._cluster.replace(self._cluster.nodes[number]))
        return cost


def measure(which: str, losses: int) -> tuple[list[float], dict[str, float]]:
    """Seconds of each loss, and the median seconds of each phase."""
    costs: list[float] = []
    with tempfile.TemporaryDirectory(prefix="holdfast-loss-") as name, Cluster(NODES, Path(name)) as cluster:
        job = Job(Path(name), cluster)
        for node in cluster.nodes:
            job.start(node)
        try:
            for _ in range(losses):
                job.wait(job.settled)
                costs.append(job.lose(which))
        except TimeoutError:
            print("\n".join(path.read_text()[-2000:] for path in Path(name).glob("agent-*.txt")), file=sys.stderr)
        recoveries = [event["phases"] for event in job.events("recovery")]
    phases = {phase: [found[phase] for found in recoveries if phase in found] for phase in PHASES}
    return costs, {phase: statistics.median(found) for phase, found in phases.items() if found}


def main() -> int:
    """Measure and judge."""
    parser = options_of(__doc__, quick="one loss of each kind; the bars of time are not judged")
    parser.add_argument("--losses", type=int, default=10, help="of each kind (default 10)")
    options = parser.parse_args()
    if (reason := why_impossible()) is not None:
        print(reason, file=sys.stderr)
        return 2
    losses = 1 if options.quick else options.losses
    found = {which: measure(which, losses) for which in ("follower", "leader")}
    said = sys.stderr if options.json == "-" else sys.stdout
    bars = [Bar(f"loss of the {which}'s node", estimate(costs), 3.5, " s") for which, (costs, _) in found.items()]
    print(machine(), file=said)
    rows = [
        [which, str(estimate(costs)), f"{min(costs):.2f} to {max(costs):.2f}", f"{len(costs)} of {losses}",
         *(f"{phases[phase]:.2f}" if phase in phases else "-" for phase in PHASES)]
        for which, (costs, phases) in found.items()
    ]  # fmt: skip
    print(table(["node lost", "s until the next step", "range", "recovered", *PHASES], rows), file=said)
    print(lines_of(bars, quick=options.quick), file=said)
    everything = {which: {"costs_s": costs, "phases_s": phases} for which, (costs, phases) in found.items()}
    keep(as_json(everything, bars, quick=options.quick), options.json)
    whole = all(len(costs) == losses for costs, _ in found.values())
    print("recovered from every loss" if whole else "NOT recovered from every loss", file=said)
    return exit_code(bars, quick=options.quick, whole=whole)


if __name__ == "__main__":
    raise SystemExit(main())
