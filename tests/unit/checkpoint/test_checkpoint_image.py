from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash
from checkpoint_images import GENERATION, VERSION, build_image, meta_of
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from holdfast.checkpoint.boxes import Box, whole
from holdfast.checkpoint.dtypes import DTYPES, itemsize
from holdfast.checkpoint.image import ImageLayout, Piece, block_checksums, header_digest, read_header
from holdfast.errors import CorruptError, StateError


def _pieces() -> list[Piece]:
    return [
        Piece("b", "bfloat16", (3, 5), whole((3, 5))),
        Piece("w", "float32", (4, 6), Box((2, 0), (2, 6))),
        Piece("w", "float32", (4, 6), Box((0, 3), (2, 3)), None, False),
        Piece("scalar", "float64", (), whole(())),
        Piece("none", "int64", (0, 3), whole((0, 3))),
        Piece("own", "bool", (7,), whole((7,)), 3),
        Piece("c", "complex128", (2,), whole((2,))),
    ]


def test_pieces_lie_without_holes_and_aligned_to_their_item_size() -> None:
    layout = ImageLayout.plan(_pieces(), objects_capacity=10)
    position = layout.data_start
    assert layout.data_start % 4096 == 0
    for piece, offset in zip(layout.pieces, layout.piece_offsets, strict=True):
        assert offset == position
        assert offset % itemsize(piece.dtype) == 0
        position += piece.size_bytes
    assert (layout.objects_offset, layout.size_bytes) == (position, position + 10)


def test_a_header_reads_back_as_it_was_written() -> None:
    layout = ImageLayout.plan(_pieces(), objects_capacity=1000, block_bytes=128)
    checksums = block_checksums([bytes(layout.size_bytes - layout.data_start)], 128)
    header = layout.header(version=VERSION, global_rank=3, world_size=8, checksums=checksums, objects_bytes=77)
    assert len(header) == layout.data_start
    meta = read_header(lambda o, n: header[o : o + n], expected_digest=header_digest(header))
    made = layout.meta(header, version=VERSION, global_rank=3, world_size=8, checksums=checksums, objects_bytes=77)
    assert vars(meta) == vars(made)
    assert meta.pieces == layout.pieces
    assert meta.version == VERSION
    assert meta.num_blocks == layout.num_blocks


def test_headers_of_all_versions_of_a_layout_have_one_size() -> None:
    layout = ImageLayout.plan(_pieces(), objects_capacity=1000)
    checksums = bytes(8 * layout.num_blocks)
    late = GENERATION.__class__(incarnation=123456, nonce="00000000", generation=99999).at(10**15)
    for version, rank in ((VERSION, 0), (late, 99_999)):
        header = layout.header(
            version=version, global_rank=rank, world_size=100_000, checksums=checksums, objects_bytes=rank % 1000
        )
        assert len(header) == layout.data_start
        assert read_header(lambda o, n, h=header: h[o : o + n]).version == version


def test_checksums_are_xxh3_64_of_blocks_however_the_data_is_cut() -> None:
    data = bytes(range(256)) * 5
    expected = b"".join(
        xxhash.xxh3_64_intdigest(data[i : i + 300]).to_bytes(8, "little") for i in range(0, len(data), 300)
    )
    assert block_checksums([data], 300) == expected
    assert block_checksums([data[:7], b"", data[7:700], data[700:]], 300) == expected


