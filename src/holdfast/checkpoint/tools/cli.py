"""``holdfast ckpt COMMAND …``."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn, Protocol

from holdfast.checkpoint.tools.units import drop_output, plain, prepare_output
from holdfast.errors import HoldfastError, UsageError

_COMMANDS = {
    "ls": ("ls", "list the steps of a checkpoint directory"),
    "inspect": ("inspecting", "show what a checkpoint holds"),
    "verify": ("verify", "check every checksum and that all is there"),
    "diff": ("diff", "compare two states, in any of the formats"),
    "export": ("export", "write Hugging Face safetensors, DCP, or one torch file"),
    "import": ("importing", "read safetensors, DCP or torch files"),
    "reshard": ("reshard", "cut for another number of ranks"),
    "copy": ("copying", "copy to another place, verified"),
    "edit": ("edit", "rename or leave out parts"),
    "repair": ("repair", "rebuild a damaged index or root, set aside what is incomplete"),
    "prune": ("prune", "delete what a policy does not keep"),
}


class Command(Protocol):
    """A module with one command. These three names are the whole surface."""

    EXAMPLE: str
    """A line that can be pasted into a shell."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare its arguments; called before they are parsed."""
        ...

    def run(self, arguments: argparse.Namespace) -> int:
        """Do it: 0 where all is well, 1 where what was looked for is not (broken, different, not there)."""
        ...


def main(argv: Sequence[str]) -> int:
    """Run one command.

    Args:
        argv: what follows ``holdfast ckpt``.

    Returns:
        0: done, and all is well. 1: it could not be done, or what was checked is broken, or differs. 2: a wrong usage.
    """
    arguments = list(argv)
    prepare_output()
    if not arguments or arguments[0] in ("-h", "--help"):
        (sys.stdout if arguments else sys.stderr).write(_help())
        return 0 if arguments else 2
    if arguments[0] not in _COMMANDS:
        sys.stderr.write(f"holdfast ckpt: error: unknown command {arguments[0]!r} (known: {', '.join(_COMMANDS)})\n")
        return 2
    logging.basicConfig(level=logging.WARNING, format="holdfast ckpt: %(message)s")
    command: Command = import_module(f"holdfast.checkpoint.tools.{_COMMANDS[arguments[0]][0]}")
    return _run(arguments[0], command, arguments[1:])


def _run(name: str, command: Command, arguments: list[str]) -> int:
    try:
        parser = _parser(name, command)
        code = command.run(parser.parse_args(arguments))
        sys.stdout.flush()
        return code
    except SystemExit as stop:  # argparse has said what is wrong, or printed its help
        return stop.code if isinstance(stop.code, int) else 2
    except UsageError as error:
        return _failed(name, str(error), 2)
    except BrokenPipeError:  # whoever read it (`head`, a pager) has seen enough
        drop_output()
        return 1
    except (HoldfastError, OSError) as error:
        return _failed(name, str(error), 1)
    except KeyboardInterrupt:
        sys.stderr.write("\n")
        return _failed(name, "interrupted; repeat the command to go on", 1)
    except MemoryError:
        return _failed(name, "there is not enough memory: give --max-memory less, where the command has it", 1)
    except Exception as error:  # the process's border: the user learns of it, whole under python -X dev
        if sys.flags.dev_mode:
            raise
        said = f"{type(error).__name__}: {error}"
        return _failed(name, f"{said} (not foreseen, please report it; PYTHONDEVMODE=1 shows where it happened)", 1)


def _failed(name: str, text: str, code: int) -> int:
    sys.stderr.write(f"holdfast ckpt {name}: error: {plain(text)}\n")
    return code


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line."""
        self.exit(2, f"{self.prog}: error: {message} ({self.prog} --help says more)\n")


def _parser(name: str, command: Command) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=f"holdfast ckpt {name}",
        description=f"{_COMMANDS[name][1][0].upper()}{_COMMANDS[name][1][1:]}.",
        epilog=f"example:\n  {command.EXAMPLE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_arguments(parser)
    return parser


def _help() -> str:
    lines = "".join(f"  {name:<9}{about}\n" for name, (_, about) in _COMMANDS.items())
    return (
        f"usage: holdfast ckpt COMMAND …\n\n{lines}\nexample:\n  holdfast ckpt ls checkpoints\n\n"
        f"`holdfast ckpt COMMAND --help` lists the arguments of one.\n"
    )
