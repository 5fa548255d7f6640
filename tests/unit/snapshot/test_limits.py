"""Memory limits: every authority is asked, the tightest counts, and one line says what it means."""

from __future__ import annotations

from pathlib import Path

import pytest

from holdfast.snapshot.limits import Limit, cgroup_limits, least_limit, plan_slots

GB = 1 << 30


@pytest.mark.parametrize(
    ("room", "slots"), [(60 * GB, 6), (6 * GB, 6), (5 * GB, 5), (2 * GB, 2), (2 * GB - 1, 0), (0, 0)]
)
def test_as_many_slots_are_planned_as_fit(room: int, slots: int) -> None:
    plan = plan_slots(GB, Limit(room, "free /dev/shm"))
    assert plan.num_slots == slots
    assert (plan.line == "") == (slots == 6)
    assert "\n" not in plan.line


def test_the_line_names_sizes_and_the_limit() -> None:
    line = plan_slots(3 * GB, Limit(4 * GB, "cgroup /sys/fs/cgroup/job")).line
    assert "3.0 GB" in line
    assert "4.0 GB of cgroup /sys/fs/cgroup/job" in line


def test_what_the_user_allows_counts_what_is_taken_already(tmp_path: Path) -> None:
    limit = least_limit(tmp_path, used_bytes=3 << 20, allowed_bytes=4 << 20)
    assert limit == Limit(1 << 20, "--hold-snapshot-memory")
    assert least_limit(tmp_path, used_bytes=5 << 20, allowed_bytes=4 << 20).room_bytes == 0


def _proc(tmp_path: Path, cgroup: str, mountinfo: str) -> Path:
    proc = tmp_path / "proc"
    proc.mkdir()
    (proc / "cgroup").write_text(cgroup)
    (proc / "mountinfo").write_text(mountinfo)
    return proc


def test_every_group_of_cgroup_v2_up_to_the_root_is_asked(tmp_path: Path) -> None:
    mount = tmp_path / "cgroup"
    (mount / "slice" / "job").mkdir(parents=True)
    (mount / "slice" / "memory.max").write_text(f"{8 * GB}\n")
    (mount / "slice" / "memory.high").write_text("max\n")
    (mount / "slice" / "memory.current").write_text(f"{3 * GB}\n")
    (mount / "slice" / "memory.stat").write_text(f"anon 5\ninactive_file {GB}\n")
    (mount / "slice" / "job" / "memory.max").write_text("max\n")
    (mount / "slice" / "job" / "memory.current").write_text(f"{3 * GB}\n")
    proc = _proc(tmp_path, "0::/slice/job\n", f"30 23 0:26 / {mount} rw shared:9 - cgroup2 cgroup2 rw\n")
    assert [limit.room_bytes for limit in cgroup_limits(proc)] == [6 * GB]


def test_cgroup_v1_is_asked_where_the_memory_controller_is_mounted(tmp_path: Path) -> None:
    mount = tmp_path / "memory"
    (mount / "job").mkdir(parents=True)
    for group, limit in ((mount, 1 << 62), (mount / "job", 2 * GB)):
        (group / "memory.limit_in_bytes").write_text(f"{limit}\n")
        (group / "memory.usage_in_bytes").write_text(f"{GB}\n")
    proc = _proc(
        tmp_path,
        "5:cpu,cpuacct:/elsewhere\n4:memory:/docker/abc/job\n",
        f"36 31 0:30 /docker/abc {mount} rw - cgroup cgroup rw,memory\n37 31 0:31 / /cpu rw - cgroup cgroup rw,cpu\n",
    )
    assert [limit.room_bytes for limit in cgroup_limits(proc)] == [GB]


def test_a_machine_without_cgroups_has_no_such_limit(tmp_path: Path) -> None:
    assert list(cgroup_limits(tmp_path / "nothing")) == []
    proc = _proc(tmp_path, "0::/\nnonsense", "30 23 0:26 / /nowhere rw shared:9 - cgroup2 cgroup2 rw\nx\n")
    assert list(cgroup_limits(proc)) == []
