"""DCP's own tests, with our writer and reader in the place of its own.

    make test-dcp                                          # fetches the files from GitHub at the installed torch's tag
    python tests/external/dcp_tests.py --from DIR          # takes them from a checkout of pytorch, or a flat folder

Nothing of pytorch is stored here. Each file is copied to a folder of its own, with lines at its head that put
`HoldfastWriter` and `HoldfastReader` where the file imports `FileSystemWriter` and `FileSystemReader` from, so that the
processes it starts have them too; marks that ask for GPUs are taken out, since gloo does without. Each file runs twice:
as it is, then with ours. A test that passes only as it is must stand in `_EXPECTED` with the reason.

Many of the tests save several times into one directory. DCP overwrites; a `HoldfastWriter` refuses. So that there is
something to compare, the lines at the head remove the old checkpoint first.

Exit code 1 where a test fails with ours that passes with DCP's own and is not expected to.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from pytorch_files import Run, fetch, run_file

FILES = (
    "test_file_system_checkpoint_cpu", "test_checkpoint", "test_dtensor_checkpoint", "test_dtensor_resharding",
    "test_planner", "test_dedup_tensors", "test_save_load_api", "test_hf_storage", "test_format_utils",
)  # fmt: skip
_FOLDER = "test/distributed/checkpoint"
_GPU_MARKS = re.compile(
    r"^[ \t]*@(skip_if_lt_x_gpu|requires_nccl|requires_accelerator_dist_backend|skip_if_no_gpu)\b.*\n", re.MULTILINE
)
_SHIM = """
import shutil as _shutil, sys as _sys, torch.distributed.checkpoint.format_utils
from holdfast.checkpoint import HoldfastReader as _HoldfastReader, HoldfastWriter as _HoldfastWriter
class _Writer(_HoldfastWriter):
    def __init__(self, path=None, *args, **options):
        super().__init__(path)
    def set_up_storage_writer(self, is_coordinator, *args, **options):
        super().set_up_storage_writer(is_coordinator, *args, **options)
        if is_coordinator and (self._directory / "root").exists():
            _shutil.rmtree(self._directory)
    def prepare_local_plan(self, plan):
        return plan
class _Reader(_HoldfastReader):
    def __init__(self, path=None, *args, **options):
        super().__init__(path)
for _name, _module in list(_sys.modules.items()):  # those that imported the names by now, and that will import them
    if _name.startswith("torch.distributed.checkpoint") and hasattr(_module, "FileSystemWriter"):
        _module.FileSystemWriter, _module.FileSystemReader = _Writer, _Reader
"""
_EXPECTED: dict[str, str] = {}
"""Test name to why it cannot pass: what it asks for is what holdfast refuses."""


def obtain(name: str, source: Path | None, version: str) -> str | None:
    """The text of a test file; None where it cannot be had."""
    if source is not None:
        places = [source / _FOLDER / f"{name}.py", source / f"{name}.py"]
        return next((path.read_text() for path in places if path.is_file()), None)
    return fetch(f"{_FOLDER}/{name}.py", version)


def changed(text: str, *, ours: bool) -> str:
    """The file as it is run."""
    text = _GPU_MARKS.sub("", text)
    if not ours:
        return text
    # After the imports from __future__, which must come first.
    head = re.match(r"(?:[ \t]*#.*\n|\s*\n|from __future__ .*\n)*", text)
    at = head.end() if head else 0
    return text[:at] + _SHIM + text[at:]


def run(name: str, text: str, timeout_s: float) -> Run:
    """Run one file."""
    with tempfile.TemporaryDirectory(prefix="dcp-tests-") as folder:
        path = Path(folder) / f"{name}.py"
        path.write_text(text)
        return run_file(path, timeout_s, {"OMP_NUM_THREADS": "1"})


def report(rows: Sequence[tuple[str, Run, Run]]) -> tuple[str, bool]:
    """(the report, whether all is as it should be)."""
    lines = ["| file | tests | pass with DCP's own | pass with ours | skipped |", "|---|---|---|---|---|"]
    notes: list[str] = []
    good = True
    for name, own, ours in rows:
        if own.problem and not own.passed:
            lines.append(f"| {name} | - | - | - | {own.problem} |")
            continue
        total = len(own.passed) + len(own.failed) + len(own.skipped)
        lines.append(f"| {name} | {total} | {len(own.passed)} | {len(ours.passed & own.passed)} | {len(own.skipped)} |")
        for test in sorted(own.passed - ours.passed):
            reason = _EXPECTED.get(test)
            good = good and reason is not None
            said = ours.failed.get(test) or ours.skipped.get(test) or ours.problem
            notes.append(f"- {name}: {test}: {'expected: ' + reason if reason else 'NOT EXPECTED'}; it said: {said}")
        notes += [f"- {name}: {test} fails with DCP's own, too: {said}" for test, said in sorted(own.failed.items())]
    passed, of = sum(len(o.passed & d.passed) for _, d, o in rows), sum(len(d.passed) for _, d, _ in rows)
    return "\n".join([*lines, "", f"{passed} of the {of} tests that pass with DCP's own pass with ours", *notes]), good


def main() -> int:
    """See the head."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="source", type=Path, help="a checkout of pytorch, or a folder with the files")
    parser.add_argument("--only", action="append", choices=FILES, help="one of the files; may be repeated")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds for one file (default 900)")
    parser.add_argument(
        "--version", default=torch.__version__.partition("+")[0], help="tag to fetch (default: torch's)"
    )
    wanted = parser.parse_args()
    rows: list[tuple[str, Run, Run]] = []
    for name in wanted.only or FILES:
        text = obtain(name, wanted.source, wanted.version)
        if text is None:
            rows.append((name, Run(problem="not there"), Run()))
            continue
        own, ours = (run(name, changed(text, ours=side), wanted.timeout) for side in (False, True))
        rows.append((name, own, ours))
        sys.stderr.write(f"{name}: {len(own.passed)} pass as they are, {len(ours.passed)} with ours\n")
    text, good = report(rows)
    sys.stdout.write(text + "\n")
    return 0 if good and any(own.passed for _, own, _ in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
