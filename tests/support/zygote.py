"""Reference runs without holdfast, in processes that need not import torch anew: each import costs seconds.

`run_plain` asks a helper process, one for each process of pytest, to fork the ranks of a run. A rank runs its script as
``__main__`` with the variables that torchrun gives, and meets the others at a store of its own run. The helper imports
torch once and nothing of holdfast; it runs no thread, so that a fork of it is whole.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import runpy
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

_helper: subprocess.Popen[str] | None = None


def run_plain(
    script: Path, arguments: Sequence[str], *, world_size: int, folder: Path, variables: Mapping[str, str], log: Path
) -> int:
    """Run a script without any launcher.

    Args:
        script: runs as ``__main__`` in each rank.
        arguments: of the script.
        world_size: ranks; they find each other by ``env://``.
        folder: working directory.
        variables: the whole environment, less what torchrun adds.
        log: what the ranks print is appended here.

    Returns:
        The largest exit code of a rank; 128 + number for a signal.
    """
    helper = _started()
    assert helper.stdin is not None
    assert helper.stdout is not None
    request = [str(script), list(arguments), world_size, str(folder), dict(variables), str(log)]
    helper.stdin.write(json.dumps(request) + "\n")
    helper.stdin.flush()
    return int(helper.stdout.readline())


def _started() -> subprocess.Popen[str]:
    global _helper
    if _helper is None or _helper.poll() is not None:
        _helper = subprocess.Popen(
            [sys.executable, "-u", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        atexit.register(_end, _helper)
    return _helper


def _end(helper: subprocess.Popen[str]) -> None:
    assert helper.stdin is not None
    assert helper.stdout is not None
    helper.stdin.close()  # the end of its requests
    helper.stdout.close()
    helper.wait(60)


def _serve() -> None:
    """The helper's loop: one line in, one exit code out."""
    import torch._dynamo
    import torch.distributed.fsdp  # noqa: F401

    assert not any(name.split(".")[0] == "holdfast" for name in sys.modules)
    for line in sys.stdin:
        code = _run(*json.loads(line))
        sys.stdout.write(f"{code}\n")


def _run(script: str, arguments: list[str], world_size: int, folder: str, variables: dict[str, str], log: str) -> int:
    gates = [os.pipe() for _ in range(world_size)]
    ranks = []
    for rank, (gate, _) in enumerate(gates):
        pid = os.fork()
        if pid == 0:
            _become(rank, world_size, gate, variables, folder, log)
            _run_script(script, arguments)
        ranks.append(pid)
    keeper = _keep_store(gates, world_size)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in ranks]
    os.kill(keeper, signal.SIGKILL)
    os.waitpid(keeper, 0)
    for pair in gates:
        for end in pair:
            os.close(end)
    return max(128 - code if code < 0 else code for code in codes)


def _keep_store(gates: list[tuple[int, int]], world_size: int) -> int:
    """Hold the store of a run in a process of its own, as torchrun's agent does, and tell the ranks its port."""
    pid = os.fork()
    if pid:
        return pid
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for _, gate in gates:
        os.write(gate, store.port.to_bytes(4, "little"))
    while True:
        signal.pause()


def _become(rank: int, world_size: int, gate: int, variables: dict[str, str], folder: str, log: str) -> None:
    """Make this fork a rank: its environment, working directory and output; waits for the store's port."""
    port = int.from_bytes(os.read(gate, 4), "little")
    torchrun = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world_size,
        "LOCAL_WORLD_SIZE": world_size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "TORCHELASTIC_USE_AGENT_STORE": True,
        "TORCHELASTIC_RESTART_COUNT": 0,
    }
    os.environ.clear()
    os.environ.update(variables | ({key: str(value) for key, value in torchrun.items()} if world_size > 1 else {}))
    os.chdir(folder)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)


def _keep_process_groups() -> None:
    """Let no process group end before its process does: torch's destructor of a gloo group waits, holding the
    interpreter's lock, for a thread that may itself be waiting for that lock. Seen once, as a rank that never ended."""
    import torch.distributed as dist

    kept = []

    def keeping(make: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(make)
        def made(*arguments: Any, **options: Any) -> Any:
            group = make(*arguments, **options)
            kept.append((group, dist.group.WORLD))
            return group

        return made

    dist.init_process_group = keeping(dist.init_process_group)
    dist.new_group = keeping(dist.new_group)


def _run_script(script: str, arguments: list[str]) -> None:
    """The script as ``__main__``, then the end of this process."""
    sys.argv = [script, *arguments]
    sys.path[0] = str(Path(script).parent)
    code = 0
    _keep_process_groups()
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as ending:
        code = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
        if isinstance(ending.code, str):
            sys.stderr.write(f"{ending.code}\n")
    except BaseException:  # noqa: BLE001  # the border of the process: the log and the exit code tell
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    _serve()
