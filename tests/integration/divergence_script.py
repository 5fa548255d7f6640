"""Small training on one rank per node, in which replicas come to differ: one bit of one, or norms that nobody syncs.

    divergence_script.py OUT CHECKPOINTS bit|drift

Rank 1 flips a bit at step 6, or (drift) a norm beside the DDP module trains on what each rank sees. After step 14
rank 0 kills itself once. Each rank writes digests of what it had after each step, after the restore and at the end.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import holdfast
from support.train import digest

UNTIL, FLIP_AT, KILL_AT = 24, 6, 14


def digests(model: nn.Module) -> dict[str, str]:
    return {name: digest(parameter) for name, parameter in model.named_parameters()}


def main() -> None:
    out, checkpoints, kind = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)
    body, norm = nn.parallel.DistributedDataParallel(nn.Linear(16, 8)), nn.LayerNorm(8)
    model = nn.ModuleDict({"body": body, "norm": norm})
    for parameter in norm.parameters():
        parameter.requires_grad_(kind == "drift")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    said: dict[str, object] = {}
    with holdfast.Session(
        model=model, optimizer=optimizer, checkpoint_dir=checkpoints, snapshot_every=1, persist_every=4
    ) as session:
        if session.restored is not None:
            said = {"tier": session.restored.tier, "step": session.step, "restored": digests(model)}
        for step in session.steps(until=UNTIL):
            generator = torch.Generator().manual_seed(1000 * step + rank)
            loss = norm(body(torch.randn(4, 16, generator=generator))).square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if (kind, rank, step) == ("bit", 1, FLIP_AT):
                with torch.no_grad():
                    body.module.weight.view(torch.int32)[3, 5] ^= 1 << 22
            time.sleep(0.1)
            (out / f"step-{step + 1}-rank-{rank}.json").write_text(json.dumps(digests(model)))
            if rank == 0 and step + 1 == KILL_AT and not (out / "killed").exists():
                (out / "killed").touch()
                os.kill(os.getpid(), signal.SIGKILL)
    (out / f"rank-{rank}.json").write_text(json.dumps({**said, "end": digests(model)}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
