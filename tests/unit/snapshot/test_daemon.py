"""What a daemon does where nobody greets it, and what it leaves behind."""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from holdfast.snapshot.daemon import Daemon, remove_socket_dir
from holdfast.snapshot.keys import JobKeys


@pytest.fixture
def sockets() -> Iterator[Path]:
    """A directory with a short path, as sockets need it."""
    with tempfile.TemporaryDirectory(prefix="hfs-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        made = Path(folder, "seat")
        made.mkdir()
        yield made


def test_a_daemon_whose_agent_died_before_it_said_hello_does_not_stay_for_ever(sockets: Path, tmp_path: Path) -> None:
    daemon = Daemon(tmp_path / "arena", sockets, "127.0.0.1", JobKeys())
    daemon._adopt()
    now = time.monotonic()
    daemon.ending.tick(now + 590)
    assert not daemon.ending.over
    daemon.ending.tick(now + 610)
    assert daemon.ending.over
    daemon._close()
    assert not (tmp_path / "arena").exists()
    assert not sockets.exists()


def test_what_others_remove_meanwhile_does_not_keep_the_directory(
    sockets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b", "c"):
        (sockets / name).write_text("")
    open_, unlink = os.open, os.unlink

    def opened(path: str | Path, flags: int, *rest: int, **more: int) -> int:
        if os.path.basename(path) == "a":
            Path(path).unlink(missing_ok=True)
        return open_(path, flags, *rest, **more)

    def unlinked(path: str, *, dir_fd: int | None = None) -> None:
        unlink(path, dir_fd=dir_fd)
        if path == "b":
            raise FileNotFoundError(path)  # it was there when the directory was listed

    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "unlink", unlinked)
    remove_socket_dir(sockets)
    assert not sockets.exists()


def test_a_seat_that_an_agent_has_taken_keeps_its_directory(sockets: Path) -> None:
    for name in ("agent.lock", "daemon.lock"):
        (sockets / name).write_text("")
    with open(sockets / "agent.lock") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        remove_socket_dir(sockets)
    assert [path.name for path in sockets.iterdir()] == ["agent.lock"]
