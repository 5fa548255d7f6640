"""Small models to guide, and an independent float64 computation of what guidance adds."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from holdfast.runtime.guidance import LateToEarly

VOCABULARY = 11
TEACHER_WIDTH, STUDENT_WIDTH = 6, 10


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Model(nn.Module):
    """Tokens in, logits out; the states of a token depend on the tokens before it."""

    def __init__(self, width: int, layers: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.drop(self.embed(tokens).cumsum(1))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def student(dtype: torch.dtype = torch.float64, *, dropout: float = 0.0) -> Model:
    torch.manual_seed(1)
    return Model(STUDENT_WIDTH, 3, dropout).to(dtype)


def teacher(dtype: torch.dtype = torch.float64, *, seed: int = 2) -> Model:
    torch.manual_seed(seed)
    return Model(TEACHER_WIDTH, 2).to(dtype).eval()


def tokens(step: int = 0, *, rows: int = 4, length: int = 5) -> Tensor:
    return torch.randint(VOCABULARY, (rows, length + 1), generator=torch.Generator().manual_seed(100 + step))


def loss_of(model: nn.Module, chunk: Tensor, **kwargs: Tensor) -> Tensor:
    logits = model(chunk[:, :-1], **kwargs)
    return nn.functional.cross_entropy(logits.flatten(0, 1), chunk[:, 1:].flatten())


def states(model: Model, chunk: Tensor, blocks: int, *, norm: bool = False) -> Tensor:
    """The state behind the first `blocks` blocks, by calling the parts: no hook is involved."""
    x = model.drop(model.embed(chunk[:, :-1]).cumsum(1))
    for block in model.blocks[:blocks]:
        x = block(x)
    return model.norm(x) if norm else x


def resized(row: list[float], width: int) -> list[float]:
    """1-D linear interpolation at half-pixel centres, element by element."""
    out = []
    for i in range(width):
        position = min(max((i + 0.5) * len(row) / width - 0.5, 0.0), len(row) - 1.0)
        low = min(math.floor(position), len(row) - 1)
        high = min(low + 1, len(row) - 1)
        out.append(row[low] + (position - low) * (row[high] - row[low]))
    return out


def reference_cosine(ours: Tensor, theirs: Tensor, mask: Tensor | None = None, *, side: str = "teacher") -> float:
    """The mean over unmasked tokens of the cosine, in Python floats."""
    values = []
    for index in range(ours[..., 0].numel()):
        if mask is not None and not mask.flatten()[index]:
            continue
        a, b = ours.flatten(0, -2)[index].tolist(), theirs.flatten(0, -2)[index].tolist()
        a, b = (a, resized(b, len(a))) if side == "teacher" else (resized(a, len(b)), b)
        dot = sum(x * y for x, y in zip(a, b, strict=True))
        values.append(dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b)))
    return sum(values) / len(values)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """By the names of the bare model."""
    found = {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}
    for wrapper in ("_orig_mod.", "_checkpoint_wrapped_module.", "module."):
        found = {name.replace(wrapper, ""): gradient for name, gradient in found.items()}
    return found


def expected(step: int = 0, rows: int = 4) -> dict[str, Tensor]:
    """Gradients of a plain model in one process, guided at its second block."""
    model = student()
    guide = LateToEarly(model, teacher(), layer="blocks.1", teacher_layer="norm", stop_step=4)
    guide(loss_of(model, tokens(step, rows=rows)), step).backward()
    return gradients(model)
