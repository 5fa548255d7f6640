"""An image that no node has any more, whole again: what is coded is decoded, what is not comes from other images.

Pieces that m + 1 failure domains hold are not coded (`holdfast.snapshot.coding`): after the loss of a node the same
bytes still lie in the image of another one, under the same name and box. The image's own checksums judge the result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import zmq

from holdfast.checkpoint.boxes import Box
from holdfast.checkpoint.image import ImageMeta
from holdfast.checkpoint.source import Source
from holdfast.checkpoint.verified import OpenImage
from holdfast.checkpoint.version import Version
from holdfast.errors import PeerError
from holdfast.snapshot.images import open_image
from holdfast.snapshot.keys import JobKeys
from holdfast.snapshot.records import ImageLocation

_Key = tuple[str, Box, int | None]


class LostSource:
    """A `holdfast.checkpoint.source.Source` of the whole image. One thread at a time.

    Args:
        decoded: gives what is coded; closed with this.
        meta: of the image.
        ranges: what is coded (`CodedImage.ranges`).
        others: open the images that are left; each is closed with this.
    """

    def __init__(
        self,
        decoded: Source,
        meta: ImageMeta,
        ranges: Sequence[tuple[int, int]],
        others: Sequence[Callable[[], OpenImage]],
    ) -> None:
        self._decoded, self._meta, self._ranges, self._others = decoded, meta, ranges, others
        self._opened: list[OpenImage] | None = None
        self._holders: dict[_Key, tuple[OpenImage, int]] = {}

    def read(self, offset: int, length: int) -> memoryview:
        """Exactly `length` bytes at `offset`.

        Raises:
            PeerError: some are neither coded nor held by another node.
            CorruptError: fewer shards or copies than needed are sound.
        """
        out = memoryview(bytearray(length))
        at, end = offset, offset + length
        for start, stop in self._ranges:
            if stop <= at or start >= end:
                continue
            self._copy(at, max(at, start), out[at - offset :])
            first, at = max(at, start), min(end, stop)
            out[first - offset : at - offset] = self._decoded.read(first, at - first)
        self._copy(at, end, out[at - offset :])
        return out

    def _copy(self, start: int, stop: int, out: memoryview) -> None:
        """Bytes that are not coded, from the pieces of others."""
        at = start
        for piece, begins in zip(self._meta.pieces, self._meta.piece_offsets, strict=True):
            end = min(stop, begins + piece.size_bytes)
            if at < stop and begins <= at < end:
                image, there = self._holder((piece.name, piece.box, piece.rank))
                out[at - start : end - start] = image.range(there + at - begins, end - at)
                at = end
        if at < stop:
            raise PeerError(f"bytes from {at} on of rank {self._meta.global_rank} of {self._meta.version} are nowhere")

    def _holder(self, key: _Key) -> tuple[OpenImage, int]:
        """An image with that piece, and where in it the piece begins."""
        if self._opened is None:
            self._opened = []
            for opened in self._others:
                image = opened()
                self._opened.append(image)
                for piece, begins in zip(image.meta.pieces, image.meta.piece_offsets, strict=True):
                    self._holders.setdefault((piece.name, piece.box, piece.rank), (image, begins))
        if key not in self._holders:
            raise PeerError(f"no image that is left has {key[0]}{key[1]} of {self._meta.version}")
        return self._holders[key]

    def close(self) -> None:
        """Close all images."""
        for image in self._opened or ():
            image.close()
        self._opened = None
        self._decoded.close()


def open_lost(
    context: zmq.Context[zmq.Socket[bytes]],
    location: ImageLocation,
    version: Version,
    keys: JobKeys,
    *,
    images: Sequence[ImageLocation],
    bulk: Mapping[int, str],
) -> OpenImage:
    """The image of `version` at `location`, which is to be decoded; its source is the caller's to close.

    Args:
        context: whose sockets to use.
        location: with a `Rebuild`.
        version: of the image.
        keys: of the job.
        images: all that are left.
        bulk: node rank -> endpoint of its bulk server.

    Raises:
        CorruptError, PeerError, PeerTimeout: its header cannot be decoded.
    """
    assert location.rebuild is not None, location
    decoded = open_image(context, location, version, keys, bulk)

    def opener(other: ImageLocation) -> Callable[[], OpenImage]:
        return lambda: open_image(context, other, version, keys, bulk)

    others = [opener(other) for other in images]
    source = LostSource(decoded.source, decoded.meta, location.rebuild.image.ranges, others)
    return OpenImage(name=decoded.name, meta=decoded.meta, source=source)
