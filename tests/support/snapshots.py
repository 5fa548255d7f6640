"""Nodes for tests of the snapshot tier: real daemons, an agent played by the test, workers without torch."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import msgspec
import zmq

from holdfast.checkpoint.version import GenerationId
from holdfast.environment import WorkerEnvironment
from holdfast.snapshot.control import ControlPage
from holdfast.snapshot.messages import (
    Ack,
    AnyMessage,
    EndGeneration,
    Hello,
    Progress,
    StartGeneration,
    Welcome,
    decode,
    encode,
)
from holdfast.snapshot.records import Member
from support.snapshot_worker import Plan

if TYPE_CHECKING:
    import pytest  # benchmarks do without it

M = TypeVar("M")
TIMEOUT_S = 240.0
WORKER = Path(__file__).with_name("snapshot_worker.py")


def wait_for(condition: Callable[[], object], what: str, timeout_s: float = TIMEOUT_S, step_s: float = 0.005) -> None:
    """Wait until `condition` holds; it is looked at every `step_s`."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s} s until {what}"
        time.sleep(step_s)


def changed(patch: pytest.MonkeyPatch, folder: Path, code: str) -> None:
    """Daemons that are started now run `code` first."""
    (folder / "sitecustomize.py").write_text(code)
    patch.setenv("PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]))


class Worker:
    """A worker process; what it printed."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.events: list[dict[str, object]] = []

    def wait(self, timeout_s: float = TIMEOUT_S) -> list[dict[str, object]]:
        """Its events, when it has ended."""
        out, _ = self.process.communicate(timeout=timeout_s)
        self.events += [json.loads(line) for line in out.splitlines()]
        return self.events

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.wait()

    def event(self, name: str) -> dict[str, object]:
        """The first event of that name."""
        found = [event for event in self.events if event["event"] == name]
        assert found, f"no event {name} in {self.events}"
        return found[0]


class Node:
    """One node: its daemon, and an agent's side of the connection."""

    def __init__(self, name: str) -> None:
        self.arena = Path(f"/dev/shm/holdfast-test-{os.getpid()}-{name}")
        self.sockets = Path(tempfile.mkdtemp(prefix="hfs-", dir="/tmp"))
        self.daemon: subprocess.Popen[bytes] | None = None
        self.workers: list[Worker] = []
        self.pushed: list[AnyMessage] = []
        self.endpoint = ""
        self._context = zmq.Context()
        self._socket: zmq.Socket[bytes] | None = None

    # --- the daemon and the agent

    def start_daemon(self) -> None:
        self.daemon = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "holdfast.snapshot.daemon",
                f"--arena={self.arena}",
                f"--socket-dir={self.sockets}",
                "--key=test",
                "--seat=0",
            ],
            start_new_session=True,
        )

    def hello(
        self,
        *,
        agent_pid: int | None = None,
        linger_s: float = 600.0,
        limit: int | None = None,
        redundancy: str = "auto",
        bandwidth: float = 0.0,
    ) -> Welcome:
        """Connect as the agent (anew)."""
        if self._socket is not None:
            self._socket.close(0)
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.connect(f"ipc://{self.sockets / 'daemon.sock'}")
        hello = Hello(
            agent_pid=agent_pid or os.getpid(),
            linger_s=linger_s,
            memory_limit_bytes=limit,
            redundancy=redundancy,
            bandwidth=bandwidth,
        )
        welcome = self.ask(hello, Welcome)
        self.endpoint = welcome.daemon
        return welcome

    def send(self, message: AnyMessage) -> None:
        assert self._socket is not None
        self._socket.send(encode(message))

    def ask(self, message: AnyMessage, answer: type[M], timeout_s: float = TIMEOUT_S) -> M:
        """Send and wait for the answer; what else comes is in `pushed`."""
        self.send(message)
        return self.expect(answer, timeout_s)

    def expect(
        self, kind: type[M], timeout_s: float = TIMEOUT_S, where: Callable[[M], bool] = lambda message: True
    ) -> M:
        """The next message of that kind."""
        assert self._socket is not None
        deadline = time.monotonic() + timeout_s
        while True:
            left = deadline - time.monotonic()
            assert left > 0, f"no {kind.__name__} came; last: {self.pushed[-5:]}"
            if self._socket.poll(round(left * 1000) + 1):
                message = decode(self._socket.recv())
                self.pushed.append(message)
                if isinstance(message, kind) and where(message):
                    return message

    def complete(self, step: int) -> Progress:
        """Wait until a version of at least `step` is complete."""
        return self.expect(Progress, where=lambda message: message.version.step >= step)

    @property
    def newest_complete(self) -> int:
        """Step of the newest complete version that the daemon has told of so far."""
        assert self._socket is not None
        while self._socket.poll(0):
            self.pushed.append(decode(self._socket.recv()))
        return max(message.version.step for message in self.pushed if isinstance(message, Progress))

    def kill_daemon(self) -> None:
        assert self.daemon is not None
        self.daemon.kill()
        self.daemon.wait()

    # --- workers

    def worker(
        self,
        plan: Plan,
        generation: GenerationId,
        *,
        rank: int,
        local_rank: int,
        node_rank: int,
        world: int,
        local: int,
    ) -> Worker:
        environment = WorkerEnvironment(
            daemon=f"ipc://{self.sockets / 'daemon.sock'}",
            arena=self.arena,
            run_dir=self.sockets,
            run_id="run",
            generation=generation,
            global_rank=rank,
            local_rank=local_rank,
            node_rank=node_rank,
            world_size=world,
            local_world_size=local,
        )
        torchrun = {
            "RANK": rank,
            "LOCAL_RANK": local_rank,
            "GROUP_RANK": node_rank,
            "WORLD_SIZE": world,
            "LOCAL_WORLD_SIZE": local,
        }
        variables = {**os.environ, **environment.variables(), **{key: str(value) for key, value in torchrun.items()}}
        paths = [str(WORKER.parent.parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        worker = Worker(
            subprocess.Popen(
                [sys.executable, str(WORKER), msgspec.json.encode(plan).decode()],
                env=variables,
                stdout=subprocess.PIPE,
                text=True,
            )
        )
        self.workers.append(worker)
        return worker

    def page(self) -> ControlPage:
        return ControlPage.open(self.arena / "control")

    def close(self) -> None:
        """End what still runs; the test asserts on its own what should be gone."""
        for worker in self.workers:
            if worker.process.poll() is None:
                worker.process.kill()
            worker.process.communicate()
        if self.daemon is not None and self.daemon.poll() is None:
            self.daemon.kill()
            self.daemon.wait()
        if self._socket is not None:
            self._socket.close(0)
        self._context.term()
        shutil.rmtree(self.arena, ignore_errors=True)
        shutil.rmtree(self.sockets, ignore_errors=True)

    def assert_gone(self) -> None:
        """The daemon has ended by itself and left nothing."""
        assert self.daemon is not None
        assert self.daemon.wait(TIMEOUT_S) == 0
        assert not self.arena.exists()
        assert not self.sockets.exists()


class Job:
    """Generations over some nodes, `local` ranks each."""

    def __init__(self, nodes: Sequence[Node], local: int, *, incarnation: int = 1, nonce: str = "0badcafe") -> None:
        self.nodes, self.local = nodes, local
        self.incarnation, self.nonce, self.number = incarnation, nonce, 0
        self.workers: list[Worker] = []

    @property
    def world(self) -> int:
        return len(self.nodes) * self.local

    @property
    def generation(self) -> GenerationId:
        return GenerationId(incarnation=self.incarnation, nonce=self.nonce, generation=self.number)

    def start(self, *plans: Plan, fresh: bool | None = None) -> list[Worker]:
        """The next generation; one plan for all ranks, or one each."""
        self.number += 1
        members = tuple(
            Member(node_rank=index, daemon=node.endpoint, first_global_rank=index * self.local, num_ranks=self.local)
            for index, node in enumerate(self.nodes)
        )
        for index, node in enumerate(self.nodes):
            message = StartGeneration(
                generation=self.generation,
                run_id="run",
                members=members,
                node_rank=index,
                leader=0,
                fresh=self.number == 1 if fresh is None else fresh,
            )
            node.ask(message, Ack)
        all_plans = plans if len(plans) == self.world else plans * self.world
        self.workers = [
            self.nodes[rank // self.local].worker(
                all_plans[rank],
                self.generation,
                rank=rank,
                local_rank=rank % self.local,
                node_rank=rank // self.local,
                world=self.world,
                local=self.local,
            )
            for rank in range(self.world)
        ]
        return self.workers

    def restart(self, nodes: Sequence[Node], *plans: Plan) -> list[Worker]:
        """The next generation, over other nodes."""
        self.nodes = nodes
        return self.start(*plans)

    def end(self, *, tell: bool = True) -> None:
        """Kill what is left of the generation, as an agent does; `tell` the daemons that it has ended."""
        for worker in self.workers:
            worker.kill()
        for node in self.nodes if tell else ():
            node.ask(EndGeneration(generation=self.generation), Ack)

    def finish(self) -> list[Worker]:
        """Wait for a normal end of all workers."""
        for worker in self.workers:
            worker.wait()
            assert worker.process.returncode == 0, worker.events
        for node in self.nodes:
            node.ask(EndGeneration(generation=self.generation), Ack)
        return self.workers
