"""Saving and loading: holdfast beside raw writes and reads of the same bytes, and beside checkpoint libraries.

    python benchmarks/checkpoint.py            # 1 GB of state over 2, 4 and 16 ranks, 20,000 small tensors, flat shards
    python benchmarks/checkpoint.py --quick    # the same in small: it judges what is counted, not what is timed

Two, four or sixteen ranks run in lock step. In each round every subject is measured once, in turn, so that what
disturbs the machine disturbs all of them; a round's value is that of the slowest rank, and ratios are taken within a
round. Reported are medians with 95 % bootstrap intervals. A bar is met only if the whole interval is; the exit code is
1 where one is not.

Each kind of load has processes of its own, as one that resumes has: what memory an allocator has left from earlier
work decides otherwise what a reader that allocates pays. Saves are measured in twice as many rounds as loads, because a
disk pauses now and then for longer than a save takes.

Everything that is written is synced: holdfast and DCP do it themselves, the raw writers (one per rank, its tensors one
after the other into one file) too; torchsnapshot and torch_checkpointing do not, and are followed by ``fsync`` of each
of their files.

The loads: *same* (2 ranks save, 2 load), *2 to 4*, *4 to 2*, *fsdp to tp* (sharded by rows, loaded by columns). The raw
read of a load is that of the bytes which each rank wants, from one file, in one row, without a checksum. Each load is
measured in two conditions, equal for all subjects: *dropped*, the pages of the files are dropped from the cache before
each load (posix_fadvise); *hot*, they were dropped once and then read from start to end before each load, so that all
of them are in the cache, and in the same way.

Each bar is judged where what it is about is the limit. *Half of DCP's time* is judged hot: there the readers are
compared. Dropped, all of them wait for the same disk, and where the raw read of the same bytes takes more than half of
DCP's time no reader can meet it; the ratio is printed all the same, without a bar, beside that of the raw read.
*At most twice the raw read's time* is judged dropped: there the raw read is the disk's rate, which is what a reader
must not waste. Hot, a raw read is one copy of memory without checksums; the tables show that ratio too.

Flat shards are those of ZeRO-style optimizers: ranges of flattened tensors which end anywhere. *Flat* saves them as
they are; *gathered* is what a library without them has to do: each rank gets every tensor in whole (each part sent by
its owner straight to its place), then saves its rows. What gathering costs grows with the number of ranks. *A fifth of
the time of gathering and DCP* is judged with 16 ranks, a small job of that kind. With 2 and 4 the raw write alone may
take more than a fifth, and then no writer can meet it: there the save is judged by the raw write, as that of the large
state is, and its ratio to gathering and DCP is printed without a bar, beside that of the raw write.

*Read / needed* is what all ranks read from files over the size of the state; *peak* is what the load needed beside its
target, at most. Both are taken in a round of their own. torchsnapshot takes what it sees as plain tensors of each rank.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from checkpoint_subjects import LOADERS, READ_BYTES, SAVER_OF, SAVERS, Saver, State
from measure import Bar, Estimate, as_json, estimate, exit_code, keep, lines_of, machine, options_of, ratios, table
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

import holdfast.checkpoint as hc

COLUMNS = 1024
SMALL_ELEMENTS = 64

LIMIT_S = 3600.0
"""For one stage."""
PRELOADED = ["torch.distributed.checkpoint", "torch.distributed.tensor", "holdfast.checkpoint"]
"""Modules that all ranks of all stages need; they take seconds to import."""

Results = dict[str, dict[str, list[float]]]


@dataclass(frozen=True)
class Options:
    """What one rank has to know; travels to it."""

    store: str
    folder: str
    results: str
    rounds: int
    tensors: int
    rows: int
    """Of each large tensor, over all ranks."""
    small: int
    """Number of small tensors."""


@dataclass(frozen=True)
class Side:
    """How many ranks save or load together, and along which dim their tensors are cut."""

    ranks: int
    dim: int


TWO, FOUR, TP = Side(2, 0), Side(4, 0), Side(2, 1)
LOADS = {"same": (TWO, TWO), "2 to 4": (TWO, FOUR), "4 to 2": (FOUR, TWO), "fsdp to tp": (TWO, TP)}
DROPPED, HOT = "dropped", "hot"
CONDITIONS = (DROPPED, HOT)
"""Of the files of a load."""


@dataclass(frozen=True)
class Stage:
    """A job of its own."""

    ranks: int
    saves: tuple[str, ...] = ()
    """Measured."""
    loads: tuple[str, ...] = ()
    """Measured."""
    keeps: bool = False
    """Whether this stage or later ones load what it saves."""


RESHARDED = ("2 to 4", "4 to 2", "fsdp to tp")

MANY = 16
"""Ranks with which flat shards are judged by what gathering costs."""
STAGES = (
    Stage(2, saves=("large", "small", "flat"), keeps=True),
    Stage(4, saves=("flat",), keeps=True),
    Stage(MANY, saves=("flat",)),
    Stage(2, loads=("same",)),
    Stage(2, loads=("fsdp to tp",)),
    Stage(4, loads=("2 to 4",)),
    Stage(2, loads=("4 to 2",)),
)
"""They run one after the other."""
SMALL_ROUNDS = 3
"""DCP takes twenty seconds for its small tensors, and two rounds more would not change what they say."""
SAVE_TURNS = 2
"""Saves are measured in so many times the rounds of loads: a disk that pauses disturbs them more."""


def large_state(options: Options, side: Side, *, fill: bool) -> State:
    """The tensors of one rank as DTensors."""
    state: State = {}
    mesh = DeviceMesh("cpu", list(range(side.ranks)))
    for index in range(options.tensors):
        rows, columns = options.rows, COLUMNS
        local = (rows // side.ranks, columns) if side.dim == 0 else (rows, columns // side.ranks)
        tensor = torch.rand(local) if fill else torch.zeros(local)
        state[f"w{index:03d}"] = DTensor.from_local(tensor, mesh, [Shard(side.dim)], run_check=False)
    return state


def flat_cuts(options: Options, index: int, world: int) -> list[int]:
    """Where the ranges of a flattened tensor end: nowhere near the end of a row."""
    total = options.rows * COLUMNS
    return [0, *(total * rank // world + 3 * index + rank for rank in range(1, world)), total]


def flat_state(options: Options, rank: int, world: int) -> State:
    """Ranges of flattened tensors that end anywhere."""
    state: State = {}
    for index in range(options.tensors):
        start, end = flat_cuts(options, index, world)[rank : rank + 2]
        state[f"w{index:03d}"] = hc.FlatRange(torch.rand(end - start), (options.rows, COLUMNS), start)
    return state


def gathered(options: Options, flat: State) -> State:
    """All tensors in whole on each rank, one after the other, and each rank's rows of them."""
    state: State = {}
    rank, world = dist.get_rank(), dist.get_world_size()
    mesh = DeviceMesh("cpu", list(range(world)))
    whole = torch.empty(options.rows * COLUMNS)
    for index, (name, part) in enumerate(flat.items()):
        for owner, (start, end) in enumerate(pairwise(flat_cuts(options, index, world))):
            if owner == rank:
                whole[start:end] = part.tensor
            dist.broadcast(whole[start:end], owner)
        rows = whole.view(options.rows, COLUMNS).chunk(world)[rank].clone()
        state[name] = DTensor.from_local(rows, mesh, [Shard(0)], run_check=False)
    return state


