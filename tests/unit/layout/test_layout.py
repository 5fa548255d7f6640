"""The shape of the repository: layers, links, what may not be imported, and links in the documents."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
PACKAGE = ROOT / "src" / "holdfast"
LAYERS = ("erasure", "checkpoint", "snapshot", "runtime", "launcher")
"""From the lowest to the highest; imports go downwards only."""
BASE = {
    "errors": set(),
    "environment": {"holdfast.errors", "holdfast.checkpoint.version"},
    "faults": {"holdfast.errors", "holdfast.environment"},
    "testing": {"holdfast.errors", "holdfast.environment", "holdfast.faults"},
}
"""Modules that every layer may use, and all that each of them may use."""
WITH_TORCH = {
    "holdfast.checkpoint.tensors",
    "holdfast.checkpoint.saving",
    "holdfast.checkpoint.api",
    "holdfast.checkpoint.dcp",
    "holdfast.checkpoint.fsdp1",
    "holdfast.checkpoint.held",
    "holdfast.checkpoint.joint",
    "holdfast.checkpoint.layout",
    "holdfast.checkpoint.loading",
    "holdfast.checkpoint.sinks",
    "holdfast.checkpoint.ties",
    "holdfast.checkpoint.tools.export_dcp",
    "holdfast.checkpoint.tools.export_torch",
    "holdfast.snapshot.copier",
    "holdfast.snapshot.copyplan",
    "holdfast.snapshot.cuda",
}
UNSAFE_MODULES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
UNSAFE_CALLS = {"torch.load", "torch.save", "eval", "exec"}
ALLOWED = {
    # DCP's planners take objects as torch files; they are made in memory, of data that was checked.
    "holdfast.checkpoint.dcp": {"torch.load", "torch.save"},
    # An unpickler that makes stand-ins of DCP's own classes and knows nothing else.
    "holdfast.checkpoint.tools.dcp_format": {"pickle", "torch.load"},
    # For the class of the error that torch.load raises.
    "holdfast.checkpoint.tools.torch_format": {"pickle", "torch.load"},
    "holdfast.checkpoint.tools.export_torch": {"torch.save"},
    # Runs the script that the user names, as python itself would.
    "holdfast.launcher.interpreter": {"exec", "compile"},
}
"""What a module uses for the sake of others' formats, and the one place that runs a script. Each torch.load is one with
weights_only=True."""
UNSAFE_METHODS = {
    "all_gather_object",
    "broadcast_object_list",
    "gather_object",
    "scatter_object_list",
    "send_object_list",
    "recv_object_list",
}

TESTS = ROOT / "tests"
WITH_AND_WITHOUT = {"train.py", "equality_script.py"}
"""Scripts of the tests that run with and without holdfast."""


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.AST) -> Iterator[str]:
    """Every module that is imported anywhere, types included; ``from a import b`` gives a and a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def of_ours(tree: ast.AST) -> set[str]:
    return {name for name in imports(tree) if name.startswith("holdfast.")}


def layer_of(name: str) -> str | None:
    part = name.split(".")[1] if "." in name else ""
    return part if part in LAYERS else None


@pytest.mark.parametrize("path", modules(), ids=module_name)
def test_imports_go_downwards_only(path: Path) -> None:
    name, tree = module_name(path), ast.parse(path.read_text())
    own = layer_of(name)
    if own is None:
        return
    for imported in of_ours(tree):
        other = layer_of(imported)
        assert other is None or LAYERS.index(other) <= LAYERS.index(own), f"{name} imports {imported}"


@pytest.mark.parametrize("module", sorted(BASE))
def test_the_base_modules_stay_below_all_layers(module: str) -> None:
    used = of_ours(ast.parse((PACKAGE / f"{module}.py").read_text()))
    beyond = {name for name in used if not any(name == known or name.startswith(f"{known}.") for known in BASE[module])}
    assert not beyond - {"holdfast.checkpoint"}


