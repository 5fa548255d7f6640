"""torch.compile: blocks in place and wrapped, before and after the guide was made, and the model as a whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from holdfast.errors import UsageError
from holdfast.runtime.guidance import LateToEarly
from support.guidance_models import expected, gradients, loss_of, student, teacher, tokens

# torch's own tracing looks at .grad of a state; its warning would be an error here.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


class Counting:
    """A backend that counts the graphs that it is given."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        self.graphs += 1
        return graph.forward


@pytest.fixture
def counting() -> Iterator[Counting]:
    torch.compiler.reset()
    yield Counting()
    torch.compiler.reset()


@pytest.mark.parametrize("attached", [False, True], ids=["loss", "attached"])
@pytest.mark.parametrize("how", ["in place", "in place, later", "wrapped", "wrapped, later"])
def test_compiled_blocks_are_guided_and_compiled_once(counting: Counting, how: str, attached: bool) -> None:
    model = student()

    def compile_blocks() -> None:
        for at, block in enumerate(model.blocks):
            if how.startswith("in place"):
                block.compile(backend=counting)
            else:
                model.blocks[at] = torch.compile(block, backend=counting)

    if "later" not in how:
        compile_blocks()
    guide = LateToEarly(model, teacher(), layer="blocks.1", teacher_layer="norm", stop_step=4)
    if "later" in how:
        compile_blocks()
    graphs = []
    for step in range(6):
        model.zero_grad()
        if attached:
            guide.attach(step=step)
        loss = loss_of(model, tokens(step))
        (loss if attached else guide(loss, step)).backward()
        graphs.append(counting.graphs)
        if step < 4:
            torch.testing.assert_close(gradients(model), expected(step), rtol=1e-9, atol=1e-14)
    assert not guide.active
    assert graphs[0] > 0
    assert graphs == [graphs[0]] * 6, "guidance begins and ends without a recompilation"


@pytest.mark.parametrize("attached", [False, True], ids=["loss", "attached"])
@pytest.mark.parametrize("how", ["in place", "wrapped"])
def test_a_model_that_is_compiled_as_a_whole_is_guided(counting: Counting, how: str, attached: bool) -> None:
    model: nn.Module = student()
    if how == "in place":
        model.compile(backend=counting)
    else:
        model = torch.compile(model, backend=counting)
    guide = LateToEarly(model, teacher(), layer="blocks.1", teacher_layer="norm", stop_step=4)
    for step in (0, 3, 4):
        model.zero_grad()
        if attached:
            guide.attach(step=step)
        loss = loss_of(model, tokens(step))
        (loss if attached else guide(loss, step)).backward()
        if step < 4:
            torch.testing.assert_close(gradients(model), expected(step), rtol=1e-9, atol=1e-14)
    assert counting.graphs > 0


@pytest.mark.parametrize("how", ["in place", "wrapped"])
def test_code_that_was_compiled_without_the_guide_is_noticed(counting: Counting, how: str) -> None:
    model: nn.Module = student()
    if how == "in place":
        model.compile(backend=counting)
    else:
        model = torch.compile(model, backend=counting)
    loss_of(model, tokens(9))
    guide = LateToEarly(model, teacher(), layer="blocks.1", teacher_layer="norm", stop_step=4)
    with pytest.raises(UsageError, match=r"there were 0 since .* needs torch\.compiler\.reset\(\)"):
        guide(loss_of(model, tokens(1)), 1)
    guide.attach(step=1)
    with pytest.raises(UsageError, match=r"nothing is guided: .* needs torch\.compiler\.reset\(\)"):
        loss_of(model, tokens(1))
    torch.compiler.reset()
    loss_of(model, tokens(1)).backward()
    torch.testing.assert_close(gradients(model), expected(1), rtol=1e-9, atol=1e-14)
