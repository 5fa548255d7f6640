"""This node's snapshot daemon, seen from its agent: started, adopted, restarted when it dies, shut down at the end.

The daemon lives in a session of its own and outlives the agent on purpose (it lingers, see ``--hold-linger``); the next
agent on the seat adopts it. Replies come in the order of requests; everything else that the daemon sends is pushed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import socket as sockets
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

import zmq

from holdfast.errors import PeerError
from holdfast.launcher.console import say
from holdfast.launcher.seats import Seat
from holdfast.launcher.wire import DaemonInfo
from holdfast.snapshot.messages import (
    Ack,
    AnyMessage,
    Bye,
    Hello,
    Refused,
    Shutdown,
    StartGeneration,
    Welcome,
    decode,
    encode,
)

logger = logging.getLogger(__name__)

SOCKET_NAME = "daemon.sock"
MAX_DEATHS = 5
"""A daemon that died that often within `DEATHS_WITHIN_S` is not started again."""
DEATHS_WITHIN_S = 60.0
ANSWER_S = 30.0
"""How long a daemon may be silent when a generation is named, or when it is to go and has nothing to write."""
_REPLIES = (Ack, Bye, Refused, Welcome)


@dataclass(frozen=True)
class DaemonDied:
    """Stands among the received messages when the process has ended."""

    pid: int
    exit_code: int | None


class Patience:
    """What is done about a daemon that lives and does not answer (it is stopped, or waits in the kernel). Pure.

    It is killed once, as its successor finds the same memory; where that brings no answer either it is given up.
    """

    def __init__(self) -> None:
        self._until: float | None = None
        self._killed = False

    def asked(self, now: float, *, again: bool = False) -> None:
        """A question went out; `again`: to the successor of one that was killed for its silence, or died."""
        self._until = now + ANSWER_S
        self._killed = self._killed and again

    def answered(self) -> None:
        """It has answered."""
        self._until = None

    def spent(self, now: float) -> Literal["", "kill", "give up"]:
        """What is to be done now; each once."""
        if self._until is None or now < self._until:
            return ""
        self._until = None if self._killed else now + ANSWER_S
        action: Literal["kill", "give up"] = "give up" if self._killed else "kill"
        self._killed = True
        return action


class DaemonLink:
    """See the module's head. Used by the agent's main thread only."""

    def __init__(
        self,
        seat: Seat,
        context: zmq.Context[zmq.Socket[bytes]],
        *,
        run_dir: Path,
        address: str,
        linger_s: float,
        memory_limit_bytes: int | None,
        redundancy: str = "auto",
        domain: str = "",
        bandwidth: float = 0.0,
    ) -> None:
        """Nothing is started here.

        Args:
            seat: whose directory and arena the daemon uses.
            context: of the agent's sockets.
            run_dir: where its log goes.
            address: at which other nodes reach it.
            linger_s: how long it waits for a new agent.
            memory_limit_bytes: most memory for its arena, None: what the node has.
            redundancy: how nodes protect each other's snapshots.
            domain: failure domain of this node, "": its host.
            bandwidth: most bytes per second that protecting them sends, 0: no limit.
        """
        self._redundancy, self._domain, self._bandwidth = redundancy, domain, bandwidth
        self._address = address
        self._seat = seat
        self._context = context
        self._run_dir = run_dir
        self._linger_s = linger_s
        self._memory_limit_bytes = memory_limit_bytes
        self._process: subprocess.Popen[bytes] | None = None
        self._deaths: deque[float] = deque(maxlen=MAX_DEATHS)
        self._pending: deque[type[AnyMessage]] = deque()
        self._patience = Patience()
        self._generation: StartGeneration | None = None
        self.socket: zmq.Socket[bytes] | None = None
        self.pid = 0
        self.pidfd: int | None = None
        self.adopted = False
        self.welcome: Welcome | None = None
        self.acked: StartGeneration | None = None
        """The generation that the daemon has confirmed."""

    @property
    def endpoint(self) -> str:
        """ipc:// endpoint for this node's workers."""
        return f"ipc://{self._seat.directory / SOCKET_NAME}"

    @property
    def log_path(self) -> Path:
        """Where the daemon's own output goes."""
        return self._run_dir / f"daemon-{self._seat.number}.log"

    @property
    def info(self) -> DaemonInfo:
        """What other nodes are told."""
        if self.welcome is None:
            return DaemonInfo()
        return DaemonInfo(
            endpoint=self.welcome.daemon,
            newest_incarnation=self.welcome.newest_incarnation,
            run_id=self.welcome.run_id,
        )

    # --- life

    def start(self) -> None:
        """Adopt the daemon that lingers on this seat, or start one; greet it. Does not wait.

        Raises:
            OSError: no process can be started.
        """
        self._seat.directory.mkdir(mode=0o700, exist_ok=True)
        self.adopted = _answers(self._seat.directory / SOCKET_NAME)
        if not self.adopted:
            with contextlib.suppress(FileNotFoundError):
                (self._seat.directory / SOCKET_NAME).unlink()
            self._spawn()
        self._connect()

    def _spawn(self) -> None:
        command = [sys.executable, "-m", "holdfast.snapshot.daemon", "--arena", str(self._seat.arena)]
        command += ["--socket-dir", str(self._seat.directory), "--key", self._seat.key]
        command += ["--seat", str(self._seat.number), "--address", self._address]
        with _opened(self.log_path) as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                cwd="/",
            )
        self._watch(self._process.pid)

    def _watch(self, pid: int) -> None:
        self._unwatch()
        with contextlib.suppress(ProcessLookupError):
            self.pidfd = os.pidfd_open(pid)
            self.pid = pid

    def _unwatch(self) -> None:
        if self.pidfd is not None:
            os.close(self.pidfd)
        self.pidfd = None
        self.pid = 0

    def _connect(self) -> None:
        self._disconnect()
        self.socket = self._context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.RECONNECT_IVL, 10)
        self.socket.connect(self.endpoint)
        self._request(
            Hello(
                agent_pid=os.getpid(),
                linger_s=self._linger_s,
                memory_limit_bytes=self._memory_limit_bytes,
                redundancy=self._redundancy,
                domain=self._domain,
                bandwidth=self._bandwidth,
            ),
            Welcome,
        )

    def _disconnect(self) -> None:
        if self.socket is not None:
            self.socket.close(linger=0)
        self.socket = None
        self._pending.clear()
        self.welcome = None
        self.acked = None

    def wait_welcome(self, timeout_s: float) -> None:
        """Wait until the daemon has answered; pushed messages that come before are dropped.

        Raises:
            PeerError: it died or stayed silent; the message holds the end of its log.
        """
        deadline = time.monotonic() + timeout_s
        while self.welcome is None:
            remaining = deadline - time.monotonic()
            died = remaining > 0 and any(isinstance(message, DaemonDied) for message in self.receive(remaining))
            if died and self.adopted:  # it was about to leave
                self._unwatch()
                self.start()
            elif died or remaining <= 0:
                raise PeerError(f"the snapshot daemon did not start: {self.last_words()}")

    def last_words(self) -> str:
        """The last line of the daemon's log."""
        try:
            lines = self.log_path.read_text(errors="replace").strip().splitlines()
        except OSError:
            lines = []
        return lines[-1] if lines else "it said nothing"

    def died(self, now: float) -> bool:
        """The process has ended: start another one, and tell it the generation again. False: none can be had."""
        self._deaths.append(now)
        self._unwatch()
        self._disconnect()
        if len(self._deaths) == MAX_DEATHS and now - self._deaths[0] < DEATHS_WITHIN_S:
            return False
        try:
            self.start()
        except OSError as error:
            logger.warning("no snapshot daemon can be started: %s", error)
            return False
        if self._generation is not None:
            self._patience.asked(now, again=True)
            self._request(self._generation, Ack)
        return True

    def lost_patience(self, now: float) -> bool:
        """Whether the daemon is to be given up; one that was only just found silent is killed: `DaemonDied` follows."""
        action = self._patience.spent(now)
        if action == "kill" and self.pid:
            say(f"snapshot daemon {self.pid} has not answered for {ANSWER_S:g} s: another one takes its place")
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
        return action == "give up"

    # --- messages

    def send(self, message: AnyMessage) -> None:
        """Send something that is not answered, or whose answer does not matter beyond an error."""
        if self.socket is not None:
            with contextlib.suppress(zmq.Again):
                self.socket.send(encode(message), zmq.NOBLOCK)

    def _request(self, message: AnyMessage, answer: type[AnyMessage]) -> None:
        self._pending.append(answer)
        self.send(message)

    def start_generation(self, message: StartGeneration) -> None:
        """Name the generation; `acked` becomes `message` once the daemon has fenced the older ones."""
        self._generation = message
        self._patience.asked(time.monotonic())
        self._request(message, Ack)

    def request(self, message: AnyMessage) -> None:
        """Send something that is answered with `Ack` or `Refused`."""
        self._request(message, Ack)

    def receive(self, timeout_s: float = 0.0) -> list[AnyMessage | DaemonDied]:
        """What the daemon pushed, `Refused` answers included, and `DaemonDied` at its end."""
        messages: list[AnyMessage | DaemonDied] = []
        if self.socket is None:
            return messages
        poller = zmq.Poller()
        poller.register(self.socket, zmq.POLLIN)
        if self.pidfd is not None:
            poller.register(self.pidfd, zmq.POLLIN)
        ready = dict(poller.poll(round(timeout_s * 1000)))
        while True:
            try:
                message = decode(self.socket.recv(zmq.NOBLOCK))
            except zmq.Again:
                break
            except PeerError:
                continue  # counted by the daemon's own log; nothing here depends on it
            if self._take_reply(message):
                messages.append(message)
        if self.pidfd in ready:
            messages.append(DaemonDied(self.pid, self._reap()))
        return messages

    def _take_reply(self, message: AnyMessage) -> bool:
        """Match a reply with its request; True where the agent has to see the message."""
        if not isinstance(message, _REPLIES):
            return True
        if self._pending:
            self._pending.popleft()
        if isinstance(message, Welcome):
            self.welcome = message
            self._watch(message.pid)
            return False
        if isinstance(message, Ack):
            self.acked = self._generation
        if isinstance(message, Ack | Refused):
            self._patience.answered()
        return isinstance(message, Bye | Refused)

    def _reap(self) -> int | None:
        if self._process is None or self._process.pid != self.pid:
            return None
        return self._process.wait(timeout=5)

    # --- end

    def shut_down(self, *, persist: bool) -> None:
        """Ask the daemon to end; it answers with `Bye`."""
        self._generation = None
        self._patience.answered()
        self._request(Shutdown(persist=persist), Bye)

    def finish(self, timeout_s: float) -> None:
        """Wait for the process to end (killed after the limit), then remove what it may have left."""
        if self.pidfd is not None:
            poller = zmq.Poller()
            poller.register(self.pidfd, zmq.POLLIN)
            if not poller.poll(round(timeout_s * 1000)):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.pid, signal.SIGKILL)
                poller.poll(round(timeout_s * 1000))
            self._reap()
        self._unwatch()
        self._disconnect()
        shutil.rmtree(self._seat.arena, ignore_errors=True)

    def let_go(self) -> None:
        """Stop talking to a daemon that cannot be used; what it kept in memory stays for a later run."""
        if self.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGTERM)
        self._unwatch()
        self._disconnect()


def _opened(log: Path) -> IO[bytes]:
    """The log of a daemon; where it cannot be had (its directory was removed, the disk is full) nobody reads it."""
    try:
        return log.open("ab")
    except OSError as error:
        logger.warning("%s cannot be written: %s", log, error)
        return open(os.devnull, "ab")


def _answers(path: Path) -> bool:
    """Whether a process listens on the socket file."""
    try:
        with sockets.socket(sockets.AF_UNIX, sockets.SOCK_STREAM) as probe:
            probe.settimeout(1.0)
            probe.connect(str(path))
    except OSError:
        return False
    return True
