"""Run a script as ``__main__`` whose Session keeps pace with its node: ``paced_script.py SCRIPT ARGUMENTS``.

For scripts that are shown to users and know nothing of `pacing`.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script, it finds only what is beside it

from holdfast import Session
from support.pacing import paced

_steps = Session.steps


def _paced_steps(session: Session, until: int) -> Iterator[int]:
    return paced(_steps(session, until))


if __name__ == "__main__":
    Session.steps = _paced_steps
    del sys.argv[0]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
