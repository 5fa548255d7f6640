"""What share of its time a job of four failing nodes spends on steps that count: holdfast against torchrun.

    python benchmarks/goodput.py                  # MTBF 15, 30, 60, 120 s, about 300 s of training each: an hour
    python benchmarks/goodput.py --mtbf 60 --seconds 150
    python benchmarks/goodput.py --quick          # two nodes, one kill: judged is the recovery, not its time

Needs root: the nodes have namespaces of their own (`tests/support/nodes.py`), so that one can lose its power. The
script is the same for all subjects: four ranks, one on each node, DDP on gloo. Faults come from a seeded schedule, the
same for all subjects: SIGKILL of a worker (75 %), power-off of a node (15 %), SIGSTOP of a worker (10 %), with
exponential gaps. A supervisor puts a new machine in the place of one without power after BOOT_S, and starts agents
again that have ended.

    holdfast     holdfast run, versions in memory every step, checkpoints in storage every PERSIST_S
    torchrun     torchrun --max-restarts, TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 (without it a restarted worker may read
                 the dead attempt's addresses); dcp.async_save at the Young/Daly interval sqrt(2 * cost * MTBF), its
                 cost being measured in the same run; collectives end after GLOO_TIMEOUT_S: it notices no hang itself
    reference    torchrun without faults and without checkpoints, for the length of a step

Goodput is what N steps take at the reference's pace over what they took. Bars: at least 0.9 with holdfast at an MTBF of
60 s (where that was measured), and above torchrun's at every point. The exit code is 1 where one is missed.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

from measure import Bar, Estimate, as_json, exit_code, keep, lines_of, machine, options_of, table

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))  # the nodes are those of the tests

from holdfast.launcher.events import read_events  # noqa: E402
from support.nodes import PORT, Cluster, why_impossible  # noqa: E402

BIN = Path(sys.executable).parent
NODES = 4
WIDTH, LAYERS = 384, 4
STEP_S = 0.15
BOOT_S = 1.0
GLOO_TIMEOUT_S = 20
PERSIST_S = 20
MEASURED_AT = (3, 8)
"""Steps after the first start at which torchrun's script saves to learn what that costs."""
QUICK_S, QUICK_MTBF_S, QUICK_LIMIT_S = 6.0, 10.0, 60.0
"""Of the short form: length of training; the MTBF for which torchrun's script picks its interval; of a run."""
KINDS = (("kill", 0.75), ("power", 0.15), ("stop", 0.10))
PHASES = ("stopped", "agreed", "started", "opened", "restored", "first_step")


# --- the training script


def worker(mode: str, folder: Path, steps: int, mtbf_s: float) -> None:
    """Train; write a line for each finished step."""
    import torch
    import torch.distributed as dist
    from torch import nn

    torch.set_num_threads(1)
    _replace(folder / f"pid-{socket.gethostname()}", str(os.getpid()))
    dist.init_process_group("gloo", timeout=timedelta(seconds=GLOO_TIMEOUT_S))
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with (folder / f"rank-{dist.get_rank()}.log").open("a", buffering=1) as log:

        def body(step: int) -> None:
            time.sleep(STEP_S)
            optimizer.zero_grad()
            model(torch.ones(8, WIDTH)).square().mean().backward()
            optimizer.step()
            log.write(f"{step} {time.time():.4f}\n")

        if mode == "holdfast":
            import holdfast

            with holdfast.Session(
                model=model,
                optimizer=optimizer,
                snapshot_every=1,
                checkpoint_dir=folder / "checkpoints",
                persist_every=timedelta(seconds=PERSIST_S),
            ) as session:
                for step in session.steps(until=steps):
                    body(step)
        elif mode == "torchrun":
            _with_dcp(folder, model, optimizer, body, steps, mtbf_s)
        else:
            for step in range(steps):
                body(step)
    dist.destroy_process_group()


