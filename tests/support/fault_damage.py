"""Rows of the fault table in which a checkpoint is damaged, foreign or hostile. Each returns what was observed."""

from __future__ import annotations

import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
import zstandard

import holdfast.checkpoint as hc
from holdfast.checkpoint.boxes import whole
from holdfast.checkpoint.commit import image_file_name, write_image
from holdfast.checkpoint.image import BLOCK_BYTES, ImageLayout, Piece, block_checksums
from holdfast.checkpoint.root import decode_root, encode_root
from holdfast.checkpoint.tools.cli import main as ckpt
from holdfast.checkpoint.version import GenerationId
from support.fault_sides import RIGHT, WRONG, Dcp, Ours, State, flip, state, the_file, verdict


def every_flip(side: Any, path: Path, file: Path, step: int) -> str:
    """Flip one bit of a byte, load, flip it back; for bytes all over the file."""
    side.save(state(1.0), path)
    whole_file = (path / file).read_bytes()
    found = set()
    for at in range(0, len(whole_file), step):
        flip(path / file, at)
        found.add(verdict(lambda: side.load(path), state(1.0)).split(" (")[0])
        (path / file).write_bytes(whole_file)
    return " or ".join(sorted(found, key=lambda text: (text != WRONG, text)))


def payload_ours(at: Path) -> str:
    Ours.save(state(1.0), at)
    image = the_file(at, "*.safetensors")
    flip(image, image.read_bytes().index(struct.pack("<f", 1.0) * 64) + 2)
    return verdict(lambda: Ours.load(at), state(1.0))


def payload_dcp(at: Path) -> str:
    Dcp.save(state(1.0), at)
    file = the_file(at, "*.distcp")
    flip(file, file.read_bytes().index(struct.pack("<f", 1.0) * 64) + 2)
    return verdict(lambda: Dcp.load(at), state(1.0))


def index_ours(at: Path) -> str:
    return every_flip(Ours, at, Path("index.json.zst"), 5)


def index_dcp(at: Path) -> str:
    return every_flip(Dcp, at, Path(".metadata"), 5)


def root_ours(at: Path) -> str:
    return every_flip(Ours, at, Path("root"), 61)


def root_dcp(at: Path) -> str:
    return "has none: `.metadata` is index and commit marker"


def truncated_ours(at: Path) -> str:
    Ours.save(state(1.0), at)
    os.truncate(the_file(at, "*.safetensors"), the_file(at, "*.safetensors").stat().st_size - 600)
    return verdict(lambda: Ours.load(at), state(1.0))


def truncated_dcp(at: Path) -> str:
    Dcp.save(state(1.0), at)
    os.truncate(the_file(at, "*.distcp"), the_file(at, "*.distcp").stat().st_size - 600)
    return verdict(lambda: Dcp.load(at), state(1.0))


def leftovers_ours(at: Path) -> str:
    generation = GenerationId(incarnation=1, nonce="0badc0de", generation=1)
    at.mkdir()
    (at / image_file_name(generation, 1, 2)).write_bytes(b"half an image")
    (at / ".tmp-x").write_bytes(b"half a file")
    Ours.save(state(1.0), at)
    left = [f.name for f in at.iterdir() if "0badc0de" in f.name or f.name.startswith(".tmp")]
    return f"{verdict(lambda: Ours.load(at), state(1.0))}; {'they stay' if left else 'they are removed'}"


def leftovers_dcp(at: Path) -> str:
    at.mkdir()
    (at / "__1_0.distcp").write_bytes(b"half a file")
    (at / ".metadata.tmp").write_bytes(b"half a file")
    Dcp.save(state(1.0), at)
    left = [f.name for f in at.iterdir() if f.name in ("__1_0.distcp", ".metadata.tmp")]
    return f"{verdict(lambda: Dcp.load(at), state(1.0))}; {'they stay' if left else 'they are removed'}"


def zombie_ours(at: Path) -> str:
    """Generation 1 was replaced by generation 2, which saved the same step; then it wakes up and writes its image."""
    old = GenerationId(incarnation=1, nonce="0badc0de", generation=1)
    Ours.save(state(2.0), at)
    piece = Piece("b", "float32", (16,), whole((16,)))
    layout = ImageLayout.plan([piece], objects_capacity=0)
    data = torch.full((16,), 1.0).numpy().tobytes()
    checksums = block_checksums([data], BLOCK_BYTES)
    facts: Any = {"version": old.at(1), "global_rank": 0, "world_size": 1, "checksums": checksums, "objects_bytes": 0}
    header = layout.header(**facts)
    try:
        write_image(at, image_file_name(old, 0, 1), layout.meta(header, **facts), [header, data])
        said = "it writes beside"
    except BaseException as error:  # noqa: BLE001  # the finding
        said = f"it is refused ({type(error).__name__})"
    # Even if it was past that check: its name is its own.
    (at / image_file_name(old, 0, 1)).write_bytes(header + data)
    return f"{said}; {verdict(lambda: Ours.load(at), state(2.0))}"


def zombie_dcp(at: Path) -> str:
    Dcp.save(state(1.0), at)
    late = {file.name: file.read_bytes() for file in at.glob("*.distcp")}
    Dcp.save(state(2.0), at)
    for name, data in late.items():
        (at / name).write_bytes(data)  # what the old writer still had in its buffers, under the name it always uses
    return verdict(lambda: Dcp.load(at), state(2.0))


