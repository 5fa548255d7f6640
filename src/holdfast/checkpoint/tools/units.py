"""Sizes as people write them, tables, and a progress line."""

from __future__ import annotations

import argparse
import codecs
import io
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from holdfast.errors import StorageError, UsageError

T = TypeVar("T")

_UNITS = {"": 1, "b": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY = {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


def argument(parse: Callable[[str], T]) -> Callable[[str], T]:
    """A ``type`` for argparse that refuses in the words of `parse`."""

    def parsed(text: str) -> T:
        try:
            return parse(text)
        except UsageError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parsed


def parse_size(text: str) -> int:
    """Bytes of ``2GiB``, ``500MB``, ``4096``.

    Raises:
        UsageError: it is no size.
    """
    digits = text.strip().lower()
    number = digits.rstrip("abcdefghijklmnopqrstuvwxyz")
    unit = digits[len(number) :]
    factor = _BINARY.get(unit) or _UNITS.get(unit.removesuffix("b") or unit)
    try:
        if factor is None or float(number) <= 0:
            raise ValueError
        return int(float(number) * factor)
    except (ValueError, OverflowError):
        raise UsageError(f"{text!r} is no size: write it like 2GiB, 500MB or 4096") from None


def human(size_bytes: float) -> str:
    """``1.5 GiB``."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size_bytes < 1024 or unit == "TiB":
            break
        size_bytes /= 1024
    return f"{size_bytes:.0f} {unit}" if unit == "B" else f"{size_bytes:.1f} {unit}"


def plain(text: str) -> str:
    """A name or a message in one line without control characters: names come from files that anybody wrote."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def prepare_output() -> None:
    """Let everything be written, whatever the terminal's encoding: paths byte for byte as the system has them, other
    characters that it lacks as escapes."""
    codecs.register_error("holdfast", _unencodable)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="holdfast")


def _unencodable(error: UnicodeError) -> tuple[bytes, int]:
    assert isinstance(error, UnicodeEncodeError)
    parts = (
        bytes([ord(c) - 0xDC00]) if "\udc80" <= c <= "\udcff" else c.encode("ascii", "backslashreplace")
        for c in error.object[error.start : error.end]
    )
    return b"".join(parts), error.end


def drop_output() -> None:
    """What could not be written any more is not tried again when the process ends."""
    with suppress(OSError, ValueError):  # not a file in tests
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def free_beside(path: Path) -> str:
    """How much room there is where a file was to be written: for errors that do not say why."""
    try:
        return f"{human(shutil.disk_usage(path.absolute().parent).free)} are free there"
    except OSError as error:
        return f"{path.absolute().parent}: {error.strerror}"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows with their columns aligned, first one as the heading."""
    rows = [[plain(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() + "\n" for row in rows
    )


def put_json(value: object) -> None:
    """Print it on standard output."""
    sys.stdout.write(json.dumps(value, indent=1) + "\n")


class Progress:
    """One line on standard error with share, rate and time left; nothing where that is no terminal.

    Any thread may add.
    """

    _INTERVAL_S = 0.2

    def __init__(self, what: str, total_bytes: int) -> None:
        """
        Args:
            what: is done, one word or two.
            total_bytes: that it takes in all.
        """
        self._what = what
        self._total = max(total_bytes, 1)
        self._lock = threading.Lock()
        self._done = 0
        self._stopped = False
        self._shown = sys.stderr.isatty()
        self._start = self._last = time.monotonic()

    def add(self, size_bytes: int) -> None:
        """So many more are done; fewer where something begins again.

        Raises:
            StorageError: it was stopped: whoever did so knows why.
        """
        with self._lock:
            if self._stopped:
                raise StorageError(f"{self._what} was stopped")
            self._done += size_bytes
            now = time.monotonic()
            if self._shown and now - self._last > self._INTERVAL_S:
                self._last = now
                self._show(now - self._start)

    def stop(self) -> None:
        """Let whoever adds next give up."""
        with self._lock:
            self._stopped = True

    def _show(self, seconds: float) -> None:
        rate = self._done / max(seconds, 1e-9)
        left = max(self._total - self._done, 0) / max(rate, 1.0)
        share = min(100 * self._done // self._total, 100)
        sys.stderr.write(f"\r\x1b[K{self._what}: {share}% of {human(self._total)}, {human(rate)}/s, {left:.0f} s left")
        sys.stderr.flush()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
