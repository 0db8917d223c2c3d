"""Make the models that ship: python -m recipes.embedded STAGE …"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Option

from safelight.errors import SafelightError

if TYPE_CHECKING:
    from recipes.embedded.sizes import Sizes

app = typer.Typer(help=__doc__, rich_markup_mode=None, no_args_is_help=True)

Data = Annotated[Path, Option(help="The folder of the cut-outs.")]
Out = Annotated[Path, Option(help="Where checkpoints, samples and models go.")]
Minutes = Annotated[float, Option(help="Minutes of computing, over all stages.")]
Dry = Annotated[
    bool, Option("--dry-run", help="Tiny networks and a few steps: to see that all of it works.")
]
Begin = Annotated[
    Path | None,
    Option(help="A folder that the stage embedded wrote, whose weights are trained further."),
]
Count = Annotated[
    int | None,
    Option(
        help="Scenes to compose, and in proportion the decoder's. [default: 122880]",
        show_default=False,
    ),
]
Native = Annotated[bool, Option("--native", help="Compile the networks first.")]


BATCHES = ("--batch", "--decoder-batch", "--pixels-batch")
STAGES = ("alone", "embedded", "decoder", "previews", "unconditional", "prompts")


@app.command()
def data(folder: Data = Path("data")) -> None:
    """Fetch the pinned npm packages and draw the cut-outs."""
    from recipes.embedded.cutouts import build

    typer.echo(build(folder))


@app.command()
def train(
    stages: Annotated[list[str], typer.Argument(help=", ".join(STAGES))],
    data: Data = Path("data"),
    out: Out = Path("runs"),
    minutes: Minutes = 13.0,
    dry_run: Dry = False,
    native: Native = False,
    begin: Begin = None,
    scenes: Count = None,
    batch: Annotated[
        int | None,
        Option(help="Pictures a step of the UNet. [default: 128]", show_default=False),
    ] = None,
    decoder_batch: Annotated[
        int | None,
        Option(help="Pictures a step of the decoder. [default: 32]", show_default=False),
    ] = None,
    pixels_batch: Annotated[
        int | None,
        Option(
            help="Pictures a step of the unconditional model. [default: 32]", show_default=False
        ),
    ] = None,
    learning_rate: Annotated[
        float | None,
        Option(
            help="The UNet's highest. [default: 0.0008, times the root of its batch over 128]",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Run stages of the training; each goes on where it was stopped."""
    from recipes.embedded.train import Recipe

    if not 0.05 <= minutes <= 100_000:
        raise SafelightError(f"--minutes {minutes:g}: expected 0.05 to 100000")
    if unknown := [stage for stage in stages if stage not in STAGES]:
        raise SafelightError(f"no stage {unknown[0]!r}: the stages are {', '.join(STAGES)}")
    sizes = _sizes(dry_run, scenes, batch, decoder_batch, pixels_batch, learning_rate)
    recipe = Recipe(data, out, minutes, sizes, native, begin)
    run = {
        "decoder": recipe.decoder,
        "previews": recipe.previews,
        "alone": recipe.alone,
        "embedded": recipe.embedded,
        "unconditional": recipe.unconditional,
        "prompts": lambda: recipe.prompts(64 if dry_run else 6144),
    }
    for stage in stages:
        typer.echo(run[stage]())


@app.command()
def compose(
    stages: Annotated[list[str], typer.Argument(help="alone, embedded")],
    data: Data = Path("data"),
    out: Out = Path("runs"),
    dry_run: Dry = False,
    begin: Begin = None,
    scenes: Count = None,
) -> None:
    """Compose and encode the pictures of stages, while a training runs that needs them later."""
    from recipes.embedded.train import Recipe

    if unknown := [stage for stage in stages if stage not in ("alone", "embedded")]:
        raise SafelightError(f"no stage {unknown[0]!r}: expected alone, embedded")
    recipe = Recipe(data, out, 1, _sizes(dry_run, scenes), begin=begin)
    for stage in stages:
        recipe.compose(stage)


