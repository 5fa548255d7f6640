"""Finding a layer by name, reading the state out of what it returns, and tapping it without touching compiled code."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from holdfast.errors import UsageError

Output = Any  # whatever a module's forward returns: the user's types
Rebuild = Callable[[Tensor], Output]
Hook = TypeVar("Hook", bound=Callable[..., Any])

_STATE_KEYS = ("last_hidden_state", "hidden_states", "hidden_state")
_LOGIT_KEYS = ("logits",)
_WRAPPED = ("module", "_orig_mod", "_checkpoint_wrapped_module")
"""Where DistributedDataParallel, torch.compile and checkpoint_wrapper keep the module that they wrap."""


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel, else the module itself."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def find_layer(root: nn.Module, name: str, *, argument: str) -> nn.Module:
    """The module called `name`, looking through wrappers; "blocks.-1" counts from the end, "" is `root`.

    Args:
        root: where names begin.
        name: as in ``root.named_modules()``.
        argument: how the user gave the name, for the message.

    Raises:
        UsageError: there is none; lists near matches.
    """
    found: nn.Module | None = root
    for part in name.split(".") if name else ():
        found = _child(found, part) if found is not None else None
    if found is None:
        known = [_plain_name(known) for known, _ in root.named_modules() if known]
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or known[:3]
        raise UsageError(
            f"{argument}={name!r} is no module of {type(root).__name__}; near matches: {', '.join(near) or 'none'}"
        )
    return found


def _child(module: nn.Module, part: str) -> nn.Module | None:
    children = dict(module.named_children())
    if part.startswith("-") and part[1:].isdigit():
        place = len(children) - int(part[1:])
        if all(key.isdigit() for key in children) and 0 <= place < len(children):
            return list(children.values())[place]
    if part in children:
        return children[part]
    inner = next((children[key] for key in _WRAPPED if key in children), None)
    return _child(inner, part) if inner is not None else None


def _plain_name(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPED[1:])


def state_of(output: Output, *, layer: str, logits: bool = False) -> tuple[Tensor, Rebuild]:
    """The hidden state (or the logits) in a layer's output, and how to put another in its place.

    Taken are: a tensor; the first of a tuple or list; of a mapping or dataclass the entry "last_hidden_state",
    "hidden_states" or "hidden_state" (a tuple there: its last tensor), of logits the entry "logits".

    Raises:
        UsageError: the output is not a floating-point tensor ``[tokens, width]`` or ``[batch, tokens, width]``.
    """
    found, rebuild = _locate(output, _LOGIT_KEYS if logits else _STATE_KEYS)
    if found is None or not found.is_floating_point() or found.dim() not in (2, 3):
        shown = type(output).__name__ if found is None else f"{str(found.dtype)[6:]}{list(found.shape)}"
        raise UsageError(
            f"the output of layer {layer!r} is {shown}, not a {'row of logits' if logits else 'hidden state'} per "
            "token ([batch, tokens, width], floating point): name another layer"
        )
    return found, rebuild


def _locate(output: Output, keys: tuple[str, ...]) -> tuple[Tensor | None, Rebuild]:
    if isinstance(output, Tensor):
        return output, _itself
    if isinstance(output, Mapping):
        for key in keys:
            if output.get(key) is not None:
                return _entry(output[key], partial(_with_item, output, key))
        return None, _itself
    if isinstance(output, tuple | list) and output:
        first, inner = _locate(output[0], keys)
        return first, lambda new: _with_first(output, inner(new))
    if dataclasses.is_dataclass(output):
        for key in keys:
            if getattr(output, key, None) is not None:
                return _entry(getattr(output, key), partial(_with_attribute, output, key))
    return None, _itself


def _itself(new: Output) -> Output:
    return new


def _entry(value: Output, rebuild: Callable[[Output], Output]) -> tuple[Tensor | None, Rebuild]:
    """The tensor in an entry: itself, or the last one of a tuple of states of all layers."""
    if isinstance(value, Tensor):
        return value, rebuild
    if isinstance(value, tuple | list) and value and isinstance(value[-1], Tensor):
        return value[-1], lambda new: rebuild(type(value)([*value[:-1], new]))
    return None, rebuild


def _with_first(output: Output, new: Output) -> Output:
    if isinstance(output, tuple) and hasattr(output, "_fields"):
        return type(output)(new, *output[1:])
    return type(output)([new, *output[1:]])


def _with_item(output: Output, key: str, new: Output) -> Output:
    changed = copy.copy(output)
    changed[key] = new
    return changed


def _with_attribute(output: Output, key: str, new: Output) -> Output:
    changed = copy.copy(output)
    object.__setattr__(changed, key, new)
    return changed


def width_of(layer: nn.Module) -> int | None:
    """How wide a layer's output is, read off its own attributes or its first norm; None where it does not show."""
    for module in (layer, *(child for child in layer.modules() if "norm" in type(child).__name__.lower())):
        for attribute in ("out_features", "embedding_dim", "normalized_shape", "hidden_size"):
            value = getattr(module, attribute, None)
            if isinstance(value, int):
                return value
            if isinstance(value, tuple) and value:
                return int(value[-1])
        weight = getattr(module, "weight", None)
        if module is not layer and isinstance(weight, Tensor) and weight.dim() == 1:
            return weight.shape[0]
    return None


