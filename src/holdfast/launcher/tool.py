"""What ``holdfast doctor``, ``status`` and ``report`` share: their parsers, their tables, their exit codes."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Protocol

from holdfast.errors import HoldfastError, UsageError

COMMANDS = {
    "doctor": "check whether this host can run jobs well",
    "status": "show the jobs of this user on this host",
    "report": "tell how a run went, from its events",
}


class Tool(Protocol):
    """A module with one command. These three names are the whole surface."""

    EXAMPLE: str
    """A line that can be pasted into a shell."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare its arguments; called before they are parsed."""
        ...

    def run(self, arguments: argparse.Namespace) -> int:
        """Do it: 0 where all is well, 1 where a problem was found."""
        ...


def main(name: str, argv: Sequence[str]) -> int:
    """Run the command `name`; 0: all is well, 1: a problem was found, 2: wrong usage."""
    tool: Tool = import_module(f"holdfast.launcher.{name}")
    parser = argparse.ArgumentParser(
        prog=f"holdfast {name}",
        description=f"{COMMANDS[name][0].upper()}{COMMANDS[name][1:]}.",
        epilog=f"example:\n  {tool.EXAMPLE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    tool.add_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    try:
        return tool.run(parser.parse_args(list(argv)))
    except SystemExit as stop:  # argparse has said what is wrong, or printed its help
        return stop.code if isinstance(stop.code, int) else 2
    except UsageError as error:
        sys.stderr.write(f"holdfast {name}: error: {error}\n")
        return 2
    except (HoldfastError, OSError) as error:
        sys.stderr.write(f"holdfast {name}: error: {error}\n")
        return 1
    except KeyboardInterrupt:
        return 1


def put_json(value: object) -> None:
    """Print `value`, which is plain data."""
    sys.stdout.write(json.dumps(value, indent=1) + "\n")


def put_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table for people; as wide as it must be where nobody watches."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", header_style="bold")
    for name in header:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell, style=_STYLES.get(cell, "")) for cell in row))
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 160)
    console.print(table)


_STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red", "failed": "bold red", "done": "green"}


def human_bytes(size: float) -> str:
    """1.5 GB, in powers of 1024."""
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TB"


def human_seconds(seconds: float) -> str:
    """0.35 s, 2 min 5 s, 3 h 12 min."""
    if seconds < 10:
        return f"{seconds:.2f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
