"""What all tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def _torch_caches_elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """torch leaves a cache folder in the temporary directory of whoever steps an optimizer; it is not a leftover."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("torch-cache")))
        yield
