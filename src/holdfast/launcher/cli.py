"""The command ``holdfast``: finds the subcommand and leaves the rest to it."""

from __future__ import annotations

import sys
from collections.abc import Sequence

_HELP = """usage: holdfast COMMAND …

  holdfast run [torchrun's flags] [--hold-…] script.py args…   run a training script, restart it from memory
  holdfast ckpt ls|inspect|verify|diff|export|import|…           look at checkpoints, check, convert and tend them
  holdfast doctor                                              check whether this host can run jobs well
  holdfast status                                              show the jobs of this user on this host
  holdfast report RUN_DIR                                      tell how a run went, from its events
  holdfast --version

example:
  holdfast run --nproc-per-node 2 train.py --lr 3e-4

`holdfast run --help` lists the flags, `holdfast ckpt --help` the commands for checkpoints.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script; the exit code is returned, that of shells for Ctrl-C where nobody heeds it."""
    try:
        return _main(list(sys.argv[1:] if argv is None else argv))
    except KeyboardInterrupt:
        sys.stderr.write("holdfast: interrupted\n")
        return 130


def _main(arguments: list[str]) -> int:
    match arguments[:1]:
        case ["run"]:
            from holdfast.launcher.run import main as run

            return run(arguments[1:])
        case ["ckpt"]:
            from holdfast.checkpoint.tools.cli import main as ckpt

            return ckpt(arguments[1:])
        case ["doctor" | "status" | "report" as name]:
            from holdfast.launcher.tool import main as tool

            return tool(name, arguments[1:])
        case ["--version"]:
            from importlib.metadata import version

            sys.stdout.write(f"holdfast {version('holdfast')}\n")
            return 0
        case ["-h" | "--help"]:
            sys.stdout.write(_HELP)
            return 0
        case []:
            sys.stderr.write(_HELP)
            return 2
        case _:
            sys.stderr.write(f"holdfast: error: unknown command {arguments[0]!r}: see `holdfast --help`\n")
            return 2