def _with_dcp(folder: Path, model: object, optimizer: object, body: object, steps: int, mtbf_s: float) -> None:
    """`dcp.async_save` at the Young/Daly interval; what a save costs is measured at the second one, a few steps in."""
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    cpu = dist.new_group(backend="gloo", timeout=timedelta(seconds=GLOO_TIMEOUT_S))
    newest, interval = folder / "newest", folder / "interval"
    told = [newest.read_text() if newest.exists() else "0", interval.read_text() if interval.exists() else "0"]
    dist.broadcast_object_list(told)
    begin, every = int(told[0]), int(told[1])
    if begin:
        model_state, optimizer_state = get_state_dict(model, optimizer)
        state = {"model": model_state, "optimizer": optimizer_state}
        dcp.load(state, checkpoint_id=folder / f"step-{begin}")
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    saves: list[tuple[object, int]] = []
    for step in range(begin, steps):
        begun = time.monotonic()
        body(step)
        step_s = time.monotonic() - begun
        if saves and saves[-1][0].done():
            _publish(folder, saves[-1][1])
        if (step + 1) % every if every else step + 1 - begin not in MEASURED_AT:
            continue
        if saves:
            saves[-1][0].result()
            _publish(folder, saves[-1][1])
        begun = time.monotonic()
        model_state, optimizer_state = get_state_dict(model, optimizer)
        state = {"model": model_state, "optimizer": optimizer_state}
        saves.append((dcp.async_save(state, checkpoint_id=folder / f"step-{step + 1}", process_group=cpu), step + 1))
        if not every and len(saves) == len(MEASURED_AT):
            told = [max(1, round(math.sqrt(2 * (time.monotonic() - begun) * mtbf_s) / step_s))]
            dist.broadcast_object_list(told)
            every = told[0]
            _write_once(interval, str(every))


def _publish(folder: Path, step: int) -> None:
    """The checkpoint of `step` is whole: restarts begin there. Rank 0 alone says so."""
    if os.environ["RANK"] == "0":
        _replace(folder / "newest", str(step))


def _write_once(path: Path, text: str) -> None:
    if os.environ["RANK"] == "0":
        _replace(path, text)


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text)
    temporary.rename(path)


# --- faults


@dataclass(frozen=True)
class Fault:
    """What breaks where, so many seconds after the first step."""

    at_s: float
    kind: str
    node: int


def schedule(mtbf_s: float, seed: int, nodes: int) -> Iterator[Fault]:
    """Faults without end."""
    chance = random.Random(f"{seed} {mtbf_s}")
    at_s = 0.0
    while True:
        at_s += chance.expovariate(1 / mtbf_s)
        [kind] = chance.choices([kind for kind, _ in KINDS], [weight for _, weight in KINDS])
        yield Fault(at_s, kind, chance.randrange(nodes))


QUICK_FAULTS = (Fault(3.0, "kill", 1),)
"""Of the short form: late enough for torchrun to have a checkpoint, too early for a standby of holdfast to be ready."""


# --- the driver


@dataclass
class Run:
    """What one run of one subject gave."""

    steps: int = 0
    """Steps that were finished in the end."""
    seconds: float = 0.0
    faults: dict[str, int] = field(default_factory=lambda: {kind: 0 for kind, _ in KINDS})
    steps_lost: int = 0
    phases: dict[str, float] = field(default_factory=dict)
    """Median seconds of each phase over all recoveries."""
    recoveries: int = 0
    step_s: float = 0.0
    """Median length of a step."""
    finished: bool = False
    save_every: int = 0
    """Steps between checkpoints of torchrun."""


class Job:
    """One subject on its own cluster."""

    def __init__(self, subject: str, folder: Path, cluster: Cluster, steps: int, mtbf_s: float) -> None:
        self._subject, self._folder, self._cluster = subject, folder, cluster
        self._steps, self._mtbf_s = steps, mtbf_s
        self._agents: dict[int, subprocess.Popen[bytes]] = {}
        self._boots: dict[int, float] = {}
        self._restarts: dict[int, float] = {}

    def start(self) -> None:
        """Agents on all nodes."""
        for number in range(len(self._cluster.nodes)):
            self._start(number)

    def _start(self, number: int) -> None:
        node = self._cluster.nodes[number]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": "/tmp"}
        environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        log = self._folder / f"agent-{node.name}.txt"
        self._agents[number] = node.start(self._command(), log=log, environment=environment)

    def _command(self) -> list[str]:
        script = [__file__, "worker", self._subject, str(self._folder), str(self._steps), str(self._mtbf_s)]
        nodes = self._cluster.nodes
        flags = ["--nnodes", str(len(nodes)), "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "goodput"]
        flags += ["--max-restarts", "1000000", "--rdzv-conf", "last_call_timeout=1,join_timeout=600"]
        if self._subject != "holdfast":
            return [str(BIN / "torchrun"), *flags, "--rdzv-endpoint", f"n0:{PORT}", *script]
        endpoints = ",".join(f"{node.name}:{PORT}" for node in nodes)
        own = ["--hold-job", "goodput", "--hold-run-dir", str(self._folder / "run"), "--hold-linger", "1s"]
        return [str(BIN / "holdfast"), "run", *flags, "--rdzv-endpoint", endpoints, *own, *script]

    def strike(self, fault: Fault, found: Run) -> None:
        """Carry out a fault; one that finds nothing to strike does not count."""
        node = self._cluster.nodes[fault.node]
        if not node.is_on:
            return
        if fault.kind == "power":
            self._cluster.power_off(node)
            self._agents.pop(fault.node, None)
            self._boots[fault.node] = time.monotonic() + BOOT_S
        else:
            told = self._folder / f"pid-{node.name}"
            pid = node.seen_as(int(told.read_text())) if told.exists() else 0
            if not pid:
                return
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL if fault.kind == "kill" else signal.SIGSTOP)
        found.faults[fault.kind] += 1

    def supervise(self) -> None:
        """New machines in the place of lost ones; agents that have ended are started again."""
        now = time.monotonic()
        for number in [number for number, at in self._boots.items() if now >= at]:
            del self._boots[number]
            self._cluster.replace(self._cluster.nodes[number])
            self._start(number)
        for number, process in list(self._agents.items()):
            if process.poll() is None or self.finished or now < self._restarts.setdefault(number, now + BOOT_S):
                continue
            del self._restarts[number]
            self._start(number)

    @property
    def finished(self) -> bool:
        """Whether every rank has finished its last step."""
        return all(steps and steps[-1][0] == self._steps - 1 for steps in self.steps())

    def steps(self) -> list[list[tuple[int, float]]]:
        """Number and time of the steps of each rank."""
        return [read_log(self._folder / f"rank-{rank}.log") for rank in range(len(self._cluster.nodes))]


