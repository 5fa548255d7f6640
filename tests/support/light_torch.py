"""Spare the processes of a test the import of torch's compiler: half of what a short training script costs.

Every optimizer, DDP and FSDP2 ask `torch._dynamo` to leave their functions alone, and that import takes as long as
torch itself does, in each of the processes that a test starts. A script that compiles nothing calls `spare_compiler`
first: it puts a stand-in there, which knows what they ask for. At the first question that the stand-in does not know,
and before the first part of the real one is loaded, it makes way for that, so that a script is slower then, and not
wrong.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

NAME = "torch._dynamo"
ALONE = "torch._dynamo.config"
"""The part that FSDP2 asks for: it needs no other one."""


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
    """`torch._dynamo` where nothing is compiled."""

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


class _Parts(MetaPathFinder, Loader):
    """Has the real module come before a part of it: a part alone asks for others, which ask for it while it loads."""

    def find_spec(self, fullname: str, path: object, target: object = None) -> ModuleSpec | None:
        if not fullname.startswith(f"{NAME}.") or fullname == ALONE:
            return None
        if not isinstance(sys.modules.get(NAME), _StandIn):
            return None
        _real()
        part = sys.modules.get(fullname)
        return ModuleSpec(fullname, self, loader_state=part) if part is not None else None

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        part = spec.loader_state
        spec.loader_state = part.__spec__
        return part  # it came with the whole

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = module.__spec__.loader_state


def spare_compiler() -> None:
    """Put the stand-in there, unless the real one has been imported. Call it before a model is made."""
    if NAME not in sys.modules:
        sys.modules[NAME] = torch._dynamo = _StandIn(NAME)
        sys.meta_path.insert(0, _Parts())
