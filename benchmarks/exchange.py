"""What protecting snapshots costs: ``python benchmarks/exchange.py``.

Real snapshot daemons on loopback, one per node, hold 1 GB of state per group (10^9 bytes) and protect version after
version in 2+1, 3+1 and 4+2. Given are, as medians over versions with 95 % bootstrap intervals,

* seconds from the first question of any node to the sealed parity of the last one, and the bytes that crossed the
  network in that time, beside m times the coded state;
* the rate, beside that of two processes that do nothing but give 1 MiB messages to each other over ZeroMQ, as many
  bytes as a group has, over one connection or as many as a pair of daemons has, whichever is faster. It is measured
  right before and right after each version, while nothing is exchanged; the mean of both is the pair of the version;
* bytes of parity buffers, beside the formula 2 m / k B; and all memory, shared and private, of the daemons, beside the
  formula S B + 2 m / k B with S slots;
* the step time of a training worker (matrix products on one core of its own; daemons have the others) while parity is
  made, beside its step time in between.

The workers that fill the slots are those of the tests: they write constant bytes and rest in between. With
``HOLDFAST_TOKEN`` set, bulk data carries a keyed MAC.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import zmq
from measure import Bar, Estimate, as_json, estimate, exit_code, keep, lines_of, options_of, ratios, table

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from holdfast.snapshot.arena import SlotState, read_header_of
from holdfast.snapshot.messages import ParityMade
from support.snapshot_worker import Plan
from support.snapshots import Job, Node

CODES, QUICK_CODES = ("2+1", "3+1", "4+2"), ("2+1", "4+2")
CHUNK_BYTES = 1 << 20
CONNECTIONS = 2
REST_S = 9.0
"""Between two versions: enough to protect one, to measure the raw rate and some quiet steps."""
FILL_S = 1.5
"""Before a version is protected its slots are filled: steps of the trainer then count for nothing."""
LIMIT_S = 120.0


@dataclass
class Sample:
    """One version in one group."""

    code: str
    seconds: float
    wire_bytes: int
    wanted_bytes: int
    """m times the coded state."""
    raw_rate: float
    """The mean of before and after."""
    parity_bytes: int
    formula_bytes: float
    """2 m / k B, summed over the nodes."""
    held_bytes: int
    """Arena files and private memory of all daemons."""
    held_formula_bytes: float
    """S B + 2 m / k B, summed over the nodes."""
    quiet_steps: list[float] = field(default_factory=list)
    busy_steps: list[float] = field(default_factory=list)


# --- the raw rate ---------------------------------------------------------------------------------------------------


def send_raw(endpoint: str, size_bytes: int, connections: int) -> None:
    """Another process: hand out 1 MiB messages from memory, without copies of ours."""
    context = zmq.Context()
    sockets = [context.socket(zmq.PUSH) for _ in range(connections)]
    for socket in sockets:
        socket.connect(endpoint)
    memory = memoryview(bytearray(os.urandom(64 << 20)))
    for number, start in enumerate(range(0, size_bytes, CHUNK_BYTES)):
        at = start % len(memory)
        sockets[number % connections].send(memory[at : at + CHUNK_BYTES], copy=False)
    for socket in sockets:
        socket.close(10_000)
    context.term()


def raw_rate(size_bytes: int) -> float:
    """Bytes per second over loopback, by what is faster: one connection or several."""
    return max(_raw_rate(size_bytes, connections) for connections in (1, CONNECTIONS))


def _raw_rate(size_bytes: int, connections: int) -> float:
    """Bytes per second from the first message to the last."""
    size_bytes -= size_bytes % CHUNK_BYTES
    context = zmq.Context()
    socket = context.socket(zmq.PULL)
    port = socket.bind_to_random_port("tcp://127.0.0.1")
    sender = subprocess.Popen(
        [sys.executable, __file__, "--send-raw", f"tcp://127.0.0.1:{port}", "--bytes", str(size_bytes),
         "--connections", str(connections)]
    )  # fmt: skip
    received, begun = 0, 0.0
    while received < size_bytes:
        if not socket.poll(30_000):
            raise TimeoutError(f"the raw sender stopped after {received} bytes")
        received += len(socket.recv(copy=False).buffer)
        begun = begun or time.perf_counter()
    seconds = time.perf_counter() - begun
    sender.wait(30)
    socket.close(0)
    context.term()
    return (received - CHUNK_BYTES) / seconds


# --- a training worker ----------------------------------------------------------------------------------------------


def train(core: int) -> None:
    """Another process: matrix products on one core; prints when each step ended and how long it took."""
    import numpy as np

    os.sched_setaffinity(0, {core})
    matrix = np.random.default_rng(0).random((512, 512), dtype=np.float32)
    while True:
        begun = time.time()
        for _ in range(4):
            matrix @ matrix
        end = time.time()
        sys.stdout.write(f"{end} {end - begun}\n")
        sys.stdout.flush()


class Trainer:
    """The training worker and what it said."""

    def __init__(self, core: int) -> None:
        variables = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        self._output = open(os.memfd_create("steps"), "w+b")  # noqa: SIM115  closed by `end`
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--train", str(core)], stdout=self._output, env=variables
        )

    def end(self) -> list[tuple[float, float]]:
        """Stop it: (end, duration) of each step, in seconds of the epoch."""
        self._process.kill()
        self._process.wait()
        self._output.seek(0)
        lines = self._output.read().decode().splitlines()[:-1]
        self._output.close()
        return [(float(end), float(step)) for end, step in (line.split() for line in lines)]


# --- a group --------------------------------------------------------------------------------------------------------


def measure(code: str, size_bytes: int, versions: int, raw_bytes: int, rest_s: float) -> list[Sample]:
    """Protect `versions` versions of `size_bytes` per group."""
    k, m = (int(part) for part in code.split("+"))
    count = k + m
    cores = sorted(os.sched_getaffinity(0))
    nodes = [Node(f"exchange-{index}") for index in range(count)]
    os.sched_setaffinity(0, set(cores[1:]) or set(cores))  # daemons and workers inherit it
    try:
        for node in nodes:
            node.start_daemon()
        for node in nodes:
            node.hello(redundancy=code)
        return _measure(code, Job(nodes, 1), size_bytes // count, versions, raw_bytes, rest_s, cores[0])
    finally:
        os.sched_setaffinity(0, set(cores))
        for node in nodes:
            node.close()


def _measure(
    code: str, job: Job, row_bytes: int, versions: int, raw_bytes: int, rest_s: float, core: int
) -> list[Sample]:
    k, m = (int(part) for part in code.split("+"))
    ranks = tuple(range(len(job.nodes)))
    job.start(Plan(until=1 << 30, ranks=ranks, row_bytes=row_bytes, step_s=rest_s, snapshot_every=1, paced=False))
    samples: list[Sample] = []
    busy: list[tuple[float, float]] = []
    quiet: list[tuple[float, float]] = []
    newest = [node.expect(ParityMade, LIMIT_S).version.step for node in job.nodes]  # the first one makes the buffers
    trainer = Trainer(core)
    rates = [raw_rate(raw_bytes)]
    while len(samples) < versions:
        after = time.time()  # what began before was disturbed by the measurement
        made = _protected(job.nodes, max(newest) + 1, after)
        newest = [one.version.step for one in made]
        begun, ended = min(one.ended - one.seconds for one in made), max(one.ended for one in made)
        quiet.append((after, min(after + 1.0, begun - FILL_S)))
        busy.append((begun, ended))
        rates.append(raw_rate(raw_bytes))
        state = [_image_bytes(node) for node in job.nodes]
        samples.append(
            Sample(
                code=code,
                seconds=ended - begun,
                wire_bytes=sum(one.fetched_bytes for one in made),
                wanted_bytes=m * sum(state),
                raw_rate=statistics.mean(rates[-2:]),
                parity_bytes=sum(_parity_bytes(node) for node in job.nodes),
                formula_bytes=2 * m / k * sum(state),
                held_bytes=sum(_held_bytes(node) for node in job.nodes),
                held_formula_bytes=(_slots(job.nodes[0]) + 2 * m / k) * sum(state),
            )
        )
    steps = trainer.end()
    job.end()
    for end, step in steps:
        for sample, (begin, stop), (quiet_begin, quiet_stop) in zip(samples, busy, quiet, strict=True):
            if begin + step < end < stop:
                sample.busy_steps.append(step)
            elif quiet_begin + step < end < quiet_stop:
                sample.quiet_steps.append(step)
    return samples


def _protected(nodes: Sequence[Node], step: int, after: float) -> list[ParityMade]:
    """What all nodes say of the first version from `step` on that was begun after `after`."""
    made = [_next(node, step) for node in nodes]
    while len({one.version.step for one in made}) > 1 or min(one.ended - one.seconds for one in made) < after:
        newest = max(one.version.step for one in made)
        step = newest if min(one.version.step for one in made) < newest else newest + 1
        made = [one if one.version.step >= step else _next(node, step) for node, one in zip(nodes, made, strict=True)]
    return made


def _next(node: Node, step: int) -> ParityMade:
    return node.expect(ParityMade, LIMIT_S, lambda one: one.version.step >= step)


def _image_bytes(node: Node) -> int:
    headers = [read_header_of(path)[0] for path in node.arena.glob("slot-*")]
    return next(header.size_bytes for header in headers if header.state is SlotState.CLEAN)


def _parity_bytes(node: Node) -> int:
    return sum(path.stat().st_size for path in node.arena.glob("parity-*"))


def _slots(node: Node) -> int:
    return sum(path.suffix == "" for path in node.arena.glob("slot-*"))


def _held_bytes(node: Node) -> int:
    """What lies in the arena, and what the daemon's process has for itself."""
    assert node.daemon is not None
    status = Path(f"/proc/{node.daemon.pid}/status").read_text().splitlines()
    private = next(int(line.split()[1]) for line in status if line.startswith("RssAnon:"))
    return sum(path.stat().st_size for path in node.arena.iterdir()) + private * 1024


