"""An EMA and a frozen teacher: both are models like any other. The teacher is copied once, the EMA at each boundary."""

import sys

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import holdfast


def network(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(256, width), nn.GELU(), nn.Linear(width, 64))


torch.manual_seed(0)
teacher = network(2048).requires_grad_(False)
student = network(1024)
ema = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(0.99))
optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)

with holdfast.Session(
    model={"student": student, "ema": ema, "teacher": teacher},
    optimizer=optimizer, checkpoint_dir=sys.argv[1], snapshot_every=1,
) as session:  # fmt: skip
    for step in session.steps(until=60):
        inputs = torch.randn(256, 256, generator=torch.Generator().manual_seed(step))
        (student(inputs) - teacher(inputs)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update_parameters(student)  # inside the step: a session's step ends with the body

print("final", *(sum(p.double().sum().item() for p in model.parameters()) for model in (student, ema)))
