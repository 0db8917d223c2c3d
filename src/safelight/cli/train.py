"""`safelight train`: make the models that ship, from packages alone."""

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from safelight.cli.output import say

app = typer.Typer(
    help="Make the models that ship: first the data, then a model from it.",
    rich_markup_mode=None,
    no_args_is_help=True,
)

Data = Annotated[Path, Option(help="The folder that `safelight train data` wrote.")]
Out = Annotated[Path, Option(help="Where checkpoints, samples and the model go.")]
Native = Annotated[
    bool, Option("--native", help="Compile the networks first; needs a C++ compiler.")
]


@app.command()
def data(
    folder: Annotated[Path, Argument(help="Where the cut-outs and captions go.")] = Path("data"),
) -> None:
    """Fetch the pinned npm packages and draw the captioned cut-outs."""
    from safelight.train.cutouts import build

    say(str(build(folder)))


@app.command()
def embedded(data: Data = Path("data"), out: Out = Path("runs"), native: Native = False) -> None:
    """Train autoencoder, text encoder and UNet; goes on where it was stopped."""
    from safelight.train.embedded import train_embedded

    say(str(train_embedded(data, out, native=native)))


@app.command()
def embedded_unconditional(
    data: Data = Path("data"), out: Out = Path("runs"), native: Native = False
) -> None:
    """Train the pixel model; goes on where it was stopped."""
    from safelight.train.embedded import train_embedded_unconditional

    say(str(train_embedded_unconditional(data, out, native=native)))
