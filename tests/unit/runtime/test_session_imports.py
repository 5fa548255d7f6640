"""What a plain script pays for a Session: nothing of torch that it does not use itself."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import sys
import torch
before = set(sys.modules)
import holdfast
with holdfast.Session(model=torch.nn.Linear(2, 2)) as session:
    assert list(session.steps(2)) == [0, 1]
heavy = ("torch.distributed.tensor", "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.checkpoint", "zmq")
print([name for name in heavy if name in sys.modules and name not in before])
"""


def test_plain_script_imports_no_dtensor_no_compiler_and_no_sockets() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=280, check=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
