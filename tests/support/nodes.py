"""Nodes that can lose power, on one machine: namespaces for a test that has to lose a host, not a process.

Each node has a PID, mount, UTS, IPC and network namespace of its own, its own memory in /dev/shm, its own /tmp,
/etc/hosts and host name; all hang on one bridge in a network namespace that nobody else uses, so clusters never meet.
`Cluster.power_off` takes the link down and then kills the node's init: the kernel takes every process of the node at
once, its shared memory goes with its mount namespace, and nothing says goodbye on the network.

Namespaces have no names: they live as long as the processes in them, and these die with the test process (PDEATHSIG
on the way down), however it ends. Folders outside of /tmp are those of the machine: they are the shared storage. Of
/tmp a node sees `root`, this checkout and the interpreter's environment.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent.parent
PORT = 29400
"""Of the rendezvous; a node's ports are its own."""
_WAIT_S = 200.0
_DIE_WITH_US = ["setpriv", "--pdeathsig", "KILL"]
_NEW = ["unshare", "--net", "--kill-child", "--fork"]
_INIT = """
set -eu
stage=$1 root=$2 hosts=$3 name=$4 shm=$5; shift 5
hostname "$name"
mount -t tmpfs -o "size=$shm,mode=1777" tmpfs /dev/shm
mount --bind "$hosts" /etc/hosts
mount -t tmpfs -o mode=1777 tmpfs "$stage"
for kept in "$@"; do mkdir -p "$stage/${kept#/tmp/}"; mount --bind "$kept" "$stage/${kept#/tmp/}"; done
mount --move "$stage" /tmp
touch "$root/up-$name"
while :; do sleep 31536 & wait; done
"""
_IDLE = "sleep 31536"
"""All that init does; bash reaps the orphans meanwhile."""


@cache
def why_impossible() -> str | None:
    """One line on why this machine or user cannot have such nodes; None where it can."""
    missing = [tool for tool in ("unshare", "nsenter", "setpriv", "ip", "mount") if shutil.which(tool) is None]
    if missing:
        return f"nodes that can lose power need {', '.join(missing)} (packages util-linux and iproute2)"
    if os.geteuid() != 0:
        return "nodes that can lose power need namespaces, and only root may make them: run these tests as root"
    probe = [
        *_NEW,
        "--pid",
        "--mount",
        "--uts",
        "--ipc",
        "--mount-proc",
        "ip",
        "link",
        "add",
        "bridge0",
        "type",
        "bridge",
    ]
    done = subprocess.run(probe, capture_output=True, text=True, timeout=_WAIT_S)
    if done.returncode:
        return f"nodes that can lose power need namespaces, which are refused here: {done.stderr.strip()}"
    return None


@dataclass(eq=False)
class Node:
    """One node, from power on to power off. What comes back under its name is another one."""

    name: str
    address: str
    link: str
    """Its end of the cable at the bridge."""
    process: subprocess.Popen[bytes]
    """The parent of its init, on our side."""
    init: int
    """Its process 1, as we see it."""
    pid_space: str = ""
    """Identity of its PID namespace."""
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def inside(self, command: Sequence[str]) -> list[str]:
        """The command line that runs `command` on this node."""
        spaces = ["--pid", "--mount", "--uts", "--ipc", "--net"]
        return [*_DIE_WITH_US, "nsenter", f"--target={self.init}", *spaces, "--wdns=/", "--", *command]

    def start(
        self,
        command: Sequence[str],
        *,
        log: Path,
        environment: Mapping[str, str] | None = None,
        folder: Path | None = None,
    ) -> subprocess.Popen[bytes]:
        """Start a command on this node; its output is appended to `log`. It ends with the node."""
        changed = ["env", "-C", str(folder or log.parent), *command]
        with log.open("ab") as output:
            process = subprocess.Popen(
                self.inside(changed),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=dict(os.environ if environment is None else environment),
            )
        self.started.append(process)
        return process

    def run(self, *command: str, timeout_s: float = _WAIT_S) -> subprocess.CompletedProcess[str]:
        """Run a short command on this node to its end."""
        return subprocess.run(self.inside(command), capture_output=True, text=True, timeout=timeout_s)

    def kill(self, needle: str) -> list[int]:
        """SIGKILL each worker of a job: processes whose command line holds `needle`, but not their launcher."""
        found = [pid for pid, command in self.processes().items() if needle in command and " run " not in command]
        for pid in found:
            os.kill(pid, signal.SIGKILL)
        assert found, f"{self.name} has no process with {needle}: {self.processes()}"
        return found

    def seen_as(self, pid: int) -> int:
        """Our number of the process that the node itself calls `pid`; 0 where there is none."""
        for ours in self.processes():
            with contextlib.suppress(OSError):
                status = Path(f"/proc/{ours}/status").read_text()
                if f"\t{pid}\n" in next(line + "\n" for line in status.splitlines() if line.startswith("NSpid:")):
                    return ours
        return 0

    @property
    def is_on(self) -> bool:
        """Whether its init lives."""
        return self.process.poll() is None

    def processes(self) -> dict[int, str]:
        """Living processes of the node without its init: their numbers on our side, and command lines."""
        found = {}
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and os.readlink(entry / "ns" / "pid") == self.pid_space:
                    found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
        return {pid: command for pid, command in found.items() if pid != self.init and command != _IDLE}


