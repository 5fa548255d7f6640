"""What training waits for one version: holdfast against memcpy and against checkpoint libraries.

    python benchmarks/stall.py            # 1 GB of state over 2 ranks, and 20,000 small tensors
    python benchmarks/stall.py --quick    # the same in small, to see that it works: its bars are not judged

Two ranks run in lock step. In each round every subject is measured once, in turn, so that what disturbs the machine
disturbs all of them; a round's value is that of the slower rank, and ratios are taken within a round. Reported are
medians with 95 % bootstrap intervals. A bar is met only if the whole interval is; the exit code is 1 where one is not.

The subjects:

    memcpy              the same bytes, tensor by tensor, into memory that is already there
    inline              holdfast, everything copied before training goes on
    overlapped          holdfast, as a Session copies: at the boundary it captures and begins, then come forward and
                        backward (a fixed amount of matrix products), then what the update still has to wait for
    dcp.save            torch.distributed.checkpoint.save, to files
    dcp.async_save      its blocking part, with one stager kept over all rounds (warm)
    torchsnapshot       the blocking part of Snapshot.async_take
    torch_checkpointing the blocking part of CheckpointManager.save, and what the update still has to wait for
    dlrover             DLRover's flash checkpoint: save_checkpoint to memory, its saver started by rank 0

The state is that of AdamW over parameters sharded by DTensor. Every version has to become clean, and none may be
skipped; that is checked in each round.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from measure import Bar, Estimate, as_json, estimate, exit_code, keep, lines_of, machine, options_of, ratios, table
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.optim import Optimizer

from holdfast.checkpoint.version import GenerationId, new_nonce
from holdfast.faults import Injector
from holdfast.runtime.capture import TrainingState
from holdfast.runtime.snapshotter import Snapshotter
from holdfast.snapshot.arena import SLOT_HEADER_BYTES, Slot
from holdfast.snapshot.copier import Ticket

RANKS = 2
SLOTS = 3
SMALL_TENSORS, SMALL_ELEMENTS = 20_000, 64
LIMIT_S = 120.0


@dataclass(frozen=True)
class Options:
    """What one rank has to know; travels to it."""

    store: str
    """File by which the ranks find each other."""
    folder: str
    """Where rivals write; emptied after each measurement."""
    results: str
    """File for what was measured."""
    rounds: int
    parameters: int
    elements: int
    """Of each parameter, on one rank."""
    compute_s: float


class Holdfast:
    """What a Session does at a boundary (capture, objects, plan, copy), with slots in shared memory of our own."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, rank: int) -> None:
        state = TrainingState(model=model, optimizer=optimizer, extra={}, ranks=tuple(range(RANKS)), global_rank=rank)
        self._shots = Snapshotter(
            state,
            node_of=lambda rank: 0,
            global_rank=rank,
            world_size=RANKS,
            session_rank=rank,
            session_size=RANKS,
            injector=Injector((), None, rank=rank),
            on_done=lambda ticket: None,
        )
        self.size_bytes = self._shots.size_bytes(0)
        paths = [Path(f"/dev/shm/holdfast-bench-{os.getpid()}-{index}") for index in range(SLOTS)]
        self._slots = tuple(_make_slot(path, self.size_bytes) for path in paths)
        self._shots.use(self._slots)
        self._generation = GenerationId(incarnation=1, nonce=new_nonce(), generation=1)
        self._step = 0

    def take(self, *, inline: bool) -> Ticket:
        """Start the next version in the next slot."""
        self._step += 1
        ticket = self._shots.take(self._generation.at(self._step), self._step % SLOTS, inline=inline)
        assert ticket is not None, "the slots are too small"
        return ticket

    def before_update(self) -> None:
        """What an optimizer's update waits for."""
        self._shots.before_update()

    def finish(self, ticket: Ticket) -> None:
        """Wait until the version is clean; it has to be."""
        if not ticket.wait(LIMIT_S) or not ticket.clean:
            raise RuntimeError(f"version {ticket.version} is not clean: torn {ticket.torn}, error {ticket.error}")

    def close(self) -> None:
        """Let go of the slots, and so of their memory."""
        self._shots.close()
        for slot in self._slots:
            slot.close()


