"""The same faults done to our checkpoints and to those of torch.distributed.checkpoint: what each of them makes of it.

    python tests/support/fault_table.py                # the table of docs/fault-table.md, from what is observed now
    python tests/support/fault_table.py --side ours    # JSON of one column

Nothing here is quoted: both columns are what the code did when it was run. A row does its fault in a folder of its own.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import pickle
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
import zstandard
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

import holdfast.checkpoint as hc
from holdfast.checkpoint import storage
from holdfast.checkpoint.boxes import whole
from holdfast.checkpoint.commit import image_file_name, list_steps, write_image
from holdfast.checkpoint.image import BLOCK_BYTES, ImageLayout, Piece, block_checksums
from holdfast.checkpoint.root import decode_root, encode_root
from holdfast.checkpoint.tools.cli import main as ckpt
from holdfast.checkpoint.version import GenerationId

RIGHT, WRONG = "right values", "**wrong values, no error**"
State = dict[str, Any]


def state(value: float) -> State:
    """Two tensors whose every element is `value`."""
    return {"w": torch.full((64, 8), value), "b": torch.full((16,), value)}


def verdict(load: Callable[[], State], *allowed: State) -> str:
    """What comes of a load: one of the allowed states, something else, or an error."""
    try:
        loaded = load()
    except BaseException as error:  # noqa: BLE001  # DCP's CheckpointException is no Exception; whatever: the finding
        return f"refused ({type(error).__name__})"
    return RIGHT if any(all(torch.equal(loaded[k], s[k]) for k in s) for s in allowed) else WRONG


class Ours:
    """`holdfast.checkpoint`."""

    @staticmethod
    def save(value: State, path: Path) -> None:
        hc.save(value, path)

    @staticmethod
    def load(path: Path) -> State:
        return hc.load(state(0.0), path)


class Dcp:
    """`torch.distributed.checkpoint`, as it comes."""

    @staticmethod
    def save(value: State, path: Path) -> None:
        dcp.save(value, checkpoint_id=path, no_dist=True)

    @staticmethod
    def load(path: Path) -> State:
        found = state(0.0)
        dcp.load(found, checkpoint_id=path, no_dist=True)
        return found


def the_file(path: Path, pattern: str) -> Path:
    (found,) = path.glob(pattern)
    return found


def flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


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


# --- rows: (what happens, ours, DCP's) ---


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


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _rank(rank: int, file: str, at: Path, second: Path, ours: bool) -> None:
    """Save 1.0, then 2.0; rank 1 is killed in the second save, when it has begun to write."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    for step, path in ((1.0, at), (2.0, second)):
        local = torch.full((32, 8), step)
        value = {"w": DTensor.from_local(local, mesh, [Shard(0)]), "b": torch.full((16,), step)}
        if step == 2.0 and rank == 1:
            _die_when_writing()
        if ours:
            from datetime import timedelta

            hc.save(value, path, timeout=timedelta(seconds=5))
        else:
            dcp.save(value, checkpoint_id=path)


