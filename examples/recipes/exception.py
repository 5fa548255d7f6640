"""An exception in the loop leaves the session unchanged, at once, without waiting for anybody.

Here a reader fails now and then. Under ``holdfast run`` all ranks start again from memory, and the step in flight is
done once more; the same exception at the same step twice would end the job with its traceback.
"""

import os
import sys
from pathlib import Path

import torch
from torch import nn

import holdfast

folder = Path(sys.argv[1])
torch.distributed.init_process_group("gloo")
rank = int(os.environ["RANK"])
torch.manual_seed(0)
model = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(256, 1024), nn.ReLU(), nn.Linear(1024, 1)))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)


def read(step: int) -> torch.Tensor:
    """A batch from a file system that loses its mount once."""
    if step == 30 and rank == 0 and not (folder / "mended").exists():
        (folder / "mended").touch()
        raise OSError(f"the data of step {step} cannot be read")
    return torch.randn(256, 256, generator=torch.Generator().manual_seed(2 * step + rank))


with holdfast.Session(model=model, optimizer=optimizer, checkpoint_dir=folder / "ckpt", snapshot_every=1) as session:
    for step in session.steps(until=60):
        model(read(step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

if rank == 0:
    print("final", sum(p.double().sum().item() for p in model.parameters()))
torch.distributed.destroy_process_group()
