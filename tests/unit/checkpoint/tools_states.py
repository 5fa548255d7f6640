"""States and ways to run the offline tools, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import holdfast.checkpoint
from holdfast.checkpoint.dtypes import DTYPES
from holdfast.checkpoint.tensors import empty_for, tensor_bytes
from holdfast.checkpoint.tools.cli import main


class Tool:
    """Runs commands and keeps what they print."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys
        self.out = ""
        self.err = ""

    def __call__(self, *arguments: object) -> int:
        code = main([str(argument) for argument in arguments])
        self.out, self.err = self._capsys.readouterr()
        return code

    def works(self, *arguments: object) -> str:
        code = self(*arguments)
        assert code == 0, (self.out, self.err)
        return self.out

    def refused(self, *arguments: object, code: int = 1) -> str:
        """The one line that it says."""
        assert self(*arguments) == code, (self.out, self.err)
        assert len(self.err.strip().splitlines()) == 1, self.err
        assert "Traceback" not in self.err
        return self.err


def every_dtype() -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = {}
    for number, name in enumerate(DTYPES):
        for shape in ((), (0, 3), (3, 4)):
            tensor = empty_for(name, shape)
            raw = tensor_bytes(tensor)
            raw[:] = bytes((i + number) % (2 if name == "bool" else 100) for i in range(len(raw)))
            state[f"{name}-{len(shape)}-{sum(shape)}"] = tensor
    return state


def training_state() -> dict[str, Any]:
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.BatchNorm1d(9), torch.nn.Linear(9, 4))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(5, 6)).sum().backward()
    optimizer.step()
    return {
        "model": dict(model.state_dict()), "optimizer": optimizer.state_dict(), "step": 7, "names": ["a", ("b", None)],
    }  # fmt: skip


def zeros_like(state: Any) -> Any:
    if isinstance(state, torch.Tensor):
        tensor = empty_for(str(state.dtype)[6:], state.shape)
        tensor_bytes(tensor)[:] = bytes(tensor.numel() * tensor.element_size())
        return tensor
    if isinstance(state, dict):
        return {key: zeros_like(item) for key, item in state.items()}
    if isinstance(state, list):
        return [zeros_like(item) for item in state]
    return None


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and bytes(tensor_bytes(a)) == bytes(tensor_bytes(b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def loaded(state: Any, path: Path) -> Any:
    return holdfast.checkpoint.load(zeros_like(state), path)


def listing(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}