def unexpected_ours(at: Path) -> str:
    Ours.save({**state(1.0), "head": torch.ones(3)}, at)
    return verdict(lambda: Ours.load(at), state(1.0))


def unexpected_dcp(at: Path) -> str:
    Dcp.save({**state(1.0), "head": torch.ones(3)}, at)
    said = verdict(lambda: Dcp.load(at), state(1.0))
    return "**`head` is ignored, no word of it**" if said == RIGHT else said


def dtype_ours(at: Path) -> str:
    Ours.save({"w": torch.tensor([1.5, 2.5])}, at)
    return verdict(lambda: hc.load({"w": torch.zeros(2, dtype=torch.int32)}, at), {"w": torch.tensor([1.5, 2.5])})


def dtype_dcp(at: Path) -> str:
    Dcp.save({"w": torch.tensor([1.5, 2.5])}, at)
    found = {"w": torch.zeros(2, dtype=torch.int32)}

    def load() -> State:
        dcp.load(found, checkpoint_id=at, no_dist=True)
        return found

    said = verdict(load, {"w": torch.tensor([1.5, 2.5])})
    return f"**1.5 becomes {int(found['w'][0])} in an int32 target, no error**" if said == WRONG else said


EXPORTED = {"scale": torch.tensor(3.5), "ids": torch.arange(4), "w": torch.ones(2, 2)}


def _opened(folder: Path) -> State:
    from safetensors.torch import load_file

    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def export_ours(at: Path) -> str:
    Ours.save(EXPORTED, at / "c")
    assert ckpt(["export", str(at / "c"), str(at / "hf")]) == 0
    return verdict(lambda: _opened(at / "hf"), EXPORTED)


def export_dcp(at: Path) -> str:
    found = []
    for name, value in EXPORTED.items():
        folder = at / name
        writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True, enable_consolidation=True)

        def export(writer: Any = writer, value: Any = value, name: str = name, folder: Path = folder) -> State:
            dcp.save({name: value}, storage_writer=writer, no_dist=True)
            return _opened(folder)

        said = verdict(export, {name: value})
        if said != RIGHT:
            kind = "0-d" if value.dim() == 0 else str(value.dtype).removeprefix("torch.")
            found.append(f"{kind}: {said}")
    return "; ".join(found) or RIGHT


class _Evil:
    """Runs code when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.marker),))


def _with_evil_metadata(at: Path) -> Path:
    Dcp.save(state(1.0), at / "c")
    (at / "c" / ".metadata").write_bytes(pickle.dumps(_Evil(at / "pwned")))
    return at / "pwned"


def pickle_ours(at: Path) -> str:
    marker = _with_evil_metadata(at)
    code = ckpt(["import", str(at / "c"), str(at / "out")])
    return "**its code is run**" if marker.exists() else "refused" if code == 1 else "read"


def pickle_dcp(at: Path) -> str:
    marker = _with_evil_metadata(at)
    verdict(lambda: Dcp.load(at / "c"), state(1.0))
    return "**its code is run**" if marker.exists() else "refused"


def outside_ours(at: Path) -> str:
    Ours.save(state(1.0), at / "c")
    Ours.save(state(6.0), at / "other")
    root, _ = decode_root((at / "c" / "root").read_bytes())
    name = the_file(at / "c", "*.safetensors").name
    other = the_file(at / "other", "*.safetensors").name
    import msgspec
    import xxhash

    index = zstandard.decompress((at / "c" / "index.json.zst").read_bytes()).replace(
        name.encode(), f"../other/{other}".encode()
    )
    data = zstandard.compress(index)
    for copy in root.index_copies:
        (at / "c" / copy.name).write_bytes(data)
    copies = tuple(msgspec.structs.replace(copy, size_bytes=len(data)) for copy in root.index_copies)
    digest = xxhash.xxh3_128_digest(data)
    new = msgspec.structs.replace(root, index_digest=digest, index_copies=copies)
    (at / "c" / "root").write_bytes(encode_root(new))
    return verdict(lambda: Ours.load(at / "c"), state(1.0))


def outside_dcp(at: Path) -> str:
    Dcp.save(state(1.0), at / "c")
    Dcp.save(state(6.0), at / "other")
    metadata = pickle.loads((at / "c" / ".metadata").read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = f"../other/{info.relative_path}"
    (at / "c" / ".metadata").write_bytes(pickle.dumps(metadata))
    said = verdict(lambda: Dcp.load(at / "c"), state(6.0))
    return "**reads the file outside**" if said == RIGHT else said


def header_ours(at: Path) -> str:
    Ours.save(state(1.0), at)
    image = the_file(at, "*.safetensors")
    data = bytearray(image.read_bytes())
    data[:8] = struct.pack("<Q", 4 << 30)
    image.write_bytes(data)
    return _with_peak(lambda: Ours.load(at))


def header_dcp(at: Path) -> str:
    at.mkdir()
    with open(at / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", 4 << 30) + b"{}")

    def load() -> State:
        found = state(0.0)
        dcp.load(found, storage_reader=dcp.HuggingFaceStorageReader(str(at)), no_dist=True)
        return found

    return _with_peak(load)


def _with_peak(load: Callable[[], State]) -> str:
    """Whether the load asks for memory of the size that the header claims."""
    import tracemalloc

    tracemalloc.start()
    said = verdict(load, state(1.0))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return f"{said}, **after asking for {peak >> 30} GiB**" if peak > 1 << 30 else said
