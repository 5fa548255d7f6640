"""How long a job stands still when a worker is killed: holdfast, with and without standby, against its rivals.

    python benchmarks/recovery.py            # 12 kills of each subject, in turns
    python benchmarks/recovery.py --quick    # 3 kills: judged is whether all were recovered from, not how fast

Two ranks train with DDP on gloo. The driver kills rank 1 with SIGKILL in the middle of a run and waits until all ranks
have finished a step again in processes that began after the kill. A failure costs that time, less one median step. Each
round runs every subject once, with the same number of kills, so that what disturbs the machine disturbs all of them.
Reported are medians with 95 % bootstrap intervals over all kills; the ratio is taken kill by kill, in pairs.

The subjects:

    holdfast            holdfast run, its standby ready, state from memory
    holdfast, cold      the same with --hold-standby 0
    torchrun            torchrun --max-restarts, TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 (without it a restarted worker may
                        read the dead attempt's addresses and burn restarts); state from its newest dcp.save, every
                        SAVE_EVERY steps. The steps that it does again are told, and not counted as time.
    nvrx                ft_launcher of nvidia-resiliency-ext with the script of torchrun, where ``--rivals``
                        names a folder with that package (``make bench-recovery`` fills one)
    torchft             a lighthouse and two replicas, each under a torchrun of its own, where the folder has torchft:
                        the killed replica comes back and fetches its state from the living one
    torchft, survivor   the same kills: until the living replica has finished a step, alone

Bars: at most 0.5 s for holdfast, and at most a quarter of torchrun's time. Every failure must be recovered from. The
phases of holdfast's recoveries come from its event log; the exit code is 1 where a bar is missed or not measured.
"""

from __future__ import annotations

import itertools
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

from measure import Bar, as_json, estimate, exit_code, keep, lines_of, machine, options_of, ratios, table

from holdfast.launcher.events import read_events

BIN = Path(sys.executable).parent
WIDTH, LAYERS = 512, 4
STEP_S = 0.05
SAVE_EVERY = 10
STEPS_BETWEEN = 25
"""Steps between two kills: torchrun's checkpoint is half as old on average as it can be."""
LIMIT_S = 180.0
TORCHFT_TIMEOUT_S = 10
PHASES = ("stopped", "agreed", "started", "opened", "restored", "first_step")
SURVIVOR = "torchft, survivor"
SUBJECTS = ("holdfast", "holdfast, cold", "torchrun")
GUESTS = {"nvrx": "nvidia_resiliency_ext", "torchft": "torchft"}
"""Subjects whose package has to be in the folder of ``--rivals``."""


# --- the training script


def worker(mode: str, folder: Path, steps: int) -> None:
    """Train; write a line for the start and for each finished step."""
    import torch
    import torch.distributed as dist
    from torch import nn

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    rank = dist.get_rank()
    with (folder / f"rank-{rank}.log").open("a", buffering=1) as log:
        log.write(f"start {os.getpid()} {time.time():.6f}\n")

        def body(step: int) -> None:
            time.sleep(STEP_S)
            optimizer.zero_grad()
            model(torch.ones(8, WIDTH)).square().mean().backward()
            optimizer.step()
            log.write(f"step {step} {time.time():.6f}\n")

        if mode == "dcp":
            _with_dcp(folder, model, optimizer, body, steps)
        else:
            import holdfast

            with holdfast.Session(model=model, optimizer=optimizer, snapshot_every=1) as session:
                for step in session.steps(until=steps):
                    body(step)
    dist.destroy_process_group()


