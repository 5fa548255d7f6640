"""The stand-in for torch's compiler makes way for the real one as soon as that is needed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys
import torch
sys.path.insert(0, sys.argv[1])
from support.light_torch import _StandIn, spare_compiler
spare_compiler()
weight = torch.ones(2, requires_grad=True)
optimizer = torch.optim.AdamW([weight])
weight.sum().backward()
optimizer.step()
import torch._dynamo.config
config = sys.modules["torch._dynamo.config"]
assert isinstance(sys.modules["torch._dynamo"], _StandIn)
assert torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2)).tolist() == [2, 2]
assert not isinstance(sys.modules["torch._dynamo"], _StandIn)
assert torch._dynamo is sys.modules["torch._dynamo"]
assert torch._dynamo.config is config
assert torch._dynamo.utils.__spec__.origin.endswith("_dynamo/utils.py")
assert torch._dynamo.utils is sys.modules["torch._dynamo.utils"]
optimizer.step()
"""


@pytest.mark.campaign
def test_a_script_that_compiles_gets_the_real_compiler() -> None:
    command = [sys.executable, "-c", SCRIPT, str(Path(__file__).parents[1])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
