"""``--run-path``: run a script by path in an interpreter that torch's error handler watches, as torchrun does."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the script named first on the command line with the arguments that follow."""
    from torch.distributed.elastic.multiprocessing.errors import record
    from torch.distributed.run import run_script_path

    record(run_script_path)(*sys.argv[1:])


if __name__ == "__main__":
    main()