def replica(number: int, folder: Path, steps: int) -> None:
    """The same training as one of torchft's replicas, which has one rank."""
    import torch
    import torchft
    from torch import nn

    torch.set_num_threads(1)
    torch.manual_seed(0)
    plain = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))
    inner = torch.optim.AdamW(plain.parameters(), lr=1e-3)

    def load(state: dict[str, dict[str, object]]) -> None:
        plain.load_state_dict(state["model"])
        inner.load_state_dict(state["optimizer"])

    manager = torchft.Manager(
        pg=torchft.ProcessGroupGloo(timeout=timedelta(seconds=TORCHFT_TIMEOUT_S)),
        load_state_dict=load,
        state_dict=lambda: {"model": plain.state_dict(), "optimizer": inner.state_dict()},
        min_replica_size=1,
        replica_id=f"replica-{number}-",
        timeout=timedelta(seconds=TORCHFT_TIMEOUT_S),
    )
    model = torchft.DistributedDataParallel(manager, plain)
    optimizer = torchft.Optimizer(manager, inner)
    with (folder / f"rank-{number}.log").open("a", buffering=1) as log:
        log.write(f"start {os.getpid()} {time.time():.6f}\n")
        while (step := manager.current_step()) < steps:
            time.sleep(STEP_S)
            optimizer.zero_grad()
            model(torch.ones(8, WIDTH)).square().mean().backward()
            optimizer.step()
            if manager.current_step() > step:  # else the step was not committed: a replica was lost in it
                log.write(f"step {step} {time.time():.6f}\n")


def replicas(folder: Path, steps: int, restarts: int) -> None:
    """A lighthouse and two replicas, until SIGTERM."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = folder / "lighthouse.py"  # its parser takes what follows a script's name; pip may drop the one in bin
    script.write_text("from torchft._torchft import lighthouse_main\n\nlighthouse_main()\n")
    lighthouse = [sys.executable, str(script), "--bind", f"127.0.0.1:{port}", "--min_replicas", "1"]
    begun = [subprocess.Popen([*lighthouse, "--quorum_tick_ms", "50", "--join_timeout_ms", "1000"])]
    for number in (0, 1):
        training = [__file__, "replica", str(number), str(folder), str(steps)]
        command = [str(BIN / "torchrun"), "--standalone", "--max-restarts", str(restarts), *training]
        environment = {**os.environ, "TORCHFT_LIGHTHOUSE": f"http://127.0.0.1:{port}"}
        begun.append(subprocess.Popen(command, env=environment))
    try:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        signal.pause()
    finally:
        for process in reversed(begun):
            process.terminate()
        for process in begun:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


def _with_dcp(folder: Path, model: object, optimizer: object, body: object, steps: int) -> None:
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    saved = sorted(folder.glob("step-*"))
    begin = 0
    if saved:
        model_state, optimizer_state = get_state_dict(model, optimizer)
        state = {"model": model_state, "optimizer": optimizer_state}
        dcp.load(state, checkpoint_id=saved[-1])
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        begin = int(saved[-1].name[5:])
    for step in range(begin, steps):
        body(step)
        if (step + 1) % SAVE_EVERY == 0:
            model_state, optimizer_state = get_state_dict(model, optimizer)
            target = folder / f"writing-{step + 1:08d}"
            dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=target)
            if dist.get_rank() == 0:
                target.rename(folder / f"step-{step + 1:08d}")
            dist.barrier()


# --- the driver


@dataclass
class Run:
    """What one run of one subject gave."""

    costs_s: list[float] = field(default_factory=list)
    survivor_s: list[float] = field(default_factory=list)
    """torchft: until the living replica finished a step."""
    steps_lost: list[int] = field(default_factory=list)
    phases: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    recovered: bool = True


def commands(
    subject: str, folder: Path, steps: int, kills: int, rivals: Path | None
) -> tuple[list[str], dict[str, str]]:
    """Command line and environment of a subject."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if subject in GUESTS and rivals is not None:
        environment["PYTHONPATH"] = str(rivals.resolve())
    if subject == "torchft":
        return [sys.executable, __file__, "replicas", str(folder), str(steps), str(kills + 3)], environment
    flags = ["--standalone", "--nproc-per-node", "2", "--max-restarts", str(kills + 3)]
    script = [__file__, "worker", "dcp" if subject in ("torchrun", "nvrx") else "holdfast", str(folder), str(steps)]
    if subject in ("torchrun", "nvrx"):
        environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        own = [str(BIN / "torchrun")]
        if subject == "nvrx":
            own = [sys.executable, "-m", "nvidia_resiliency_ext.fault_tolerance.launcher"]
            own += ["--ignore-missing-fault-tol-cfg"]
        return [*own, *flags, *script], environment
    ours = ["--hold-job", f"recovery-{os.getpid()}", "--hold-run-dir", str(folder / "run")]
    ours += ["--hold-standby", "0" if "cold" in subject else "1"]
    return [str(BIN / "holdfast"), "run", *flags, *ours, *script], environment


