"""Rehearse failures: schedules for tests, and the hooks that reach the middle of a forward or backward pass.

A test of a training script looks like this::

    faults = Faults("kill:rank=1,step=20,when=backward")
    environment = {**os.environ, **faults.environment()}
    subprocess.run(["holdfast", "run", "--hold-run-dir", run_dir, "train.py"], env=environment)
    assert faults.all_fired(run_dir)
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdfast.environment import FAULTS
from holdfast.faults import (
    Fault,
    Fired,
    Injector,
    Kind,
    RehearsedFault,
    When,
    format_schedule,
    parse_schedule,
    read_fired,
)

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

__all__ = ["Fault", "Faults", "Fired", "Kind", "RehearsedFault", "When", "install_hooks"]


class Faults:
    """A schedule of rehearsed failures and the record of those that fired."""

    def __init__(self, schedule: str | Iterable[Fault] = "") -> None:
        """Take a schedule as text (see `holdfast.faults`) or as `Fault` objects.

        Raises:
            UsageError: the text is no schedule.
        """
        self.schedule: tuple[Fault, ...] = parse_schedule(schedule) if isinstance(schedule, str) else tuple(schedule)

    def __str__(self) -> str:
        """The text for ``--hold-faults``."""
        return format_schedule(self.schedule)

    def environment(self) -> dict[str, str]:
        """The variable by which ``holdfast run`` and a Session learn the schedule."""
        return {FAULTS: str(self)}

    def fired(self, run_dir: str | os.PathLike[str]) -> tuple[Fired, ...]:
        """What fired in the run whose directory this is (``--hold-run-dir``), oldest first."""
        return read_fired(Path(run_dir))

    def all_fired(self, run_dir: str | os.PathLike[str]) -> bool:
        """Whether each fault of the schedule fired."""
        return {fired.index for fired in self.fired(run_dir)} == set(range(len(self.schedule)))


def install_hooks(
    injector: Injector,
    *,
    models: Sequence[nn.Module],
    optimizers: Sequence[Optimizer],
    step: Callable[[], int],
) -> ExitStack:
    """Let the faults of `injector` reach forward, loss, backward, optimizer and updated.

    Nothing is installed for an instant that no pending fault of this rank names, so that a run without faults, and the
    generation after one, runs the user's code and nothing else. Called by the Session, on the training thread.

    Args:
        injector: this rank's injector.
        models: the models of the Session; forward, loss and backward are taken from the first.
        optimizers: the optimizers of the Session; any update counts.
        step: gives `Session.step` now.

    Returns:
        What removes the hooks when it is closed.
    """
    installed = ExitStack()
    if models and injector.wants(When.FORWARD, When.BACKWARD):
        handle = _middle(models[0]).register_forward_hook(_forward_hook(injector, step))
        installed.callback(handle.remove)
    if models and injector.wants(When.LOSS):
        handle = models[0].register_forward_hook(lambda *_: injector.at(When.LOSS, step()))
        installed.callback(handle.remove)
    for optimizer in optimizers:
        if injector.wants(When.OPTIMIZER):
            handle = optimizer.register_step_pre_hook(lambda *_: injector.at(When.OPTIMIZER, step()))
            installed.callback(handle.remove)
        if injector.wants(When.UPDATED):
            handle = optimizer.register_step_post_hook(lambda *_: injector.at(When.UPDATED, step()))
            installed.callback(handle.remove)
    return installed


def _middle(model: nn.Module) -> nn.Module:
    """A module half way through the model: the middle one of those that hold parameters themselves."""
    holders = [module for module in model.modules() if any(True for _ in module.parameters(recurse=False))]
    return holders[len(holders) // 2] if holders else model


def _forward_hook(injector: Injector, step: Callable[[], int]) -> Callable[..., None]:
    """A forward hook that fires forward, and hangs backward on the output's gradient."""

    def hook(module: nn.Module, inputs: object, output: object) -> None:
        injector.at(When.FORWARD, step())
        tensor = _first_differentiable(output)
        if tensor is not None:
            tensor.register_hook(lambda _: injector.at(When.BACKWARD, step()))  # type: ignore[no-untyped-call]

    return hook


def _first_differentiable(output: Any) -> Tensor | None:  # Any: a module may return whatever it likes
    import torch

    if isinstance(output, torch.Tensor):
        return output if output.requires_grad else None
    if isinstance(output, tuple | list):
        return next((found for found in map(_first_differentiable, output) if found is not None), None)
    if isinstance(output, dict):
        return _first_differentiable(list(output.values()))
    return None
