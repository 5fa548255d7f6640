"""The files that people submit: they parse, their flags exist, and Kubernetes' schemas accept them."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from holdfast.launcher.arguments import make_parser

CONFIGS = Path(__file__).parents[3] / "cluster_configs"
FILES = sorted(CONFIGS.iterdir())


def documents() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((CONFIGS / "kubernetes.yaml").read_text()))


@pytest.mark.parametrize("path", [path for path in FILES if path.suffix != ".yaml"], ids=lambda path: path.name)
def test_shell_scripts_parse(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_flag_exists_and_three_lines_are_marked(path: Path) -> None:
    text = path.read_text()
    known = {option for action in make_parser()._actions for option in action.option_strings}
    used = set(re.findall(r"(?<![\w-])(--(?:hold|rdzv|nnodes|nproc)[a-z-]*)", text))
    assert {"--hold-grace", "--hold-requeue-code", "--rdzv-endpoint"} <= used
    assert used <= known
    assert [mark for mark in ("# 1:", "# 2:", "# 3:") if mark not in text] == []


def test_kubernetes_accepts_its_files() -> None:
    for document in documents():
        kubernetes_validate.validate(document, "1.30", strict=True)


def test_the_schemas_refuse_a_misspelt_field() -> None:
    document = documents()[2]
    document["spec"]["completion"] = document["spec"].pop("completions")
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(document, "1.30", strict=True)


def test_the_job_has_room_for_snapshots_the_token_and_names_that_resolve() -> None:
    service, secret, job = documents()
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
    (token,) = (entry for entry in container["env"] if entry["name"] == "HOLDFAST_TOKEN")
    key = token["valueFrom"]["secretKeyRef"]
    assert key["name"] == secret["metadata"]["name"]
    assert key["key"] in secret["stringData"]
    assert service["spec"]["clusterIP"] == "None"
    assert pod["subdomain"] == service["metadata"]["name"]
    (endpoints,) = (flag for flag in container["args"] if flag.startswith("--rdzv-endpoint="))
    hosts = [endpoint.split(":")[0] for endpoint in endpoints.partition("=")[2].split(",")]
    name = job["metadata"]["name"]
    assert hosts == [f"{name}-{index}.{pod['subdomain']}" for index in range(job["spec"]["completions"])]
    grace = next(int(flag.partition("=")[2].rstrip("s")) for flag in container["args"] if "grace" in flag)
    assert grace < pod["terminationGracePeriodSeconds"]