def _die_when_writing() -> None:
    def die(*args: object, **kwargs: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    storage._write_file = die  # type: ignore[assignment]
    filesystem._write_files_from_queue = die


def _two_ranks(at: Path, second: Path, ours: bool) -> list[int | None]:
    context = mp.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        arguments = [(rank, f"{folder}/store", at, second, ours) for rank in range(2)]
        ranks = [context.Process(target=_quietly, args=a) for a in arguments]
        for process in ranks:
            process.start()
        ranks[1].join(60)
        ranks[0].join(20)
        if ranks[0].is_alive():
            ranks[0].kill()
            ranks[0].join(10)
        return [process.exitcode for process in ranks]


def _quietly(*arguments: Any) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    _rank(*arguments)


def killed_rank_ours(at: Path) -> str:
    codes = _two_ranks(at / "step-00000001", at / "step-00000002", True)
    assert codes[1] == -signal.SIGKILL, codes
    assert codes[0] == 1, "the other rank must learn of it"
    complete = [info.step for info in list_steps(at) if info.complete]
    assert complete == [1], complete
    second = verdict(lambda: Ours.load(at / "step-00000002"), state(2.0)).replace("refused (StorageError)", "absent")
    first = verdict(lambda: Ours.load(at / "step-00000001"), state(1.0))
    return f"old one: {first}; new one: {second}"


def killed_rank_dcp(at: Path) -> str:
    codes = _two_ranks(at, at, False)
    assert codes[1] == -signal.SIGKILL, codes
    return verdict(lambda: Dcp.load(at), state(1.0), state(2.0))


@contextmanager
def _failing(module: Any, name: str, when: Callable[..., bool]) -> Iterator[None]:
    real = getattr(module, name)

    def failing(*args: Any, **kwargs: Any) -> Any:
        if when(*args, **kwargs):
            raise OSError(5, "Input/output error")
        return real(*args, **kwargs)

    setattr(module, name, failing)
    try:
        yield
    finally:
        setattr(module, name, real)


def writer_ours(at: Path) -> str:
    with _failing(storage, "_write_file", lambda path, *rest: "safetensors" in path.name):
        handle = hc.async_save(state(1.0), at)
        try:
            handle.result()
        except BaseException as error:  # noqa: BLE001  # the finding
            return f"the save fails ({type(error).__name__})"
    return "the save succeeds; the load: " + verdict(lambda: Ours.load(at), state(1.0))


def writer_dcp(at: Path) -> str:
    import threading

    side = threading.main_thread()
    with _failing(filesystem, "_write_item", lambda *a, **k: threading.current_thread() is not side):
        writer = dcp.FileSystemWriter(at, thread_count=2, single_file_per_rank=False)
        value = {f"w{i}": torch.ones(50_000) for i in range(40)}
        real = filesystem._write_files_from_queue

        def slowly(*args: Any, **kwargs: Any) -> Any:
            if threading.current_thread() is side:
                time.sleep(0.5)  # so that the side thread gets some of the files
            return real(*args, **kwargs)

        filesystem._write_files_from_queue = slowly
        try:
            dcp.save(value, storage_writer=writer, no_dist=True)
        except BaseException as error:  # noqa: BLE001  # the finding
            return f"the save fails ({type(error).__name__})"
        finally:
            filesystem._write_files_from_queue = real
    found = {name: torch.zeros(50_000) for name in value}

    def load() -> State:
        dcp.load(found, checkpoint_id=at, no_dist=True)
        return found

    return "**the save succeeds**; the load: " + verdict(load, value)


def _on_full_disk(at: Path, side: str) -> str:
    """In a mount namespace of its own, because a tmpfs has to be mounted."""
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        f"import fault_table as t; from pathlib import Path\n"
        f"print('VERDICT', t._fill_disk(Path({str(at)!r}), t.{side}))"
    )
    mounted = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(at)]
    mount = f"import subprocess; subprocess.run({mounted!r}, check=True)"
    namespace = ["unshare", "--user", "--map-root-user", "--mount"]
    command = [*namespace, sys.executable, "-W", "ignore", "-c", f"{mount}\n{code}"]
    at.mkdir()
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("VERDICT ")]
    assert lines, done.stderr[-2000:]
    return lines[0].removeprefix("VERDICT ")


def _fill_disk(at: Path, side: Any) -> str:
    path = at / "step-00000001" if side is Ours else at / "c"
    side.save(state(1.0), path)
    second = at / "step-00000002" if side is Ours else path
    try:
        side.save({"w": torch.full((300_000,), 2.0)}, second)
        return "the save succeeds"
    except BaseException as error:  # noqa: BLE001  # the finding
        failed = f"the save fails ({type(error).__name__})"
    return f"{failed}; the old one: {verdict(lambda: side.load(path), state(1.0))}"


def full_ours(at: Path) -> str:
    return _on_full_disk(at, "Ours")


def full_dcp(at: Path) -> str:
    return _on_full_disk(at, "Dcp")


def worker_ours(at: Path) -> str:
    with _failing(storage, "_write_file", lambda path, *rest: True):
        failed = hc.async_save(state(1.0), at / "step-00000001")
        assert failed._thread.join(60) is None
        assert failed.error() is not None
    hc.async_save(state(2.0), at / "step-00000002").result()
    return "that save fails, the next one: " + verdict(lambda: Ours.load(at / "step-00000002"), state(2.0))


def worker_dcp(at: Path) -> str:
    from torch.distributed.checkpoint import _async_process_executor as executor

    port = _free_port()
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    try:
        kind = AsyncCheckpointerType.PROCESS
        dcp.async_save(state(1.0), checkpoint_id=at / "1", async_checkpointer_type=kind).result()
        daemon = executor._CHECKPOINT_PROCESS
        assert daemon is not None
        daemon._save_process.kill()
        daemon._save_process.join(30)
        found = []
        for number in (2, 3):
            try:
                dcp.async_save(state(2.0), checkpoint_id=at / str(number), async_checkpointer_type=kind).result()
                found.append("succeeds")
            except BaseException as error:  # noqa: BLE001  # the finding
                found.append(f"fails ({type(error).__name__})")
        return f"the next save {found[0]}, **the one after it {found[1]}**" if "fails" in found[1] else found[1]
    finally:
        executor._CHECKPOINT_PROCESS = None
        dist.destroy_process_group()


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


_WATCHED = ("open", "os.rename", "os.link", "os.remove", "os.mkdir", "os.truncate")


