"""What an agent sees of its own workers: signs of life, process states, and their stacks when they are asked for.

The shell around `holdfast.launcher.hangs`: it reads the control page and /proc, sends the signal at which a worker
writes its stacks, and puts these into the run directory. It decides nothing. Used by the agent's main thread.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from holdfast.checkpoint.version import GenerationId
from holdfast.errors import HoldfastError
from holdfast.launcher.processes import descendants
from holdfast.launcher.stacks import describe, digest, parse_stacks
from holdfast.launcher.wire import Pulse
from holdfast.snapshot.control import ControlPage, Phase, RankPart, generation_word, stack_file

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 0.5
"""How often workers are looked at."""
_ANSWER_S = 1.0
"""When the answers to a dump are read."""
_LATE_S = 3.0
"""From then on a worker that has written nothing will not."""
_NATIVE_LIMIT_S = 20.0
_FAMILY_AFTER_S = 2.0
"""Of a worker that has been silent for so long, the processes that it has started are looked at too."""
_FAMILY_EVERY_S = 10.0
"""And how often where it is in no Session: such a one is silent always."""
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class ProcessState:
    """What /proc tells of a worker."""

    state: str
    switches: int
    """Context switches of the main thread: a sleep that was interrupted for a moment of work shows here."""
    cpu_s: float
    io_bytes: int


def read_process(pid: int, proc: Path = Path("/proc")) -> ProcessState | None:
    """The state of process `pid`, None where it is gone or not ours to see."""
    try:
        stat = (proc / str(pid) / "stat").read_text(errors="replace")  # the name of a process is any bytes
        status = (proc / str(pid) / "status").read_text(errors="replace")
    except OSError:
        return None
    fields = stat[stat.rindex(")") + 2 :].split()
    switches = sum(int(line.split()[1]) for line in status.splitlines() if "_ctxt_switches:" in line)
    return ProcessState(fields[0], switches, (int(fields[11]) + int(fields[12])) / _TICKS_PER_S, _io_bytes(proc, pid))


def family_cpu_s(pid: int) -> float:
    """CPU seconds of `pid`, of its children that have ended, and of all processes below it."""
    return sum(_lineage_cpu_s(member) for member in (pid, *descendants(pid)))


def _lineage_cpu_s(pid: int) -> float:
    try:
        stat = Path("/proc", str(pid), "stat").read_text(errors="replace")
    except OSError:
        return 0.0
    return sum(map(int, stat[stat.rindex(")") + 2 :].split()[11:15])) / _TICKS_PER_S


def _io_bytes(proc: Path, pid: int) -> int:
    with contextlib.suppress(OSError, ValueError, IndexError):  # another user's process, or none any more
        text = (proc / str(pid) / "io").read_text()
        return sum(int(line.split()[1]) for line in text.splitlines() if line.split(":")[0] in ("rchar", "wchar"))
    return 0


@dataclass
class _Dump:
    number: int
    ordered: float
    open: set[int]
    """Local ranks whose answer is awaited."""
    asked: set[int]
    """Those that write their stacks: who is in no Session has no handler for the signal."""


class NodeWatch:
    """See the module's head. One per agent; `begin` at each generation, `look` every half second while one runs."""

    def __init__(self, arena: Path, run_dir: Path) -> None:
        self._arena = arena
        self._directory = run_dir / "stacks"
        self._page: ControlPage | None = None
        self._generation: GenerationId | None = None
        self._first_rank = 0
        self._stuck: dict[int, tuple[ProcessState, float]] = {}
        self._since: dict[int, float] = {}
        """When each local rank was first seen."""
        self._family: dict[int, tuple[float, float]] = {}
        """CPU seconds of a local rank's whole family, and when they were read; of those in no Session."""
        self._answers: dict[int, tuple[int, str, str]] = {}
        """Of the newest dump, by local rank: its number, digest and where the main thread stood."""
        self._dump: _Dump | None = None
        self._dumped = 0
        self._native: list[tuple[subprocess.Popen[bytes], float]] = []
        self._next = 0.0

    def begin(self, generation: GenerationId, first_global_rank: int) -> None:
        """Workers of a new generation are spawned."""
        self._generation, self._first_rank = generation, first_global_rank
        self._stuck.clear()
        self._since.clear()
        self._family.clear()
        self._answers.clear()
        self._dump, self._dumped = None, 0

    def due(self, now: float) -> bool:
        """Whether it is time to look again."""
        if now < self._next:
            return False
        self._next = now + LOOK_EVERY_S
        return True

    def look(self, pids: Mapping[int, int], now: float) -> tuple[Pulse, ...]:
        """A pulse for each worker (process ids by local rank)."""
        self._reap(now)
        if self._generation is None:
            return ()
        seats = self._seats(pids)
        self._collect(pids, now)
        pulses = (self._pulse(rank, pid, seats.get(rank), now) for rank, pid in pids.items())
        return tuple(pulse for pulse in pulses if pulse is not None)

    def dump(self, number: int, pids: Mapping[int, int], now: float) -> None:
        """Have the workers write their stacks, where dump `number` was not ordered before."""
        if number <= self._dumped or self._generation is None:
            return
        self._dumped = number
        seats = self._seats(pids)
        self._dump = _Dump(number, now, set(pids), set(seats))
        for local_rank, pid in pids.items():
            part = seats.get(local_rank)
            with contextlib.suppress(OSError):
                os.truncate(stack_file(self._arena, local_rank), 0)
            if part is not None and part.stack_signal:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, part.stack_signal)
            if number == 1:
                self._dump_native(local_rank, pid, now)

    def close(self) -> None:
        """Unmap the page; end what still runs."""
        self._reap(float("inf"))
        if self._page is not None:
            self._page.close()
            self._page = None

    # --- inside

    def _open(self) -> ControlPage | None:
        if self._page is None:
            with contextlib.suppress(OSError, HoldfastError):
                self._page = ControlPage.open(self._arena / "control")
        return self._page

    def _seats(self, pids: Mapping[int, int]) -> dict[int, RankPart]:
        """By local rank, what stands in the page of those workers that have entered a Session."""
        page = self._open()
        if page is None or self._generation is None:
            return {}
        word = generation_word(self._generation)
        parts = {rank: page.rank(rank) for rank in pids}
        return {rank: part for rank, part in parts.items() if part.generation == word and part.pid == pids[rank]}

    def _pulse(self, local_rank: int, pid: int, part: RankPart | None, now: float) -> Pulse | None:
        found = read_process(pid)
        if found is None:
            return None
        number, stack, frame = self._answers.get(local_rank, (0, "", ""))
        silent_s = now - self._since.setdefault(local_rank, now)
        pulse = Pulse(
            global_rank=self._first_rank + local_rank,
            local_rank=local_rank,
            pid=pid,
            phase=int(Phase.NONE),
            entered=False,
            silent_s=round(silent_s, 3),
            beat_s=round(time.time() - silent_s, 4),
            state=found.state,
            stuck_s=self._stuck_s(local_rank, found, now),
            cpu_s=found.cpu_s,
            switches=found.switches,
            io_bytes=found.io_bytes,
            dump=number,
            stack=stack,
            frame=frame,
        )
        if part is not None:
            return _with_signs(pulse, part)
        return msgspec.structs.replace(pulse, cpu_s=self._family_cpu_s(local_rank, pid, now))

    def _family_cpu_s(self, local_rank: int, pid: int, now: float) -> float:
        cpu_s, read = self._family.get(local_rank, (0.0, float("-inf")))
        if now - read >= _FAMILY_EVERY_S:
            cpu_s, read = self._family[local_rank] = (family_cpu_s(pid), now)
        return cpu_s

    def _stuck_s(self, local_rank: int, found: ProcessState, now: float) -> float:
        before = self._stuck.get(local_rank)
        same = before is not None and before[0].state == found.state
        if before is not None and found.state == "D":
            same = same and (before[0].switches, before[0].cpu_s) == (found.switches, found.cpu_s)
        if found.state not in ("T", "D") or not same or before is None:
            self._stuck[local_rank] = (found, now)
            return 0.0
        return now - before[1]

    def _collect(self, pids: Mapping[int, int], now: float) -> None:
        """Read what workers have written of their stacks, into the run directory."""
        dump = self._dump
        if dump is None or now - dump.ordered < _ANSWER_S:
            return
        for local_rank in sorted(dump.open):
            text = ""
            with contextlib.suppress(OSError):
                text = stack_file(self._arena, local_rank).read_text(errors="replace")
            late = now - dump.ordered >= _LATE_S or local_rank not in dump.asked
            if text or late or local_rank not in pids or self._stands(local_rank, now):
                dump.open.discard(local_rank)
                self._answers[local_rank] = self._answer(dump, local_rank, pids.get(local_rank, 0), text)
        if not dump.open:
            self._dump = None

    def _stands(self, local_rank: int, now: float) -> bool:
        """Whether the process cannot answer: it has been seen standing still, and not only for the moment."""
        found = self._stuck.get(local_rank)
        return found is not None and found[0].state in ("T", "D") and now - found[1] >= _ANSWER_S

    def _answer(self, dump: _Dump, local_rank: int, pid: int, text: str) -> tuple[int, str, str]:
        threads = parse_stacks(text)
        if threads:
            found = (dump.number, digest(threads), describe(threads))
        else:
            text = _kernel_view(pid)
            why = "are out of reach" if local_rank in dump.asked else "come with a Session"
            found = (dump.number, text, f"its stacks {why} ({text.splitlines()[0]})")
        self._save(self._name(dump.number, local_rank), text)
        return found

    def _name(self, number: int, local_rank: int, kind: str = "txt") -> Path:
        rank = self._first_rank + local_rank
        return self._directory / f"{self._generation}-dump-{number}-rank-{rank:05d}.{kind}"

    def _save(self, path: Path, text: str) -> None:
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        except OSError as error:
            logger.warning("stacks cannot be written to %s: %s", path, error)

    def _dump_native(self, local_rank: int, pid: int, now: float) -> None:
        """Native frames too, where py-spy is installed; it may lack the rights, which its file then says."""
        program = shutil.which("py-spy")
        if program is None:
            return
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            with self._name(1, local_rank, "native.txt").open("wb") as file:
                command = [program, "dump", "--native", "--nonblocking", "--pid", str(pid)]
                process = subprocess.Popen(command, stdout=file, stderr=file, stdin=subprocess.DEVNULL)
        except OSError as error:
            logger.warning("py-spy could not be started: %s", error)
            return
        self._native.append((process, now + _NATIVE_LIMIT_S))

    def _reap(self, now: float) -> None:
        for process, deadline in tuple(self._native):
            if process.poll() is None and now >= deadline:
                process.kill()
                process.wait(5)
            if process.poll() is not None:
                self._native.remove((process, deadline))


