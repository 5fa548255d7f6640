"""Whole blocks of a file: verified as they come, into memory that is there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from checkpoint_images import build_image, meta_of

from holdfast.checkpoint import verified
from holdfast.checkpoint.boxes import whole
from holdfast.checkpoint.image import Piece
from holdfast.checkpoint.source import FileSource
from holdfast.checkpoint.verified import OpenImage
from holdfast.errors import CorruptError

_SIZE = 3000


def _file(tmp_path: Path, block_bytes: int) -> tuple[Path, bytearray]:
    array = np.random.default_rng(0).integers(0, 256, _SIZE, dtype=np.uint8)
    image = build_image([Piece("w", "uint8", (_SIZE,), whole((_SIZE,)))], {"w": array}, block_bytes=block_bytes)
    path = tmp_path / "image"
    path.write_bytes(image)
    return path, image


@pytest.mark.parametrize("at_once", [1, 512, 700, 1 << 20])
@pytest.mark.parametrize("block_bytes", [256, 4096])
def test_blocks_come_as_they_were_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int, at_once: int
) -> None:
    monkeypatch.setattr(verified, "_CACHED_BYTES", at_once)
    path, image = _file(tmp_path, block_bytes)
    opened = OpenImage("image", meta_of(image), FileSource(path))
    count, start = opened.meta.num_blocks, opened.meta.data_start
    for first in range(count):
        for end in range(first + 1, count + 1):
            memory = memoryview(bytearray(count * block_bytes + 1))
            data = opened.blocks(first, end, memory)
            assert data == image[start + first * block_bytes : start + end * block_bytes]
            assert data.obj is memory.obj
    small = memoryview(bytearray(1))
    assert opened.blocks(0, count, small) == image[start:]
    assert bytes(small) == b"\0"
    opened.close()


@pytest.mark.parametrize("at_once", [1, 512, 700, 1 << 20])
def test_each_damaged_block_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr(verified, "_CACHED_BYTES", at_once)
    path, image = _file(tmp_path, 256)
    meta = meta_of(image)
    for block in range(meta.num_blocks):
        damaged = bytearray(image)
        damaged[min(meta.data_start + block * 256 + 255, meta.size_bytes - 1)] ^= 1
        path.write_bytes(damaged)
        opened = OpenImage("image", meta, FileSource(path))
        for memory in (None, memoryview(bytearray(4096))):
            with pytest.raises(CorruptError, match=rf"image: block {block} \(bytes"):
                opened.blocks(0, meta.num_blocks, memory)
        opened.close()
