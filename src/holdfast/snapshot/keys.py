"""Keys of a job, all derived from its token: who has the token is of the job, nobody else is.

The token (HOLDFAST_TOKEN, or the file that ``--hold-job-token-file`` names) gives one CURVE key pair for all processes
of the job (RFC 26/CurveZMQ; a server takes only clients that have the same pair) and one key for tags of bulk data.

A *tag* is a one-time Poly1305 (RFC 8439) where libsodium is at hand, which runs at several GB/s, else HMAC-SHA256. Its
key is derived from the job's key and the request that the data answers; requests carry a random nonce, so no key is
used twice and no answer fits another request. Without a token the tag is xxh3_128 of the data: it notices flipped bits,
not enemies.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import hmac
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, Protocol

import xxhash
import zmq
import zmq.utils.z85

from holdfast.errors import UsageError

POLY1305: Final = "poly1305"
HMAC: Final = "hmac-sha256"
XXH3: Final = "xxh3"
_MIN_TOKEN: Final = 16
_TAG_BYTES: Final = 16
_KNOWN_TAG: Final = bytes.fromhex("0c2f71383f5021c0fd57b20c67c11b76")
"""Of b"holdfast" under the key 0, 1, ... 31."""

Buffer = bytes | bytearray | memoryview


class Tagger(Protocol):
    """Makes tags of one kind. This method is the whole surface; any thread calls it."""

    def __call__(self, key: bytes, data: Buffer) -> bytes:
        """The tag of `data` under a one-time `key` of 32 bytes."""
        ...


class JobKeys:
    """What the token gives. Immutable; any thread.

    Args:
        token: the job's token, "" where there is none.
        encrypt_all: bulk data goes through CURVE too.

    Raises:
        UsageError: the token is too short, or this ZeroMQ has no CURVE.
    """

    def __init__(self, token: str = "", *, encrypt_all: bool = False) -> None:
        self.encrypt_all = encrypt_all and bool(token)
        self._bulk = b""
        self._public = self._secret = b""
        if not token:
            return
        if len(token) < _MIN_TOKEN:
            raise UsageError(f"the job token has {len(token)} characters: give at least {_MIN_TOKEN}")
        if not zmq.has("curve"):
            raise UsageError("this ZeroMQ was built without CURVE: install pyzmq from its wheels, or run without token")
        self._bulk = _derive(token, "bulk")
        self._secret = zmq.utils.z85.encode(_derive(token, "curve"))
        self._public = zmq.curve_public(self._secret)

    @property
    def secret(self) -> bool:
        """Whether there is a token."""
        return bool(self._bulk)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of tags that this process can check, best first."""
        if not self._bulk:
            return (XXH3,)
        return (POLY1305, HMAC) if _poly1305() is not None else (HMAC,)

    def serve(self, socket: zmq.Socket[bytes]) -> None:
        """Make `socket` a CURVE server; `Gate` must run in its context. Nothing without a token."""
        if self._public:
            socket.curve_publickey, socket.curve_secretkey = self._public, self._secret
            socket.curve_server = True

    def dial(self, socket: zmq.Socket[bytes]) -> None:
        """Make `socket` a CURVE client. Nothing without a token."""
        if self._public:
            socket.curve_publickey, socket.curve_secretkey = self._public, self._secret
            socket.curve_serverkey = self._public

    def admits(self, public: bytes) -> bool:
        """Whether a client with that public key (32 raw bytes) is of the job."""
        return bool(self._public) and hmac.compare_digest(zmq.utils.z85.encode(public), self._public)

    def sign(self, request: Buffer) -> bytes:
        """Tag of a request; b"" without a token."""
        if not self._bulk:
            return b""
        return hashlib.blake2b(request, key=self._bulk, digest_size=_TAG_BYTES, person=b"request").digest()

    def tag(self, kind: str, request: Buffer, data: Buffer) -> bytes:
        """Tag of the data that answers `request` (its encoded bytes). Releases the interpreter lock.

        Raises:
            UsageError: this process cannot make tags of that kind.
        """
        if kind not in self.kinds:
            raise UsageError(f"tags of kind {kind!r} cannot be made here: {', '.join(self.kinds)} can")
        if kind == XXH3:
            return xxhash.xxh3_128_digest(data)
        key = hashlib.blake2b(request, key=self._bulk, digest_size=32, person=b"answer").digest()
        poly1305 = _poly1305()
        if kind == POLY1305 and poly1305 is not None:
            return poly1305(key, data)
        return hmac.digest(key, data, "sha256")[:_TAG_BYTES]

    def between_workers(self) -> Callable[[bytes, memoryview], bytes] | None:
        """Makes the tags of what workers send each other; None where they are to send nothing: all bulk data is to be
        encrypted, and they have no CURVE between them."""
        return None if self.encrypt_all else functools.partial(self.tag, self.kinds[0])

    def sound(self, kind: str, request: Buffer, data: Buffer, tag: Buffer) -> bool:
        """Whether `tag` is the tag of `data`."""
        return kind in self.kinds and hmac.compare_digest(self.tag(kind, request, data), bytes(tag))


