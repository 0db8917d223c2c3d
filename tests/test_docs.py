"""The README and the docs agree with the code, and with each other."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
from pydantic import Field

import safelight
from recipes.embedded.cutouts import LOCK, notice
from safelight.cli import app
from safelight.request import Request
from safelight.sampling import SAMPLERS
from safelight.settings import settings_of
from safelight.settings_docs import markdown

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
COMMANDS = typer.main.get_command(app).commands
README_LINES = 150


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def rows(text: str) -> dict[str, list[str]]:
    """Return the rows of a text's tables, by each name in backticks in their first cell."""
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("| `")
    ]
    return {name: row for row in cells for name in re.findall(r"`([^`]+)`", row[0])}


SETTINGS = rows(markdown(Request))
_PAGE, _, _GENERATE = read(DOCS / "cli.md").partition("\n## `safelight generate`\n")
GENERATE = rows(_GENERATE)


def commands(text: str) -> list[list[str]]:
    """Yield the arguments of each safelight command in a text's code blocks."""
    joined = text.replace("\\\n", " ")
    lines = re.findall(r"^ {4}(?:.*&& )?safelight (.*)$", joined, flags=re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines]


WRITTEN = [
    pytest.param(arguments, id=f"{document.name}: {' '.join(arguments)}")
    for document in DOCUMENTS
    for arguments in commands(read(document))
]


def test_the_readme_is_short():
    assert len(read(ROOT / "README.md").splitlines()) <= README_LINES


def test_every_setting_is_documented_as_its_field_describes_it():
    assert markdown(Request) in read(DOCS / "settings.md")
    assert set(SETTINGS) == set(Request.model_fields)


def test_a_new_setting_is_in_the_table():
    class Wider(Request):
        tiling: bool = Field(False, description="whether the edges fit together")

    row = "| `tiling` | `--tiling` | whether the edges fit together | true or false | off |"
    assert row in markdown(Wider).splitlines()


def test_every_alias_of_an_option_is_documented():
    text = read(DOCS / "settings.md")
    for setting in settings_of(Request).values():
        aliases = ", ".join(f"`{alias}`" for alias in setting.about.aliases)
        assert not aliases or f"| {setting.name} | {aliases} |" in text


def test_every_option_of_generate_is_documented():
    for parameter in COMMANDS["generate"].params:
        option = next((o for o in parameter.opts if o.startswith("--")), None)
        assert parameter.name in SETTINGS or option in GENERATE, parameter.name


def test_the_docs_invent_no_option():
    assert set(GENERATE) <= {o for parameter in COMMANDS["generate"].params for o in parameter.opts}


@pytest.mark.parametrize(
    ("page", "command"), [("server.md", "serve"), ("studio.md", "studio"), ("scale.md", "worker")]
)
def test_every_option_of_a_server_is_documented(page: str, command: str):
    found = set(rows(read(DOCS / page)))
    real = {o for parameter in COMMANDS[command].params for o in parameter.opts if o != "--help"}
    real |= {o for parameter in COMMANDS[command].params for o in parameter.secondary_opts}
    assert real - found <= {"-h", "--browser", "model"}
    assert found <= real


def test_every_option_of_batch_is_documented():
    """Options that it shares with generate are on the page of generate."""
    found = set(rows(read(DOCS / "batch.md").partition("\n## Options\n")[2]))
    own = [p for p in COMMANDS["batch"].params if p.name not in {*SETTINGS, "file", "help"}]
    real = {option for parameter in own for option in parameter.opts}
    assert real - found <= GENERATE.keys()
    assert found <= real


def test_every_option_of_train_is_documented_with_its_default():
    text = read(DOCS / "train-your-own.md").partition("\n## Options\n")[2]
    kinds = ("fine-tune", "text-to-image", "unconditional", "distil")
    head = next(line for line in text.splitlines() if line.startswith("| option"))
    assert [cell.strip(" `") for cell in head.strip("|").split("|")][2:] == list(kinds)
    found = rows(text.partition("\n## ")[0])
    for column, kind in enumerate(kinds, start=2):
        real = {
            parameter.opts[0]: parameter
            for parameter in COMMANDS["train"].commands[kind].params
            if parameter.opts[0].startswith("--") and parameter.name != "help"
        }
        assert {option for option, row in found.items() if row[column]} == set(real), kind
        for option, parameter in real.items():
            said = found[option][column].strip("`").replace(",", "")
            if isinstance(parameter.default, bool) or parameter.default is None:
                continue
            if parameter.required:
                assert said == "required"
            elif isinstance(parameter.default, str):
                assert said == parameter.default
            else:
                assert float(said) == parameter.default, (kind, option)


