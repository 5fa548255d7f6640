"""Test files of pytorch that are not stored here: fetched, run by pytest as they come, and what came of them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import urllib.request
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass, field
from pathlib import Path

_URL = "https://raw.githubusercontent.com/pytorch/pytorch/v{version}/{path}"


@dataclass
class Run:
    """What came of one file."""

    passed: set[str] = field(default_factory=set)
    """As ``class.test``, like the others."""
    skipped: dict[str, str] = field(default_factory=dict)
    """With the reason."""
    failed: dict[str, str] = field(default_factory=dict)
    """With the last line that names an error."""
    problem: str = ""
    """Why no test ran at all."""


def fetch(path: str, version: str) -> str | None:
    """The text of a file of pytorch at a tag; None where it cannot be had."""
    try:
        with urllib.request.urlopen(_URL.format(version=version, path=path), timeout=60) as answer:
            return str(answer.read().decode())
    except OSError as error:
        sys.stderr.write(f"{path}: cannot be fetched: {error}\n")
        return None


def run_file(file: Path, timeout_s: float, environment: dict[str, str]) -> Run:
    """Run a test file in its folder, with pytorch's own settings or none.

    Args:
        file: alone in its folder, but for what it needs.
        timeout_s: for all its tests.
        environment: beside this process's.
    """
    report = file.parent / "report.xml"
    options = ["-q", "-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", str(file.parent), "-W", "ignore"]
    command = [sys.executable, "-m", "pytest", *options, f"--junitxml={report}", str(file)]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
            env={**os.environ, "PYTHONWARNINGS": "ignore", **environment},
            cwd=file.parent,
        )
    except subprocess.TimeoutExpired:
        return Run(problem=f"not done after {timeout_s:.0f} s")
    if not report.exists():
        return Run(problem=(done.stdout + done.stderr).strip().splitlines()[-1][:200])
    return _parse(ElementTree.parse(report).getroot())


def _parse(root: ElementTree.Element) -> Run:
    found = Run()
    for case in root.iter("testcase"):
        name = f"{case.get('classname', '').rpartition('.')[2]}.{case.get('name')}"
        skip, bad = case.find("skipped"), [*case.findall("failure"), *case.findall("error")]
        if bad:
            found.failed[name] = _cause(bad[0])
        elif skip is not None:
            found.skipped[name] = (skip.get("message") or "")[:120]
        else:
            found.passed.add(name)
    if not (found.passed | found.failed.keys() | found.skipped.keys()):
        found.problem = "there is no test in it"
    return found


def _cause(element: ElementTree.Element) -> str:
    text = element.text or element.get("message") or ""
    lines = [
        line.strip("E ").strip() for line in text.splitlines() if re.search(r"(Error|Exception|assert)\b.*:", line)
    ]
    return (lines[-1] if lines else (element.get("message") or ""))[:200]
