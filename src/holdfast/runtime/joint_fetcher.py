"""A `Fetcher` for which ranks hand on what they read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from holdfast.checkpoint.dtypes import itemsize
from holdfast.checkpoint.joint import JointReading, Want
from holdfast.checkpoint.sinks import Sink
from holdfast.errors import MismatchError
from holdfast.runtime.reader import Region


class JointFetcher:
    """Takes bytes from a reading in which all ranks take part."""

    def __init__(self, reading: JointReading) -> None:
        self._reading = reading

    def objects(self, images: Iterable[int]) -> None:
        """See `Fetcher.objects`."""
        self._reading.objects(images)

    def fetch(self, regions: Sequence[Region]) -> None:
        """See `Fetcher.fetch`."""
        self._reading.fill([self._want(region) for region in regions if not region.box.is_empty])

    def _want(self, region: Region) -> Want:
        name, box, view, rank = region
        missing = self._reading.catalog.missing(name, box, rank=rank)
        if missing:
            raise MismatchError(f"no image holds {name}{missing[0]}")
        dtype = self._reading.catalog.tensor(name, rank=rank).dtype
        return Want(name, Sink(view, box, dtype=dtype, itemsize=itemsize(dtype)), rank)