def _make_slot(path: Path, size_bytes: int) -> Slot:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    os.posix_fallocate(descriptor, 0, SLOT_HEADER_BYTES + (size_bytes + 4095) // 4096 * 4096)
    os.close(descriptor)
    slot = Slot.open(path)
    path.unlink()  # the mapping keeps it: nothing stays in /dev/shm whatever ends this process
    slot.prefault()
    return slot


class Compute:
    """A forward and backward pass of a fixed amount of work."""

    def __init__(self, seconds: float) -> None:
        self._a = torch.randn(512, 512)
        self._products = 1
        self()
        began = time.perf_counter()
        for _ in range(20):
            self()
        self._products = max(1, round(20 * seconds / (time.perf_counter() - began)))

    def __call__(self) -> None:
        for _ in range(self._products):
            self._a @ self._a


@dataclass
class Sample:
    """One measurement on one rank."""

    stall_s: float
    """What the training thread waited."""
    cpu_s: float = 0.0
    """CPU seconds of the whole process until the version was there; only where nothing else ran."""
    step_s: float = 0.0
    """Duration of the whole step, where there was a compute phase."""


Subject = Callable[[int], Sample]


class Large:
    """The subjects over a sharded state of large tensors."""

    def __init__(self, options: Options, rank: int) -> None:
        self._options, self._rank = options, rank
        mesh = init_device_mesh("cpu", (RANKS,))
        model = nn.Module()
        for index in range(options.parameters):
            local = torch.randn(options.elements)
            sharded = nn.Parameter(DTensor.from_local(local, mesh, [Shard(0)], run_check=False))
            sharded.grad = DTensor.from_local(torch.zeros(options.elements), mesh, [Shard(0)], run_check=False)
            model.register_parameter(f"weight{index:03d}", sharded)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        optimizer.step()  # makes its state: three tensors of the parameter's size, with the parameter itself
        optimizer.zero_grad()
        self._sharded = {
            f"{name}.{key}": tensor.detach()
            for name, parameter in model.named_parameters()
            for key, tensor in [("weight", parameter), *optimizer.state[parameter].items()]
            if isinstance(tensor, DTensor)
        }
        self._local = {name: tensor.to_local() for name, tensor in self._sharded.items()}
        self._target = torch.zeros(sum(t.numel() for t in self._local.values()))
        self._holdfast = Holdfast(model, optimizer, rank)
        self._compute = Compute(options.compute_s)
        self._rivals = contextlib.ExitStack()
        self.skipped: dict[str, str] = {}

    def subjects(self) -> dict[str, Subject]:
        """All that work here; what does not is named in `skipped`."""
        found: dict[str, Subject] = {
            "memcpy": self._memcpy,
            "inline": self._inline,
            "overlapped": self._overlapped,
            "compute": self._compute_alone,
        }
        for name, make in (
            ("dcp.save", self._dcp_save),
            ("dcp.async_save", self._dcp_async_save),
            ("torchsnapshot", self._torchsnapshot),
            ("torch_checkpointing", self._torch_checkpointing),
            ("dlrover", self._dlrover),
        ):
            failure = ""
            try:
                subject = make()
                subject(-1)  # the first save warms up whatever the library keeps
                found[name] = subject
            except Exception as error:  # noqa: BLE001  # a rival that does not work here is left out on all ranks
                failure = f"{type(error).__name__}: {error}".splitlines()[0]
            failures: list[Any] = [None] * RANKS
            dist.all_gather_object(failures, failure)
            if any(failures):
                found.pop(name, None)
                self.skipped[name] = next(filter(None, failures))
        return found

    def close(self) -> None:
        self._holdfast.close()
        self._rivals.close()

    def _memcpy(self, round_: int) -> Sample:
        address, began, cpu = self._target.data_ptr(), time.perf_counter(), time.process_time()
        for tensor in self._local.values():
            size = 4 * tensor.numel()
            ctypes.memmove(address, tensor.data_ptr(), size)
            address += size
        return Sample(time.perf_counter() - began, time.process_time() - cpu)

    def _inline(self, round_: int) -> Sample:
        began, cpu = time.perf_counter(), time.process_time()
        ticket = self._holdfast.take(inline=True)
        stall = time.perf_counter() - began
        self._holdfast.finish(ticket)
        return Sample(stall, time.process_time() - cpu)

    def _overlapped(self, round_: int) -> Sample:
        began = time.perf_counter()
        ticket = self._holdfast.take(inline=False)
        stall = time.perf_counter() - began
        self._compute()
        update = time.perf_counter()
        self._holdfast.before_update()
        stall += time.perf_counter() - update
        step = time.perf_counter() - began
        self._holdfast.finish(ticket)
        return Sample(stall, step_s=step)

    def _compute_alone(self, round_: int) -> Sample:
        began = time.perf_counter()
        self._compute()
        return Sample(0.0, step_s=time.perf_counter() - began)

    # --- rivals

    def _path(self, name: str, round_: int) -> str:
        return f"{self._options.folder}/{name}-{round_}"

    def _dcp_save(self) -> Subject:
        import torch.distributed.checkpoint as dcp

        def subject(round_: int) -> Sample:
            began, cpu = time.perf_counter(), time.process_time()
            dcp.save(self._sharded, checkpoint_id=self._path("dcp", round_))
            return Sample(time.perf_counter() - began, time.process_time() - cpu)

        return subject

    def _dcp_async_save(self) -> Subject:
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        stager = DefaultStager(StagingOptions(False, False, False, False))
        self._rivals.callback(stager.close)

        def subject(round_: int) -> Sample:
            began = time.perf_counter()
            pending = dcp.async_save(self._sharded, checkpoint_id=self._path("async", round_), async_stager=stager)
            stall = time.perf_counter() - began
            pending.result(LIMIT_S)  # type: ignore[union-attr]
            return Sample(stall)

        return subject

    def _torchsnapshot(self) -> Subject:
        from torchsnapshot import Snapshot, StateDict

        state = {"state": StateDict(**self._local)}

        def subject(round_: int) -> Sample:
            began = time.perf_counter()
            pending = Snapshot.async_take(self._path("torchsnapshot", round_), state)
            stall = time.perf_counter() - began
            pending.wait()
            return Sample(stall)

        return subject

    def _torch_checkpointing(self) -> Subject:
        from torch_checkpointing import CheckpointManager
        from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

        config = CheckpointManager.Config.with_async_save()
        config.storage_config = LocalFileSystemStorageConfig(use_direct_io=False)
        manager = config.build()
        self._rivals.callback(manager.close)

        def subject(round_: int) -> Sample:
            began = time.perf_counter()
            pending = manager.save(self._path("tck", round_), {"model": self._local})
            stall = time.perf_counter() - began
            self._compute()
            update = time.perf_counter()
            with manager.lock():
                stall += time.perf_counter() - update
            step = time.perf_counter() - began
            pending.result(LIMIT_S)
            return Sample(stall, step_s=step)

        return subject

    def _dlrover(self) -> Subject:
        run = f"holdfast-bench-{os.getppid()}"
        ranks = {"RANK": self._rank, "LOCAL_RANK": self._rank, "WORLD_SIZE": RANKS, "LOCAL_WORLD_SIZE": RANKS}
        os.environ |= {"TORCHELASTIC_RUN_ID": run} | {name: str(value) for name, value in ranks.items()}
        from dlrover.trainer.torch.flash_checkpoint.ddp import DdpCheckpointer, StorageType

        checkpointer = DdpCheckpointer(f"{self._options.folder}/dlrover", RANKS, RANKS)

        def end() -> None:  # it leaves its process, its shared memory and its sockets behind
            checkpointer._engine.close()
            if checkpointer._engine.saver_proc is not None:
                checkpointer._engine.saver_proc.kill()
                checkpointer._engine.saver_proc.join(LIMIT_S)
                shutil.rmtree("/tmp/ckpt_sock", ignore_errors=True)
            for path in Path("/dev/shm").glob(f"{run}_ckpt_shm_{self._rank}"):
                path.unlink()

        self._rivals.callback(end)

        def subject(round_: int) -> Sample:
            began, cpu = time.perf_counter(), time.process_time()
            checkpointer.save_checkpoint(round_ + 2, {"model": self._local}, storage_type=StorageType.MEMORY)
            return Sample(time.perf_counter() - began, time.process_time() - cpu)

        return subject


class Small:
    """The subjects over many small tensors."""

    def __init__(self, options: Options, rank: int) -> None:
        model = nn.ParameterList(torch.randn(SMALL_ELEMENTS) for _ in range(SMALL_TENSORS))
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        self._holdfast = Holdfast(model, optimizer, rank)
        self._compute = Compute(options.compute_s / 4)

    def subjects(self) -> dict[str, Subject]:
        return {"inline": self._inline, "overlapped": self._overlapped}

    def close(self) -> None:
        self._holdfast.close()

    def _inline(self, round_: int) -> Sample:
        began = time.perf_counter()
        ticket = self._holdfast.take(inline=True)
        stall = time.perf_counter() - began
        self._holdfast.finish(ticket)
        return Sample(stall)

    def _overlapped(self, round_: int) -> Sample:
        began = time.perf_counter()
        ticket = self._holdfast.take(inline=False)
        stall = time.perf_counter() - began
        self._compute()
        update = time.perf_counter()
        self._holdfast.before_update()
        stall += time.perf_counter() - update
        self._holdfast.finish(ticket)
        return Sample(stall)


def rank_main(rank: int, options: Options) -> None:
    """One rank: measure every subject once per round; rank 0 writes what the slower one took."""
    warnings.simplefilter("ignore")
    logging.disable(logging.INFO)  # the rivals' own
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(options.store, RANKS), rank=rank, world_size=RANKS)
    results: dict[str, dict[str, dict[str, list[float]]]] = {}
    skipped: dict[str, str] = {}
    for scale, make in (("large", Large), ("small", Small)):
        state: Large | Small = make(options, rank)
        results[scale] = rounds_of(state.subjects(), options)
        skipped |= getattr(state, "skipped", {})
        state.close()
        del state
        gc.collect()
    if rank == 0:
        Path(options.results).write_text(json.dumps({"results": results, "skipped": skipped}))
    dist.barrier()
    dist.destroy_process_group()


