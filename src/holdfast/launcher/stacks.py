"""What faulthandler writes, read: threads and frames. Pure."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import PurePath

_THREAD = re.compile(r"^(?:Current thread|Thread) (0x[0-9a-f]+).*:$")
_FRAME = re.compile(r'^  File "(?P<file>.*)", line (?P<line>\d+|\?\?\?) in (?P<name>.*)$')
_OURS = ("/holdfast/snapshot/", "/holdfast/runtime/", "/holdfast/checkpoint/")


@dataclass(frozen=True)
class Frame:
    """One call."""

    file: str
    line: str
    name: str

    @property
    def is_library(self) -> bool:
        """Whether it is Python's, installed, or ours, rather than the user's."""
        return any(part in self.file for part in ("/site-packages/", "/dist-packages/", "/lib/python", "<", *_OURS))

    def __str__(self) -> str:
        return f"{PurePath(self.file).name}:{self.line} in {self.name}"


@dataclass(frozen=True)
class Thread:
    """One thread, innermost call first."""

    ident: str
    frames: tuple[Frame, ...]

    @property
    def is_ours(self) -> bool:
        """Whether holdfast started it: what it does says nothing about the script."""
        starter = [frame for frame in self.frames if not frame.file.endswith("/threading.py")]
        return self.frames[-1].name == "_bootstrap" and bool(starter) and any(o in starter[-1].file for o in _OURS)


def parse_stacks(text: str) -> tuple[Thread, ...]:
    """The threads of one dump; the main thread is the last one."""
    threads: list[tuple[str, list[Frame]]] = []
    for line in text.splitlines():
        head = _THREAD.match(line)
        frame = _FRAME.match(line)
        if head:
            threads.append((head[1], []))
        elif frame and threads:
            threads[-1][1].append(Frame(frame["file"], frame["line"], frame["name"]))
    return tuple(Thread(ident, tuple(frames)) for ident, frames in threads if frames)


def digest(threads: tuple[Thread, ...]) -> str:
    """Equal for two dumps of a process whose threads, less ours, stand where they stood."""
    lines = [f"{t.ident} {f.file} {f.line} {f.name}" for t in threads if not t.is_ours for f in t.frames]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def describe(threads: tuple[Thread, ...]) -> str:
    """Where the main thread stands: the innermost call of the user's own, and the innermost of all."""
    if not threads:
        return "without Python frames"
    frames = threads[-1].frames
    own = next((frame for frame in frames if not frame.is_library), frames[0])
    inner = "" if own is frames[0] else f" (now {frames[0]})"
    return f"in {own}{inner}"