class Gate:
    """Answers ZeroMQ's question (ZAP, RFC 27) whether a CURVE client may connect: one per context, polled by its owner.

    `socket` is readable when a question waits.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], keys: JobKeys) -> None:
        self._keys = keys
        self.refused = 0
        """Clients that were turned away."""
        self.socket = context.socket(zmq.REP)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.bind("inproc://zeromq.zap.01")

    def answer(self) -> None:
        """Answer the questions that wait."""
        while self.socket.poll(0):
            question = self.socket.recv_multipart()
            version, identity = question[0], question[1] if len(question) > 1 else b""
            good = len(question) == 7 and question[5] == b"CURVE" and self._keys.admits(question[6])
            self.refused += not good
            status = (b"200", b"OK") if good else (b"400", b"not of this job")
            self.socket.send_multipart([version, identity, *status, b"", b""])

    def close(self) -> None:
        """Close the socket."""
        self.socket.close(0)


def read_token(path: Path) -> str:
    """The token in a file, without white space around it.

    Raises:
        UsageError: it cannot be read, or others may read it.
    """
    try:
        mode = path.stat().st_mode
        text = path.read_text().strip()
    except OSError as error:
        raise UsageError(f"--hold-job-token-file {path}: {error.strerror}") from error
    if mode & 0o077:
        raise UsageError(f"--hold-job-token-file {path} can be read by others (mode {mode & 0o777:o}): chmod 600 it")
    return text


def _derive(token: str, purpose: str) -> bytes:
    """32 bytes. PBKDF2 makes guessing a weak token slow (RFC 8018); the purpose separates the keys."""
    return hashlib.blake2b(_stretched(token), digest_size=32, person=purpose.encode()).digest()


@functools.lru_cache(maxsize=2)
def _stretched(token: str) -> bytes:
    return hashlib.pbkdf2_hmac("sha256", token.encode(), b"holdfast job token", 10_000)


@functools.cache
def _poly1305() -> Tagger | None:
    """Poly1305 of libsodium: a system library, or the one in pyzmq's wheel; None where there is none."""
    for name in _sodium_candidates():
        try:
            library = ctypes.CDLL(name)
            function = library.crypto_onetimeauth_poly1305
            if library.sodium_init() < 0:
                continue
        except (OSError, AttributeError):
            continue
        tagger = _bind(function)
        if tagger(bytes(range(32)), b"holdfast") == _KNOWN_TAG:
            return tagger
    return None


def _bind(function: Any) -> Tagger:  # Any: a ctypes function
    function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_ulonglong, ctypes.c_char_p)
    function.restype = ctypes.c_int

    def tag(key: bytes, data: Buffer) -> bytes:
        out = ctypes.create_string_buffer(_TAG_BYTES)
        address, length, _keep = _address(data)
        function(out, address, length, key)
        return out.raw

    return tag


def _address(data: Buffer) -> tuple[int | None, int, object]:
    """Address and length of a buffer, read-only ones too, and what keeps it alive."""
    import numpy as np

    array = np.frombuffer(data, dtype=np.uint8) if len(data) else np.empty(0, dtype=np.uint8)
    return array.ctypes.data, array.nbytes, array


def _sodium_candidates() -> Iterator[str]:
    spec = importlib.util.find_spec("zmq")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        bundled = Path(folder).parent / "pyzmq.libs"
        yield from (str(path) for path in sorted(bundled.glob("libsodium*.so*")))
    yield from ("libsodium.so.26", "libsodium.so.23", "libsodium.so")
