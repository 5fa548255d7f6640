"""Save on a metric: the best two checkpoints by validation loss are kept, beside the newest."""

import sys

import torch
from torch import nn

import holdfast

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(256, 1024), nn.ReLU(), nn.Linear(1024, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
held_out = torch.randn(512, 256, generator=torch.Generator().manual_seed(99))


def loss_on(inputs: torch.Tensor) -> torch.Tensor:
    return (model(inputs) - inputs.mean(1, keepdim=True)).square().mean()


with holdfast.Session(
    model=model, optimizer=optimizer, checkpoint_dir=sys.argv[1], snapshot_every=1,
    keep=holdfast.Retention(last=1, best=2, best_by="val_loss"),
) as session:  # fmt: skip
    session.on_persisted(lambda saved: print("saved", saved.path.name, flush=True))
    for step in session.steps(until=80):
        loss_on(torch.randn(256, 256, generator=torch.Generator().manual_seed(step))).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 19:
            with torch.no_grad():
                session.save(metrics={"val_loss": loss_on(held_out).item()})

print("final", sum(p.double().sum().item() for p in model.parameters()))
