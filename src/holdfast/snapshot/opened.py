"""The images of a restore, as a worker opens them: local slots by mmap, those of other nodes by ranges, or files.

Copies that should agree are compared first (`holdfast.snapshot.divergence`). Which images could not be opened, or did
not match their checksums while they were read, is known afterwards: others may give them back.
"""

from __future__ import annotations

from collections.abc import Callable

import zmq

from holdfast.checkpoint.catalog import Catalog, OpenImage
from holdfast.checkpoint.commit import open_checkpoint
from holdfast.environment import WorkerEnvironment
from holdfast.errors import CorruptError
from holdfast.snapshot.divergence import settle
from holdfast.snapshot.images import open_image
from holdfast.snapshot.keys import JobKeys
from holdfast.snapshot.messages import Diverged, Restore
from holdfast.snapshot.records import ImageLocation


class OpenedImages:
    """Of one worker. Training thread only.

    Args:
        context: whose sockets to use for images of other nodes.
        keys: of the job.
        environment: which images are this node's own.
        tell: sends to the daemon.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        keys: JobKeys,
        environment: WorkerEnvironment,
        tell: Callable[[Diverged], None],
    ) -> None:
        self._context, self._keys, self._environment, self._tell = context, keys, environment, tell
        self._images: list[tuple[ImageLocation, OpenImage | None]] = []  # of the last catalog; None: it did not open

    @property
    def bad(self) -> tuple[int, ...]:
        """Global ranks, in the generation that wrote them, whose images in slots failed."""
        return tuple(
            sorted(
                {
                    location.global_rank
                    for location, image in self._images
                    if location.rebuild is None and (image is None or image.damaged)
                }
            )
        )

    @property
    def num_damaged(self) -> int:
        """How many images, those that were decoded too, gave bytes that did not match their checksum."""
        return sum(image is not None and image.damaged for _, image in self._images)

    def catalog(self, restore: Restore) -> Catalog:
        """The images of `restore`.

        Raises:
            CorruptError: one is not what it should be, or copies that should agree do not and none has a majority.
            PeerError, PeerTimeout, StorageError: one cannot be read.
        """
        if restore.path is not None:
            return open_checkpoint(restore.path)
        assert restore.version is not None, f"there are no images in {restore}"
        images: list[OpenImage] = []
        self._images = []
        try:
            for location in restore.images:
                self._images.append((location, None))
                images.append(open_image(self._context, location, restore.version, self._keys, restore.bulk))
                self._images[-1] = (location, images[-1])
            catalog = Catalog(images)
            self._settle(catalog, restore)
        except BaseException:
            for image in images:
                image.source.close()
            raise
        return catalog

    def _settle(self, catalog: Catalog, restore: Restore) -> None:
        """Raises CorruptError where copies that should agree do not, and none of them has a majority."""
        assert restore.version is not None
        environment = self._environment

        def is_own(rank: int) -> bool:
            same = catalog.world_size == environment.world_size
            return same and environment.node_of(rank) == environment.node_rank

        found = settle(catalog, [location.node_rank for location in restore.images], is_own)
        if environment.global_rank == 0:
            told = [("error", text) for text in found.texts] + [("warning", text) for text in found.drifted]
            for severity, text in told:
                self._tell(
                    Diverged(generation=environment.generation, version=restore.version, text=text, severity=severity)
                )
        if found.undecided:
            raise CorruptError(found.undecided)
