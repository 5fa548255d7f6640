"""The public face: about a dozen names, imported on first use."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import holdfast

PUBLIC = {
    "ElasticSampler",
    "HoldfastError",
    "InitFrom",
    "LateToEarly",
    "PerRank",
    "Persisted",
    "Restored",
    "Retention",
    "SaveHandle",
    "Session",
    "__version__",
    "checkpoint",
    "errors",
    "register_codec",
    "restore_point",
    "testing",
}


def test_all_lists_the_public_names_in_order() -> None:
    assert set(holdfast.__all__) == PUBLIC
    assert sorted(holdfast.__all__) == holdfast.__all__
    assert dir(holdfast) == holdfast.__all__


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_each_public_name_can_be_imported(name: str) -> None:
    assert getattr(holdfast, name) is not None


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse(Path(holdfast.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen == PUBLIC - {"__version__"}


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Sesion'"):
        holdfast.Sesion  # noqa: B018


def test_importing_holdfast_imports_no_torch() -> None:
    script = "import sys, holdfast; holdfast.errors; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False, timeout=240).returncode == 0


def test_the_version_is_the_one_of_the_package_metadata() -> None:
    from importlib.metadata import version

    assert version("holdfast") == holdfast.__version__
