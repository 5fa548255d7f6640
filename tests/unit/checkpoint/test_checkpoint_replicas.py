"""Copies that should agree: compared by checksum, named where they differ, outvoted or refused."""

from __future__ import annotations

import numpy as np
import pytest
from checkpoint_images import build_image, catalog_of, read_array

from holdfast.checkpoint.boxes import Box, whole
from holdfast.checkpoint.objects import ObjectRecord, encode
from holdfast.checkpoint.pieces import Piece
from holdfast.checkpoint.replicas import UNSYNCHRONISED, divergences
from holdfast.snapshot.divergence import settle

RNG = np.random.default_rng(0)
ARRAYS = {
    "large": RNG.standard_normal((40, 32)).astype(np.float32),  # 20 blocks
    "own": RNG.standard_normal(7).astype(np.float32),
    "small": RNG.standard_normal(5).astype(np.float32),
    "tiny": RNG.standard_normal(3).astype(np.float32),
}


def image_of(
    rank: int,
    *,
    changed: dict[str, int] | None = None,
    own: int = 7,
    world_size: int = 4,
    free: list[str] | None = None,
) -> bytearray:
    """The image of one replica; `changed`: tensors and the element whose lowest bit is flipped; `own`: elements of a
    per-rank tensor, which shifts all that follows; `free`: what nothing keeps equal."""
    arrays = {name: array.copy() for name, array in ARRAYS.items()}
    for name, element in (changed or {}).items():
        arrays[name].reshape(-1).view(np.uint32)[element] ^= 1
    arrays["own"] = np.full(own, rank, np.float32)
    pieces = [
        Piece(name, "float32", arrays[name].shape, whole(arrays[name].shape), rank=rank if name == "own" else None)
        for name in arrays
    ]
    objects = {"rng": ObjectRecord(bytes([rank]) * 40, per_rank=True)}
    if free is not None:
        objects[UNSYNCHRONISED] = ObjectRecord(encode(free), per_rank=True)
    return build_image(pieces, arrays, rank=rank, world_size=world_size, objects=objects)


def test_replicas_that_agree_are_not_divergent_whatever_stands_beside_them() -> None:
    images = [image_of(0), image_of(1), image_of(2, own=9), image_of(3, own=300)]
    assert divergences(catalog_of(images).images) == []


@pytest.mark.parametrize("own", [7, 9, 300])
@pytest.mark.parametrize(
    ("name", "element"), [("large", 0), ("large", 639), ("large", 1279), ("small", 4), ("tiny", 0)]
)
def test_one_flipped_bit_is_named_with_its_tensor_and_outvoted(name: str, element: int, own: int) -> None:
    images = [image_of(0), image_of(1, changed={name: element}), image_of(2, own=own)]
    catalog = catalog_of(images)
    [found] = divergences(catalog.images)
    assert (found.name, found.copies) == (name, ((0, 2), (1,)))
    assert found.has_majority
    assert found.outvoted == {1}
    settled = settle(catalog, [0, 1, 2])
    assert settled.undecided == ""
    [text] = settled.texts
    assert f"copies of {name}" in text
    assert "rank 0 on node 0, rank 2 on node 2 against rank 1 on node 1; the majority's copy is used" in text


def test_the_majority_is_read_even_where_ones_own_image_was_outvoted() -> None:
    diverged, *sound = [image_of(0, changed={"large": 5, "tiny": 1}), image_of(1), image_of(2)]
    catalog = catalog_of([diverged, *sound])
    before = read_array(catalog, "large", whole((40, 32)), np.dtype(np.float32))
    assert before.tobytes() != ARRAYS["large"].tobytes()
    assert len(settle(catalog, [0, 1, 2]).texts) == 2
    for name in ("large", "tiny", "small"):
        array = read_array(catalog, name, whole(ARRAYS[name].shape), np.dtype(np.float32))
        assert array.tobytes() == ARRAYS[name].tobytes()
    assert read_array(catalog, "own", Box((0,), (7,)), np.dtype(np.float32), rank=0).tolist() == [0.0] * 7


def test_without_a_majority_no_copy_is_to_be_used() -> None:
    two = settle(catalog_of([image_of(0), image_of(1, changed={"small": 0})]), [0, 1])
    assert "copies of small" in two.undecided
    assert "rank 0 on node 0 against rank 1 on node 1; no copy has a majority" in two.undecided
    tie = [image_of(0), image_of(1, changed={"large": 1}), image_of(2, changed={"large": 1}), image_of(3)]
    assert settle(catalog_of(tie), [0, 1, 2, 3]).undecided
    three_ways = [image_of(0), image_of(1, changed={"large": 1}), image_of(2, changed={"large": 2})]
    [found] = divergences(catalog_of(three_ways).images)
    assert found.copies == ((0,), (1,), (2,))
    assert found.outvoted == {0, 1, 2}


def test_copies_that_only_reading_could_tell_apart_are_taken_for_equal_beyond_the_limit() -> None:
    images = catalog_of([image_of(0), image_of(1, changed={"tiny": 0})]).images
    assert len(divergences(images)) == 1
    assert divergences(images, limit_bytes=0) == []
    large = catalog_of([image_of(0), image_of(1, changed={"large": 640})]).images
    assert len(divergences(large, limit_bytes=0)) == 1  # its checksums alone tell


def test_an_image_that_cannot_be_read_is_left_out_of_the_comparison() -> None:
    broken = image_of(1, changed={"tiny": 0})
    catalog = catalog_of([image_of(0), broken, image_of(2)])
    broken[len(broken) - 60 :] = bytes(60)
    broken[catalog.images[1].meta.data_start :] = bytes(len(broken) - catalog.images[1].meta.data_start)
    assert divergences(catalog.images) == []


def test_shards_that_nobody_shares_are_not_compared() -> None:
    arrays = {"w": np.arange(8, dtype=np.float32)}
    halves = [Piece("w", "float32", (8,), Box((4 * i,), (4,))) for i in range(2)]
    images = [build_image([half], arrays, rank=rank, world_size=2) for rank, half in enumerate(halves)]
    assert divergences(catalog_of(images).images) == []


def test_what_nothing_keeps_equal_stays_each_nodes_own_and_is_told_apart() -> None:
    images = [image_of(0, free=["tiny"]), image_of(1, changed={"tiny": 1}, free=["tiny"])]
    read = []
    for node in (0, 1):
        catalog = catalog_of(images)
        settled = settle(catalog, [0, 1], is_own=lambda rank, node=node: rank == node)
        assert (settled.undecided, settled.texts) == ("", ())
        [text] = settled.drifted
        assert "copies of tiny" in text
        assert "rank 0 on node 0 against rank 1 on node 1; each node goes on with its own" in text
        read.append(read_array(catalog, "tiny", whole((3,)), np.dtype(np.float32)).tobytes())
    assert read[0] == ARRAYS["tiny"].tobytes() != read[1]
    catalog = catalog_of(images)
    settle(catalog, [0, 1])  # another world: all take the copy of the lowest rank
    assert read_array(catalog, "tiny", whole((3,)), np.dtype(np.float32)).tobytes() == read[0]


def test_what_differs_beside_it_is_corruption_all_the_same() -> None:
    changed = image_of(1, changed={"tiny": 1, "large": 7}, free=["tiny"])
    settled = settle(catalog_of([image_of(0, free=["tiny"]), changed]), [0, 1])
    assert len(settled.drifted) == len(settled.texts) == 1
    assert "copies of large" in settled.undecided