@app.command()
def evaluate(
    data: Data = Path("data"),
    out: Out = Path("runs/evaluation"),
    model: Annotated[str, Option(help="The model to judge.")] = "embedded",
    share: Annotated[float, Option(help="Of the prompts.")] = 1.0,
    steps: Annotated[
        int | None,
        Option(help="Train the kept judge further first, for so many steps.", show_default=False),
    ] = None,
    like: Annotated[
        str | None,
        Option(help="Ask the prompts of this model, to compare both.", show_default=False),
    ] = None,
) -> None:
    """Judge what the model draws, with the judge of OUT or else the kept one. If neither knows the
    things that the model was taught, a judge is trained.
    """
    from recipes.embedded import figures, unconditional
    from recipes.embedded.judge import PLAN, judge_of
    from recipes.embedded.scenes import Scenes
    from recipes.embedded.stage import Stage
    from safelight.train.devices import accelerator
    from safelight.weights import load_model

    path = data / "cutouts.npz"
    stage = Stage(Scenes(path), accelerator().device)
    plan = None
    if steps is not None:
        if not 1 <= steps <= 1_000_000:
            raise SafelightError(f"--steps {steps}: expected 1 to 1000000")
        plan = replace(PLAN, steps=steps, warmup=min(PLAN.warmup, max(1, steps // 10)))
    judge, judged = judge_of(stage, path, out, plan), load_model(model)
    if not judged.uses_prompt:
        typer.echo(unconditional.evaluate(judged, judge, stage, out, share=share))
        return
    asks = None if like is None else load_model(like)
    typer.echo(figures.evaluate(judged, judge, stage, out, share=share, like=asks))


@app.command()
def fast(
    data: Data = Path("data"),
    out: Out = Path("runs/evaluation"),
    model: Annotated[str, Option(help="The model to judge.")] = "embedded",
    share: Annotated[float, Option(help="Of the prompts.")] = 1.0,
) -> None:
    """Judge what the model draws at each level of the fast mode."""
    from recipes.embedded.figures import judge_levels
    from recipes.embedded.judge import judge_of
    from recipes.embedded.scenes import Scenes
    from recipes.embedded.stage import Stage
    from safelight.train.devices import accelerator
    from safelight.weights import load_model

    path = data / "cutouts.npz"
    stage = Stage(Scenes(path), accelerator().device)
    judge = judge_of(stage, path, out)
    typer.echo(judge_levels(load_model(model), judge, stage, out, share=share))


def _sizes(
    dry_run: bool,
    scenes: int | None,
    batch: int | None = None,
    decoder_batch: int | None = None,
    pixels_batch: int | None = None,
    learning_rate: float | None = None,
) -> Sizes:
    """Return the sizes that the options ask for."""
    from recipes.embedded.sizes import DRY, FULL

    if scenes is not None and not 512 <= scenes <= 1_000_000:
        raise SafelightError(f"--scenes {scenes}: expected 512 to 1000000")
    sizes = DRY if dry_run else FULL
    if scenes is not None:
        sizes = sizes.with_scenes(scenes)
    asked = {"unet_plan": batch, "decoder_plan": decoder_batch, "pixels_plan": pixels_batch}
    for name, (plan, count) in zip(BATCHES, asked.items(), strict=True):
        if count is not None and not 1 <= count <= 8192:
            raise SafelightError(f"{name} {count}: expected 1 to 8192")
        if count is not None:
            sizes = replace(sizes, **{plan: getattr(sizes, plan).with_batch(count)})
    if learning_rate is not None:
        if not 0 < learning_rate < 1:
            raise SafelightError(f"--learning-rate {learning_rate}: expected above 0 and below 1")
        plan = replace(sizes.unet_plan, learning_rate=learning_rate)
        sizes = replace(sizes, unet_plan=plan)
    return sizes


def main() -> None:
    """Run the command line; a SafelightError is one line, and exit code 2."""
    try:
        app()
    except SafelightError as error:
        typer.echo(f"error: {error}", err=True)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
