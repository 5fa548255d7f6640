"""A process that outlives the agent by a moment and ends what the agent left: run by path, imports nothing of ours.

PR_SET_PDEATHSIG ends a worker with its agent, but not what the worker started (the python inside a wrapper script).
Workers name their process group here before they run a user's program; when the agent is gone without a word, every
group that is still named gets SIGKILL.

Standard input carries lines: ``+PGID`` (started), ``-PGID`` (ended and reaped), ``.`` (the agent leaves in good order).
"""

from __future__ import annotations

import contextlib
import os
import signal


def main() -> None:
    """Read until the agent leaves or dies."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    groups: set[int] = set()
    rest = b""
    while chunk := os.read(0, 65536):
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if line == b".":
                return
            if line[:1] == b"+":
                groups.add(int(line[1:]))
            elif line[:1] == b"-":
                groups.discard(int(line[1:]))
    for group in groups:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    main()