def _dies_at(number: int, save: Callable[[], None]) -> int:
    """Exit code of a child that is gone, without cleaning up, before its file operation `number`."""
    child = os.fork()
    if child == 0:
        count = 0

        def count_one() -> None:
            nonlocal count
            count += 1
            if count == number:
                os._exit(77)

        real_sync, real_writev = os.fsync, os.writev
        os.fsync = lambda fd: (count_one(), real_sync(fd))[1]  # type: ignore[assignment]
        os.writev = lambda fd, data: (count_one(), real_writev(fd, data))[1]  # type: ignore[assignment]
        sys.addaudithook(lambda event, args: count_one() if event in _WATCHED else None)
        try:
            save()
            os._exit(0)
        except BaseException:  # noqa: BLE001  # a child must not go on here
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _kills(at: Path, side: Any, *, again: bool) -> tuple[set[str], set[str], int]:
    """(what the old checkpoint is after each kill, what the new one is, how many kills)."""
    old_found, new_found = set(), set()
    number = 0
    while True:
        number += 1
        folder = at / str(number)
        old = folder / "step-00000001"
        new = folder / "step-00000002" if again else old
        side.save(state(1.0), old)
        code = _dies_at(number, lambda: side.save(state(2.0), new))  # noqa: B023  # run before the next turn
        assert code in (0, 77), code
        if code == 0:
            return old_found, new_found, number - 1
        if again:
            old_found.add(verdict(lambda: side.load(old), state(1.0)))  # noqa: B023
            is_there = any(info.step == 2 and info.complete for info in list_steps(folder))
            said = verdict(lambda: side.load(new), state(2.0))  # noqa: B023
            new_found.add(said if is_there else said.replace("refused (StorageError)", "absent"))
            if not is_there:
                side.save(state(2.0), new)
                assert verdict(lambda: side.load(new), state(2.0)) == RIGHT  # noqa: B023
        else:
            new_found.add(verdict(lambda: side.load(old), state(1.0), state(2.0)).split(" (")[0])  # noqa: B023
        shutil.rmtree(folder)


def kills_ours(at: Path) -> str:
    old, new, number = _kills(at, Ours, again=True)
    assert number > 15, "the operations were not counted"
    assert old == {RIGHT}, old
    assert new == {RIGHT, "absent"}, new
    return "the old one: right values; the new one: absent (the save can be repeated) or right values"


def kills_dcp(at: Path) -> str:
    _, found, number = _kills(at, Dcp, again=False)
    assert number > 5, "the operations were not counted"
    return "in the same directory: " + " or ".join(sorted(found, key=lambda text: (text != WRONG, text))).replace(
        "refused", "**refused: neither the old nor the new one is left**"
    )


ROWS: dict[str, tuple[Callable[[Path], str], Callable[[Path], str]]] = {
    "a bit flips in the payload": (payload_ours, payload_dcp),
    "a bit flips in the index (each 5th byte in turn)": (index_ours, index_dcp),
    "a bit flips in the root": (root_ours, root_dcp),
    "a data file is cut short": (truncated_ours, truncated_dcp),
    "kill -9 of one of two ranks in the second save": (killed_rank_ours, killed_rank_dcp),
    "a writer in a side thread fails": (writer_ours, writer_dcp),
    "no space is left in the second save": (full_ours, full_dcp),
    "the worker of an asynchronous save dies": (worker_ours, worker_dcp),
    "files of a dead attempt lie there": (leftovers_ours, leftovers_dcp),
    "a writer of an older generation wakes up": (zombie_ours, zombie_dcp),
    "the checkpoint has a key that the model lacks": (unexpected_ours, unexpected_dcp),
    "the target has another dtype": (dtype_ours, dtype_dcp),
    "0-d and int64 tensors go out as safetensors": (export_ours, export_dcp),
    "the metadata of a DCP checkpoint is a hostile pickle": (pickle_ours, pickle_dcp),
    "the index names `../other/file`": (outside_ours, outside_dcp),
    "a safetensors header says that it has 4 GiB": (header_ours, header_dcp),
    "a kill between every two file operations of the second save": (kills_ours, kills_dcp),
}


SLOW = ("no space is left in the second save", "a kill between every two file operations of the second save")
"""Need the right to mount, or ten seconds."""


def observe(column: int, *, quick: bool = False) -> dict[str, str]:
    """Do every fault to one side."""
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found: dict[str, str] = {}
    for name, sides in ROWS.items():
        if quick and name in SLOW:
            continue
        with tempfile.TemporaryDirectory() as folder, redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
            found[name] = sides[column](Path(folder) / "c")
    return found


def main() -> None:
    """See the head."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", choices=("ours", "dcp"), help="print JSON of one column")
    parser.add_argument("--quick", action="store_true", help="without the rows that need ten seconds or a mount")
    wanted = parser.parse_args()
    if wanted.side:
        sys.stdout.write(json.dumps(observe(("ours", "dcp").index(wanted.side), quick=wanted.quick)) + "\n")
        return
    ours, theirs = observe(0, quick=wanted.quick), observe(1, quick=wanted.quick)
    rows = [f"| {name} | {ours[name]} | {theirs[name]} |\n" for name in ours]
    sys.stdout.write("".join(["| what happens | holdfast | DCP |\n", "|---|---|---|\n", *rows]))


if __name__ == "__main__":
    main()
