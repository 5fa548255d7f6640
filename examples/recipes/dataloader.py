"""A DataLoader with two workers: the order of samples follows from seed and step, so a resumed run starts where it was.

The loader is made after the session has restored, from `session.step` on; nothing that is prefetched gets lost.
"""

import sys

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import holdfast

STEPS, BATCH = 60, 256


class Squares(Dataset):
    """A sample is a function of its index."""

    def __len__(self) -> int:
        return 10_000

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.randn(256, generator=torch.Generator().manual_seed(index))


def batches(first: int) -> list[list[int]]:
    """Indices of the batches from step `first` on: one shuffle per epoch, seeded by the epoch."""
    per_epoch, order = len(Squares()) // BATCH, []
    for step in range(first, STEPS):
        shuffled = torch.randperm(len(Squares()), generator=torch.Generator().manual_seed(step // per_epoch))
        order.append(shuffled[step % per_epoch * BATCH :][:BATCH].tolist())
    return order


torch.manual_seed(0)
model = nn.Sequential(nn.Linear(256, 1024), nn.ReLU(), nn.Dropout(0.1), nn.Linear(1024, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

with holdfast.Session(model=model, optimizer=optimizer, checkpoint_dir=sys.argv[1], snapshot_every=1) as session:
    generator = torch.Generator().manual_seed(0)  # workers' seeds come from here, not from the training's generator
    loader = DataLoader(Squares(), batch_sampler=batches(session.step), num_workers=2, generator=generator)
    for _step, inputs in zip(session.steps(until=STEPS), loader, strict=False):
        model(inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

print("final", sum(p.double().sum().item() for p in model.parameters()))
