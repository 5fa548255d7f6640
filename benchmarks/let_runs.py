"""The trainings of benchmarks/let.py: arms in lockstep on the same batches, teachers, and a store of results."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from gpt.train import GPT
from let_text import Text, text_of

import holdfast

BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.1
_VALIDATION_SEED = 0x5EED
_TEACHER_SEED = 0x7EAC


@dataclass(frozen=True, kw_only=True)
class Scale:
    """What all trainings of a campaign have in common."""

    text_bytes: int
    vocabulary: int
    batch: int
    """Sequences per step."""
    context: int
    """Tokens per sequence."""
    steps: int
    warmup: int
    evaluate_every: int
    validation: int
    """Sequences."""
    teacher_lr: float


@dataclass(frozen=True, kw_only=True)
class Size:
    """A GPT's shape."""

    width: int
    layers: int
    heads: int

    @property
    def parameters(self) -> int:
        """Of its blocks: N in the bound of FLOPs, where the embedding is only looked up."""
        return 12 * self.layers * self.width**2


@dataclass(frozen=True, kw_only=True)
class Pretraining:
    """How a teacher came to be."""

    size: Size
    part: str = "train"
    """Of the text."""
    steps: int
    """0: it keeps its random weights."""


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """How an arm is guided."""

    teacher: Pretraining
    layer: str = "blocks.1"
    teacher_layer: str = "norm"
    weight: float = 0.1
    stop: float = 0.5
    """The end, as a part of all steps."""
    objective: str = "cosine"
    match: str = "linear"
    shuffled: bool = False
    """The teacher's states are dealt out to other tokens of the batch: a control."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One training of a student, but for its seed."""

    size: Size
    lr: float
    guidance: Guidance | None = None


@dataclass(frozen=True, kw_only=True)
class Curve:
    """What a training gave: validation loss (nats per token) by steps done, and CPU seconds of training until then."""

    steps: list[int]
    losses: list[float]
    seconds: list[float]

    @property
    def final(self) -> float:
        return self.losses[-1]


class Missing(Exception):
    """A result is not there, and only what is there may be shown."""


class Store:
    """Results of finished trainings, one file each, named by a hash of all that determines them."""

    def __init__(self, folder: Path, *, only_read: bool = False) -> None:
        self.folder = folder
        self._only_read = only_read
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, name: str, key: object, suffix: str) -> Path:
        """Where a result belongs."""
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
        return self.folder / f"{name}-{digest}{suffix}"

    def get(self, name: str, key: object) -> Any:  # Any: what was put
        """What was put under a key, None if nothing was.

        Raises:
            Missing: nothing was, and the store is for reading only.
        """
        path = self.path(name, key, ".json")
        if path.exists():
            return json.loads(path.read_text())["result"]
        if self._only_read:
            raise Missing(name)
        return None

    def put(self, name: str, key: object, result: object) -> None:
        """Keep a result; it is there whole or not at all."""
        path = self.path(name, key, ".json")
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps({"key": key, "result": result}))
        os.replace(partial, path)


class Shuffled(nn.Module):
    """A teacher whose states are dealt out to other tokens of the same batch, anew at each forward."""

    def __init__(self, teacher: GPT) -> None:
        super().__init__()
        self.teacher = teacher
        self.dealt = nn.Identity()
        self._generator = torch.Generator().manual_seed(1)

    def forward(self, tokens: Tensor) -> Tensor:
        model = self.teacher
        x = model.tokens(tokens) + model.positions.weight[: tokens.shape[1]]
        for block in model.blocks:
            x = block(x)
        rows = model.norm(x).flatten(0, 1)
        order = torch.randperm(len(rows), generator=self._generator)
        return self.dealt(rows[order].view_as(x))


