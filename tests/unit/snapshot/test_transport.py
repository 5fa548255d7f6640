"""The daemon's sockets."""

from __future__ import annotations

from pathlib import Path

import pytest

from holdfast.errors import UsageError
from holdfast.snapshot.transport import Transport


def test_a_socket_path_that_the_system_cannot_take_is_named_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"bytes, the system takes 107: set TMPDIR or XDG_RUNTIME_DIR"):
        Transport(tmp_path / ("d" * 100), "127.0.0.1")
