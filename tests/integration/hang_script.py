"""A small DDP job that hangs, or only seems to, in its first generation: ``hang_script.py OUT HOW``.

Beside the hang it shows that what the launcher needs of a worker disturbs nobody: handlers of the script's own for
signals stay, and a model that is compiled in one piece, copied and pickled inside the Session is as it was.
"""

from __future__ import annotations

import copy
import os
import pickle
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import holdfast

STEPS = 14
HANG_AT = 8


LONG_S = 150.0
"""Longer than the silence after which stacks are taken, and than the two looks that follow."""


def work(seconds: float) -> None:
    """Use the CPU, without a sign of life."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        torch.ones(200, 200) @ torch.ones(200, 200)


def listen(seconds: float) -> None:
    """Read a slow stream: no CPU, a little I/O."""
    program = f"import time\nfor _ in range({round(seconds)}): print('.', flush=True), time.sleep(1)"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        while process.stdout.read(1):
            pass


def take_long(how: str, rank: int, step: int, model: nn.Module, session: holdfast.Session) -> None:
    """Healthy, and slow."""
    match how:
        case "slow steps" if step >= HANG_AT:
            work(25)
        case "compile" if step == 0:
            work(LONG_S)
        case "compile in a child" if step == 0:
            subprocess.run([sys.executable, "-c", f"import time; time.sleep({LONG_S})"], check=True)
        case "evaluation" if step == HANG_AT and rank == 0:
            end = time.monotonic() + 180
            while time.monotonic() < end:
                with torch.no_grad():
                    model.module(torch.ones(3, 4))
                time.sleep(0.5)
        case "scoring" if step == HANG_AT and rank == 0:
            work(LONG_S)
        case "stream" if step == HANG_AT and rank == 0:
            listen(LONG_S)
        case "long section" if step == HANG_AT:
            with session.section("upload"):
                time.sleep(LONG_S)


def misbehave(how: str, rank: int, session: holdfast.Session) -> None:
    """What happens at step HANG_AT."""
    match how:
        case "loop" if rank == 1:
            while True:
                pass
        case "absent" if rank == 1:
            time.sleep(3600)
        case "section":
            with session.section("evaluation", timedelta(minutes=1)):
                time.sleep(8)
        case "loader":
            loader = DataLoader(TensorDataset(torch.zeros(8, 1)))
            for _ in loader:
                time.sleep(1)
        case "writes" if rank == 0:
            with (Path(sys.argv[1]) / "big").open("wb") as file:
                for _ in range(120):
                    file.write(bytes(8 << 20))
                    os.fsync(file.fileno())
                    file.seek(0)
                    time.sleep(0.9)


def stop_where(how: str, place: str, restart: str) -> None:
    """Rank 1 stands still at `place`, in the generation after so many restarts."""
    here = (os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"])
    if how == "stopped outside" and here == ("1", restart):
        sys.stdout.write(f"rank 1 stops {place}\n")
        sys.stdout.flush()
        os.kill(os.getpid(), signal.SIGSTOP)


def main() -> None:
    out, how = Path(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    stop_where(how, "before the process group", restart="2")
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    mine = signal.SIGRTMAX - 1
    signal.signal(mine, lambda *_: None)
    signal.signal(signal.SIGUSR1, lambda *_: None)
    model = nn.parallel.DistributedDataParallel(nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    stop_where(how, "before its Session", restart="0")
    with holdfast.Session(model=model, optimizer=optimizer) as session:
        assert signal.getsignal(mine).__name__ == "<lambda>"
        assert signal.getsignal(signal.SIGUSR1).__name__ == "<lambda>"
        for step in session.steps(until=STEPS):
            if first:
                take_long(how, rank, step, model, session)
            if step == HANG_AT and first:
                misbehave(how, rank, session)
            if how == "stopped outside" and step == HANG_AT and os.environ["TORCHELASTIC_RESTART_COUNT"] == "1":
                os.kill(os.getpid(), signal.SIGKILL)
            optimizer.zero_grad()
            model(torch.ones(3, 4)).sum().backward()
            optimizer.step()
            time.sleep(0.05)
        if how == "loop":
            assert copy.deepcopy(model.module).weight.equal(model.module.weight)
            assert pickle.loads(pickle.dumps(model.module)).weight.equal(model.module.weight)
    (out / f"done-{rank}").write_text(os.environ["TORCHELASTIC_RESTART_COUNT"])
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
