"""`safelight train`: models from pictures, one's own or those of the recipe."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from safelight.cli.loading import import_torch
from safelight.cli.output import note, say
from safelight.errors import SafelightError

if TYPE_CHECKING:
    from safelight.train.loop import Plan

app = typer.Typer(
    help="Teach a model your own pictures, or make the models that ship.",
    rich_markup_mode=None,
    no_args_is_help=True,
)

Data = Annotated[Path, Option(help="The folder that `safelight train data` wrote.")]
Out = Annotated[Path, Option(help="Where checkpoints, samples and the model go.")]
Native = Annotated[
    bool, Option("--native", help="Compile the networks first; needs a C++ compiler.")
]
Batch = Annotated[int, Option(help="Pictures a step.")]
Rate = Annotated[float, Option(help="The learning rate at its highest.")]
Seed = Annotated[int, Option(help="Of first weights, order and noise.")]


@app.command()
def fine_tune(
    folder: Annotated[
        Path, Argument(help="Pictures, each with its caption in a .txt, or metadata.jsonl.")
    ],
    out: Out,
    model: Annotated[str, Option(help="As `generate --model`: what to begin from.")] = "embedded",
    steps: Annotated[int, Option(help="How long.")] = 1000,
    batch: Batch = 8,
    learning_rate: Rate = 2e-4,
    size: Annotated[
        int | None, Option(help="Pictures are cut to squares of it [the model's].")
    ] = None,
    min_snr: Annotated[
        float | None, Option(help="Gamma of min-SNR weighting, 5 as a rule [equal weights].")
    ] = None,
    seed: Seed = 0,
    native: Native = False,
) -> None:
    """Teach a model your pictures; goes on where it was stopped. The result is OUT/model."""
    _numbers(steps, batch, learning_rate)
    plan = _plan(steps, batch, learning_rate, seed, warmup=50, ema=0.99)
    from safelight.train.finetune import finetune

    say(finetune(folder, out, plan, model=model, size=size, min_snr=min_snr, native=native))


@app.command()
def text_to_image(
    folder: Annotated[
        Path, Argument(help="Pictures, each with its caption in a .txt, or metadata.jsonl.")
    ],
    out: Out,
    size: Annotated[int, Option(help="Pictures are cut to squares of it.")] = 64,
    steps: Annotated[int, Option(help="How long, of the UNet.")] = 10_000,
    autoencoder_steps: Annotated[int, Option(help="How long, of the autoencoder before.")] = 3500,
    batch: Batch = 16,
    learning_rate: Rate = 6e-4,
    seed: Seed = 0,
    native: Native = False,
) -> None:
    """Train a model of words from nothing; goes on where it was stopped. It wants thousands of
    pictures, and hours: `fine-tune` wants few.
    """
    _numbers(steps, batch, learning_rate)
    _numbers(autoencoder_steps, batch, learning_rate)
    cooldown = max(1, steps * 2 // 3)
    plan = _plan(steps, batch, learning_rate, seed, warmup=100, cooldown=cooldown)
    from safelight.train.scratch import text_to_image as train

    say(train(folder, out, plan, size=size, autoencoder_steps=autoencoder_steps, native=native))


@app.command()
def unconditional(
    source: Annotated[str, Argument(help='A folder of pictures, or "digits".')],
    out: Out,
    size: Annotated[int, Option(help="Pictures are cut to squares of it.")] = 32,
    steps: Annotated[int, Option(help="How long.")] = 3000,
    batch: Batch = 32,
    learning_rate: Rate = 1e-3,
    seed: Seed = 0,
    native: Native = False,
) -> None:
    """Train a model that draws from noise alone; goes on where it was stopped."""
    _numbers(steps, batch, learning_rate)
    plan = _plan(steps, batch, learning_rate, seed, warmup=200)
    from safelight.train.unconditional import unconditional as train

    made = train(source, out, plan, size=size, native=native)
    say(made)
    note(f"draw with: safelight generate --unconditional --sampler ddim --model {made}")


@app.command()
def distil(
    prompts: Annotated[Path, Argument(help="A text file, one prompt a line; thousands are good.")],
    out: Out,
    model: Annotated[str, Option(help="As `generate --model`: the teacher.")] = "embedded",
    drawing_steps: Annotated[int, Option(help="Steps that the student draws in.")] = 4,
    guidance_scale: Annotated[
        float, Option(help="The teacher's; the student draws without.")
    ] = 4.0,
    steps: Annotated[int, Option(help="How long.")] = 2000,
    batch: Batch = 32,
    learning_rate: Rate = 2e-4,
    seed: Seed = 0,
    native: Native = False,
) -> None:
    """Teach a copy of a model to draw in few steps; goes on where it was stopped."""
    _numbers(steps, batch, learning_rate)
    if not 1 <= drawing_steps <= 50:
        raise SafelightError(f"--drawing-steps {drawing_steps}: expected 1 to 50")
    if not 1 <= guidance_scale <= 100:
        raise SafelightError(f"--guidance-scale {guidance_scale:g}: expected 1 to 100")
    plan = _plan(steps, batch, learning_rate, seed, warmup=100, weight_decay=0.0, ema=0.99)
    from safelight.train.distil import distil as train

    made = train(
        prompts,
        out,
        plan,
        model=model,
        drawing_steps=drawing_steps,
        guidance_scale=guidance_scale,
        native=native,
    )
    say(made)
    note(
        f"draw with: safelight generate --sampler ddim --steps {drawing_steps} --guidance-scale 1 "
        f"--model {made}"
    )


@app.command()
def data(
    folder: Annotated[Path, Argument(help="Where the cut-outs and captions go.")] = Path("data"),
    whole: Annotated[
        bool, Option("--whole", help="All of the vocabulary, for pictures of 256; minutes.")
    ] = False,
) -> None:
    """Fetch the pinned npm packages and draw the captioned cut-outs."""
    from safelight.train.cutouts import build

    say(str(build(folder, whole=whole)))


@app.command()
def embedded(data: Data = Path("data"), out: Out = Path("runs"), native: Native = False) -> None:
    """Make the model that ships: autoencoder, text encoder, UNet; goes on where it was stopped."""
    from safelight.train.embedded import train_embedded

    say(str(train_embedded(data, out, native=native)))


@app.command()
def embedded_fast(
    data: Data = Path("data"),
    out: Out = Path("runs"),
    model: Annotated[str, Option(help="The teacher.")] = "embedded",
    native: Native = False,
) -> None:
    """Distil the copy of the model that ships which draws in four steps."""
    from safelight.train.embedded import train_embedded_fast

    say(str(train_embedded_fast(data, out, model=model, native=native)))


@app.command(name="embedded-256")
def embedded_256(
    data: Annotated[Path, Option(help="What `safelight train data --whole` wrote.")] = Path(
        "data/256"
    ),
    out: Out = Path("runs/256"),
    minutes: Annotated[float, Option(help="Of a GPU, over all calls.")] = 25.0,
    dry_run: Annotated[
        bool, Option("--dry-run", help="Tiny networks, 64 pixels: to see that all of it works.")
    ] = False,
    native: Native = False,
) -> None:
    """Make the model of the whole vocabulary at 256; goes on where it was stopped."""
    if not 0.05 <= minutes <= 1440:
        raise SafelightError(f"--minutes {minutes:g}: expected 0.05 to 1440")
    import_torch()
    from safelight.train.large import DRY, WHOLE, train_large

    sizes = DRY if dry_run else WHOLE
    say(str(train_large(data, out, minutes=minutes, sizes=sizes, native=native)))


@app.command()
def embedded_unconditional(
    data: Data = Path("data"), out: Out = Path("runs"), native: Native = False
) -> None:
    """Make the pixel model that ships; goes on where it was stopped."""
    from safelight.train.embedded import train_embedded_unconditional

    say(str(train_embedded_unconditional(data, out, native=native)))


@app.command()
def evaluate(
    data: Data = Path("data"),
    out: Out = Path("runs/evaluation"),
    model: Annotated[str, Option(help="The model to judge.")] = "embedded",
    share: Annotated[float, Option(help="Of the thousand prompts.")] = 1.0,
) -> None:
    """Train a judge, and let it look at what the model draws for a thousand prompts."""
    import_torch()
    from safelight.evaluate.figures import evaluate as run

    say(run(data, out, model, share=share))


def _plan(
    steps: int, batch: int, learning_rate: float, seed: int, *, warmup: int, **other: Any
) -> "Plan":
    """warmup: steps, fewer in a short run."""
    import_torch()
    from safelight.train.loop import Plan

    return Plan(
        steps=steps,
        batch=batch,
        learning_rate=learning_rate,
        warmup=max(1, min(warmup, steps // 10)),
        seed=seed,
        **other,
    )


def _numbers(steps: int, batch: int, learning_rate: float) -> None:
    for name, value in (("steps", steps), ("batch", batch)):
        if not 1 <= value <= 10_000_000:
            raise SafelightError(f"--{name} {value}: expected 1 or more")
    if not 0 < learning_rate < 1:
        raise SafelightError(f"--learning-rate {learning_rate}: expected above 0 and below 1")
