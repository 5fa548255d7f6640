"""Early stopping: `stop()` ends the loop at the end of the body, saves the final step, and the job exits 0."""

import sys

import torch
from torch import nn

import holdfast

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(256, 1024), nn.ReLU(), nn.Linear(1024, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)


class Patience:
    """Part of the state (`extra`): a resumed run is as patient as an undisturbed one."""

    def __init__(self) -> None:
        self.best, self.since = float("inf"), 0

    def ran_out(self, loss: float) -> bool:
        self.best, self.since = (loss, 0) if loss < self.best - 0.01 else (self.best, self.since + 1)
        return self.since >= 30

    def state_dict(self) -> dict:
        return {"best": self.best, "since": self.since}

    def load_state_dict(self, state: dict) -> None:
        self.best, self.since = state["best"], state["since"]


patience = Patience()
with holdfast.Session(
    model=model, optimizer=optimizer, extra={"patience": patience}, checkpoint_dir=sys.argv[1], snapshot_every=1
) as session:
    for step in session.steps(until=100_000):
        inputs = torch.randn(256, 256, generator=torch.Generator().manual_seed(step))
        loss = (model(inputs) - inputs.mean(1, keepdim=True)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if patience.ran_out(loss.item()):
            session.stop()

print("final", session.step, sum(p.double().sum().item() for p in model.parameters()))