def _with_signs(pulse: Pulse, part: RankPart) -> Pulse:
    """The pulse of a worker that has entered a Session, with what it has written into the page."""
    silent_s = max(0, time.monotonic_ns() - part.beat_ns) / 1e9
    phase = part.phase
    return msgspec.structs.replace(
        pulse,
        phase=int(phase),
        entered=True,
        step=part.step,
        steps_done=part.step - part.phase_step + 1 if phase >= Phase.FIRST_STEP else 0,
        inner_beats=part.inner_beats,
        silent_s=round(silent_s, 3),
        beat_s=round(time.time() - silent_s, 4),
        exempt=part.section_until > time.monotonic_ns(),
        step_s=part.step_ns / 1e9,
        lead_s=part.lead_ns / 1e9,
        cpu_s=pulse.cpu_s if silent_s < _FAMILY_AFTER_S else family_cpu_s(pulse.pid),
    )


def _kernel_view(pid: int) -> str:
    """What the kernel says of a process that does not answer; its stack only where we may read it."""
    found = read_process(pid)
    if found is None:
        return "the process is gone"
    lines = [f"state {found.state}"]
    for name in ("wchan", "syscall", "stack"):
        with contextlib.suppress(OSError):
            text = Path("/proc", str(pid), name).read_text(errors="replace").strip()
            if text not in ("", "0"):
                lines.append(f"{name}: {text}")
    return "\n".join(lines)
