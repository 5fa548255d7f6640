"""Spare the processes of a test the import of torch's compiler: half of what a short training script costs.

Every optimizer, DDP and FSDP2 ask `torch._dynamo` to leave their functions alone, and that import takes as long as
torch itself does, in each of the processes that a test starts. A script that compiles nothing calls `spare_compiler`
first: it puts a stand-in there, which knows what they ask for. At the first question that the stand-in does not know
it makes way for the real one, so that a script is slower then, and not wrong.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

NAME = "torch._dynamo"


def _disable(fn: Callable[..., Any] | None = None, *_: object, **__: object) -> Callable[..., Any]:
    """A function as it is, or a decorator that leaves it so."""
    return fn if fn is not None else lambda function: function


class _Part:
    """A module within the stand-in: what it knows are its attributes."""

    def __init__(self, name: str, **known: Callable[..., Any]) -> None:
        self._name = name
        self.__dict__.update(known)

    def __getattr__(self, name: str) -> Any:
        return getattr(getattr(_real(), self._name), name)


class _StandIn(ModuleType):
    """`torch._dynamo` where nothing is compiled; its submodules are the real ones."""

    __path__ = [str(Path(torch.__file__).with_name("_dynamo"))]  # noqa: RUF012  # as of any package
    disable = staticmethod(_disable)
    graph_break = staticmethod(lambda *_, **__: None)
    utils = _Part("utils", get_optimize_ddp_mode=lambda: "ddp_optimizer")  # as its configuration has it
    trace_rules = _Part("trace_rules", clear_lru_cache=lambda: None)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(_real(), name)


def _real() -> ModuleType:
    if isinstance(sys.modules.get(NAME), _StandIn):
        del sys.modules[NAME], torch._dynamo
    return importlib.import_module(NAME)


def spare_compiler() -> None:
    """Put the stand-in there, unless the real one has been imported. Call it before a model is made."""
    if NAME not in sys.modules:
        sys.modules[NAME] = torch._dynamo = _StandIn(NAME)
