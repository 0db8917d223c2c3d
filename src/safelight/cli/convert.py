"""`safelight convert`: write a model in another layout."""

from typing import Annotated

from typer import Argument, Option

from safelight.cli import options
from safelight.cli.output import say, warn


def convert(
    model: Annotated[str, Argument(help="As `generate --model`.")],
    out: Annotated[
        str,
        Option("--out", "-o", help="A .safetensors file, or a folder in diffusers' layout."),
    ],
    dtype: Annotated[
        str | None,
        Option(help="float32, bfloat16 or float16 [as it is stored].", show_default=False),
    ] = None,
    parts: options.Parts = None,
    vae: options.Vae = None,
    prediction_type: Annotated[
        str | None,
        Option(
            help="epsilon, v_prediction or sample, where the model does not say.",
            show_default=False,
        ),
    ] = None,
    models_dir: options.ModelsDir = None,
    overwrite: options.Overwrite = False,
) -> None:
    """Write a model as a folder or as one file.

    diffusers loads the folder; the file has the original names. Weights stay equal to the bit
    unless --dtype asks for another precision. Prints the path.
    """
    from safelight.paths import expanded
    from safelight.weights import convert as writer

    for line in writer.convert(
        model,
        out,
        dtype=dtype,
        parts=parts,
        vae=vae,
        prediction_type=prediction_type,
        models_dir=models_dir,
        overwrite=overwrite,
    ):
        warn(line)
    say(expanded(out))
