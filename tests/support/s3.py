"""A real S3 server on loopback (moto's), and a proxy before it that makes requests fail as networks and stores do."""

from __future__ import annotations

import http.client
import logging
import re
import socket
import struct
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import unquote

Kind = Literal["500", "503", "429", "403", "reset", "lost", "cut", "slow"]
"""An answer of that status instead of the store's; the connection reset before the store hears of the request, or
(lost) after it has carried it out; the answer cut off in its middle; the answer late."""
_BODIES = {"503": b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"}


@dataclass
class Rule:
    """The next `times` requests of `method` whose path contains `path` (query included) meet `kind`."""

    kind: Kind
    method: str = ""
    path: str = ""
    times: int = 1
    fired: int = 0


class Together:
    """Holds requests back until so many have come; from then on none."""

    def __init__(self, count: int, timeout_s: float = 120.0) -> None:
        self._left = threading.Semaphore(count - 1)
        self._met = threading.Event()
        self._timeout_s = timeout_s
        self.arrived = threading.Semaphore(0)
        """Released once by each."""
        self.broken = False
        """One has waited in vain."""

    def wait(self) -> None:
        """Wait for the others."""
        self.arrived.release()
        if not self._left.acquire(blocking=False):
            self._met.set()
        elif not self._met.wait(self._timeout_s):
            self.broken = True


@dataclass
class S3:
    """The server behind its proxy."""

    server_port: int
    proxy_port: int
    rules: list[Rule] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    """Method and path of all that passed the proxy; of a deletion the keys, too."""
    got: Counter[str] = field(default_factory=Counter)
    """Bytes that were read of each object."""
    slow_s: float = 0.3
    together: Together | None = None
    """Holds reads of large ranges."""

    def environment(self) -> dict[str, str]:
        """How obstore finds it."""
        return {
            "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1",
            "AWS_ALLOW_HTTP": "true", "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.proxy_port}",
        }  # fmt: skip

    def make_bucket(self, name: str) -> str:
        """Make one; its URL."""
        url = f"http://127.0.0.1:{self.server_port}/{name}"
        urllib.request.urlopen(urllib.request.Request(url, method="PUT"), timeout=120).close()
        return f"s3://{name}"

    def uploads(self, bucket: str) -> bytes:
        """What the server says of multipart uploads that are under way."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.server_port}/{bucket}?uploads", timeout=120) as answer:
            return bytes(answer.read())

    def fail(self, kind: Kind, method: str = "", path: str = "", times: int = 1) -> Rule:
        """Make coming requests fail; the rule counts how many did."""
        self.rules.append(Rule(kind, method, path, times))
        return self.rules[-1]

    def got_of(self, prefix: str, suffix: str) -> int:
        """Bytes that were read of objects below a URL whose names end so."""
        below = prefix.partition("://")[2]
        return sum(size for path, size in self.got.items() if path.startswith(below) and path.endswith(suffix))

    def take(self, method: str, path: str, body: bytes) -> Kind | None:
        """What a request meets; called by the proxy."""
        keys = re.findall(r"<Key>(.*?)</Key>", body.decode()) if path.endswith("?delete") else []
        self.requests.append(" ".join([method, path, *keys]))
        for rule in self.rules:
            if rule.times > rule.fired and rule.method in ("", method) and rule.path in path:
                rule.fired += 1
                return rule.kind
        return None


@contextmanager
def s3_server() -> Iterator[S3]:
    """Both servers, each in a thread of its own, on ports that the system chooses."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    proxy = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    proxy.daemon_threads = True
    proxy.s3 = S3(server.get_host_and_port()[1], proxy.server_address[1])  # type: ignore[attr-defined]
    thread = threading.Thread(target=proxy.serve_forever, name="s3-proxy", daemon=True)
    thread.start()
    try:
        yield proxy.s3  # type: ignore[attr-defined]
    finally:
        proxy.shutdown()
        proxy.server_close()
        thread.join(60)
        server.stop()


def _range_bytes(header: str | None) -> int:
    found = re.fullmatch(r"bytes=(\d+)-(\d+)", header or "")
    return int(found[2]) - int(found[1]) + 1 if found else 0


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def _handle(self) -> None:
        s3: S3 = self.server.s3  # type: ignore[attr-defined]
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        kind = s3.take(self.command, self.path, body)
        if s3.together is not None and _range_bytes(self.headers.get("Range")) >= 1 << 20:
            s3.together.wait()
        if kind == "reset":
            self._reset()
        elif kind in ("500", "503", "429", "403"):
            self._answer(int(kind), _BODIES.get(kind, b""), {})
        else:
            status, headers, data = self._ask(s3.server_port, body)
            if self.command == "GET" and status < 300:
                s3.got[unquote(self.path.lstrip("/").partition("?")[0])] += len(data)
            if kind == "slow":
                time.sleep(s3.slow_s)
            if kind == "lost":
                self._reset()
            else:
                self._answer(status, data, headers, cut=kind == "cut")

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _handle

    def _ask(self, port: int, body: bytes) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        try:
            connection.request(self.command, self.path, body, dict(self.headers.items()))
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()
        finally:
            connection.close()

    def _answer(self, status: int, data: bytes, headers: dict[str, str], *, cut: bool = False) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in ("content-length", "connection", "transfer-encoding"):
                self.send_header(name, value)
        length = headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(data))
        self.send_header("Content-Length", length)
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            self._reset()

    def _reset(self) -> None:
        """Close with RST."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RD)
        self.connection.close()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""

    def finish(self) -> None:
        try:
            super().finish()
        except (OSError, ValueError):
            return  # reset on purpose
