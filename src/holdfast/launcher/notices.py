"""What an agent hears of its host: the notice file of a preemption, and the findings of health checks. Main thread."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec

from holdfast.errors import PeerError
from holdfast.launcher import health
from holdfast.launcher.console import say
from holdfast.launcher.events import AnyEvent, HealthEvent
from holdfast.launcher.health import Finding, Status

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
        self._told = self.path.exists()
        return self._told


class HealthCheck:
    """Runs the checks, tells what changed since the last time."""

    def __init__(self, level: str, directories: Iterable[Path], write: Callable[[AnyEvent], None]) -> None:
        """`level`: off, warn or strict; `directories`: where the job writes; `write` takes the events."""
        self._level = level
        self._directories = tuple(directories)
        self._write = write
        self._known: dict[str, Status] = {}

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

    def after_a_failure(self) -> None:
        """The checks that take no time: workers are about to be started again."""
        if self._level != "off":
            self._tell(health.quick_checks(self._directories))

    def _tell(self, findings: Iterable[Finding]) -> None:
        """Failures are said; everything that changed is an event."""
        for finding in findings:
            key = f"{finding.check} {finding.text}" if finding.check == "gpu" else finding.check
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
    except (OSError, subprocess.SubprocessError, msgspec.MsgspecError) as error:
        return [Finding(check="gpu", status="warn", text=f"the check of the GPUs did not end well: {error}")]
