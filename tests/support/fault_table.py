"""The same faults done to our checkpoints and to those of torch.distributed.checkpoint: what each of them makes of it.

    python tests/support/fault_table.py                # the table of docs/fault-table.md, from what is observed now
    python tests/support/fault_table.py --side ours    # JSON of one column

Nothing here is quoted: both columns are what the code did when it was run. A row does its fault in a folder of its own.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # run as a script, it finds only what is beside it

import support.fault_damage as damage
import support.fault_deaths as deaths

ROWS: dict[str, tuple[Callable[[Path], str], Callable[[Path], str]]] = {
    "a bit flips in the payload": (damage.payload_ours, damage.payload_dcp),
    "a bit flips in the index (each 5th byte in turn)": (damage.index_ours, damage.index_dcp),
    "a bit flips in the root": (damage.root_ours, damage.root_dcp),
    "a data file is cut short": (damage.truncated_ours, damage.truncated_dcp),
    "kill -9 of one of two ranks in the second save": (deaths.killed_rank_ours, deaths.killed_rank_dcp),
    "a writer in a side thread fails": (deaths.writer_ours, deaths.writer_dcp),
    "no space is left in the second save": (deaths.full_ours, deaths.full_dcp),
    "the worker of an asynchronous save dies": (deaths.worker_ours, deaths.worker_dcp),
    "files of a dead attempt lie there": (damage.leftovers_ours, damage.leftovers_dcp),
    "a writer of an older generation wakes up": (damage.zombie_ours, damage.zombie_dcp),
    "the checkpoint has a key that the model lacks": (damage.unexpected_ours, damage.unexpected_dcp),
    "the target has another dtype": (damage.dtype_ours, damage.dtype_dcp),
    "0-d and int64 tensors go out as safetensors": (damage.export_ours, damage.export_dcp),
    "the metadata of a DCP checkpoint is a hostile pickle": (damage.pickle_ours, damage.pickle_dcp),
    "the index names `../other/file`": (damage.outside_ours, damage.outside_dcp),
    "a safetensors header says that it has 4 GiB": (damage.header_ours, damage.header_dcp),
    "a kill between every two file operations of the second save": (deaths.kills_ours, deaths.kills_dcp),
}
SLOW = ("no space is left in the second save", "a kill between every two file operations of the second save")
"""Need the right to mount, or ten seconds."""


def observe(column: int, *, quick: bool = False) -> dict[str, str]:
    """Do every fault to one side."""
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found: dict[str, str] = {}
    for name, sides in ROWS.items():
        if quick and name in SLOW:
            continue
        with tempfile.TemporaryDirectory() as folder, redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
            found[name] = sides[column](Path(folder) / "c")
    return found


def main() -> None:
    """See the head."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", choices=("ours", "dcp"), help="print JSON of one column")
    parser.add_argument("--quick", action="store_true", help="without the rows that need ten seconds or a mount")
    wanted = parser.parse_args()
    if wanted.side:
        sys.stdout.write(json.dumps(observe(("ours", "dcp").index(wanted.side), quick=wanted.quick)) + "\n")
        return
    ours, theirs = observe(0, quick=wanted.quick), observe(1, quick=wanted.quick)
    rows = [f"| {name} | {ours[name]} | {theirs[name]} |\n" for name in ours]
    sys.stdout.write("".join(["| what happens | holdfast | DCP |\n", "|---|---|---|\n", *rows]))


if __name__ == "__main__":
    main()
