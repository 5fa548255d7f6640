"""Images in memory for tests: arrays cut in any way, put in images of any ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from holdfast.checkpoint.boxes import Box, whole
from holdfast.checkpoint.catalog import Catalog
from holdfast.checkpoint.commit import commit_step, image_file_name, subset_image, write_image
from holdfast.checkpoint.image import ImageLayout, ImageMeta, Piece, block_checksums, read_header
from holdfast.checkpoint.objects import ObjectRecord, encode, encode_objects
from holdfast.checkpoint.source import MemorySource
from holdfast.checkpoint.storage import Storage
from holdfast.checkpoint.verified import OpenImage
from holdfast.checkpoint.version import GenerationId, Version

GENERATION = GenerationId(incarnation=1, nonce="7f3a9c02", generation=4)
VERSION = GENERATION.at(100)


def slices(box: Box) -> tuple[slice, ...]:
    return tuple(slice(o, o + n) for o, n in zip(box.offsets, box.lengths, strict=True))


def build_image(
    pieces: Sequence[Piece],
    arrays: Mapping[str, np.ndarray],
    *,
    rank: int = 0,
    world_size: int = 1,
    objects: Mapping[str, ObjectRecord] | None = None,
    version: Version = VERSION,
    block_bytes: int = 256,
    room: int = 0,
) -> bytearray:
    """The bytes of an image of `pieces` of global arrays."""
    blob = encode_objects(objects or {})
    layout = ImageLayout.plan(pieces, objects_capacity=len(blob) + room, block_bytes=block_bytes)
    data = bytearray(layout.size_bytes)
    for piece, offset in zip(layout.pieces, layout.piece_offsets, strict=True):
        raw = np.ascontiguousarray(arrays[piece.name][slices(piece.box)]).tobytes()
        data[offset : offset + len(raw)] = raw
    data[layout.objects_offset : layout.objects_offset + len(blob)] = blob
    checksums = block_checksums([memoryview(data)[layout.data_start :]], block_bytes)
    data[: layout.data_start] = layout.header(
        version=version, global_rank=rank, world_size=world_size, checksums=checksums, objects_bytes=len(blob)
    )
    return data


def meta_of(image: bytearray) -> ImageMeta:
    return read_header(lambda offset, length: image[offset : offset + length])


def catalog_of(images: Sequence[bytearray]) -> Catalog:
    return Catalog(
        [OpenImage(f"image {i}", meta_of(image), MemorySource(memoryview(image))) for i, image in enumerate(images)]
    )


def read_array(catalog: Catalog, name: str, box: Box, dtype: np.dtype, *, rank: int | None = None) -> np.ndarray:
    out = np.empty(box.lengths, dtype)
    catalog.read(name, box, out, rank=rank)
    return out


ARRAYS = {
    "w": np.arange(40, dtype=np.float32).reshape(10, 4),
    "v": np.arange(6, dtype=np.int64),
    "mean": np.arange(3, dtype=np.float64),
}


def step_images(version: Version = VERSION) -> list[bytearray]:
    """Two ranks; rank 1 also holds a copy of v in memory."""
    pieces = [
        [
            Piece("w", "float32", (10, 4), Box((0, 0), (5, 4))),
            Piece("v", "int64", (6,), whole((6,))),
            Piece("mean", "float64", (3,), whole((3,)), 0),
        ],
        [
            Piece("w", "float32", (10, 4), Box((5, 0), (5, 4))),
            Piece("v", "int64", (6,), whole((6,)), None, False),
            Piece("mean", "float64", (3,), whole((3,)), 1),
        ],
    ]
    return [
        build_image(
            pieces[rank],
            ARRAYS,
            rank=rank,
            world_size=2,
            objects={"step": ObjectRecord(encode(version.step)), "rng": ObjectRecord(encode(rank), per_rank=True)},
            version=version,
            block_bytes=64,
        )
        for rank in range(2)
    ]


def save_step(directory: Path, version: Version = VERSION, storage: Storage | None = None, **kwargs: Any) -> Path:
    """Commit the images of both ranks as a step."""
    records = []
    for rank, image in enumerate(step_images(version)):
        meta, chunks = subset_image(meta_of(image), MemorySource(memoryview(image)))
        name = image_file_name(version.generation, rank, 2)
        records.append(write_image(directory, name, meta, chunks, storage=storage))
    commit_step(directory, records, version=version, world_size=2, storage=storage, **kwargs)
    return directory
