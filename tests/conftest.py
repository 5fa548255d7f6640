"""What all tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

# Images of containers set it. Children would write each argument of a `print` on its own, and what several of them say
# in one file would be torn; and no test may pass only because what it reads was not in a buffer.
os.environ.pop("PYTHONUNBUFFERED", None)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tests share the processors; torch reads it when it is imported

LONG = ("simulation", "schedules", "fault_table")
"""In the names of unit tests that take long; jobs of processes all do."""


def pytest_configure(config: pytest.Config) -> None:
    """Property tests do real work on machines of any speed. Outside of campaigns their examples are always the same."""
    settings.register_profile(
        "holdfast",
        deadline=None,
        derandomize="not campaign" in config.option.markexpr,
        suppress_health_check=[HealthCheck.too_slow],
    )
    settings.load_profile("holdfast")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first, so that the short ones fill up what is left where processes share the work."""
    items.sort(key=lambda item: "unit" in item.path.parts and not any(name in item.path.name for name in LONG))


@pytest.fixture(scope="session", autouse=True)
def _torch_caches_elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """torch leaves a cache folder in the temporary directory of whoever steps an optimizer; it is not a leftover."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("torch-cache")))
        yield
