"""`safelight compare`: a grid of pictures over one or two settings."""

from types import SimpleNamespace
from typing import Annotated, Any

from typer import Option

from safelight.cli import options
from safelight.cli.groups import Loading, spread
from safelight.cli.output import StepBar, say, warn
from safelight.errors import SafelightError


@spread
def compare(
    settings: dict[str, Any],
    *,
    x: Annotated[
        str,
        Option(
            help="What changes from column to column, as in sampler=ddim,euler_a; "
            "of prompts, as in 'prompt=a cat|a dog'."
        ),
    ],
    y: Annotated[
        str | None,
        Option(
            help="What changes from row to row, as in steps=5,10,20 [one row].", show_default=False
        ),
    ] = None,
    model: options.Model = None,
    loading: Loading,
    out: Annotated[str, Option("--out", "-o", help="The .png file to write.")] = "grid.png",
    overwrite: options.Overwrite = False,
) -> None:
    """Make a labelled grid of pictures over one or two settings.

    All are drawn from the same noise. Prints the path of the grid; its recipe is inside the file.
    """
    from safelight.compare import Axis, grid, requests
    from safelight.paths import expanded
    from safelight.picture import check_writable

    across = Axis.parse(x)
    down = None if y is None else Axis.parse(y)
    axes = [axis.name for axis in (across, down) if axis is not None]
    for name in axes:
        if name in settings:
            raise SafelightError(
                f"{name} is an axis of the grid: leave it out as an option", field=name
            )
    if "prompt" not in axes:
        options.check_prompt(settings, 'compare "a cat" --x sampler=ddim,euler_a')
    settings = loading.with_words(settings)
    base = options.request_of(settings)
    requests(base, across, down)
    if not out.lower().endswith(".png"):
        raise SafelightError(f"out must be name.png, not {out[-100:]!r}")
    out = str(expanded(out))
    check_writable(out, overwrite=overwrite, need=2**24)

    with StepBar(1) as on_step:
        made = grid(
            loading.load(options.model_for(base, model)),
            base,
            across,
            down,
            on_step=lambda step, steps: on_step(
                SimpleNamespace(image_index=0, step=step, steps=steps)
            ),
        )
    made.save(out, overwrite=overwrite)
    for warning in made.warnings:
        warn(warning)
    say(out)