def uncompiled(hook: Hook) -> Hook:
    """The hook, which torch.compile leaves alone where it meets it inside of a module that is compiled as a whole."""
    disable: Callable[[Hook], Hook] = torch.compiler.disable
    return disable(hook)


class Tap:
    """Hands what a layer returns to `seen`, and returns what that returns.

    A plain layer gets a forward hook. Where ``layer.compile()`` was called, hooks would be part of the compiled code
    and their removal would compile it again (or go unnoticed); there the call itself is wrapped, outside of the code.
    Either way `refresh` before each forward notices that the layer was compiled, wrapped or replaced meanwhile.

    Training thread only.
    """

    def __init__(self, root: nn.Module, name: str, seen: Callable[[Output], Output], *, argument: str) -> None:
        self._root = root
        self._name = name
        self._argument = argument
        self._seen = uncompiled(seen)
        self._layer: nn.Module | None = None
        self._wrapped: Callable[..., Any] | None = None
        self._remove: Callable[[], None] = _nothing

    @property
    def layer(self) -> nn.Module | None:
        """Where the tap sits now."""
        return self._layer

    def refresh(self) -> None:
        """Sit on the layer that has the name now.

        Raises:
            UsageError: no layer has it any more.
        """
        layer = find_layer(self._root, self._name, argument=self._argument)
        if layer is self._layer and layer._compiled_call_impl is self._wrapped:
            return
        self.remove()
        self._layer = layer
        if layer._compiled_call_impl is None:
            self._remove = layer.register_forward_hook(lambda module, args, output: self._seen(output)).remove
        else:
            self._wrap(layer, layer._compiled_call_impl)

    def _wrap(self, layer: nn.Module, compiled: Callable[..., Any]) -> None:
        seen = self._seen

        def call(*args: Any, **kwargs: Any) -> Output:
            return seen(compiled(*args, **kwargs))

        def unwrap_call() -> None:
            if layer._compiled_call_impl is call:
                layer._compiled_call_impl = compiled

        layer._compiled_call_impl = self._wrapped = call
        self._remove = unwrap_call

    def remove(self) -> None:
        """Leave the layer as it was; harmless twice."""
        self._remove()
        self._remove, self._layer, self._wrapped = _nothing, None, None


class Border:
    """Calls `before` with the arguments of each forward of a module, and `after` when the forward has ended well.

    Where ``module.compile()`` was called before, the two stand outside of the compiled code, which may have been made
    already and would not notice new hooks; elsewhere they are hooks. Training thread only.
    """

    def __init__(
        self, module: nn.Module, before: Callable[[tuple[Any, ...], dict[str, Any]], None], after: Callable[[], None]
    ) -> None:
        before, after = uncompiled(before), uncompiled(after)
        self._remove: Callable[[], None] = _nothing
        compiled: Callable[..., Any] | None = module._compiled_call_impl
        if compiled is None:
            pre = module.register_forward_pre_hook(lambda module, args, kwargs: before(args, kwargs), with_kwargs=True)
            post = module.register_forward_hook(lambda module, args, output: after())

            def remove_hooks() -> None:
                pre.remove()
                post.remove()

            self._remove = remove_hooks
            return

        def call(*args: Any, **kwargs: Any) -> Output:
            before(args, kwargs)
            output = compiled(*args, **kwargs)
            after()
            return output

        def unwrap_call() -> None:
            if module._compiled_call_impl is call:
                module._compiled_call_impl = compiled

        module._compiled_call_impl = call
        self._remove = unwrap_call

    def remove(self) -> None:
        """Leave the module as it was; harmless twice."""
        self._remove()
        self._remove = _nothing


def argument_of(module: nn.Module, name: str) -> Callable[[tuple[Any, ...], dict[str, Any]], Any] | None:
    """How to take an argument of the module's forward, given by name or by place; None where it has no such argument.

    Any: what the user's forward takes. An argument that was not given is None.
    """
    for wrapped in _WRAPPED[1:]:
        module = getattr(module, wrapped, module)
    parameters = inspect.signature(module.forward).parameters
    found = parameters.get(name)
    if found is None and all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters.values()):
        return None
    by_place = found is not None and found.kind is not found.KEYWORD_ONLY
    place = list(parameters).index(name) if by_place else len(parameters)
    return lambda args, kwargs: kwargs.get(name, args[place] if place < len(args) else None)


def _nothing() -> None:
    """What removing a tap that sits nowhere does."""
