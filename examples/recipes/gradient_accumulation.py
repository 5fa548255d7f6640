"""Gradient accumulation with a GradScaler: the scaler is part of the state, a step is one pass of the outer loop.

A step whose gradients overflow is skipped by the scaler; it still counts as a step of the session.
"""

import sys

import torch
from torch import nn

import holdfast

MICRO_BATCHES, STEPS = 2, 60
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(256, 1024), nn.ReLU(), nn.Linear(1024, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=8)

with holdfast.Session(
    model=model, optimizer=optimizer, extra={"scaler": scaler}, checkpoint_dir=sys.argv[1], snapshot_every=1
) as session:
    for step in session.steps(until=STEPS):
        generator = torch.Generator().manual_seed(step)
        for _ in range(MICRO_BATCHES):
            inputs = torch.randn(64, 256, generator=generator)
            with torch.autocast("cpu", dtype=torch.float16):
                loss = (model(inputs) - inputs.sum(1, keepdim=True)).square().mean() / MICRO_BATCHES
            scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

print("final", scaler.get_scale(), sum(p.double().sum().item() for p in model.parameters()))