def test_a_module_belongs_to_a_layer_or_to_the_base() -> None:
    strays = {path.stem for path in PACKAGE.glob("*.py")} - set(BASE) - {"__init__"}
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"} - set(LAYERS)
    assert (strays, folders) == (set(), set())


@pytest.mark.parametrize("path", modules(), ids=module_name)
def test_nothing_unpickles_or_runs_code_from_data(path: Path) -> None:
    tree = ast.parse(path.read_text())
    allowed = ALLOWED.get(module_name(path), set())
    assert not {name.split(".")[0] for name in imports(tree)} & (UNSAFE_MODULES - allowed)
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    called = {ast.unparse(node.func) for node in calls} - allowed
    assert not {name for name in called if name in UNSAFE_CALLS or name.split(".")[-1] in UNSAFE_METHODS}
    loads = [node for node in calls if ast.unparse(node.func) == "torch.load"]
    assert all("weights_only=True" in map(ast.unparse, node.keywords) for node in loads)
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg == "allow_pickle"]


def test_the_search_for_unsafe_calls_finds_one() -> None:
    tree = ast.parse("import torch\nx = torch.load('f')\n")
    assert {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)} & UNSAFE_CALLS


def torch_free_modules() -> list[str]:
    names = [module_name(path) for path in modules()]
    free = [name for name in names if layer_of(name) in ("erasure", "checkpoint", "snapshot") or layer_of(name) is None]
    return [name for name in free if name not in WITH_TORCH and not name.endswith("__main__")]


def test_the_daemon_and_all_below_it_import_no_torch() -> None:
    script = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
        "    assert 'torch' not in sys.modules, name + ' imports torch'\n"
    )
    command = [sys.executable, "-W", "error", "-c", script, *torch_free_modules()]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert result.returncode == 0, result.stderr


def test_the_environment_is_read_in_one_module_and_by_the_launcher() -> None:
    readers = set()
    for path in modules():
        text = path.read_text()
        if "env" not in text:
            continue  # to parse all would take seconds
        used = {ast.unparse(node) for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Attribute)}
        if used & {"os.environ", "os.getenv", "os.putenv"}:
            readers.add(module_name(path))
    assert "holdfast.environment" in readers
    assert {name for name in readers if layer_of(name) != "launcher"} <= {"holdfast.environment"}


@pytest.mark.parametrize("layer", LAYERS)
def test_the_root_has_a_link_to_each_package(layer: str) -> None:
    link = ROOT / layer
    assert link.is_symlink()
    assert link.resolve() == PACKAGE / layer


def inner_imports(text: str, ours: set[str]) -> set[str]:
    """What is imported of ours within functions."""
    if not re.search(rf"^\s+(from|import) ({'|'.join(ours)})\b", text, re.MULTILINE):
        return set()  # to parse all would take seconds
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
    return {name for node in functions for name in imports(node) if name.split(".")[0] in ours}


def test_the_tests_import_what_is_ours_at_the_top_of_a_file() -> None:
    """Where a name has moved, the collection fails at once, and not one test at the end of a long run."""
    files = sorted(TESTS.rglob("*.py"))
    ours = {"holdfast", "support", *(path.stem for path in files)}
    found = {path.name: inner_imports(path.read_text(), ours) for path in files}
    assert {name for name, inner in found.items() if inner} == WITH_AND_WITHOUT


def documents() -> list[Path]:
    return sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").glob("*.md")])


@pytest.mark.parametrize("path", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_links_in_documents_lead_somewhere(path: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text())
    missing = [target for target in targets if "://" not in target and not (path.parent / target).exists()]
    assert not missing


def test_every_page_of_the_documentation_is_reached_from_the_readme() -> None:
    reached, queue = set(), [ROOT / "README.md"]
    while queue:
        page = queue.pop()
        if page in reached or page.suffix != ".md" or not page.exists():
            continue
        reached.add(page)
        queue += [(page.parent / target).resolve() for target in re.findall(r"\]\(([^)#\s]+)", page.read_text())]
    assert {str(path.relative_to(ROOT)) for path in documents()} - {
        str(path.relative_to(ROOT)) for path in reached
    } == set()
