"""The demonstration behind `make demo-nodes`: four machines on this one, two of them lose power at once.

    sudo python examples/demo_nodes.py [--parallel ddp|fsdp2] [--steps N] [--off-at STEP]

Each node has namespaces of its own: losing power takes its link, all its processes and all its memory in an instant.
New machines take the places of the lost ones. Where the state comes from is what the event log says of the recovery:
the memory of other nodes where it holds enough, else the newest checkpoint in the storage that the nodes share.

Exits with 0 where the run ended with the same bits as an undisturbed one under stock torchrun, with 1 where not.
"""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))  # the nodes are those of the tests

from support.nodes import PORT, Cluster, Node, why_impossible  # noqa: E402

TRAIN = ROOT / "examples" / "gpt" / "train.py"
BIN = Path(sys.executable).parent
NODES = 4
LIMIT_S = 600


class Show:
    """The nodes of the job, redrawn while it runs; what happened stands below."""

    def __init__(self, folder: Path, cluster: Cluster) -> None:
        self._folder, self._cluster = folder, cluster
        self._began = time.monotonic()
        self._read_bytes = 0
        self.happened: list[str] = []
        self.recoveries: list[dict] = []
        self._ranks: dict[str, str] = {}

    def says(self, line: str) -> None:
        self.happened.append(f"[{time.monotonic() - self._began:5.1f} s] {line}")

    @property
    def step(self) -> int:
        """The newest step that rank 0 has printed."""
        lines = (self._folder / "agent-n0.txt").read_text(errors="replace") if self.started else ""
        found = re.findall(r"^step +(\d+) ", lines, re.MULTILINE)
        return int(found[-1]) if found else 0

    @property
    def started(self) -> bool:
        return (self._folder / "agent-n0.txt").exists()

    @property
    def checkpoints(self) -> list[str]:
        return sorted(path.parent.name for path in self._folder.glob("checkpoints/step-*/root"))

    def read(self) -> None:
        """Tell of the events that are new; the last line may still be incomplete."""
        path = self._folder / "run" / "events.jsonl"
        if not path.exists():
            return
        with path.open("rb") as file:
            file.seek(self._read_bytes)
            new = file.read()
        complete = new[: new.rfind(b"\n") + 1]
        self._read_bytes += len(complete)
        for line in complete.splitlines():
            self._tell(json.loads(line))

    def _tell(self, event: dict) -> None:
        if event["kind"] == "generation_started":
            self._ranks[event["host"]] = f"node {event['node']}, generation {event['generation'].rpartition('-g')[2]}"
        elif event.get("change") == "node_lost" or event["kind"] == "notice":
            self.says(event["text"])
        elif event["kind"] == "recovery":
            self.recoveries.append(event)
            tier = {"peers": "the memory of other nodes"}.get(event["tier"], event["tier"] or "nothing")
            self.says(f"RESUMED from {tier} at step {event['step']}, steps lost: {event['steps_lost']}")

    def __rich__(self) -> Group:
        table = Table(title=f"step {self.step}    checkpoints: {', '.join(self.checkpoints) or 'none yet'}")
        for column in ("machine", "address", "power", "in the job", "processes"):
            table.add_column(column)
        for node in self._cluster.nodes:
            power = Text("on", "green") if node.is_on else Text("OFF", "bold red")
            place = self._ranks.get(node.name, "starting") if node.is_on else ""
            table.add_row(node.name, node.address, power, place, str(len(node.processes())) if node.is_on else "")
        return Group(table, *self.happened[-12:], "")


def training(args: argparse.Namespace, digest: Path) -> list[str]:
    script = [str(TRAIN), "--parallel", args.parallel, "--steps", str(args.steps), "--width", "64", "--layers", "2"]
    return [*script, "--batch", "4", "--log-every", "1", "--digest-out", str(digest)]


