"""A loop that is not ours: epochs, its own counter, an evaluation. It only tells the session where a step ends."""

import sys
from datetime import timedelta

import torch
from torch import nn

import holdfast

EPOCHS, BATCHES = 4, 20
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(256, 1024), nn.ReLU(), nn.Dropout(0.1), nn.Linear(1024, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)


def batch(epoch: int, index: int) -> torch.Tensor:
    return torch.randn(256, 256, generator=torch.Generator().manual_seed(1000 * epoch + index))


with holdfast.Session(
    model=model, optimizer=optimizer, extra={"scheduler": scheduler}, checkpoint_dir=sys.argv[1], snapshot_every=1
) as session:
    for epoch in range(session.step // BATCHES, EPOCHS):
        for index in range(session.step % BATCHES, BATCHES):
            model(batch(epoch, index)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            if index == BATCHES - 1:
                scheduler.step()  # what belongs to the step comes before its end
            session.end_step()
            if session.should_stop:
                sys.exit(0)
        with session.section("evaluation", limit=timedelta(minutes=5)), torch.no_grad():
            print("epoch", epoch, model(batch(99, 0)).square().mean().item(), flush=True)

print("final", sum(p.double().sum().item() for p in model.parameters()))
