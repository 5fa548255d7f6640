"""``holdfast doctor``: what would hold up a job on this host."""

from __future__ import annotations

import argparse
import platform
from importlib.metadata import version
from pathlib import Path

import msgspec

from holdfast.launcher import health
from holdfast.launcher.health import Finding
from holdfast.launcher.tool import put_json, put_table

EXAMPLE = "holdfast doctor --directory runs/gpt --endpoint node-0:29400"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare them."""
    parser.add_argument("--directory", type=Path, action="append", default=[], metavar="DIR", help="where jobs write")
    parser.add_argument(
        "--endpoint", action="append", default=[], metavar="HOST:PORT", help="must answer; may be given several times"
    )
    parser.add_argument("--strict", action="store_true", help="warnings are problems, too")


def run(arguments: argparse.Namespace) -> int:
    """0; 1 where a check fails."""
    findings = examine(arguments.directory, arguments.endpoint)
    if arguments.json:
        put_json([msgspec.to_builtins(finding) for finding in findings])
    else:
        rows = [(finding.check, finding.status, finding.text) for finding in findings]
        put_table(f"holdfast doctor on {platform.node()}", ("check", "status", "found"), rows)
    bad = ("fail", "warn") if arguments.strict else ("fail",)
    return int(health.worst(findings) in bad)


def examine(directories: list[Path], endpoints: list[str]) -> list[Finding]:
    """All checks."""
    findings = [_versions(), *health.quick_checks(directories)]
    findings += [health.reach(endpoint) for endpoint in endpoints]
    if health.has_gpus():
        findings += [*health.gpu_errors(), *health.gpu_matmuls()]
    return findings + _erasure()


def _versions() -> Finding:
    text = f"holdfast {version('holdfast')}, torch {version('torch')}, Python {platform.python_version()}"
    return Finding(check="versions", status="ok", text=text)


def _erasure() -> list[Finding]:
    from holdfast.erasure.report import kernel_report

    report = kernel_report()
    slow = report.kernel != "isa-l"
    return [
        Finding(check="erasure", status="warn" if slow and index == 0 else "ok", text=line)
        for index, line in enumerate(report.lines())
    ]
