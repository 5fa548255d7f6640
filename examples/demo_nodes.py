"""The demonstration behind `make demo-nodes`: four machines on this one, two of them lose power at once.

    sudo python examples/demo_nodes.py [--parallel ddp|fsdp2] [--steps N] [--off-at STEP]

Each node has namespaces of its own: losing power takes its link, all its processes and all its memory in an instant.
The checkpoint storage fails in the same instant and stays away until the job has come back. A new machine takes the
place of one lost node, nothing that of the other: the three that are there go on from the memory of the two survivors,
where the state is spread as 2+2 (each two of four nodes hold all of it).

At the end the same training is done without holdfast and without any loss: stock torchrun on four ranks until the step
from which the job went on, then, from torch's own checkpoint, on three. Exits with 0 where both end with the same bits.
"""

import argparse
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

from holdfast.launcher.events import read_events  # noqa: E402
from support.node_memory import protected, whole  # noqa: E402
from support.nodes import PORT, Cluster, Node, why_impossible  # noqa: E402

TRAIN = ROOT / "examples" / "gpt" / "train.py"
PLANNED = ROOT / "examples" / "planned_resize.py"
BIN = Path(sys.executable).parent
NODES = 4
LEFT = 3
LIMIT_S = 600


class Storage:
    """The checkpoint directory that all nodes share, and that can fail."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "checkpoints"
        self._away = folder / "checkpoints-away"

    @property
    def works(self) -> bool:
        return not self._away.exists()

    @property
    def steps(self) -> list[str]:
        return sorted(path.parent.name for path in self.path.glob("step-*/root")) if self.works else []

    def fail(self) -> None:
        """From now on nothing below the path can be read, written or listed."""
        self.path.rename(self._away)
        self.path.write_text("a file where the directory was")

    def mend(self) -> None:
        self.path.unlink()
        self._away.rename(self.path)


class Show:
    """The nodes of the job, redrawn while it runs; what happened stands below."""

    def __init__(self, folder: Path, cluster: Cluster, storage: Storage) -> None:
        self._folder, self._cluster, self.storage = folder, cluster, storage
        self._began = time.monotonic()
        self._told = 0
        self.happened: list[str] = []
        self.recoveries: list[dict] = []
        self._ranks: dict[str, str] = {}
        self._tiers: dict[str, str] = {}

    def says(self, line: str) -> None:
        self.happened.append(f"[{time.monotonic() - self._began:5.1f} s] {line}")

    @property
    def step(self) -> int:
        """The newest step that rank 0 has printed."""
        lines = self._log.read_text(errors="replace") if self._log.exists() else ""
        found = re.findall(r"^step +(\d+) ", lines, re.MULTILINE)
        return int(found[-1]) + 1 if found else 0

    @property
    def protected(self) -> int:
        """The newest step that any two nodes may be lost of."""
        return protected(self._cluster.nodes)

    @property
    def _log(self) -> Path:
        return self._folder / "agent-n0.txt"

    def read(self) -> None:
        """Tell of the events that are new."""
        events = read_events(self._folder / "run")
        for event in events[self._told :]:
            self._tell(event)
        self._told = len(events)

    def _tell(self, event: dict) -> None:
        if event["kind"] == "generation_started":
            number = int(event["generation"].rpartition("-g")[2])
            self._ranks[event["host"]] = f"rank {event.get('node', 0)} of {event['world_size']}, generation {number}"
        elif event.get("change") == "node_lost" or (event["kind"] == "notice" and event["severity"] != "info"):
            self.says(event["text"])
        elif event["kind"] == "recovery" and event.get("tier"):
            self.recoveries.append(event)
            tier = {"peers": "the memory of other nodes"}.get(event["tier"], event["tier"])
            self.says(f"RESUMED from {tier} at step {event['step']}, steps lost: {event['steps_lost']}")

    def __rich__(self) -> Group:
        storage = ", ".join(self.storage.steps) or "empty" if self.storage.works else "UNREADABLE"
        table = Table(title=f"step {self.step}    protected: step {self.protected}    storage: {storage}")
        for column in ("machine", "power", "in the job", "memory: own images", "memory: parity", "processes"):
            table.add_column(column)
        for node in self._cluster.nodes:
            if not node.is_on:
                table.add_row(node.name, Text("OFF", "bold red"), "", "lost", "lost", "")
                continue
            place = self._ranks.get(node.name, "starting")
            held = [_listed(whole(node, pattern)) for pattern in ("slot-*", "parity-?")]
            table.add_row(node.name, Text("on", "green"), place, *held, str(len(node.processes())))
        return Group(table, *self.happened[-12:], "")

    def forget(self, node: Node) -> None:
        """Its place in the job is gone."""
        self._ranks.pop(node.name, None)


def _listed(steps: set[int]) -> str:
    return f"steps {', '.join(map(str, sorted(steps)))}" if steps else "empty"


def training(args: argparse.Namespace, digest: Path) -> list[str]:
    script = ["--parallel", args.parallel, "--width", "64", "--layers", "2", "--batch", "4", "--log-every", "1"]
    return [*script, "--digest-out", str(digest)]


def environment() -> dict[str, str]:
    """One thread per rank in both runs: with more, sums may be taken in another order."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": "/tmp"}