class Trainer:
    """Runs arms and teachers of one scale."""

    def __init__(self, scale: Scale, store: Store) -> None:
        self.scale = scale
        self.store = store

    @functools.cached_property
    def text(self) -> Text:
        return text_of(self.scale.text_bytes, self.scale.vocabulary, self.store.folder)

    def model(self, size: Size, seed: int) -> GPT:
        """A student or a teacher with the initial weights of a seed."""
        torch.manual_seed(seed)
        return GPT(size.width, size.layers, size.heads, self.scale.context, self.scale.vocabulary)

    # --- students

    def curves(self, name: str, arms: Sequence[Arm], seed: int) -> list[Curve]:
        """Train arms in lockstep, with the weights and the batches of one seed, or take what the store has.

        Args:
            name: begins the file's name.
            arms: take turns step by step, so that what else the machine does slows all alike.
            seed: of initial weights and of the order of the data.
        """
        key = [asdict(self.scale), [asdict(arm) for arm in arms], seed]
        name = f"{name}-seed{seed}"
        found = self.store.get(name, key)
        if found is None:
            found = [asdict(curve) for curve in self._train(arms, seed)]
            self.store.put(name, key, found)
        return [Curve(**curve) for curve in found]

    def _train(self, arms: Sequence[Arm], seed: int) -> list[Curve]:
        runs = [_Run(self, arm, seed) for arm in arms]
        for step in range(self.scale.steps):
            batch = self.batch(self.text.train, seed, step, self.scale.batch)
            for run in runs if step % 2 else reversed(runs):
                run.step(step, batch)
            if (step + 1) % self.scale.evaluate_every == 0:
                for run in runs:
                    run.evaluate(step + 1)
        return [run.curve for run in runs]

    def batch(self, data: Tensor, seed: int, step: int, rows: int) -> Tensor:
        """Rows of ``context + 1`` tokens: a function of seed and step."""
        generator = torch.Generator().manual_seed((seed << 32) + step)
        starts = torch.randint(len(data) - self.scale.context - 1, (rows,), generator=generator)
        return torch.stack([data[start : start + self.scale.context + 1] for start in starts.tolist()])

    @functools.cached_property
    def judged_by(self) -> Tensor:
        """The validation rows, the same for every training."""
        return self.batch(self.text.validation, _VALIDATION_SEED, 0, self.scale.validation)

    @torch.no_grad()
    def loss_on_validation(self, model: nn.Module) -> float:
        """Nats per token."""
        rows = self.judged_by.split(self.scale.batch)
        return sum(loss_of(model, part).item() * len(part) for part in rows) / len(self.judged_by)

    # --- teachers

    def teacher(self, pretraining: Pretraining) -> tuple[dict[str, float], Path]:
        """Its validation "loss" and the CPU "seconds" it took, and its weights: trained now if it was not before."""
        key = [self._of_teachers(), asdict(pretraining)]
        name = f"teacher-{pretraining.size.width}x{pretraining.size.layers}-{pretraining.part}-{pretraining.steps}"
        result, weights = self.store.get(name, key), self.store.path(name, key, ".weights")
        if result is None:
            model = self.model(pretraining.size, _TEACHER_SEED)
            began = time.process_time()
            self._pretrain(model, pretraining)
            result = {"seconds": time.process_time() - began, "loss": self.loss_on_validation(model)}
            shutil.rmtree(weights, ignore_errors=True)  # of a campaign that ended between the two
            holdfast.checkpoint.save({"model": model.state_dict()}, weights)
            self.store.put(name, key, result)
        return result, weights

    def _of_teachers(self) -> dict[str, object]:
        """What of the scale matters to a teacher."""
        scale = asdict(self.scale)
        return {name: scale[name] for name in ("text_bytes", "vocabulary", "batch", "context", "warmup", "teacher_lr")}

    def _pretrain(self, model: GPT, pretraining: Pretraining) -> None:
        data, steps, lr = getattr(self.text, pretraining.part), pretraining.steps, self.scale.teacher_lr
        optimizer = optimizer_of(model, lr)
        for step in range(steps):
            left = 2 * (1 - step / steps)  # a finished model: from half of its steps on the learning rate falls to zero
            _set_lr(optimizer, lr * min(1.0, (step + 1) / self.scale.warmup, left))
            update(loss_of(model, self.batch(data, _TEACHER_SEED, step, self.scale.batch)), optimizer)

    def guide(self, model: nn.Module, guidance: Guidance, stop_step: int) -> holdfast.LateToEarly:
        """The guide of an arm."""
        _, weights = self.teacher(guidance.teacher)
        teacher = self.model(guidance.teacher.size, 0)
        holdfast.checkpoint.load({"model": teacher.state_dict()}, weights)
        distils = guidance.objective == "logits"
        return holdfast.LateToEarly(
            model,
            (Shuffled(teacher) if guidance.shuffled else teacher).eval(),
            stop_step=stop_step,
            layer=None if distils else guidance.layer,
            teacher_layer=None if distils else "dealt" if guidance.shuffled else guidance.teacher_layer,
            weight=guidance.weight,
            objective=guidance.objective,
            match=guidance.match,
        )


class _Run:
    """One arm in training."""

    def __init__(self, trainer: Trainer, arm: Arm, seed: int) -> None:
        self._trainer = trainer
        self._lr = arm.lr
        self._guide = None
        self._model = trainer.model(arm.size, seed)
        if arm.guidance is not None:
            stop_step = max(1, round(arm.guidance.stop * trainer.scale.steps))
            self._guide = trainer.guide(self._model, arm.guidance, stop_step)
        learned = list(self._guide.parameters()) if self._guide is not None else []
        self._optimizer = optimizer_of(self._model, arm.lr, learned)
        self._seconds = 0.0
        self.curve = Curve(steps=[], losses=[], seconds=[])

    def step(self, step: int, batch: Tensor) -> None:
        began = time.process_time()
        _set_lr(self._optimizer, self._lr * min(1.0, (step + 1) / self._trainer.scale.warmup))
        loss = loss_of(self._model, batch)
        if self._guide is not None:
            loss = self._guide(loss, step)
        update(loss, self._optimizer)
        self._seconds += time.process_time() - began

    def evaluate(self, steps_done: int) -> None:
        self.curve.steps.append(steps_done)
        self.curve.losses.append(self._trainer.loss_on_validation(self._model))
        self.curve.seconds.append(self._seconds)


def loss_of(model: nn.Module, chunk: Tensor) -> Tensor:
    """Mean cross-entropy in nats per token."""
    return F.cross_entropy(model(chunk[:, :-1]).flatten(0, 1), chunk[:, 1:].flatten())


def optimizer_of(model: nn.Module, lr: float, learned: Sequence[nn.Parameter] = ()) -> torch.optim.Optimizer:
    return torch.optim.AdamW([*model.parameters(), *learned], lr=lr, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True)


def _set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def update(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
