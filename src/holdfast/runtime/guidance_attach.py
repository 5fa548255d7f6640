"""The form of guidance that needs no loss: the gradient of the term joins the state's own on its way back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _Inject(torch.autograd.Function):
    """The identity on its first argument; backward adds gradients that are known already.

    They are kept on the context, not by ``save_for_backward``: inside a checkpointed region, which counts the tensors
    that are saved, this function leaves no trace, so the recomputed forward need not contain it.
    """

    @staticmethod
    def forward(
        ctx: Any, state: Tensor, gradients: tuple[Tensor, ...], ran: Callable[[], None], *parameters: Tensor
    ) -> Tensor:
        ctx.gradients, ctx.ran = gradients, ran
        return state.view_as(state)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        ctx.ran()
        state, *parameters = ctx.gradients
        return (upstream + state, None, None, *parameters)


def inject(
    state: Tensor,
    term: Callable[[Tensor], Tensor],
    factor: float | Tensor,
    parameters: Sequence[Tensor],
    ran: Callable[[], None],
) -> tuple[Tensor, Tensor]:
    """Add the gradient of ``factor * term(state)`` to that of `state`, and to those of `parameters`.

    Args:
        state: the layer's output, in the autograd graph.
        term: the scalar to add to the loss; depends on `state` and `parameters`.
        factor: lambda times the scale of the loss.
        parameters: leaves that `term` depends on besides.
        ran: called when a backward comes by, before it reaches `parameters`.

    Returns:
        What goes on in place of `state`, equal to it; and the term's value, without a graph.
    """
    leaf = state.detach().requires_grad_()
    # Hooks of an enclosing checkpoint would take the tensors that the small graph saves for the region's own.
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_same, _same):
        value = term(leaf)
        gradients = torch.autograd.grad(value * factor, [leaf, *parameters])
    apply: Callable[..., Tensor] = _Inject.apply
    return apply(state, gradients, ran, *parameters), value.detach()


def _same(tensor: Tensor) -> Tensor:
    return tensor