def test_safetensors_opens_an_image_of_every_dtype(tmp_path: Path) -> None:
    pieces, arrays, expected = [], {}, {}
    for name, row in DTYPES.items():
        dtype = getattr(torch, name)
        raw = np.arange(6 * row.itemsize, dtype=np.uint8) % 2
        pieces.append(Piece(name, name, (2, 3), whole((2, 3))))
        arrays[name] = raw.view(f"V{row.itemsize}").reshape(2, 3)
        expected[name] = torch.from_numpy(raw.copy())
        if row.code != "U8" or name == "uint8":
            expected[name] = expected[name].view(dtype).reshape(2, 3)
    pieces += [Piece("cut", "float32", (4, 2), Box((2, 0), (2, 2))), Piece("empty", "float32", (0,), whole((0,)))]
    arrays["cut"] = np.arange(8, dtype=np.float32).reshape(4, 2)
    arrays["empty"] = np.empty(0, np.float32)
    path = tmp_path / "image.safetensors"
    path.write_bytes(build_image(pieces, arrays, room=50))
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == {*DTYPES, "cut[2:4,0:2]", "empty", "__objects__"}
        assert torch.equal(file.get_tensor("cut[2:4,0:2]"), torch.tensor([[4.0, 5.0], [6.0, 7.0]]))
        assert file.get_tensor("empty").shape == (0,)
        for name, tensor in expected.items():
            found = file.get_tensor(name)
            assert torch.equal(found.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name
            if DTYPES[name].code != "U8":
                assert found.dtype == getattr(torch, name)
                assert found.shape == (2, 3)


def test_pieces_with_one_key_and_reserved_names_are_refused() -> None:
    with pytest.raises(StateError, match="one key 'w'"):
        ImageLayout.plan([Piece("w", "int8", (1,), whole((1,)))] * 2, objects_capacity=0)
    clash = [Piece("w[0:1]", "int8", (1,), whole((1,))), Piece("w", "int8", (2,), Box((0,), (1,)))]
    with pytest.raises(StateError, match="one key"):
        ImageLayout.plan(clash, objects_capacity=0)
    for name in ("__objects__", "__metadata__"):
        with pytest.raises(StateError, match="cannot be named"):
            ImageLayout.plan([Piece(name, "int8", (1,), whole((1,)))], objects_capacity=0)
    with pytest.raises(StateError, match="quint8 cannot be stored"):
        ImageLayout.plan([Piece("q", "quint8", (1,), whole((1,)))], objects_capacity=0)


def _reader(data: bytes) -> object:
    return lambda offset, length: data[offset : offset + length].ljust(length, b"\0")


@pytest.mark.parametrize("length", [0, 1, 4088 - 1, 4 << 30, 1 << 63, (1 << 64) - 1])
def test_a_header_length_out_of_bounds_is_refused_before_it_is_read(length: int) -> None:
    def read(offset: int, size: int) -> bytes:
        assert size <= 8
        return struct.pack("<Q", length)

    with pytest.raises(CorruptError):
        read_header(read)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 4095), st.integers(1, 255))
def test_every_flipped_byte_of_a_header_is_noticed(position: int, flip: int) -> None:
    image = build_image([Piece("w", "float32", (4,), whole((4,)))], {"w": np.zeros(4, np.float32)})
    assert meta_of(image).data_start == 4096
    image[position] ^= flip
    with pytest.raises(CorruptError):
        read_header(_reader(bytes(image)))  # type: ignore[arg-type]


def _forged(change: object) -> bytes:
    """A header whose piece table was changed and whose digests are right."""
    import base64
    import json

    import msgspec
    import zstandard

    image = build_image([Piece("w", "float32", (4,), Box((0,), (2,)))], {"w": np.zeros(4, np.float32)})
    header = json.loads(image[8:4096])
    packed = base64.b64decode(header["__metadata__"]["holdfast.pieces"])
    table = msgspec.msgpack.decode(zstandard.decompress(packed))
    change(table)  # type: ignore[operator]
    pieces = base64.b64encode(zstandard.compress(msgspec.msgpack.encode(table))).decode()
    header["__metadata__"] |= {"holdfast.pieces": pieces, "holdfast.digest": "0" * 32}
    text = json.dumps(header, separators=(",", ":")).encode().ljust(4088)
    bare = struct.pack("<Q", 4088) + text
    digest = xxhash.xxh3_128_hexdigest(bare)
    return bare.replace(b'"holdfast.digest":"' + b"0" * 32, b'"holdfast.digest":"' + digest.encode())


def test_a_forged_header_is_read_when_it_is_sound() -> None:
    assert read_header(_reader(_forged(lambda table: None))).pieces[0].box == Box((0,), (2,))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.update(offsets=[[-1]]),
        lambda t: t.update(offsets=[[3]]),
        lambda t: t.update(lengths=[[-2]]),
        lambda t: t.update(lengths=[[1 << 62]]),
        lambda t: t.update(shape=[[-4]]),
        lambda t: t.update(shape=[[4, 4]]),
        lambda t: t.update(dtype=[5]),
        lambda t: t.update(dtype=[-1]),
        lambda t: t.update(dtypes=["object"]),
        lambda t: t.update(name=["a", "b"]),
        lambda t: t.update(block_bytes=0),
        lambda t: t.update(block_bytes=-1),
        lambda t: t.update(objects_capacity=-1),
        lambda t: t.update(objects_capacity=1 << 62),
        lambda t: t.update(shape=[[1 << 62]], lengths=[[]], offsets=[[]]),
        lambda t: t.pop("job"),
        lambda t: t.update(name="w"),
    ],
)
def test_a_forged_piece_table_cannot_leave_its_bounds(change: object) -> None:
    with pytest.raises(CorruptError):
        read_header(_reader(_forged(change)))  # type: ignore[arg-type]