def test_every_command_is_documented():
    assert set(rows(_PAGE)) == set(COMMANDS)


def test_every_sampler_is_documented_as_the_registry_has_it():
    found = rows(read(DOCS / "samplers.md"))
    assert list(found) == list(SAMPLERS)
    for sampler in SAMPLERS.values():
        _, steps, schedules, web, _ = found[sampler.name]
        assert (steps, web) == (str(sampler.steps), sampler.a1111 or "")
        assert schedules == ("yes" if sampler.schedules else "")


def test_there_are_commands_in_the_documents():
    assert len(WRITTEN) > 30
    assert len(commands(read(ROOT / "README.md"))) >= 6


@pytest.mark.parametrize("arguments", WRITTEN)
def test_written_commands_parse(arguments: list[str]):
    command: Any = typer.main.get_command(app)
    if arguments[0].startswith("-"):
        arguments = ["generate", *arguments]  # options of the program itself, such as --help
    name = "safelight"
    while hasattr(command, "commands"):
        name, *arguments = arguments
        command = command.commands[name]
    if "--help" in arguments:
        return
    context = command.make_context(name, arguments)
    assert context.params.get("sampler") in {None, *SAMPLERS}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_examples_of_a_page_write_different_files(document: Path):
    """They are copied in order, and an existing file is an error."""
    text = "\n".join(re.findall(r"^ {4}.*", read(document), flags=re.MULTILINE))
    text = re.sub(r"safelight (?:batch|convert|backup) .*", "", text)  # alternatives of one another
    written = re.findall(r"(?:--out |\.save\(\")([^\s\"{]*[^\s\"{/])(?:\s|\"|$)", text)
    assert len(written) == len(set(written)), sorted(written)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_extras_are_installed_from_the_clone(document: Path):
    """Safelight is on no package index, so an install line names the folder."""
    assert not re.findall(r"pip install ['\"]?safelight", read(document))


def test_measured_has_the_sizes_of_the_bundled_models():
    row = next(line for line in read(DOCS / "measured.md").splitlines() if "on disk" in line)
    models = Path(safelight.__file__).parent / "models"
    names = re.findall(r"`(embedded[a-z-]*)`", row)
    sizes = [
        sum(path.stat().st_size for path in (models / name).rglob("*") if path.is_file())
        for name in names
    ]
    assert len(names) == 3
    first, second, third = (f"{size / 2**20:.2f}" for size in sizes)
    assert f"| {first}, {second} and {third} MiB |" in row


def test_every_page_is_in_the_index():
    index = read(DOCS / "README.md")
    for page in DOCS.glob("*.md"):
        assert page.name == "README.md" or f"]({page.name})" in index, page.name
    assert "](decisions/README.md)" in index


def test_the_readme_quotes_the_model_card():
    """The README has the bundled models' figures in one table, each as in the model card."""
    _, _, after = read(ROOT / "README.md").partition("\n## The bundled models\n")
    quoted = re.findall(r"\d+ %", after.partition("\n## ")[0])
    assert len(quoted) >= 14
    assert set(quoted) <= set(re.findall(r"\d+ %", read(DOCS / "model-card.md")))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files(document: Path):
    text = read(document)
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if not target.startswith("https://"):
            assert (document.parent / target).is_file(), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_name_the_page_that_they_lead_to(document: Path):
    for label, target in re.findall(r"\[([^\]]+\.md)\]\(([^)#]+)", read(document)):
        assert label == target.removeprefix("../")


def test_every_decision_is_in_the_index():
    index = read(DOCS / "decisions" / "README.md")
    for note in (DOCS / "decisions").glob("[0-9]*.md"):
        title = read(note).splitlines()[0].partition(": ")[2]
        assert f"[{note.name[:4]}]({note.name})" in index
        assert title in " ".join(index.split())


def test_the_notice_credits_every_package_of_the_lock():
    text = read(ROOT / "NOTICE")
    lock = json.loads(LOCK.read_text(encoding="utf-8"))
    assert notice(lock["packages"]).strip() in text
    for package in [*lock["packages"], lock["names"]]:
        assert f"{package['name']} {package['version']}" in text
