"""`safelight download`: fetch a model before it is needed."""

from typing import Annotated

from typer import Argument

from safelight.cli.output import note, say
from safelight.errors import SafelightError


def download(
    name: Annotated[str, Argument(metavar="ORG/NAME", help="A hub id; @ adds a revision.")],
) -> None:
    """Download a model or an autoencoder from the hub.

    Tells the sizes first, resumes a download that was cut short, fetches only files that are read,
    and checks each file's digest. Prints the folder.
    """
    from safelight.weights import hub
    from safelight.weights.find import HUB_ID

    found = HUB_ID.fullmatch(name)
    if found is None:
        raise SafelightError(f'{name[:100]!r} is no hub id: expected "org/name"')
    say(hub.download(found[1], found[2], note))