# --- results --------------------------------------------------------------------------------------------------------


def judge(samples: Sequence[Sample]) -> list[Bar]:
    """The bars of one code."""
    code = samples[0].code
    rates = [sample.wire_bytes / sample.seconds for sample in samples]
    wire, wanted = [sample.wire_bytes for sample in samples], [sample.wanted_bytes for sample in samples]
    held, formula = [sample.parity_bytes for sample in samples], [sample.formula_bytes for sample in samples]
    everything = [sample.held_bytes for sample in samples]
    everything_formula = [sample.held_formula_bytes for sample in samples]
    bars = [
        Bar(f"{code}: raw ZeroMQ rate / rate", _ratio([sample.raw_rate for sample in samples], rates), 2.0),
        Bar(f"{code}: bytes / m x state", _ratio(wire, wanted), 1.02, counts=True),
        Bar(f"{code}: parity / formula", _ratio(held, formula), 1.05, counts=True),
        Bar(f"{code}: all memory / formula", _ratio(everything, everything_formula), 1.05),
    ]
    both = [sample for sample in samples if sample.busy_steps and sample.quiet_steps]
    slower = [statistics.mean(sample.busy_steps) / statistics.mean(sample.quiet_steps) for sample in both]
    if slower:
        bars.append(Bar(f"{code}: step time while protecting / else", estimate(slower), 1.15))
    return bars