def rounds_of(subjects: dict[str, Subject], options: Options) -> dict[str, dict[str, list[float]]]:
    """Per subject and quantity the value of each round: that of the slower rank."""
    measured: dict[str, dict[str, list[float]]] = {
        name: {"stall_s": [], "cpu_s": [], "step_s": []} for name in subjects
    }
    for round_ in range(-1, options.rounds):
        for name, subject in subjects.items():
            dist.barrier()
            sample = subject(round_ + 1)
            slowest = torch.tensor([sample.stall_s, sample.cpu_s, sample.step_s], dtype=torch.float64)
            dist.all_reduce(slowest, dist.ReduceOp.MAX)
            if round_ >= 0:  # the round before the first warms up
                for quantity, value in zip(measured[name], slowest.tolist(), strict=True):
                    measured[name][quantity].append(value)
            if dist.get_rank() == 0:
                for leftover in Path(options.folder).iterdir():
                    shutil.rmtree(leftover, ignore_errors=True)
    return measured


def judge(results: dict[str, dict[str, dict[str, list[float]]]], size_mb: float) -> list[Bar]:
    """The bars that can be judged with what was measured.

    Args:
        results: of all rounds.
        size_mb: of the large state, on each rank.
    """
    size = f"{RANKS * size_mb / 1000:.1g} GB"
    large, small = results["large"], results["small"]
    bars = [
        Bar(
            f"{size} inline, wait over memcpy",
            estimate(ratios(large["inline"]["stall_s"], large["memcpy"]["stall_s"])),
            1.5,
            "x",
        ),
        Bar(
            f"{size} inline, CPU seconds with checksums over memcpy's",
            estimate(ratios(large["inline"]["cpu_s"], large["memcpy"]["cpu_s"])),
            2.0,
            "x",
        ),
    ]
    if "dcp.async_save" in large:
        value = estimate(ratios(large["overlapped"]["stall_s"], large["dcp.async_save"]["stall_s"]))
        bars.append(Bar(f"{size} overlapped, wait over dcp.async_save's warm stall", value, 0.1, "x"))
    for mode in ("inline", "overlapped"):
        per_tensor = [1e6 * value / SMALL_TENSORS for value in small[mode]["stall_s"]]
        bars.append(
            Bar(f"{SMALL_TENSORS} small tensors {mode}, training thread each", estimate(per_tensor), 5.0, " us")
        )
    return bars


