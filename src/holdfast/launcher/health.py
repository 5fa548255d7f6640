"""Whether this host can run a job well: checks that take milliseconds, and the ones of GPUs, which take longer.

Each check looks at one thing and gives a `Finding`; none changes anything. A check whose own look fails says so as a
warning: what cannot be seen is not taken for healthy. ``holdfast doctor`` prints all of them; an agent runs
`quick_checks` before the first generation and after a failure, and asks for the memory errors of GPUs then too.
"""

from __future__ import annotations

import ctypes
import os
import resource
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Literal

import msgspec

from holdfast.launcher.tool import human_bytes
from holdfast.snapshot.limits import cgroup_limits

Status = Literal["ok", "warn", "fail"]

_GIB = 1 << 30
_DISK_FAIL, _DISK_WARN = 64 << 20, _GIB
_MEMORY_WARN = _GIB
_SHM_WARN = 64 << 20
_FILES_WARN = 1024
_REACH_S = 3.0
SMI_S = 20.0
"""How long nvidia-smi may take."""
GPU_ERRORS = (
    "nvidia-smi",
    "--query-gpu=index,name,ecc.errors.uncorrected.volatile.total,remapped_rows.pending,remapped_rows.failure",
    "--format=csv,noheader,nounits",
)
_STA_UNSYNC = 0x40
_SHM_HINT = (
    "Kubernetes: volumes: [{name: shm, emptyDir: {medium: Memory}}] and volumeMounts: "
    "[{name: shm, mountPath: /dev/shm}]; Docker: --shm-size 16g"
)


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """What one check found."""

    check: str
    """Stable name, for scripts: disk, memory, shm, cgroup, files, clock, kernel, reach, gpu, erasure."""
    status: Status
    text: str
    """One line: what was found and, where it is not well, what to do."""


def quick_checks(directories: Iterable[Path] = ()) -> list[Finding]:
    """Checks without GPUs and network.

    Args:
        directories: where the job writes, beside the temporary directory.
    """
    checks: list[Callable[[], Finding]] = [
        *(lambda path=path: disk(path) for path in (Path(tempfile.gettempdir()), *directories)),
        memory,
        shared_memory,
        cgroup,
        open_files,
        clock,
        kernel,
    ]
    return [_guarded(check) for check in checks]


def _guarded(check: Callable[[], Finding]) -> Finding:
    try:
        return check()
    except OSError as error:
        return Finding(check=getattr(check, "__name__", "disk").strip("<>"), status="warn", text=f"unknown: {error}")


def disk(path: Path) -> Finding:
    """Free space of the file system of `path`, and whether we may write there."""
    there = next(parent for parent in (path, *path.parents) if parent.exists())
    free = shutil.disk_usage(there).free
    text = f"{human_bytes(free)} free at {path}"
    if not os.access(there, os.W_OK):
        return Finding(check="disk", status="fail", text=f"{there} is not writable")
    status: Status = "fail" if free < _DISK_FAIL else "warn" if free < _DISK_WARN else "ok"
    return Finding(check="disk", status=status, text=text if status == "ok" else f"{text}: make room")


def memory() -> Finding:
    """What the kernel calls available."""
    import psutil

    found = psutil.virtual_memory()
    text = f"{human_bytes(found.available)} of {human_bytes(found.total)} available"
    return Finding(check="memory", status="warn" if found.available < _MEMORY_WARN else "ok", text=text)


def shared_memory(path: Path = Path("/dev/shm")) -> Finding:
    """Where snapshots live."""
    found = os.statvfs(path)
    total, free = found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize
    text = f"{human_bytes(free)} of {human_bytes(total)} free in {path}"
    if total <= _SHM_WARN or free <= _SHM_WARN:
        return Finding(check="shm", status="warn", text=f"{text}: too small for snapshots in memory. {_SHM_HINT}")
    return Finding(check="shm", status="ok", text=text)


def cgroup() -> Finding:
    """The tightest memory cgroup."""
    limits = list(cgroup_limits())
    if not limits:
        return Finding(check="cgroup", status="ok", text="no memory limit")
    least = min(limits)
    status: Status = "warn" if least.room_bytes < _MEMORY_WARN else "ok"
    return Finding(check="cgroup", status=status, text=f"{human_bytes(least.room_bytes)} of room in {least.name}")


