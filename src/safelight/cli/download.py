"""`safelight download`: fetch a model before it is needed."""

from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from safelight.cli import options
from safelight.cli.output import note, say
from safelight.errors import SafelightError

if TYPE_CHECKING:
    from safelight.weights.hub import Layout


def download(
    name: Annotated[
        str,
        Argument(
            metavar="ORG/NAME[/FILE]",
            help="A hub id, also with a file of it, or an address on huggingface.co; @ adds a "
            "revision.",
        ),
    ],
    parts_for: Annotated[
        str | None,
        Option(
            metavar="FILE",
            help="Only what this single-file model lacks, as for --parts.",
            show_default=False,
        ),
    ] = None,
    parts: Annotated[
        list[str] | None,
        Option(
            help="With --parts-for: what else lends that file something; only the rest is fetched.",
            show_default=False,
        ),
    ] = None,
    models_dir: options.ModelsDir = None,
) -> None:
    """Download a model, one of its parts or one file from the hub.

    A part is an autoencoder, a ControlNet or the image encoder of an IP-Adapter. Tells the sizes
    first, resumes a download that was cut short, fetches only files that are read, and checks each
    file's digest. Prints the folder, or the path of the file.
    """
    from safelight.weights import hub
    from safelight.weights.hub_names import hub_name

    found = hub_name(name)
    if found is None:
        raise SafelightError(
            f'{name[:100]!r} is no hub id: expected "org/name" or "org/name/file.safetensors"'
        )
    if found.file is not None and parts_for is not None:
        raise SafelightError(f"--parts-for takes what it needs of {found.repo}: name no file of it")
    if parts and parts_for is None:
        raise SafelightError("--parts is for --parts-for: give the file that lacks something")
    layout = None if parts_for is None else _layout(parts_for, parts or [], models_dir)
    say(hub.download(found, note, layout))


def _layout(file: str, parts: list[str], models_dir: str | None) -> "Layout":
    """Return what is read of a repository that lends a single file what it lacks."""
    from safelight.weights import hub
    from safelight.weights.find import find, parts_finder
    from safelight.weights.plan import read_plan

    source = find(file, download=False, models_dir=models_dir)
    given = parts_finder(parts, download=False, models_dir=models_dir)
    plan = read_plan(source, parts=given, partial=True)
    if not plan.lacking:
        raise SafelightError(f"{file[-100:]!r} lacks nothing: it needs no --parts")
    return hub.parts_for(plan.source.path, plan.lacking, parts)
