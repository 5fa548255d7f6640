"""torch's own launcher tests, with `holdfast run` in the place of torchrun.

    make test-torch-launcher                                # fetches the files from GitHub at the installed torch's tag
    python tests/external/launcher_tests.py --from DIR      # takes them from a checkout of pytorch, or a flat folder

Nothing of pytorch is stored here. Each file is copied to a folder of its own, with lines at its head that make
`torch.distributed.run.main` that of holdfast; the rest of that module is torch's own in both. Each file runs twice: as
it is, then with ours. A test that passes only as it is must stand in `_EXPECTED` with the reason. Exit code 1 where
another one fails.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from pytorch_files import Run, fetch, run_file

_LAUNCHER, _ELASTIC = "test/distributed/launcher", "test/distributed/elastic/multiprocessing"
FILES = {
    f"{_LAUNCHER}/test_run.py": (
        "bin/test_script.py",
        "bin/test_script.sh",
        "bin/test_script_init_method.py",
        "bin/test_script_is_torchelastic_launched.py",
        "script_deviceid.py",
    ),
    f"{_LAUNCHER}/test_api.py": (),
    f"{_ELASTIC}/test_api.py": (),
    f"{_ELASTIC}/errors/api_test.py": (),
    f"{_ELASTIC}/errors/error_handler_test.py": (),
}
"""Test files, and what they run, beside them."""
_SHIM = """
import sys as _sys, torch.distributed.run as _torchrun
def _main(args=None):
    from holdfast.launcher.run import run
    code = run(list(_sys.argv[1:] if args is None else args))
    if code:
        raise SystemExit(code)
_torchrun.main = _main
"""
_EXPECTED = {
    "test_launch_elastic_agent_raise_exception": "replaces a method of torch's agent, which we do not use",
    "test_launch_shutdown": "replaces torch's agent and rendezvous handler, which we do not use",
    "test_launch_elastic_worker_raise_exception": (
        "ChildFailedError is raised as asked for; then records of torch's own event log are counted, and we write none"
    ),
}
"""Test name to why it cannot pass."""


def obtain(path: str, source: Path | None, version: str) -> str | None:
    """The text of a file of pytorch; None where it cannot be had."""
    if source is not None:
        name = path.split("/", 3)[3] if path.startswith(_LAUNCHER) else path
        for place in (source / path, source / name, source / Path(path).name):
            if place.is_file():
                return place.read_text()
        return None
    return fetch(path, version)


def lay_out(path: str, folder: Path, source: Path | None, version: str, *, ours: bool) -> Path | None:
    """The test file and what it runs, in `folder`."""
    text = obtain(path, source, version)
    if text is None:
        return None
    for helper in FILES[path]:
        found = obtain(f"{_LAUNCHER}/{helper}", source, version)
        if found is not None:
            target = folder / helper
            target.parent.mkdir(exist_ok=True)
            target.write_text(found)
            target.chmod(0o755)
    target = folder / Path(path).name
    target.write_text((_SHIM if ours else "") + text)
    return target


def run(path: str, source: Path | None, version: str, timeout_s: float, *, ours: bool) -> Run:
    """Run one file."""
    with tempfile.TemporaryDirectory(prefix="launcher-tests-") as name:
        folder = Path(name)
        file = lay_out(path, folder, source, version, ours=ours)
        if file is None:
            return Run(problem="the file cannot be had")
        return run_file(file, timeout_s, {"TMPDIR": name})


def report(rows: Sequence[tuple[str, Run, Run]]) -> tuple[str, bool]:
    """(the report, whether all is as it should be)."""
    lines = ["| file | pass with torchrun | of these, pass with ours | skipped |", "|---|---|---|---|"]
    notes: list[str] = []
    good = True
    for path, own, ours in rows:
        problem = own.problem or ours.problem
        good = good and not problem
        counts = f"{len(own.passed)} | {len(ours.passed & own.passed)} | {len(own.skipped)}"
        lines.append(f"| {path} | {problem or counts} |")
        for test in sorted(own.passed - ours.passed):
            reason = _EXPECTED.get(test.rpartition(".")[2])
            good = good and reason is not None
            said = ours.failed.get(test, "it did not run")
            notes.append(f"- {test}: {'expected: ' + reason if reason else 'NOT EXPECTED'}; it said: {said}")
        notes += [f"- {test} fails with torchrun, too: {said}" for test, said in sorted(own.failed.items())]
    passed, of = sum(len(o.passed & d.passed) for _, d, o in rows), sum(len(d.passed) for _, d, _ in rows)
    return "\n".join([*lines, "", f"{passed} of the {of} tests that pass with torchrun pass with ours", *notes]), good


def main() -> int:
    """See the head."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="source", type=Path, help="a checkout of pytorch, or a folder with the files")
    parser.add_argument("--only", action="append", choices=list(FILES), help="one of the files; may be repeated")
    parser.add_argument("--timeout", type=float, default=1800.0, help="seconds for one file (default 1800)")
    options = parser.parse_args()
    version = torch.__version__.partition("+")[0]
    rows = []
    for path in options.only or FILES:
        own = run(path, options.source, version, options.timeout, ours=False)
        ours = run(path, options.source, version, options.timeout, ours=True)
        rows.append((path, own, ours))
    text, good = report(rows)
    sys.stdout.write(f"torch {torch.__version__}\n\n{text}\n")
    return int(not good)


if __name__ == "__main__":
    raise SystemExit(main())
