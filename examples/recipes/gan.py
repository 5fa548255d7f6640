"""A GAN: two models, two optimizers. A mapping names them, and the names prefix everything that is saved."""

import sys

import torch
import torch.nn.functional as F
from torch import nn

import holdfast

torch.manual_seed(0)
models = {
    "generator": nn.Sequential(nn.Linear(64, 1024), nn.ReLU(), nn.Linear(1024, 256)),
    "discriminator": nn.Sequential(nn.Linear(256, 1024), nn.BatchNorm1d(1024), nn.ReLU(), nn.Linear(1024, 1)),
}
optimizers = {name: torch.optim.Adam(model.parameters(), lr=1e-3) for name, model in models.items()}

with holdfast.Session(model=models, optimizer=optimizers, checkpoint_dir=sys.argv[1], snapshot_every=1) as session:
    for _step in session.steps(until=60):
        real, noise = torch.randn(256, 256) + 1, torch.randn(256, 64)  # the generator's state is restored as well
        fake = models["generator"](noise)
        judged_real, judged_fake = models["discriminator"](real), models["discriminator"](fake.detach())
        loss = F.softplus(-judged_real).mean() + F.softplus(judged_fake).mean()
        optimizers["discriminator"].zero_grad()
        loss.backward()
        optimizers["discriminator"].step()
        optimizers["generator"].zero_grad()
        F.softplus(-models["discriminator"](fake)).mean().backward()
        optimizers["generator"].step()

print("final", *(sum(p.double().sum().item() for p in model.parameters()) for model in models.values()))