def read_log(path: Path) -> list[tuple[int, float]]:
    """Number and time of each step in a rank's log."""
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [(int(number), float(at)) for number, at in (line.split() for line in lines)]


def measure(
    subject: str, mtbf_s: float, steps: int, *, faults: Iterable[Fault], limit_s: float, nodes: int = NODES
) -> Run:
    """One run of one subject; `mtbf_s`: infinite for the reference."""
    found = Run()
    with tempfile.TemporaryDirectory(prefix="holdfast-goodput-") as name, Cluster(nodes, Path(name)) as cluster:
        folder = Path(name)
        job = Job(subject, folder, cluster, steps, mtbf_s)
        job.start()
        began = _wait_for_first_step(job)
        coming = iter(faults)
        upcoming = next(coming, None)
        while not job.finished and time.time() - began < limit_s:
            if upcoming is not None and time.time() - began >= upcoming.at_s:
                job.strike(upcoming, found)
                upcoming = next(coming, None)
            job.supervise()
            time.sleep(0.05)
        _fill(found, job.steps(), began, job.finished)
        _fill_recoveries(found, folder)
        if os.environ.get("GOODPUT_KEEP"):
            subprocess.run(["cp", "-r", str(folder), os.environ["GOODPUT_KEEP"]], check=False)
    return found


def _wait_for_first_step(job: Job) -> float:
    """When all ranks have finished their first step; only then do faults begin, and time counts."""
    deadline = time.monotonic() + 120
    while not all(job.steps()):
        if time.monotonic() > deadline:
            raise TimeoutError("the job makes no step")
        time.sleep(0.05)
    return max(steps[0][1] for steps in job.steps())


def _fill(found: Run, ranks: list[list[tuple[int, float]]], began: float, finished: bool) -> None:
    ends = [max(at for _, at in steps) for steps in ranks]
    found.finished = finished
    found.steps = min(steps[-1][0] for steps in ranks)
    found.seconds = (max(ends) if finished else time.time()) - began
    gaps = [b - a for steps in ranks for (i, a), (j, b) in itertools.pairwise(steps) if j == i + 1]
    found.step_s = statistics.median(gaps)
    found.steps_lost = max(sum(max(0, i + 1 - j) for (i, _), (j, _) in itertools.pairwise(steps)) for steps in ranks)


def _fill_recoveries(found: Run, folder: Path) -> None:
    interval = folder / "interval"
    found.save_every = int(interval.read_text()) if interval.exists() else 0
    recoveries = [event["phases"] for event in read_events(folder / "run") if event["kind"] == "recovery"]
    found.recoveries = len(recoveries)
    for phase in PHASES:
        seconds = [phases[phase] for phases in recoveries if phase in phases]
        if seconds:
            found.phases[phase] = statistics.median(seconds)


