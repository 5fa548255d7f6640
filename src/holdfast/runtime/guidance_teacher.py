"""The teacher: where it comes from, who it is, one forward of it, and its end."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from holdfast.errors import UsageError
from holdfast.runtime.guidance_layers import Tap, state_of, unwrap
from holdfast.runtime.guidance_weights import load_weights, weights_hash

Source = nn.Module | Callable[[], nn.Module] | str | os.PathLike[str]
Inputs = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and named arguments of a forward."""

_NOT_PASSED_ON = ("labels", "past_key_values")
"""Arguments of Hugging Face models that make no sense for a teacher: it has a loss and a cache of its own."""


class _Reached(Exception):
    """Ends the teacher's forward behind the layer that was asked for; what follows (the head) is not computed."""


class Teacher:
    """A frozen model and the layer of it that is looked at. Training thread only.

    Args:
        source: a module in eval mode; a function that makes one; or a Hugging Face folder (needs transformers).
        weights: what to load into the module (see `load_weights`); None: it has its weights.
        layer: its layer; "" is the whole model's output.
        logits: whether the layer's output is read as logits.
        dtype: what its floating-point state and inputs are cast to, in place; None: as they are.
        device: where it runs, in place; None: where it is (one that we make: `default_device`).
        default_device: the student's.

    Raises:
        UsageError: it is in training mode, there is no such layer, or nothing to load it from.
        MismatchError, CorruptError: its weights cannot be used.
    """

    def __init__(
        self,
        source: Source,
        *,
        weights: str | os.PathLike[str] | None,
        layer: str,
        logits: bool,
        dtype: torch.dtype | None,
        device: torch.device | str | None,
        default_device: torch.device,
    ) -> None:
        module, ours = _module(source)
        if ours:
            module.eval()
        _check_eval(module)
        if weights is not None:
            load_weights(module, Path(weights))
        self.identity = weights_hash(module)
        """Hash of its weights before any cast: the same teacher in another dtype is the same teacher."""
        target = torch.device(device) if device is not None else default_device if ours else None
        if dtype is not None or target is not None:
            module.to(device=target, dtype=dtype)
        self._module: nn.Module | None = module
        self._layer = layer
        self._logits = logits
        self._seen: Any = None
        self._running = self._ends_early = False
        self._tap: Tap | None = Tap(unwrap(module), layer, self._see, argument="teacher_layer")
        self._tap.refresh()

    @property
    def module(self) -> nn.Module:
        """The model.

        Raises:
            UsageError: it was dropped.
        """
        if self._module is None:
            raise UsageError("the teacher was dropped at stop_step")
        return self._module

    @property
    def layer(self) -> nn.Module:
        """The layer that is looked at."""
        assert self._tap is not None
        assert self._tap.layer is not None
        return self._tap.layer

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return device_of(self.module)

    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """Its state for the student's inputs, on its own device, without a graph.

        Raises:
            UsageError: it is in training mode, its layer was not reached, or gave no hidden state.
        """
        module, tap = self.module, self._tap
        assert tap is not None
        _check_eval(module)
        device, dtype = self.device, _float_dtype(module)
        args, kwargs = tree_map(lambda value: _brought(value, device, dtype), (args, _passed_on(kwargs)))
        tap.refresh()
        self._running, self._ends_early = True, self._layer != "" and not _must_end(module)
        try:
            with torch.no_grad(), torch.autocast(device.type, enabled=False), contextlib.suppress(_Reached):
                module(*args, **kwargs)
        finally:
            self._running = False
            seen, self._seen = self._seen, None
        if seen is None:
            raise UsageError(f"teacher_layer={self._layer!r} did not run in the teacher's forward: name another layer")
        state, _ = state_of(seen, layer=self._layer, logits=self._logits)
        return state.detach()

    def drop(self) -> None:
        """Let go of the model: its memory is free unless someone else still refers to it."""
        if self._tap is not None:
            self._tap.remove()
        self._tap = self._module = self._seen = None  # the tap refers to the module

    def _see(self, output: Any) -> Any:
        if not self._running:
            return output  # someone else uses the module
        self._seen = output
        if self._ends_early:
            raise _Reached
        return output


def device_of(module: nn.Module) -> torch.device:
    """Of its first parameter or buffer; the CPU where it has none."""
    return next((tensor.device for tensor in chain(module.parameters(), module.buffers())), torch.device("cpu"))


def _module(source: Source) -> tuple[nn.Module, bool]:
    """The module, and whether we made it (and may put it into eval mode)."""
    if isinstance(source, nn.Module):
        return source, False
    if isinstance(source, str | os.PathLike):
        return _from_hugging_face(Path(source)), True
    if callable(source):
        made = source()
        if isinstance(made, nn.Module):
            return made, True
        raise UsageError(f"the function given as teacher returned a {type(made).__name__}, not a module")
    raise UsageError(f"teacher is a {type(source).__name__}: give a module, a function that makes one, or a folder")


def _from_hugging_face(path: Path) -> nn.Module:
    if not (path / "config.json").is_file():
        raise UsageError(
            f"teacher={str(path)!r} is no Hugging Face folder (it has no config.json): give a function that makes the "
            "module as teacher, and this path as teacher_weights"
        )
    try:
        from transformers import AutoModelForCausalLM  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        raise UsageError(f"teacher={str(path)!r} needs the package transformers: pip install transformers") from error
    model: nn.Module = AutoModelForCausalLM.from_pretrained(path, use_safetensors=True, local_files_only=True)
    return model


def _check_eval(module: nn.Module) -> None:
    if any(part.training for part in module.modules()):
        raise UsageError("the teacher is in training mode (dropout would make its states random): call teacher.eval()")


def _must_end(module: nn.Module) -> bool:
    """Whether its forward must run to the end: FSDP reshards there, and compiled code is left whole."""
    return any(
        hasattr(part, "set_reshard_after_forward") or part._compiled_call_impl is not None or hasattr(part, "_orig_mod")
        for part in module.modules()
    )


def _float_dtype(module: nn.Module) -> torch.dtype | None:
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), None)


def _passed_on(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if name not in _NOT_PASSED_ON}


def _brought(value: Any, device: torch.device, dtype: torch.dtype | None) -> Any:
    """An input of the student on the teacher's device, floating-point ones in its dtype."""
    if not isinstance(value, Tensor):
        return value
    own_dtype = dtype if value.is_floating_point() else None
    # A copy to the CPU that nobody waits for could be read before it is there.
    return value.detach().to(device=device, dtype=own_dtype, non_blocking=device.type != "cpu")
