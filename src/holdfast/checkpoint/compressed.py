"""zstd of what comes from files and from other ranks: never more than it may be."""

from __future__ import annotations

import zstandard

from holdfast.errors import CorruptError


def unpacked(data: bytes, *, limit_bytes: int, what: str) -> bytes:
    """The content of a frame, whose head says how long it is.

    Args:
        data: the frame.
        limit_bytes: of the content.
        what: for messages.

    Raises:
        CorruptError: it is none, is damaged, or speaks of more than the limit.
    """
    try:
        size = zstandard.frame_content_size(data)
        if not 0 <= size <= limit_bytes:
            raise CorruptError(f"{what} speaks of {size} bytes")
        return zstandard.decompress(data, max_output_size=size)
    except zstandard.ZstdError as error:
        raise CorruptError(f"{what} does not parse: {error}") from error