def read(folder: Path, rank: int) -> list[tuple[str, int, float]]:
    """The whole lines that a rank has written: kind, pid or step, time."""
    path = folder / f"rank-{rank}.log"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [(kind, int(number), float(at)) for kind, number, at in (line.split() for line in lines)]


def since_start(folder: Path, rank: int, after: float) -> list[tuple[int, float]]:
    """Steps (number, time) of the rank's newest process, where that began after `after`."""
    lines = read(folder, rank)
    starts = [index for index, (kind, _, _) in enumerate(lines) if kind == "start"]
    if not starts or lines[starts[-1]][2] <= after:
        return []
    return [(number, at) for kind, number, at in lines[starts[-1] :] if kind == "step"]


def measure(subject: str, kills: int, rivals: Path | None) -> Run:
    """One run of one subject with `kills` kills."""
    found = Run()
    with tempfile.TemporaryDirectory(prefix="holdfast-recovery-") as name:
        folder = Path(name)
        command, environment = commands(subject, folder, 10**6, kills, rivals)
        with (folder / "log.txt").open("wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=folder)
        try:
            for _ in range(kills):
                _kill_once(subject, folder, process, found)
        except TimeoutError:
            found.recovered = False
            print((folder / "log.txt").read_text()[-3000:], file=sys.stderr)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        _read_phases(folder / "run", found)
    return found


def _kill_once(subject: str, folder: Path, process: subprocess.Popen[bytes], found: Run) -> None:
    begun = time.time()
    _until(process, lambda: _ready(subject, folder, found))
    steps = since_start(folder, 1, 0.0)
    median = statistics.median(b - a for (_, a), (_, b) in itertools.pairwise(steps))
    pid = [number for kind, number, _ in read(folder, 1) if kind == "start"][-1]
    time.sleep(STEP_S * (begun % 1.0))  # anywhere within a step
    killed = time.time()
    os.kill(pid, signal.SIGKILL)
    before = max(number for kind, number, _ in read(folder, 1) if kind == "step")
    if subject == "torchft":
        _until(process, lambda: since_start(folder, 1, killed) and _steps_after(folder, 0, killed))
        survivor = _steps_after(folder, 0, killed)[0]
        found.survivor_s.append(survivor - killed - median)
        found.costs_s.append(max(survivor, since_start(folder, 1, killed)[0][1]) - killed - median)
        found.steps_lost.append(0)
        return
    _until(process, lambda: all(since_start(folder, rank, killed) for rank in (0, 1)))
    first = [since_start(folder, rank, killed)[0] for rank in (0, 1)]
    found.costs_s.append(max(at for _, at in first) - killed - median)
    found.steps_lost.append(max(0, before + 1 - first[0][0]))


def _steps_after(folder: Path, rank: int, after: float) -> list[float]:
    """When the rank finished steps, in whatever process."""
    return [at for kind, _, at in read(folder, rank) if kind == "step" and at > after]


def _ready(subject: str, folder: Path, found: Run) -> bool:
    """Enough steps since the last kill; with a standby, that it is there."""
    if any(len(since_start(folder, rank, 0.0)) < STEPS_BETWEEN for rank in (0, 1)):
        return False
    events = folder / "run" / "events.jsonl"
    return subject != "holdfast" or '"change":"ready"' in events.read_text()


def _until(process: subprocess.Popen[bytes], happened: object) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not happened():
        if process.poll() is not None or time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(0.02)


def _read_phases(run_dir: Path, found: Run) -> None:
    for event in read_events(run_dir):
        if event["kind"] == "recovery":
            for phase, seconds in event["phases"].items():
                found.phases[phase].append(seconds)


def main() -> int:
    """Measure and judge."""
    parser = options_of(__doc__, quick="3 kills of each subject; the bars of time are not judged")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--kills", type=int, default=3, help="kills of each subject per round")
    parser.add_argument(
        "--rivals", type=Path, metavar="FOLDER", help=f"where pip installed {', '.join(GUESTS.values())}"
    )
    parser.add_argument("--only", nargs="+", metavar="SUBJECT", help="default: all that are here")
    options = parser.parse_args()
    rounds = 1 if options.quick else options.rounds
    runs: dict[str, list[Run]] = {subject: [] for subject in options.only or here(options.rivals)}
    for _ in range(rounds):
        for subject in runs:
            runs[subject].append(measure(subject, options.kills, options.rivals))
    return report(runs, rounds * options.kills, quick=options.quick, path=options.json)


def here(rivals: Path | None) -> tuple[str, ...]:
    """The subjects that can be measured."""
    guests = [name for name, package in GUESTS.items() if rivals is not None and (rivals / package).is_dir()]
    return (*SUBJECTS, *guests)


def report(runs: dict[str, list[Run]], kills: int, *, quick: bool, path: str | None) -> int:
    """Print; 1 where a bar is missed."""
    costs = {subject: [cost for run in found for cost in run.costs_s] for subject, found in runs.items()}
    lost = {subject: [steps for run in found for steps in run.steps_lost] for subject, found in runs.items()}
    if survivors := [cost for run in runs.get("torchft", []) for cost in run.survivor_s]:
        costs[SURVIVOR], lost[SURVIVOR] = survivors, lost["torchft"]
    estimates = {subject: estimate(values) for subject, values in costs.items() if values}
    rows = [
        [subject, str(estimates[subject]), f"{min(costs[subject]):.2f} to {max(costs[subject]):.2f}",
         f"{statistics.mean(lost[subject]):.1f}", f"{len(costs[subject])} of {kills}"]
        for subject in estimates
    ]  # fmt: skip
    said = sys.stderr if path == "-" else sys.stdout
    print(machine(), file=said)
    print(table(["subject", "s until the next step", "range", "steps lost", "recovered"], rows), file=said)
    phases = {
        subject: {
            phase: statistics.median(run_phases) for phase in PHASES if (run_phases := _phase(runs, subject, phase))
        }
        for subject in runs
        if subject.startswith("holdfast")
    }
    print(table(["s since the failure was noticed", *PHASES],
                [[subject, *(f"{found[phase]:.3f}" if phase in found else "-" for phase in PHASES)]
                 for subject, found in phases.items()]), file=said)  # fmt: skip
    bars = []
    if pairs := min(len(costs.get(subject, ())) for subject in ("holdfast", "torchrun")):
        share = estimate(ratios(costs["holdfast"][:pairs], costs["torchrun"][:pairs]))
        bars = [Bar("kill to next step", estimates["holdfast"], 0.5, " s"), Bar("over torchrun", share, 0.25)]
    whole = all(len(values) == kills for values in costs.values())
    print(lines_of(bars, quick=quick), file=said)
    print("recovered from every failure" if whole else "NOT recovered from every failure", file=said)
    keep(as_json({"costs_s": costs, "steps_lost": lost, "phases_s": phases}, bars, quick=quick), path)
    return exit_code(bars, quick=quick, whole=whole and bool(bars))


def _phase(runs: dict[str, list[Run]], subject: str, phase: str) -> list[float]:
    return [seconds for run in runs[subject] for seconds in run.phases.get(phase, [])]


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        worker(sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))
    elif sys.argv[1:2] == ["replica"]:
        replica(int(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
    elif sys.argv[1:2] == ["replicas"]:
        replicas(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
    else:
        raise SystemExit(main())
