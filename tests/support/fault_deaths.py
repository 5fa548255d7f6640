"""Rows of the fault table in which a process dies or a disk fails. Each returns what was observed."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

import holdfast.checkpoint as hc
from holdfast.checkpoint import storage
from holdfast.checkpoint.commit import list_steps
from support.fault_sides import RIGHT, WRONG, Dcp, Ours, State, state, verdict


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

            # The second one has to be long enough for the rank that lives to come to its death.
            hc.save(value, path, timeout=timedelta(seconds=120 if step == 1.0 else 10))
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
        ranks[1].join(240)
        ranks[0].join(120 if ours else 20)
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
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent.parent)!r})\n"
        f"import support.fault_deaths as t; from pathlib import Path\n"
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
