"""What the documents say is there is there, and what is there they say."""

import json
import re
import shlex
from pathlib import Path

import pytest
import typer

from recipes.embedded.cutouts import LOCK, notice
from safelight.cli import app
from safelight.request import Request
from safelight.sampling import SAMPLERS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


def rows(heading: str) -> dict[str, list[str]]:
    """The rows of the tables under a heading of the README, by each name in their first cell."""
    _, _, after = README.partition(f"\n## {heading}\n")
    section = after.partition("\n## ")[0]
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in section.splitlines()
        if line.startswith("| `")
    ]
    return {name: row for row in cells for name in re.findall(r"`([^`]+)`", row[0])}


def commands(text: str) -> list[list[str]]:
    """The arguments of each safelight command in the code blocks of a text."""
    joined = text.replace("\\\n", " ")
    lines = re.findall(r"^ {4}safelight (.*)$", joined, flags=re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines]


def test_every_setting_is_in_the_readme():
    assert set(Request.model_fields) <= set(rows("Parameters"))


def test_every_option_of_generate_is_in_the_readme():
    known = set(rows("Parameters"))
    for parameter in typer.main.get_command(app).commands["generate"].params:
        option = next((o for o in parameter.opts if o.startswith("--")), None)
        assert parameter.name in known or option in known, parameter.name


def test_the_readme_invents_no_setting():
    options = {
        option
        for parameter in typer.main.get_command(app).commands["generate"].params
        for option in parameter.opts
    }
    assert set(rows("Parameters")) <= options | set(Request.model_fields)


def test_every_sampler_is_in_the_readme_as_the_registry_has_it():
    found = rows("Samplers")
    assert list(found) == list(SAMPLERS)
    for sampler in SAMPLERS.values():
        _, steps, schedules, web, _ = found[sampler.name]
        assert (steps, web) == (str(sampler.steps), sampler.a1111 or "")
        assert schedules == ("yes" if sampler.schedules else "")


def test_there_are_commands_in_the_readme():
    assert len(commands(README)) > 10


@pytest.mark.parametrize("arguments", commands(README), ids=" ".join)
def test_commands_of_the_readme_parse(arguments: list[str]):
    group = typer.main.get_command(app)
    command = group.commands[arguments[0]]
    context = command.make_context(arguments[0], arguments[1:])
    assert arguments[0] != "generate" or context.params["sampler"] in {None, *SAMPLERS}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files(document: Path):
    text = document.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if not target.startswith("https://"):
            assert (document.parent / target).is_file(), target


def test_every_decision_is_in_the_index():
    index = (ROOT / "docs" / "decisions" / "README.md").read_text(encoding="utf-8")
    for note in (ROOT / "docs" / "decisions").glob("[0-9]*.md"):
        title = note.read_text(encoding="utf-8").splitlines()[0].partition(": ")[2]
        assert f"[{note.name[:4]}]({note.name})" in index
        assert title in " ".join(index.split())


def test_the_notice_credits_every_package_of_the_lock():
    text = (ROOT / "NOTICE").read_text(encoding="utf-8")
    lock = json.loads(LOCK.read_text(encoding="utf-8"))
    assert notice(lock["packages"]).strip() in text
    for package in [*lock["packages"], lock["names"]]:
        assert f"{package['name']} {package['version']}" in text
