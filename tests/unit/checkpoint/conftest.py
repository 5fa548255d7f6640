"""Fixtures of the checkpoint's tests."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest
from tools_states import Tool

from holdfast.checkpoint.places import place
from support.s3 import S3, s3_server


@pytest.fixture(scope="session")
def s3_of_session() -> Iterator[S3]:
    """One server for all tests of this process."""
    with s3_server() as s3:
        yield s3


@pytest.fixture
def s3(s3_of_session: S3, monkeypatch: pytest.MonkeyPatch) -> S3:
    """The server, without faults and requests of other tests, and the environment that finds it."""
    s3_of_session.rules.clear()
    s3_of_session.requests.clear()
    s3_of_session.got.clear()
    for name, value in s3_of_session.environment().items():
        monkeypatch.setenv(name, value)
    return s3_of_session


@pytest.fixture
def tool(capsys: pytest.CaptureFixture[str]) -> Tool:
    """The command line of the offline tools."""
    return Tool(capsys)


@pytest.fixture
def runs(s3: S3) -> Path:
    """A URL in a bucket of this test's own."""
    return place(f"{s3.make_bucket(f'b{secrets.token_hex(6)}')}/runs")
