"""The harness itself: a node of support/nodes.py is a host of its own, and losing its power loses all of it at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.nodes import Cluster, cluster_of, why_impossible

SERVER = """
import os, socket, sys
listener = socket.create_server(("", 5000))
if os.fork() == 0:
    os.setsid()  # a daemon of its own, as the snapshot daemon is
    open("/dev/shm/held", "w").write("x" * 4096)
    connection, _ = listener.accept()
    connection.sendall(b"hello")
    connection.recv(1)
"""
CLIENT = """
import socket, sys
connection = socket.create_connection(("n1", 5000), timeout=60)
print(connection.recv(5).decode(), flush=True)
sys.stdin.readline()
connection.settimeout(0.7)
try:
    print("heard", connection.recv(1), flush=True)
except OSError as error:
    print(type(error).__name__, flush=True)
"""


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with cluster_of(2, tmp_path) as found:
        yield found


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 200
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_node_is_a_host_of_its_own(cluster: Cluster, tmp_path: Path) -> None:
    first, second = cluster.nodes
    assert second.run("hostname").stdout == "n1\n"
    assert first.run("getent", "hosts", "n1").stdout.split() == ["10.0.0.2", "n1"]
    for path in ("/dev/shm/x", "/tmp/x"):
        assert first.run("touch", path).returncode == 0
        assert second.run("test", "-e", path).returncode == 1
        assert not Path(path).exists()
    assert first.run("touch", str(tmp_path / "shared")).returncode == 0
    assert second.run("test", "-e", str(tmp_path / "shared")).returncode == 0
    assert int(first.run("sh", "-c", "ls /proc | grep -c '^[0-9]'").stdout) <= 5  # init, sleep, sh, ls, grep


def test_a_node_that_loses_power_says_no_goodbye_and_leaves_nothing(cluster: Cluster, tmp_path: Path) -> None:
    first, second = cluster.nodes
    second.start([sys.executable, "-c", SERVER], log=tmp_path / "server.txt").wait(200)
    assert len(second.processes()) == 1
    client = subprocess.Popen(
        first.inside([sys.executable, "-c", CLIENT]), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert client.stdout is not None
    assert client.stdout.readline() == "hello\n"
    cluster.power_off(second)
    assert not second.is_on
    assert second.processes() == {}
    assert client.communicate("\n", timeout=200)[0] == "TimeoutError\n"
    newcomer = cluster.replace(second)
    assert (newcomer.name, newcomer.address) == (second.name, second.address)
    assert newcomer.run("ls", "/dev/shm").stdout == ""
    assert first.run(sys.executable, "-c", "import socket; socket.create_connection(('n1', 5000), 60)").stderr.count(
        "ConnectionRefused"
    )


def test_a_cut_cable_is_silence_until_it_heals(cluster: Cluster) -> None:
    first, second = cluster.nodes
    knock = [sys.executable, "-c", "import socket; socket.create_connection(('n1', 5000), 0.5)"]
    cluster.cut(second)
    assert "TimeoutError" in first.run(*knock).stderr or "No route" in first.run(*knock).stderr
    assert second.is_on
    cluster.heal(second)
    wait_for(lambda: "ConnectionRefused" in first.run(*knock).stderr)


def test_nothing_of_a_cluster_outlives_a_killed_test(tmp_path: Path) -> None:
    if (reason := why_impossible()) is not None:
        pytest.skip(reason)
    script = (
        "import sys, time; from pathlib import Path; from support.nodes import Cluster\n"
        "with Cluster(1, Path(sys.argv[1])) as cluster:\n"
        "    cluster.nodes[0].start(['sleep', '977'], log=Path(sys.argv[1]) / 'log')\n"
        "    print(cluster.nodes[0].init, cluster._switch_pid, flush=True); time.sleep(600)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        pids = process.stdout.readline().split()
        os.kill(process.pid, signal.SIGKILL)
    assert len(pids) == 2
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))


def test_who_is_not_root_is_told_so_in_one_line() -> None:
    if os.geteuid() != 0:
        assert "only root may make them" in str(why_impossible())
        return
    tests = str(Path(__file__).parent.parent)
    script = (
        "import os, sys; sys.path.insert(0, sys.argv[1]); from support.nodes import why_impossible\n"
        "os.setgid(65534); os.setuid(65534); print(why_impossible())"
    )
    done = subprocess.run([sys.executable, "-c", script, tests], capture_output=True, text=True, timeout=240)
    assert done.stdout.startswith("nodes that can lose power need"), done.stderr
    assert done.stdout.count("\n") == 1