class Demo:
    """One job over the nodes, watched until it ends."""

    def __init__(self, args: argparse.Namespace, folder: Path, cluster: Cluster, show: Show, live: Live) -> None:
        self._args, self._folder, self._cluster, self._show, self._live = args, folder, cluster, show, live
        self._storage = show.storage
        self._agents: dict[Node, subprocess.Popen] = {}

    def start(self, node: Node) -> None:
        command = [str(BIN / "holdfast"), "run", "--nnodes", f"{LEFT}:{NODES}", "--nproc-per-node", "1"]
        command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"n0:{PORT}", "--rdzv-conf", "last_call_timeout=1"]
        command += ["--hold-job", f"demo-nodes-{os.getpid()}", "--hold-run-dir", str(self._folder / "run")]
        command += ["--hold-redundancy", "2+2", "--hold-claim-store", str(self._folder / "claims")]
        command += [str(TRAIN), *training(self._args, self._folder / "holdfast.digest")]
        command += ["--steps", str(self._args.steps), "--persist-every", "10"]
        command += ["--checkpoint-dir", str(self._storage.path)]
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
        show = self._show
        if not self.watch(lambda: show.step >= self._args.off_at and show.protected and self._storage.steps):
            return False
        self.lose(self._cluster.nodes[1], self._cluster.nodes[3])
        if not self.watch(lambda: show.recoveries):
            return False
        self._storage.mend()
        show.says("the checkpoint storage can be read and written again")
        ended = self.watch(lambda: all(process.poll() is not None for process in self._agents.values()))
        codes = {node.name: process.poll() for node, process in self._agents.items()}
        if not ended or set(codes.values()) != {0}:
            show.says(f"the job did not come to its end: exit codes {codes}")
            return False
        return True

    def lose(self, *lost: Node) -> None:
        """Both machines and the storage at once; a new machine takes the place of the first one only."""
        step, safe = self._show.step, self._show.protected
        self._cluster.power_off(*lost)
        self._storage.fail()
        names = " and ".join(node.name for node in lost)
        self._show.says(f"POWER OFF: {names}, at step {step} (protected: {safe}); the checkpoint storage fails too")
        for node in lost:
            self._agents.pop(node).wait(10)
            self._show.forget(node)
        off_at = time.monotonic()
        self.watch(lambda: time.monotonic() > off_at + 3)
        self._show.says(
            f"a new machine takes the place of {lost[0].name}, its memory is empty; {lost[1].name} stays off"
        )
        self.start(self._cluster.replace(lost[0]))


def without_holdfast(args: argparse.Namespace, folder: Path, console: Console, resumed: int) -> str | None:
    """The same training under stock torchrun, planned: four ranks until step `resumed`, three from there on."""
    digest = folder / "torchrun.digest"
    for ranks, steps in ((NODES, resumed), (LEFT, args.steps)):
        launcher = ["torchrun", "--standalone", "--nproc-per-node", str(ranks)]
        script = [*training(args, digest), "--steps", str(steps), "--handover", str(folder / "handover")]
        shown = shlex.join([*launcher, f"examples/{PLANNED.name}", "--steps", str(steps)])
        console.print(f"now the same without holdfast and without a loss: $ {shown}")
        command = [str(BIN / launcher[0]), *launcher[1:], str(PLANNED), *script]
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
        (folder / "claims").mkdir()
        with Cluster(NODES, folder) as cluster:
            show = Show(folder, cluster, Storage(folder))
            with Live(show, console=console, auto_refresh=False) as live:
                came_back = Demo(args, folder, cluster, show, live).run()
                live.refresh()
        if not came_back:
            console.print((folder / "agent-n0.txt").read_text(errors="replace")[-3000:])
            return 1
        [recovery] = show.recoveries
        held = (folder / "holdfast.digest").read_text().strip()
        plain = without_holdfast(args, folder, console, recovery["step"])
    console.print(f"two of four nodes lost at once, under holdfast   {held}")
    console.print(f"planned change of world, under torchrun          {plain}")
    same = held == plain and recovery["tier"] == "peers"
    console.print(
        "IDENTICAL: final weights and optimizer state are the same bit for bit"
        if same
        else f"NOT AS IT SHOULD BE: state from {recovery['tier']}, {'equal' if held == plain else 'DIFFERENT'} weights"
    )
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