def report(results: dict[str, dict[str, dict[str, list[float]]]], skipped: dict[str, str], size_mb: float) -> str:
    """The tables, in milliseconds."""
    large = results["large"]
    rows = []
    for name, values in large.items():
        if name == "compute":
            continue
        over = estimate(ratios(values["stall_s"], large["memcpy"]["stall_s"]))
        cpu = str(_ms(values["cpu_s"])) if any(values["cpu_s"]) else "-"
        rows.append([name, str(_ms(values["stall_s"])), str(over), cpu])
    rows += [[name, f"not measured: {reason[:60]}", "-", "-"] for name, reason in skipped.items()]
    lines = [
        f"{RANKS} ranks, {size_mb:.0f} MB each; training waits (ms)",
        "",
        table(["subject", "wait, ms", "over memcpy", "CPU, ms"], rows),
        "",
    ]
    growth = [
        100 * (with_copy / alone - 1)
        for with_copy, alone in zip(large["overlapped"]["step_s"], large["compute"]["step_s"], strict=True)
    ]
    lines += [
        f"an overlapped copy makes a step of {_ms(large['compute']['step_s'])} ms longer by {estimate(growth)} %",
        "",
    ]
    rows = [[f"{SMALL_TENSORS} tensors, {name}", str(_ms(v["stall_s"]))] for name, v in results["small"].items()]
    return "\n".join([*lines, table(["subject", "wait, ms"], rows), ""])


