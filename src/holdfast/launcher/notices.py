"""What an agent hears of its host: the notice file of a preemption, and the findings of health checks. Main thread."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec

from holdfast.errors import DECODE_ERRORS, PeerError
from holdfast.launcher import health
from holdfast.launcher.console import say
from holdfast.launcher.events import AnyEvent, HealthEvent
from holdfast.launcher.health import Finding, Status
from holdfast.launcher.reach import Reach
from holdfast.launcher.wire import Place, Plan

NOTICE_POLL_S = 0.5
"""How often the notice file is looked for."""
_GPU_LIMIT_S = 60.0
_ASK_GPUS = (
    "import msgspec, sys; from holdfast.launcher import health; "
    "sys.stdout.buffer.write(msgspec.json.encode([*health.gpu_errors(), *health.gpu_matmuls()]))"
)


class NoticeFile:
    """A file whose appearance announces that this host is about to be taken away."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._told = path is None
        self._next = 0.0

    def arrived(self, now: float) -> bool:
        """True once: when the file is there for the first time."""
        if self._told or now < self._next:
            return False
        self._next = now + NOTICE_POLL_S
        assert self.path is not None, "without a file nothing is left to tell"
        self._told = os.path.exists(self.path)  # which, unlike Path.exists, never raises
        return self._told


class GpuErrors:
    """Asks the driver for memory errors of GPUs while the job goes on: no GPU is opened, nobody waits."""

    def __init__(self, command: tuple[str, ...] = health.GPU_ERRORS) -> None:
        self._command = command
        self._process: subprocess.Popen[bytes] | None = None
        self._until = 0.0

    def ask(self, now: float) -> None:
        """Begin; one question at a time."""
        if self._process is not None:
            return
        self._until = now + health.SMI_S
        with contextlib.suppress(OSError):  # no such program: it said so before the first generation
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )

    def look(self, now: float) -> list[Finding]:
        """The answer, once it is there; nothing where there is none in time."""
        process = self._process
        if process is None or (process.poll() is None and now < self._until):
            return []
        ended = process.poll() == 0
        if not ended:
            process.kill()
        text, _ = process.communicate()
        self._process = None
        return [health.parse_gpu_line(line) for line in text.decode(errors="replace").splitlines()] if ended else []

    def close(self) -> None:
        """Wait for no answer any longer."""
        self.look(float("inf"))


class HealthCheck:
    """Runs the checks, tells what changed since the last time."""

    def __init__(
        self,
        level: str,
        directories: Iterable[Path],
        write: Callable[[AnyEvent], None],
        gpu_errors: GpuErrors | None = None,
    ) -> None:
        """`level`: off, warn or strict; `directories`: where the job writes; `write` takes the events.

        `gpu_errors`: asks for them; None: where there are GPUs, their driver is asked.
        """
        self._gpu_errors = gpu_errors or (GpuErrors() if health.has_gpus() else None)
        self._unfit = False
        """A check of this host has failed since it was last asked about."""
        self._level = level
        self._directories = tuple(directories)
        self._write = write
        self._known: dict[str, Status] = {}
        self._reach = Reach()

    def before_the_first_generation(self) -> None:
        """All checks; GPUs in a process of their own, so that this one never opens them.

        Raises:
            PeerError: one failed, and `level` is strict.
        """
        if self._level == "off":
            return
        findings = health.quick_checks(self._directories)
        if health.has_gpus():
            findings += ask_gpus()
        self._tell(findings)
        failed = [finding.text for finding in findings if finding.status == "fail"]
        if failed and self._level == "strict":
            raise PeerError(f"this host is not fit for the job: {'; '.join(failed)} (--hold-health strict)")

    def after_a_failure(self, now: float) -> None:
        """The checks that take no time: workers are about to be started again. The GPUs' driver is only asked."""
        if self._level == "off":
            return
        self._judge(health.quick_checks(self._directories))
        if self._gpu_errors is not None:
            self._gpu_errors.ask(now)

    def _judge(self, findings: list[Finding]) -> None:
        self._tell(findings)
        self._unfit = self._unfit or any(finding.status == "fail" for finding in findings)

    def generation_begins(self, plan: Plan, place: Place, now: float) -> None:
        """See whether the other nodes of the generation answer this one; `look` tells what came of it."""
        if self._level != "off":
            self._reach.begin(plan, place, now)

    def look(self, now: float) -> bool:
        """Take in answers, at least every second; True once where this host has to leave: it is unfit, and strict."""
        self._tell(self._reach.look(now))
        if self._gpu_errors is not None:
            self._judge(self._gpu_errors.look(now))
        leaves = self._unfit and self._level == "strict"
        self._level = "warn" if leaves else self._level
        return leaves

    def close(self) -> None:
        """Wait for no answers any longer."""
        self._reach.close()
        if self._gpu_errors is not None:
            self._gpu_errors.close()

    def _tell(self, findings: Iterable[Finding]) -> None:
        """Failures are said; everything that changed is an event."""
        seen: Counter[str] = Counter()
        for finding in findings:
            several = finding.check in ("gpu", "reach")  # else: of several disks, always the same ones in this order
            key = f"{finding.check} {finding.text if several else seen[finding.check]}"
            seen[finding.check] += 1
            if self._known.get(key, "ok") == finding.status:
                continue
            self._known[key] = finding.status
            self._write(HealthEvent(check=finding.check, status=finding.status, text=finding.text))
            if finding.status == "fail":
                say(f"health: {finding.text}")


def ask_gpus(command: tuple[str, ...] = (sys.executable, "-c", _ASK_GPUS)) -> list[Finding]:
    """Findings about the GPUs of this host, from a process of their own; takes seconds."""
    try:
        answer = subprocess.run(command, capture_output=True, timeout=_GPU_LIMIT_S, check=True).stdout
        return msgspec.json.decode(answer, type=list[Finding])
    except (OSError, subprocess.SubprocessError, *DECODE_ERRORS) as error:
        return [Finding(check="gpu", status="warn", text=f"the check of the GPUs did not end well: {error}")]
