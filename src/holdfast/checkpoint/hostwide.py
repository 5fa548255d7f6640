"""What one rank of each host reads of a checkpoint for all ranks there: root and index, and a little more if wanted."""

from __future__ import annotations

import socket
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import msgspec

import holdfast.errors
from holdfast.checkpoint.catalog import Catalog
from holdfast.checkpoint.commit import catalog_of, read_index
from holdfast.checkpoint.index import encode_index
from holdfast.checkpoint.meeting import Ranks, await_key, store_errors
from holdfast.errors import HoldfastError, PeerError


class HostRead(msgspec.Struct, frozen=True, array_like=True):
    """What was read, as the rank that did it hands it to the others of its host."""

    index: bytes = b""
    more: bytes = b""
    error: str = ""
    kind: str = ""

    @classmethod
    def get(
        cls,
        path: str | Path,
        ranks: Ranks,
        *,
        name: str,
        timeout: timedelta,
        more: Callable[[Catalog], bytes] | None = None,
    ) -> HostRead:
        """The first rank of a host that comes reads; the others wait for it.

        Args:
            path: of the checkpoint.
            ranks: who read it together.
            name: the same on all ranks, another one each time.
            timeout: how long to wait.
            more: what else is read.

        Raises:
            PeerTimeout: the rank that reads is not heard of.
            HoldfastError: it cannot be read, or `more` raised; on all ranks of the host.
        """
        if ranks.world_size == 1:
            return cls._read(path, more)
        key = f"holdfast/{name}/{host_name()}"
        with store_errors():
            is_first = ranks.store.add(f"{key}/claim", 1) == 1
            if is_first:
                ranks.store.set(f"{key}/reader", str(ranks.rank))
        if not is_first:
            reader = await_key(ranks, f"{key}/reader", timeout, lambda: f"{path}: a rank of this host vanished")
            missing = f"{path}: rank {reader.decode()} did not read the index within {timeout}"
            read = msgspec.msgpack.decode(await_key(ranks, key, timeout, lambda: missing), type=cls)
            if read.error:
                raise _error(read.kind)(f"rank {reader.decode()}: {read.error}")
            return read
        try:
            read = cls._read(path, more)
        except Exception as error:  # the other ranks of this host learn of it, ours by the raise
            with store_errors():
                ranks.store.set(key, msgspec.msgpack.encode(cls(error=str(error), kind=type(error).__name__)))
            raise
        with store_errors():
            ranks.store.set(key, msgspec.msgpack.encode(read))
        return read

    @classmethod
    def _read(cls, path: str | Path, more: Callable[[Catalog], bytes] | None) -> HostRead:
        index = read_index(path)
        if more is None:
            return cls(encode_index(index))
        with catalog_of(path, index) as catalog:
            return cls(encode_index(index), more(catalog))


def host_name() -> str:
    """The same for the processes of one host, whatever container they are in."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = ""
    return f"{boot}{socket.gethostname()}"


def _error(kind: str) -> type[HoldfastError]:
    found = getattr(holdfast.errors, kind, PeerError)
    return found if isinstance(found, type) and issubclass(found, HoldfastError) else PeerError