# --- measuring ---


class Rank:
    """One rank of a stage: measures every subject once per round."""

    def __init__(self, options: Options, rank: int) -> None:
        self._options, self._rank = options, rank
        self._count = 0
        self._scratch = bytearray(READ_BYTES)
        self.measured: Results = {}
        self.skipped: dict[str, str] = {}

    def run(self, stage: Stage) -> None:
        """Everything of the stage."""
        side = Side(stage.ranks, 0)
        if "large" in stage.saves:
            self._saves("save large", large_state(self._options, side, fill=True), SAVERS)
        if "small" in stage.saves:
            few = {name: SAVERS[name] for name in ("raw", "holdfast", "dcp.save", "torchsnapshot")}
            self._saves("save small", self._small(), few, rounds=min(SMALL_ROUNDS, self._options.rounds))
        if stage.keeps:
            self._keep(large_state(self._options, side, fill=True), side)
        if "flat" in stage.saves:
            self._flat(side)
        for name in stage.loads:
            self._loads(name)

    def _keep(self, state: State, side: Side) -> None:
        """Checkpoints for the loads, in each library's form."""
        for key, saver in SAVER_OF.items():
            path = self._kept(key, side)
            path.parent.mkdir(exist_ok=True)
            self._works(key, lambda saver=saver, path=path: SAVERS[saver](state, path))  # type: ignore[misc]

    def _small(self) -> State:
        return {f"model.layer{i:05d}.weight": torch.rand(SMALL_ELEMENTS) for i in range(self._options.small)}

    def _saves(self, name: str, state: State, savers: dict[str, Saver], *, rounds: int | None = None) -> None:
        rounds = rounds or SAVE_TURNS * self._options.rounds
        self._rounds(name, {key: self._saver(saver, state) for key, saver in savers.items()}, rounds=rounds)

    def _saver(self, saver: Saver, state: State) -> Callable[[], float]:
        def subject() -> float:
            self._count += 1
            path = Path(self._options.folder) / f"step-{self._count:08d}"
            began = time.perf_counter()
            saver(state, path)
            return time.perf_counter() - began

        return subject

    def _flat(self, side: Side) -> None:
        def with_gather(saver: Saver) -> Saver:
            return lambda state, path: saver(gathered(self._options, state), path)

        savers = {"raw": SAVERS["raw"], "holdfast flat": SAVERS["holdfast"],
                  "holdfast gathered": with_gather(SAVERS["holdfast"]),
                  "dcp gathered": with_gather(SAVERS["dcp.save"])}  # fmt: skip
        state = flat_state(self._options, self._rank, side.ranks)
        self._saves(f"save flat, {side.ranks} ranks", state, savers)

    def _loads(self, name: str) -> None:
        saved, loaded = LOADS[name]
        target = large_state(self._options, loaded, fill=False)
        for condition in CONDITIONS:

            def subject(key: str, condition: str = condition) -> Callable[[], float]:
                def load() -> float:
                    self._prepare(self._kept(key, saved), condition)
                    dist.barrier()
                    began = time.perf_counter()
                    LOADERS[key](target, self._kept(key, saved))
                    return time.perf_counter() - began

                return load

            # torchsnapshot knows nothing of DTensors: what a rank saved can only go to that rank.
            subjects = {key: subject(key) for key in LOADERS if name == "same" or key != "torchsnapshot"}
            title = load_title(name, condition)
            for key in subjects:
                self._prepare(self._kept(key, saved), DROPPED)
            self._rounds(title, subjects)
            if condition == DROPPED:  # what warms the cache would count as read
                self._costs(f"load {name}", {key: subjects[key] for key in self.measured[title]})

    def _kept(self, key: str, side: Side) -> Path:
        return Path(self._options.folder).parent / f"kept-{key}-{side.ranks}" / "step-00000001"

    def _rounds(self, name: str, subjects: dict[str, Callable[[], float]], *, rounds: int | None = None) -> None:
        """The value of a round is that of the slowest rank; the round before the first warms up."""
        found = {key: subject for key, subject in subjects.items() if self._works(key, subject)}
        gc.collect()
        gc.freeze()  # what torch and its libraries hold is not looked through before every subject
        values: dict[str, list[float]] = {key: [] for key in found}
        for number in range(rounds or self._options.rounds):
            # Another order in each round, the same on all ranks: the disk remembers what was written before.
            for key, subject in random.Random(number).sample(sorted(found.items()), len(found)):
                gc.collect()
                dist.barrier()
                slowest = torch.tensor(subject(), dtype=torch.float64)
                dist.all_reduce(slowest, dist.ReduceOp.MAX)
                values[key].append(float(slowest))
                self._clear()
        self.measured[name] = values
        if self._rank == 0:
            shown = ", ".join(f"{key} {statistics.median(of):.3g} s" for key, of in values.items())
            print(f"{name}: {shown}", file=sys.stderr, flush=True)

    def _works(self, key: str, subject: Callable[[], object]) -> bool:
        failure = ""
        try:
            subject()
        except BaseException as error:  # noqa: BLE001  # DCP's is no Exception; a rival that fails is left out
            failure = f"{type(error).__name__}: {error}".splitlines()[0][:100]
        failures: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(failures, failure)
        if any(failures):
            self.skipped[key] = next(filter(None, failures))
            assert not key.startswith(("raw", "holdfast")), self.skipped
        return not any(failures)

    def _costs(self, name: str, subjects: dict[str, Callable[[], float]]) -> None:
        """Bytes read over bytes of the state, and memory beside the target, of one more load of each."""
        size = 4 * COLUMNS * self._options.rows * self._options.tensors
        for key, subject in subjects.items():
            gc.collect()
            Path("/proc/self/clear_refs").write_text("5")
            before, read = _status("VmRSS"), _bytes_read()
            subject()
            costs = torch.tensor([float(_bytes_read() - read), float(_status("VmHWM") - before)], dtype=torch.float64)
            total = costs.clone()
            dist.all_reduce(total)
            dist.all_reduce(costs, dist.ReduceOp.MAX)
            self.measured.setdefault(f"{name}: read over needed", {})[key] = [float(total[0]) / size]
            self.measured.setdefault(f"{name}: peak MB", {})[key] = [float(costs[1]) / 1e6]

    def _clear(self) -> None:
        dist.barrier()
        if self._rank == 0:
            for leftover in Path(self._options.folder).iterdir():
                shutil.rmtree(leftover, ignore_errors=True)
            os.sync()  # or the next subject waits for the disk to forget what this one has written
        dist.barrier()

    def _prepare(self, path: Path, condition: str) -> None:
        """Bring the files of a checkpoint into their condition."""
        if self._rank:
            return
        for file in sorted(path.rglob("*")):
            if not file.is_file():
                continue
            descriptor = os.open(file, os.O_RDONLY)
            if condition == DROPPED:
                os.fsync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while os.readv(descriptor, [self._scratch]):
                    pass
            os.close(descriptor)