def _ms(values: list[float]) -> Estimate:
    return estimate([1000 * value for value in values])


def main() -> int:
    parser = options_of(__doc__, quick="small sizes and few rounds; the bars are not judged")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--folder", help="where rivals write; default: a temporary directory")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the folder of the rivals' files goes
    parameters, elements = (3, 1 << 20) if args.quick else (20, 2 << 20)
    with tempfile.TemporaryDirectory(prefix="holdfast-bench-", dir=args.folder) as folder:
        options = Options(
            store=f"{folder}/store",
            folder=f"{folder}/rivals",
            results=f"{folder}/results.json",
            rounds=3 if args.quick else args.rounds,
            parameters=parameters,
            elements=elements,
            compute_s=0.2 if args.quick else 1.0,
        )
        Path(options.folder).mkdir()
        mp.spawn(rank_main, args=(options,), nprocs=RANKS)
        found = json.loads(Path(options.results).read_text())
    results, skipped = found["results"], found["skipped"]
    size_mb = 12 * parameters * elements / 1e6
    bars = judge(results, size_mb)
    keep(as_json({"stall": results, "skipped": skipped}, bars, quick=args.quick), args.json)
    if args.json != "-":
        print(f"machine: {machine()}\n")
        print(report(results, skipped, size_mb))
        print(lines_of(bars, quick=args.quick))
    return exit_code(bars, quick=args.quick)


if __name__ == "__main__":
    sys.exit(main())
