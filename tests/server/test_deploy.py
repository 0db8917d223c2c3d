"""What deploy/ says agrees with the code; `make deploy` holds it against schemas and a linter."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from safelight.cli import app
from safelight.server.files import Files
from safelight.server.keep import Keep
from safelight.server.metrics import Metrics
from safelight.server.retention import Retention

DEPLOY = Path(__file__).parent.parent.parent / "deploy"
COMMANDS = typer.main.get_command(app).commands  # pyright: ignore[reportAttributeAccessIssue]


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((DEPLOY / name).read_text()))


def container(name: str) -> dict[str, Any]:
    found = [one for one in documents(name) if one["kind"] == "StatefulSet"]
    return found[0]["spec"]["template"]["spec"]["containers"][0]


def instruction(name: str) -> list[str]:
    """Return the words of the Dockerfile's last instruction of this name."""
    text = (DEPLOY / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.startswith(f"{name} ")]
    return lines[-1].removeprefix(f"{name} ").split(None, 1)


def arguments() -> list[Any]:
    """Yield each command line in deploy/ that starts safelight."""
    image = json.loads(" ".join(instruction("CMD")))
    composed = documents("compose.yaml")[0]["services"]["server"]["command"]
    composed = [re.sub(r"\$\{\w+:-(.*?)\}", r"\1", part) for part in composed]
    batch = shlex.split(documents("kubernetes/ray-batch.yaml")[0]["spec"]["entrypoint"])
    fleet = documents("kubernetes/ray-fleet.yaml")[0]["spec"]["headGroupSpec"]["template"]["spec"]
    served = shlex.split(fleet["containers"][0]["args"][0].partition("exec ")[2])
    return [
        pytest.param(image, id="image"),
        pytest.param(composed, id="compose"),
        pytest.param(container("kubernetes/server.yaml")["args"], id="kubernetes"),
        pytest.param(batch[1:], id="ray"),
        pytest.param(served[1:], id="fleet"),
    ]


@pytest.mark.parametrize("given", arguments())
def test_command_lines_parse(given: list[str]) -> None:
    if given[0] not in COMMANDS:
        pytest.fail(f"there is no command {given[0]}")
    context = COMMANDS[given[0]].make_context(given[0], given[1:])
    if context.params.get("keep"):
        Keep.parse(context.params["keep"])


def test_the_image_runs_as_nobody_in_particular() -> None:
    assert instruction("USER") == ["10001"]
    assert "useradd --uid 10001" in (DEPLOY / "Dockerfile").read_text()
    pod = documents("kubernetes/server.yaml")[1]["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsUser"] == 10001
    assert container("kubernetes/server.yaml")["securityContext"]["readOnlyRootFilesystem"]


def test_health_is_asked_where_it_is_answered() -> None:
    from safelight.server.apis.ours import router

    paths = {getattr(route, "path", "") for route in router.routes}
    probes = container("kubernetes/server.yaml")
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert probes[name]["httpGet"]["path"] in paths
    assert "/healthz" in " ".join(instruction("HEALTHCHECK"))


def test_files_that_are_mounted_are_there() -> None:
    composed = documents("compose.yaml")[0]
    for config in composed["configs"].values():
        assert "file" not in config or (DEPLOY / config["file"]).is_file()
    used = re.findall(r"\$\{(\w+)", (DEPLOY / "compose.yaml").read_text())
    assert set(used) == set(re.findall(r"^#?(\w+)=", (DEPLOY / "example.env").read_text(), re.M))


def test_the_dashboard_asks_for_figures_that_there_are(tmp_path: Path) -> None:
    retention = Retention(Files(tmp_path), None, Keep())  # pyright: ignore[reportArgumentType]
    found = {metric.name for metric in Metrics(retention)._registry.collect()}
    board = json.loads((DEPLOY / "monitoring" / "dashboard.json").read_text())
    asked = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    names = {name for text in asked for name in re.findall(r"safelight_\w+", text)}
    assert {name.removesuffix("_total") for name in names} <= found
    assert len(names) >= 6
    ids = [panel["id"] for panel in board["panels"]]
    assert len(ids) == len(set(ids))
    source = yaml.safe_load((DEPLOY / "monitoring" / "sources.yaml").read_text())
    assert {panel["datasource"]["uid"] for panel in board["panels"]} == {
        source["datasources"][0]["uid"]
    }