class Cluster:
    """Nodes ``n0``, ``n1``, ... on one bridge. A context manager: at its end nothing of them is left.

    Args:
        num_nodes: powered on at the start.
        root: a folder that all nodes see under the same path: the shared storage.
        shm_bytes: shared memory of each node.
        rate: most bandwidth of each node's link in both directions, as ``tc`` writes it ("400mbit"); None: no limit.
    """

    def __init__(self, num_nodes: int, root: Path, *, shm_bytes: int = 512 << 20, rate: str | None = None) -> None:
        self.root = root.resolve()
        self.nodes: list[Node] = []
        self._num_nodes, self._shm_bytes, self._rate = num_nodes, shm_bytes, rate
        self._links = 0
        self._switch: subprocess.Popen[bytes] | None = None
        self._switch_pid = 0

    def __enter__(self) -> Cluster:
        self.root.mkdir(parents=True, exist_ok=True)
        self._hosts = self.root / "hosts"
        self._hosts.write_text("127.0.0.1 localhost\n" + "".join(f"{address_of(i)} n{i}\n" for i in range(100)))
        self._switch = subprocess.Popen([*_DIE_WITH_US, *_NEW, "sleep", "infinity"])
        try:
            self._switch_pid = _child_of(self._switch)
            self._in_switch("link", "add", "bridge0", "type", "bridge")
            self._in_switch("link", "set", "bridge0", "up")
            for _ in range(self._num_nodes):
                self.add()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Power off everything, and wait until it is gone."""
        for node in self.nodes:
            self._kill(node)
        if self._switch is not None:
            self._switch.kill()
            self._switch.wait(_WAIT_S)

    # --- power

    def add(self) -> Node:
        """Power on one more node."""
        return self._boot(len(self.nodes))

    def replace(self, node: Node) -> Node:
        """Power on a machine with the name and address of a node that is off; its memory is empty."""
        assert not node.is_on, f"{node.name} is on"
        return self._boot(self.nodes.index(node))

    def power_off(self, *nodes: Node) -> None:
        """Take the links down first, so that no packet gets out, then every process and all memory at once."""
        for node in nodes:
            self.cut(node)
        for node in nodes:
            os.kill(node.init, signal.SIGKILL)
            for pid in node.processes():  # init takes them along, but only after it has let go of its namespaces
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        for node in nodes:
            self._kill(node)

    def cut(self, node: Node) -> None:
        """Pull the cable: the node lives on and hears nobody."""
        self._in_switch("link", "set", node.link, "down")

    def heal(self, node: Node) -> None:
        """Put the cable in again."""
        self._in_switch("link", "set", node.link, "up")

    # --- inside

    def _boot(self, number: int) -> Node:
        name, stage = f"n{number}", Path(tempfile.mkdtemp(prefix="stage-", dir=self.root))
        up = self.root / f"up-{name}"
        up.unlink(missing_ok=True)
        init = ["bash", "-c", _INIT, "init", str(stage), str(self.root), str(self._hosts), name, str(self._shm_bytes)]
        spaces = ["--pid", "--mount", "--uts", "--ipc", "--mount-proc"]
        with (self.root / f"init-{name}.txt").open("ab") as log:
            process = subprocess.Popen([*_DIE_WITH_US, *_NEW, *spaces, *init, *map(str, self._kept())], stderr=log)
        self._links += 1
        node = Node(name, address_of(number), f"link{self._links}", process, 0)
        self.nodes[number : number + 1] = [node]
        node.init = _child_of(process)
        node.pid_space = os.readlink(f"/proc/{node.init}/ns/pid")
        self._plug(node)
        _wait_until(up.exists, f"{name} to be up")
        up.unlink()
        stage.rmdir()
        return node

    def _kept(self) -> list[Path]:
        """What a node's own /tmp shows of ours, none within another."""
        wanted = {self.root, REPOSITORY, Path(sys.prefix), Path(sys.base_prefix), *_python_path()}
        hidden = sorted(path for path in wanted if path.is_relative_to("/tmp"))
        return [path for path in hidden if not any(path != other and path.is_relative_to(other) for other in hidden)]

    def _plug(self, node: Node) -> None:
        # The hardware address goes with the name: else neighbours would send to the lost machine for a while.
        card = f"02:00:00:00:00:{self.nodes.index(node) + 1:02x}"
        peer = ["peer", "name", "eth0", "address", card, "netns", str(node.init)]
        self._in_switch("link", "add", node.link, "type", "veth", *peer)
        if self._rate is not None:
            shape = ["root", "tbf", "rate", self._rate, "burst", "256kb", "latency", "50ms"]
            self._run(["tc", "qdisc", "add", "dev", node.link, *shape], self._switch_pid)
            self._run(["tc", "qdisc", "add", "dev", "eth0", *shape], node.init)
        self._in_switch("link", "set", node.link, "master", "bridge0", "up")
        self._run(["ip", "link", "set", "lo", "up"], node.init)
        self._run(["ip", "addr", "add", f"{node.address}/24", "dev", "eth0"], node.init)
        self._run(["ip", "link", "set", "eth0", "up"], node.init)

    def _in_switch(self, *arguments: str) -> None:
        self._run(["ip", *arguments], self._switch_pid)

    @staticmethod
    def _run(command: Sequence[str], pid: int) -> None:
        """In the network namespace of a process."""
        done = subprocess.run(
            ["nsenter", f"--target={pid}", "--net", "--", *command], capture_output=True, text=True, timeout=_WAIT_S
        )
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr.strip()}"

    @staticmethod
    def _kill(node: Node) -> None:
        """The kernel ends all processes of a PID namespace with its init."""
        node.process.kill()
        node.process.wait(_WAIT_S)
        for process in node.started:
            if process.poll() is None:
                process.kill()
            process.wait(_WAIT_S)
        _wait_until(lambda: not Path(f"/proc/{node.init}").exists(), f"the end of {node.name}")


def address_of(number: int) -> str:
    """Of the node with this number, within its cluster."""
    return f"10.0.0.{number + 1}"


def _python_path() -> list[Path]:
    return [Path(entry) for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]


def _child_of(process: subprocess.Popen[bytes]) -> int:
    """The only child of a process, once there is one."""
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")

    def children() -> list[int]:
        assert process.poll() is None, f"{process.args} ended with {process.returncode}"
        return [int(pid) for pid in path.read_text().split()]

    _wait_until(lambda: children(), f"a child of {process.args}")
    return children()[0]


def _wait_until(condition: object, what: str) -> None:
    assert callable(condition)
    deadline = time.monotonic() + _WAIT_S
    while not condition():
        assert time.monotonic() < deadline, f"waited {_WAIT_S} s for {what}"
        time.sleep(0.005)


@contextlib.contextmanager
def cluster_of(num_nodes: int, root: Path, **options: object) -> Iterator[Cluster]:
    """A cluster for a test; the test is skipped, with the reason in one line, where there can be none."""
    import pytest

    if (reason := why_impossible()) is not None:
        pytest.skip(reason)
    with Cluster(num_nodes, root, **options) as cluster:  # type: ignore[arg-type]
        yield cluster