def load_title(name: str, condition: str) -> str:
    return f"load {name}, {condition}"


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))


def _bytes_read() -> int:
    """By system calls on files and, because the kernel counts them together, on pipes and sockets."""
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])


def rank_main(rank: int, stage: int, options: Options) -> None:
    """One rank; rank 0 writes what was measured."""
    warnings.simplefilter("ignore")
    logging.disable(logging.INFO)  # the rivals' own
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    world = STAGES[stage].ranks
    store = dist.FileStore(f"{options.store}-{stage}", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    measuring = Rank(options, rank)
    measuring.run(STAGES[stage])
    if rank == 0:
        found = {"results": measuring.measured, "skipped": measuring.skipped}
        Path(f"{options.results}-{stage}").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def offline_reshard(folder: Path, size: int) -> float:
    """Peak memory of `holdfast ckpt reshard` over its bound, on a checkpoint of four times the bound."""
    bound = max(size // 4, 64 << 20)
    hc.save({"w": torch.zeros(4 * bound // (4 * COLUMNS), COLUMNS)}, folder / "step-00000001")
    code = (
        "import sys, numpy, holdfast.checkpoint.tools.reshard\n"
        "from holdfast.checkpoint.tools.cli import main\n"
        # Not ru_maxrss, which a process takes over from the one that started it.
        "def peak(): return int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])\n"
        "idle = peak()\n"
        "assert main(sys.argv[1:]) == 0\n"
        "print(peak() - idle)"
    )
    arguments = [
        "reshard",
        str(folder / "step-00000001"),
        str(folder / "r"),
        "--world",
        "3",
        "--max-memory",
        str(bound),
    ]
    done = subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True, text=True)
    return (int(done.stdout.splitlines()[-1]) << 10) / bound


# --- reporting ---


def judge(results: Results, reshard: float) -> list[Bar]:
    """The bars, each as an upper limit of a ratio of times."""
    large, small = results["save large"], results["save small"]
    bars = [
        Bar("save, time over the raw write's", estimate(ratios(large["holdfast"], large["raw"])), 1 / 0.9, "x"),
        Bar("save of small tensors, over DCP's", estimate(ratios(small["holdfast"], small["dcp.save"])), 1 / 2, "x"),
    ]
    for ranks in (2, 4):
        over = _flat_ratio(results, ranks, "holdfast flat", "raw")
        bars.append(Bar(f"save of flat shards, {ranks} ranks, over the raw write's", over, 1 / 0.9, "x"))
    over = _flat_ratio(results, MANY, "holdfast flat", "dcp gathered")
    bars.append(Bar(f"save of flat shards, {MANY} ranks, over gather and DCP", over, 1 / 5, "x"))
    for name in RESHARDED:
        hot, dropped = (results[load_title(name, condition)] for condition in (HOT, DROPPED))
        over_dcp, over_raw = ratios(hot["holdfast"], hot["dcp"]), ratios(dropped["holdfast"], dropped["raw"])
        bars.append(Bar(f"{load_title(name, HOT)}, over DCP's", estimate(over_dcp), 1 / 2, "x"))
        bars.append(Bar(f"{load_title(name, DROPPED)}, over the raw read's", estimate(over_raw), 2.0, "x"))
    for name in LOADS:
        read = results[f"load {name}: read over needed"]["holdfast"]
        bars.append(Bar(f"load {name}, bytes read over needed", estimate(read), 1.05, counts=True))
    bars.append(Bar("offline reshard, memory over its bound", estimate([reshard]), 1.0, counts=True))
    return bars


def beside(results: Results) -> list[str]:
    """What is shown without a bar; the head of this module says why."""
    lines = []
    for name in RESHARDED:
        title = load_title(name, DROPPED)
        of = results[title]
        ours, raw = (estimate(ratios(of[key], of["dcp"])) for key in ("holdfast", "raw"))
        lines.append(f"no bar  {title}, over DCP's: {ours}x; the raw read over DCP's: {raw}x")
    for ranks in (2, 4, MANY):
        ours, raw = (_flat_ratio(results, ranks, key, "dcp gathered") for key in ("holdfast flat", "raw"))
        lines.append(f"no bar  save of flat shards, {ranks} ranks, over gather and DCP: {ours}x; the raw write: {raw}x")
    return lines


def _flat_ratio(results: Results, ranks: int, key: str, other: str) -> Estimate:
    of = results[f"save flat, {ranks} ranks"]
    return estimate(ratios(of[key], of[other]))


def report(results: Results, skipped: dict[str, str], size_mb: float) -> str:
    """The tables, in milliseconds."""
    lines = [f"{size_mb:.0f} MB of state; each load's title says whether its files were in the cache", ""]
    for name, subjects in results.items():
        if ": " in name:
            continue
        rows = []
        for key, values in subjects.items():
            over = estimate(ratios(values, subjects["raw"]))
            load = name.removesuffix(f", {DROPPED}")
            costs = [results.get(f"{load}: {what}", {}).get(key) for what in ("read over needed", "peak MB")]
            shown = [f"{cost[0]:.3g}" if cost else "-" for cost in costs]
            rows.append([key, str(estimate([1000 * value for value in values])), str(over), *shown])
        lines += [table([name, "ms", "over raw", "read / needed", "peak, MB"], rows), ""]
    lines += [f"left out: {key}: {reason}" for key, reason in sorted(skipped.items())]
    return "\n".join([*lines, ""])


def measure(options: Options) -> tuple[Results, dict[str, str]]:
    """Run the stages."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    results: Results = {}
    skipped: dict[str, str] = {}
    for number, stage in enumerate(STAGES):
        ranks = [
            context.Process(target=rank_main, args=(rank, number, options), daemon=True) for rank in range(stage.ranks)
        ]
        for process in ranks:
            process.start()
        deadline, running = time.monotonic() + LIMIT_S, list(ranks)
        while running and all(not process.exitcode for process in ranks) and time.monotonic() < deadline:
            wait([process.sentinel for process in running], deadline - time.monotonic())
            running = [process for process in running if process.exitcode is None]
        if any(process.exitcode != 0 for process in ranks):
            raise SystemExit(f"a rank failed or did not end: {[process.exitcode for process in ranks]}")
        found = json.loads(Path(f"{options.results}-{number}").read_text())
        results |= found["results"]
        skipped |= found["skipped"]
    return results, skipped


@contextlib.contextmanager
def working_folder(folder: str | None) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="holdfast-checkpoint-", dir=folder) as found:
        yield Path(found)


def main() -> int:
    parser = options_of(__doc__, quick="small sizes and few rounds; bars of time are not judged")
    parser.add_argument("--rounds", type=int, default=7, help="7 or more")
    parser.add_argument("--folder", help="where to write; default: a temporary directory")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the folder goes
    os.environ["OMP_NUM_THREADS"] = "1"
    tensors, rows, small = (4, 1024, 500) if args.quick else (16, 16384, 20_000)
    rounds = 2 if args.quick else max(args.rounds, 7)
    with working_folder(args.folder) as folder:
        (folder / "data").mkdir()
        options = Options(
            store=str(folder / "store"), folder=str(folder / "data"), results=str(folder / "results"), rounds=rounds,
            tensors=tensors, rows=rows, small=small,
        )  # fmt: skip
        results, skipped = measure(options)
        size = 4 * COLUMNS * rows * tensors
        reshard = offline_reshard(folder / "data", size)
    bars = judge(results, reshard)
    results["offline reshard: memory over bound"] = {"holdfast": [reshard]}
    everything = {"times_s": results, "skipped": skipped, "beside": beside(results)}
    keep(as_json(everything, bars, quick=args.quick), args.json)
    print(", ".join(f"{key} {value}" for key, value in machine().items()))
    print(report(results, skipped, size / 1e6))
    print("\n".join([lines_of(bars, quick=args.quick), *beside(results)]))
    return exit_code(bars, quick=args.quick)


if __name__ == "__main__":
    sys.exit(main())