def _ratio(above: Sequence[float], below: Sequence[float]) -> Estimate:
    return estimate(ratios(above, below))


def row(samples: Sequence[Sample]) -> list[str]:
    """One line of the table."""
    return [
        samples[0].code,
        str(estimate([sample.seconds for sample in samples])),
        str(estimate([sample.wire_bytes / sample.seconds / 1e9 for sample in samples])),
        str(estimate([sample.raw_rate / 1e9 for sample in samples])),
        f"{samples[0].wire_bytes / 1e9:.3f} of {samples[0].wanted_bytes / 1e9:.3f}",
        f"{samples[-1].parity_bytes / 1e9:.3f} of {samples[-1].formula_bytes / 1e9:.3f}",
        f"{samples[-1].held_bytes / 1e9:.3f} of {samples[-1].held_formula_bytes / 1e9:.3f}",
    ]


def main() -> int:
    parser = options_of(__doc__, quick="30 MB and three versions; bars of time are not judged")
    parser.add_argument("--versions", type=int, default=11, help="versions per code (default 11)")
    parser.add_argument("--mb", type=int, default=1000, help="state per group in 10^6 bytes (default 1000)")
    parser.add_argument("--codes", help="comma separated (default 2+1,3+1,4+2; with --quick 2+1,4+2)")
    parser.add_argument("--send-raw", help=argparse.SUPPRESS)
    parser.add_argument("--bytes", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--connections", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--train", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.send_raw:
        send_raw(arguments.send_raw, arguments.bytes, arguments.connections)
        return 0
    if arguments.train is not None:
        train(arguments.train)
        return 0
    megabytes, versions = (30, 3) if arguments.quick else (arguments.mb, arguments.versions)
    rest_s = 2.0 if arguments.quick else REST_S
    usual = QUICK_CODES if arguments.quick else CODES
    results = {
        code: measure(code, megabytes * 10**6, versions, megabytes * 10**6, rest_s)
        for code in (arguments.codes.split(",") if arguments.codes else usual)
    }
    header = [
        "code",
        "seconds",
        "GB/s",
        "raw ZeroMQ GB/s",
        "GB on the wire, of m x state",
        "GB of parity, of the formula",
        "GB in all, of the formula",
    ]
    bars = [bar for samples in results.values() for bar in judge(samples)]
    everything = {code: [asdict(sample) for sample in samples] for code, samples in results.items()}
    keep(as_json({"exchange": everything}, bars, quick=arguments.quick), arguments.json)
    if arguments.json != "-":
        print(table(header, [row(samples) for samples in results.values()]))
        print(lines_of(bars, quick=arguments.quick))
    return exit_code(bars, quick=arguments.quick)


if __name__ == "__main__":
    sys.exit(main())
