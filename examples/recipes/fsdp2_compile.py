"""FSDP2 with each block compiled by itself: names stay those of the plain model, so any layout can load them."""

import os
import sys

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

import holdfast

torch.distributed.init_process_group("gloo")
torch.manual_seed(0)
model = nn.Sequential(*(nn.Sequential(nn.Linear(512, 512), nn.GELU()) for _ in range(4)), nn.Linear(512, 1))
for block in model[:4]:
    block.compile(backend=os.environ.get("COMPILE_BACKEND", "inductor"))
    fully_shard(block)
fully_shard(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

with holdfast.Session(model=model, optimizer=optimizer, checkpoint_dir=sys.argv[1], snapshot_every=1) as session:
    for step in session.steps(until=60):
        seed = step * torch.distributed.get_world_size() + torch.distributed.get_rank()
        inputs = torch.randn(256, 512, generator=torch.Generator().manual_seed(seed))
        (model(inputs) - inputs.mean(1, keepdim=True)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

total = sum(p.full_tensor().double().sum().item() for p in model.parameters())  # every rank takes part in this
if torch.distributed.get_rank() == 0:
    print("final", total)
torch.distributed.destroy_process_group()