def environment() -> dict[str, str]:
    """One thread per rank in both runs: with more, sums may be taken in another order."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": "/tmp"}


class Demo:
    """One job over the nodes, watched until it ends."""

    def __init__(self, args: argparse.Namespace, folder: Path, cluster: Cluster, live: Live, show: Show) -> None:
        self._args, self._folder, self._cluster, self._live, self._show = args, folder, cluster, live, show
        self._agents: dict[Node, subprocess.Popen] = {}

    def start(self, node: Node) -> None:
        command = [str(BIN / "holdfast"), "run", "--nnodes", str(NODES), "--nproc-per-node", "1"]
        command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"n0:{PORT}", "--rdzv-conf", "last_call_timeout=1"]
        command += ["--hold-job", f"demo-nodes-{os.getpid()}", "--hold-run-dir", str(self._folder / "run")]
        command += [*training(self._args, self._folder / "holdfast.digest"), "--persist-every", "10"]
        command += ["--checkpoint-dir", str(self._folder / "checkpoints")]
        log = self._folder / f"agent-{node.name}.txt"
        self._agents[node] = node.start(command, log=log, environment=environment())

    def watch(self, until) -> bool:
        """Redraw until something is so; False where every agent ended, or the time is up, before."""
        deadline = time.monotonic() + LIMIT_S
        while time.monotonic() < deadline:
            self._show.read()
            self._live.refresh()
            if until():
                return True
            if all(process.poll() is not None for process in self._agents.values()):
                return bool(until())
            time.sleep(0.25)
        return False

    def run(self) -> bool:
        """Whether the job came to its end after the loss."""
        for node in self._cluster.nodes:
            self.start(node)
        self._show.says("four machines are on, each with one worker; two of them will lose power soon")
        if not self.watch(lambda: self._show.step >= self._args.off_at and self._show.checkpoints):
            return False
        lost = self._cluster.nodes[2:]
        self._show.says(f"POWER OFF: {' and '.join(node.name for node in lost)}, at step {self._show.step}")
        self._cluster.power_off(*lost)
        for node in lost:
            self._agents.pop(node).wait(10)
        off_at = time.monotonic()
        self.watch(lambda: time.monotonic() > off_at + 2)
        for node in lost:
            self._show.says(f"a new machine takes the place of {node.name}; its memory is empty")
            self.start(self._cluster.replace(node))
        ended = self.watch(lambda: all(process.poll() is not None for process in self._agents.values()))
        codes = {node.name: process.poll() for node, process in self._agents.items()}
        if not ended or set(codes.values()) != {0} or not self._show.recoveries:
            self._show.says(f"the job did not come back: exit codes {codes}")
            return False
        return True


def without_holdfast(args: argparse.Namespace, folder: Path, console: Console) -> str | None:
    """The same loop, which does not import holdfast, under stock torchrun."""
    digest = folder / "torchrun.digest"
    command = [
        str(BIN / "torchrun"),
        "--standalone",
        "--nproc-per-node",
        str(NODES),
        *training(args, digest),
        "--plain",
    ]
    console.print(f"now the same loop without holdfast: $ {shlex.join(['torchrun', *command[1:4]])} ... --plain")
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    if done.returncode:
        console.print(done.stderr[-2000:])
        return None
    return digest.read_text().strip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parallel", choices=("ddp", "fsdp2"), default="fsdp2")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--off-at", type=int, default=35, help="the step at which two nodes lose power")
    args = parser.parse_args()
    console = Console()
    if (reason := why_impossible()) is not None:
        console.print(reason)
        return 1
    with tempfile.TemporaryDirectory(prefix="holdfast-demo-nodes-") as name:
        folder = Path(name)
        with Cluster(NODES, folder) as cluster:
            show = Show(folder, cluster)
            with Live(show, console=console, auto_refresh=False) as live:
                came_back = Demo(args, folder, cluster, live, show).run()
                live.refresh()
        if not came_back:
            console.print((folder / "agent-n0.txt").read_text(errors="replace")[-3000:])
            return 1
        held = (folder / "holdfast.digest").read_text().strip()
        plain = without_holdfast(args, folder, console)
    console.print(f"two of four nodes lost power, under holdfast   {held}")
    console.print(f"undisturbed, under torchrun                    {plain}")
    same = held == plain
    console.print(
        "IDENTICAL: final weights and optimizer state are the same bit for bit" if same else "DIFFERENT weights"
    )
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
