"""How much memory the arena of a node may take, and how many slots that makes.

The limit is the least of what the user allowed (`--hold-snapshot-memory`), the head room of every memory cgroup from
this process up to the root (v1 and v2), what the kernel calls available, and the free space of /dev/shm. A part of the
head room is left alone: the arena must never be what calls the OOM killer.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

WANTED_SLOTS: Final = 6
"""A slot each for: newest complete, two being filled, old protected, being protected, pinned."""
LEAST_SLOTS: Final = 2
_KEPT_SHARE: Final = 20
"""One part in this many of the head room is left alone."""
_KUBERNETES_SHM_BYTES: Final = 64 << 20
_KUBERNETES_HINT: Final = (
    "; in Kubernetes give the pod more: volumes: [{name: shm, emptyDir: {medium: Memory}}] and "
    "volumeMounts: [{name: shm, mountPath: /dev/shm}]"
)


@dataclass(frozen=True, order=True)
class Limit:
    """Bytes that one authority would still give, and its name for a message."""

    room_bytes: int
    name: str


@dataclass(frozen=True)
class SlotPlan:
    """How many slots to make, and the line to say about it ("" where all wanted slots fit)."""

    num_slots: int
    line: str
    severity: str = "warning"


def plan_slots(slot_bytes: int, limit: Limit, *, wanted: int = WANTED_SLOTS) -> SlotPlan:
    """How many slots of `slot_bytes` (over all local ranks of the node) fit into `limit`.

    Returns:
        Between 2 and `wanted` slots, or 0 where fewer than two fit: then there is no memory tier.
    """
    fitting = limit.room_bytes // slot_bytes if slot_bytes > 0 else wanted
    if fitting >= wanted:
        return SlotPlan(wanted, "", "info")
    need, room = size_of(slot_bytes), f"{size_of(limit.room_bytes)} of {limit.name}"
    if fitting >= LEAST_SLOTS:
        return SlotPlan(
            fitting,
            f"snapshots: {fitting} slots of {need} fit into {room}, {wanted} would never skip a step: "
            f"some steps will not be snapshotted",
        )
    return SlotPlan(
        0,
        f"no snapshots in memory: {LEAST_SLOTS} slots of {need} do not fit into {room}; checkpoints go to storage only",
    )


def least_limit(directory: Path, *, used_bytes: int, allowed_bytes: int | None) -> Limit:
    """The tightest limit on more memory for an arena in `directory` that already takes `used_bytes`."""
    import psutil  # late: a daemon that starts needs it later, if at all

    shm = os.statvfs(directory)
    hint = _KUBERNETES_HINT if shm.f_blocks * shm.f_frsize <= _KUBERNETES_SHM_BYTES else ""
    limits = [
        _with_reserve(Limit(psutil.virtual_memory().available, "available memory")),
        Limit(shm.f_bavail * shm.f_frsize, f"free /dev/shm{hint}"),
        *(_with_reserve(limit) for limit in cgroup_limits()),
    ]
    if allowed_bytes is not None:
        limits.append(Limit(max(0, allowed_bytes - used_bytes), "--hold-snapshot-memory"))
    return min(limits)


def cgroup_limits(proc: Path = Path("/proc/self")) -> Iterator[Limit]:
    """The head room of every memory cgroup from this process up to the root; nothing where none limits.

    Page cache that the kernel can drop (inactive files) counts as room.
    """
    try:
        memberships = [
            line.split(":", 2) for line in (proc / "cgroup").read_text().splitlines() if line.count(":") >= 2
        ]
        mounts = [line.split() for line in (proc / "mountinfo").read_text().splitlines() if " - " in line]
    except OSError:
        return
    for _, controllers, path in memberships:
        kind = "cgroup2" if controllers == "" else "cgroup"
        if kind == "cgroup" and "memory" not in controllers.split(","):
            continue
        for mount in mounts:
            tail = mount[mount.index("-") + 1 :]
            if len(tail) >= 3 and tail[0] == kind and (kind == "cgroup2" or "memory" in tail[2].split(",")):
                yield from _walk(Path(mount[4]), mount[3], path, kind)


def _walk(mount_point: Path, mount_root: str, path: str, kind: str) -> Iterator[Limit]:
    relative = os.path.relpath(path, mount_root)
    if relative.startswith(".."):  # our group lies outside of what is mounted here: the mount itself is the nearest
        relative = "."
    group = mount_point / relative
    while True:
        limit = _group_limit(group, kind)
        if limit is not None:
            yield limit
        if group in (mount_point, group.parent):
            return
        group = group.parent


def _group_limit(group: Path, kind: str) -> Limit | None:
    if kind == "cgroup2":
        maxima = [_number(group / name) for name in ("memory.max", "memory.high")]
        used, cache = _number(group / "memory.current"), "inactive_file"
    else:
        maxima = [_number(group / "memory.limit_in_bytes")]
        used, cache = _number(group / "memory.usage_in_bytes"), "total_inactive_file"
    known = [maximum for maximum in maxima if maximum is not None and maximum < 1 << 60]
    if not known or used is None:
        return None
    return Limit(max(0, min(known) - max(0, used - _statistic(group / "memory.stat", cache))), f"cgroup {group}")


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # absent, or "max"
        return None


def _statistic(path: Path, key: str) -> int:
    try:
        lines = (line.split() for line in path.read_text().splitlines())
        return next(int(value) for name, value in lines if name == key)
    except (OSError, ValueError, StopIteration):
        return 0


def _with_reserve(limit: Limit) -> Limit:
    return Limit(limit.room_bytes - limit.room_bytes // _KEPT_SHARE, limit.name)


def size_of(size_bytes: int) -> str:
    """For people."""
    for unit, power in (("GB", 30), ("MB", 20)):
        if size_bytes >= 1 << power:
            return f"{size_bytes / (1 << power):.1f} {unit}"
    return f"{size_bytes / 1024:.0f} KB"
