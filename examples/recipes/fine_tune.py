"""Fine-tuning: `init_from` loads a pretrained trunk once; as soon as there is something to resume, it is ignored."""

import sys
from pathlib import Path

import torch
from torch import nn

import holdfast

folder = Path(sys.argv[1])


class Network(nn.Module):
    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(256, 1024), nn.ReLU(), nn.Linear(1024, 256), nn.ReLU())
        self.head = nn.Linear(256, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.trunk(x))


torch.manual_seed(0)
if not (folder / "pretrained").exists():
    holdfast.checkpoint.save({"model": Network(10).state_dict()}, folder / "pretrained")
model = Network(outputs=2)  # another head: it starts fresh, the trunk comes from the checkpoint
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

with holdfast.Session(
    model=model, optimizer=optimizer, checkpoint_dir=folder / "checkpoints", snapshot_every=1,
    init_from=holdfast.InitFrom(path=folder / "pretrained", skip=["head."]),
) as session:  # fmt: skip
    for step in session.steps(until=60):
        inputs = torch.randn(256, 256, generator=torch.Generator().manual_seed(step))
        nn.functional.cross_entropy(model(inputs), (inputs[:, 0] > 0).long()).backward()
        optimizer.step()
        optimizer.zero_grad()

print("final", sum(p.double().sum().item() for p in model.parameters()))