def main() -> int:
    """Measure and judge."""
    parser = options_of(__doc__, quick="a short run on two nodes with one fault; bars of time are not judged")
    parser.add_argument("--mtbf", type=float, nargs="+", default=[15.0, 30.0, 60.0, 120.0], metavar="SECONDS")
    parser.add_argument(
        "--seconds", type=float, default=300.0, help="of training at the reference's pace (default 300)"
    )
    parser.add_argument("--seed", type=int, default=1, help="of the schedule (default 1)")
    options = parser.parse_args()
    if (reason := why_impossible()) is not None:
        print(reason, file=sys.stderr)
        return 2
    mtbfs, seconds, nodes = ([QUICK_MTBF_S], QUICK_S, 2) if options.quick else (options.mtbf, options.seconds, NODES)
    reference = measure("reference", math.inf, 8 if options.quick else 60, faults=(), limit_s=120, nodes=nodes)
    steps = round(seconds / reference.step_s)
    limit_s = QUICK_LIMIT_S if options.quick else 3 * seconds
    runs: dict[str, Run] = {}
    for mtbf_s in mtbfs:
        for subject in ("holdfast", "torchrun"):
            key = f"{subject} {mtbf_s:g}"
            faults = QUICK_FAULTS if options.quick else schedule(mtbf_s, options.seed, nodes)
            runs[key] = measure(subject, mtbf_s, steps, faults=faults, limit_s=limit_s, nodes=nodes)
            print(key, goodput(runs[key], reference), runs[key], file=sys.stderr)
    return report(runs, reference, quick=options.quick, path=options.json)


def goodput(run: Run, reference: Run) -> float:
    """What the steps take at the reference's pace over what they took."""
    return run.steps * reference.step_s / run.seconds


def report(runs: dict[str, Run], reference: Run, *, quick: bool, path: str | None) -> int:
    """Print; 1 where a bar is missed."""
    bars = [*_bars(runs, reference), *(_recovered(runs) if quick else ())]
    keep(as_json(_results(runs, reference), bars, quick=quick), path)
    if path != "-":
        _print(runs, reference)
        print(lines_of(bars, quick=quick))
    return exit_code(bars, quick=quick)


def _print(runs: dict[str, Run], reference: Run) -> None:
    print(machine())
    print(f"a step takes {reference.step_s * 1000:.0f} ms without faults and checkpoints")
    rows = [
        [key, f"{goodput(run, reference):.3f}", str(run.steps), f"{run.seconds:.0f}",
         " ".join(f"{count} {kind}" for kind, count in run.faults.items()), str(run.steps_lost),
         f"{run.step_s * 1000:.0f}", "yes" if run.finished else "no"]
        for key, run in runs.items()
    ]  # fmt: skip
    header = ["subject, MTBF (s)", "goodput", "steps", "s", "faults", "steps done again", "ms per step", "finished"]
    print(table(header, rows))
    phases = [[key, str(run.recoveries), *(_seconds(run, phase) for phase in PHASES)] for key, run in runs.items()]
    print(table(["median s since a failure was noticed", "recoveries", *PHASES], phases))


def _seconds(run: Run, phase: str) -> str:
    return f"{run.phases[phase]:.2f}" if phase in run.phases else "-"


def _results(runs: dict[str, Run], reference: Run) -> dict[str, object]:
    found: dict[str, object] = {key: {**run.__dict__, "goodput": goodput(run, reference)} for key, run in runs.items()}
    return {**found, "reference": reference.__dict__}


def _bars(runs: dict[str, Run], reference: Run) -> list[Bar]:
    """Bars are upper limits: what is lost, not what is left."""
    bars = []
    for key, run in runs.items():
        subject, mtbf = key.split()
        if subject != "holdfast":
            continue
        lost = 1 - goodput(run, reference)
        rival = 1 - goodput(runs[f"torchrun {mtbf}"], reference)
        bars.append(Bar(f"MTBF {mtbf} s: share of time lost, torchrun's", Estimate(lost, lost, lost, 1), rival))
        if mtbf == "60":
            bars.append(Bar("MTBF 60 s: share of time lost", Estimate(lost, lost, lost, 1), 0.1))
    return bars


def _recovered(runs: dict[str, Run]) -> list[Bar]:
    """Of the short form, where each fault is recovered from on its own: holdfast has finished all steps after them."""
    found = {key: run for key, run in runs.items() if key.startswith("holdfast")}
    bars = []
    for key, run in found.items():
        left = float(len(QUICK_FAULTS) - run.recoveries) if run.finished else float(len(QUICK_FAULTS))
        bars.append(Bar(f"{key}: faults not recovered from", Estimate(left, left, left, 1), 0, counts=True))
    return bars


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        worker(sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]), float(sys.argv[5]))
    else:
        raise SystemExit(main())
