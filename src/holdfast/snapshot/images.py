"""Images of a version, opened where they lie: a slot of this node by mmap, one of another node by ranges."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Final

import zmq

from holdfast.checkpoint.catalog import OpenImage
from holdfast.checkpoint.image import read_header
from holdfast.checkpoint.source import MemorySource
from holdfast.checkpoint.version import Version
from holdfast.errors import CorruptError
from holdfast.snapshot.arena import Slot, SlotState
from holdfast.snapshot.coding import Rebuild
from holdfast.snapshot.keys import JobKeys
from holdfast.snapshot.peers import PeerSource
from holdfast.snapshot.records import ImageLocation

_PEER_TIMEOUT: Final = timedelta(seconds=60)


def open_image(
    context: zmq.Context[zmq.Socket[bytes]],
    location: ImageLocation,
    version: Version,
    keys: JobKeys,
    bulk: Mapping[int, str],
) -> OpenImage:
    """The image of `version` at `location`; its source is the caller's to close.

    Args:
        context: whose sockets to use for an image of another node.
        keys: of the job.
        bulk: node rank -> endpoint of its bulk server.

    Raises:
        CorruptError: it is not there, or is not what it should be.
        PeerError, PeerTimeout: the other node does not serve it.
    """
    if location.local:
        return _local_image(location, version)
    if location.rebuild is not None:
        return _decoded_image(context, location.rebuild, version, keys, bulk)
    source = PeerSource(
        context, location.daemon, location.path, version, location.offset, keys=keys, timeout=_PEER_TIMEOUT
    )
    try:
        meta = read_header(source.read)
    except BaseException:
        source.close()
        raise
    return OpenImage(name=f"{location.path} on node {location.node_rank}", meta=meta, source=source)


def _decoded_image(
    context: zmq.Context[zmq.Socket[bytes]], rebuild: Rebuild, version: Version, keys: JobKeys, bulk: Mapping[int, str]
) -> OpenImage:
    from holdfast.snapshot.decoded import DecodedSource  # late: it needs numpy

    source = DecodedSource(context, rebuild, bulk, keys=keys, timeout=_PEER_TIMEOUT)
    try:
        meta = read_header(source.read, expected_digest=rebuild.image.header_digest)
    except BaseException:
        source.close()
        raise
    return OpenImage(name=f"the decoded image of rank {rebuild.global_rank} at {version}", meta=meta, source=source)


class _SlotSource(MemorySource):
    """An image in a slot of this node, mapped for reading while the source is open. Nobody writes it meanwhile."""

    def __init__(self, slot: Slot, image: memoryview) -> None:
        super().__init__(image)
        self._slot = slot

    def close(self) -> None:
        super().close()
        self._slot.close()


def _local_image(location: ImageLocation, version: Version) -> OpenImage:
    try:
        slot = Slot.open(location.path)
    except OSError as error:
        raise CorruptError(f"{version} is gone from memory: {error}") from error
    header = slot.read_header()
    if header.state is not SlotState.CLEAN or header.version != version:
        slot.close()
        raise CorruptError(f"{location.path} holds {header.version} ({header.state.name.lower()}), not {version}")
    source = _SlotSource(slot, slot.image[: header.size_bytes])
    try:
        meta = read_header(source.read, expected_digest=header.header_digest)
    except BaseException:
        source.close()
        raise
    return OpenImage(name=location.path, meta=meta, source=source)
