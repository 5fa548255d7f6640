"""A small guided training that writes a digest of all it ended with: its state must survive a kill in mid-guidance."""

from __future__ import annotations

import hashlib
import sys
import time
from pathlib import Path

import torch

import holdfast
from holdfast.runtime.guidance import LateToEarly
from support.guidance_models import loss_of, student, teacher, tokens

STOP, STEPS = 40, 50


def main(out: Path, step_seconds: float) -> None:
    torch.set_num_threads(1)
    model = student(torch.float32, dropout=0.2)
    guide = LateToEarly(
        model, lambda: teacher(torch.float32), layer="blocks.1", teacher_layer="norm", match="learned", weight=0.5,
        stop_step=STOP,
    )  # fmt: skip
    optimizer = torch.optim.AdamW([*model.parameters(), *guide.parameters()], lr=0.01)
    torch.manual_seed(11)
    session = holdfast.Session(
        model=[model, guide.learned], optimizer=optimizer, extra={"guide": guide}, snapshot_every=1
    )
    with session:
        for step in session.steps(until=STEPS):
            time.sleep(step_seconds)
            guide(loss_of(model, tokens(step)), step).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert not guide.active
    found = hashlib.sha256()
    for parameter in [*model.parameters(), *guide.parameters()]:
        found.update(parameter.detach().numpy().tobytes())
        for key in ("exp_avg", "exp_avg_sq", "step"):
            found.update(optimizer.state[parameter][key].numpy().tobytes())
    out.write_text(found.hexdigest())


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