def open_files() -> Finding:
    """RLIMIT_NOFILE."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < _FILES_WARN:
        text = f"{soft} open files are allowed: raise it with ulimit -n (up to {hard})"
        return Finding(check="files", status="warn", text=text)
    return Finding(check="files", status="ok", text=f"{soft} open files are allowed")


def clock() -> Finding:
    """Whether the kernel's clock is kept by a time service: events of several nodes are compared by it."""
    buffer = (ctypes.c_long * 64)()  # struct timex: modes, offset, freq, maxerror, esterror, status, ...
    state = ctypes.CDLL(None, use_errno=True).adjtimex(ctypes.byref(buffer))
    if state < 0:
        return Finding(check="clock", status="warn", text=f"unknown: {os.strerror(ctypes.get_errno())}")
    status = buffer[5] & 0xFFFFFFFF
    if status & _STA_UNSYNC:
        text = "no time service keeps this clock: times of events differ between nodes (chrony, systemd-timesyncd)"
        return Finding(check="clock", status="warn", text=text)
    return Finding(check="clock", status="ok", text=f"synchronised, largest error {buffer[3] / 1e3:.0f} ms")


def kernel() -> Finding:
    """System calls that the launcher cannot do without."""
    try:
        os.close(os.pidfd_open(os.getpid()))
    except (OSError, AttributeError) as error:
        text = f"pidfd_open does not work here ({error}): Linux 5.3 or later, and a sandbox that allows it"
        return Finding(check="kernel", status="fail", text=text)
    return Finding(check="kernel", status="ok", text=f"{os.uname().sysname} {os.uname().release}")


def reach(endpoint: str) -> Finding:
    """Whether something answers at ``host:port``."""
    host, _, port = endpoint.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_REACH_S) as found:
            return Finding(check="reach", status="ok", text=f"{endpoint} answers ({found.getpeername()[0]})")
    except (OSError, ValueError) as error:
        return Finding(check="reach", status="fail", text=f"{endpoint} does not answer: {error}")


# --- GPUs


def has_gpus() -> bool:
    """Whether the driver shows any device, without touching one."""
    return Path("/dev/nvidiactl").exists()


def gpu_errors() -> Iterator[Finding]:
    """Memory errors that the driver has counted, and rows that wait for a reset, of each GPU."""
    try:
        answer = subprocess.run(GPU_ERRORS, capture_output=True, text=True, timeout=SMI_S, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        yield Finding(check="gpu", status="warn", text=f"nvidia-smi tells nothing: {error}")
        return
    yield from map(parse_gpu_line, answer.stdout.splitlines())


def parse_gpu_line(line: str) -> Finding:
    """One line of nvidia-smi's answer: index, name, uncorrected errors, rows pending, rows failed."""
    index, name, *counts = (part.strip() for part in line.split(","))
    told = dict(zip(("uncorrected ECC errors", "rows to be remapped", "rows not remapped"), counts, strict=False))
    bad = [f"{count} {what}" for what, count in told.items() if count not in ("0", "No", "[N/A]", "N/A")]
    if bad:
        text = f"GPU {index} ({name}): {', '.join(bad)}: reset it, or have it replaced"
        return Finding(check="gpu", status="fail", text=text)
    return Finding(check="gpu", status="ok", text=f"GPU {index} ({name}): no memory errors")


def gpu_matmuls() -> Iterator[Finding]:
    """A product of matrices on each GPU, twice, compared with itself and with the host's. Initialises CUDA."""
    import torch

    if not torch.cuda.is_available():
        yield Finding(check="gpu", status="fail", text="torch cannot use the GPUs here: the driver, or a CPU build")
        return
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randint(-8, 8, (512, 512), generator=generator).float() for _ in range(2))
    expected = left @ right  # whole numbers below 2^24: exact in float32 whatever the order of summing
    for index in range(torch.cuda.device_count()):
        yield _gpu_matmul(index, left, right, expected)


def _gpu_matmul(index: int, left: object, right: object, expected: object) -> Finding:
    import torch

    assert isinstance(left, torch.Tensor), "made by the caller"
    assert isinstance(right, torch.Tensor), "made by the caller"
    assert isinstance(expected, torch.Tensor), "made by the caller"
    try:
        free, _ = torch.cuda.mem_get_info(index)
        device = torch.device("cuda", index)
        products = [(left.to(device) @ right.to(device)).cpu() for _ in range(2)]
    except RuntimeError as error:
        return Finding(check="gpu", status="fail", text=f"GPU {index} does not compute: {error}")
    if not all(product.equal(expected) for product in products):
        return Finding(check="gpu", status="fail", text=f"GPU {index} multiplies wrongly: take it out of service")
    return Finding(check="gpu", status="ok", text=f"GPU {index} computes, {human_bytes(free)} free")


def worst(findings: Iterable[Finding]) -> Status:
    """fail before warn before ok."""
    order: tuple[Status, ...] = ("ok", "warn", "fail")
    return max((finding.status for finding in findings), key=order.index, default="ok")
