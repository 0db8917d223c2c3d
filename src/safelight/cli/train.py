"""`safelight train`: models from your own pictures."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from safelight.cli.loading import import_torch
from safelight.cli.output import help_alone, note, say
from safelight.errors import SafelightError
from safelight.paths import expanded

if TYPE_CHECKING:
    from safelight.train.plan import Plan

app = typer.Typer(
    help="Teach a model your own pictures, or make a new one from them.",
    rich_markup_mode=None,
    invoke_without_command=True,
    callback=help_alone,
)

Out = Annotated[
    Path, Option(callback=expanded, help="Where checkpoints, samples and the model go.")
]
Native = Annotated[
    bool, Option("--native", help="Compile the networks first; needs a C++ compiler.")
]
Batch = Annotated[int, Option(help="Pictures per training step.")]
Rate = Annotated[float, Option(help="The learning rate at its highest.")]
Seed = Annotated[int, Option(help="Seed for first weights, order and noise.")]


@app.command()
def fine_tune(
    folder: Annotated[
        Path, Argument(help="Pictures, each with its caption in a .txt, or metadata.jsonl.")
    ],
    out: Out,
    model: Annotated[str, Option(help="As `generate --model`: what to begin from.")] = "embedded",
    steps: Annotated[int, Option(help="Training steps.")] = 1000,
    batch: Batch = 8,
    learning_rate: Rate = 2e-4,
    size: Annotated[
        int | None, Option(help="Side of the training squares, in pixels [the model's].")
    ] = None,
    min_snr: Annotated[
        float | None, Option(help="Gamma of min-SNR weighting, 5 as a rule [equal weights].")
    ] = None,
    seed: Seed = 0,
    native: Native = False,
) -> None:
    """Teach a model your pictures; goes on where it was stopped. The result is OUT/model."""
    if min_snr is not None and not 0 < min_snr < math.inf:
        raise SafelightError(f"--min-snr {min_snr:g}: expected a number above 0")
    plan = _plan(steps, batch, learning_rate, seed, warmup=50, ema=0.99)
    from safelight.train.finetune import finetune

    made = finetune(folder, out, plan, model=model, size=size, min_snr=min_snr, native=native)
    say(made)
    note(f"draw with: safelight generate PROMPT --model {made}")


@app.command()
def text_to_image(
    folder: Annotated[
        Path, Argument(help="Pictures, each with its caption in a .txt, or metadata.jsonl.")
    ],
    out: Out,
    size: Annotated[int, Option(help="Side of the training squares, in pixels.")] = 64,
    steps: Annotated[int, Option(help="Training steps of the UNet.")] = 10_000,
    autoencoder_steps: Annotated[int, Option(help="Training steps of the autoencoder.")] = 3500,
    batch: Batch = 16,
    learning_rate: Rate = 6e-4,
    seed: Seed = 0,
    native: Native = False,
) -> None:
    """Train a text-to-image model from nothing; goes on where it was stopped. It needs thousands
    of pictures, and hours; `fine-tune` needs few.
    """
    _whole("autoencoder-steps", autoencoder_steps)
    cooldown = max(1, steps * 2 // 3)
    plan = _plan(steps, batch, learning_rate, seed, warmup=100, cooldown=cooldown)
    from safelight.train.scratch import text_to_image as train

    made = train(folder, out, plan, size=size, autoencoder_steps=autoencoder_steps, native=native)
    say(made)
    note(f"draw with: safelight generate PROMPT --model {made}")


@app.command()
def unconditional(
    source: Annotated[str, Argument(help='A folder of pictures, or "digits".')],
    out: Out,
    size: Annotated[int, Option(help="Side of the training squares, in pixels.")] = 32,
    steps: Annotated[int, Option(help="Training steps.")] = 3000,
    batch: Batch = 32,
    learning_rate: Rate = 1e-3,
    seed: Seed = 0,
    native: Native = False,
) -> None:
    """Train a model that draws from noise alone; goes on where it was stopped."""
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
    guidance_scale: Annotated[float, Option(help="Guidance scale of the teacher.")] = 4.0,
    steps: Annotated[int, Option(help="Training steps.")] = 2000,
    batch: Batch = 32,
    learning_rate: Rate = 2e-4,
    seed: Seed = 0,
    native: Native = False,
) -> None:
    """Teach a copy of a model to draw in few steps; goes on where it was stopped."""
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


def _plan(
    steps: int, batch: int, learning_rate: float, seed: int, *, warmup: int, **other: Any
) -> "Plan":
    """Return the plan, once its numbers are checked. warmup: in steps; short runs use fewer."""
    from safelight.request_ranges import MAX_SEED

    _whole("steps", steps)
    _whole("batch", batch)
    if not 0 < learning_rate < 1:
        raise SafelightError(f"--learning-rate {learning_rate}: expected above 0 and below 1")
    if not 0 <= seed <= MAX_SEED:
        raise SafelightError(f"--seed {seed}: expected a whole number from 0 to {MAX_SEED}")
    import_torch()
    from safelight.train.plan import Plan

    return Plan(
        steps=steps,
        batch=batch,
        learning_rate=learning_rate,
        warmup=max(1, min(warmup, steps // 10)),
        seed=seed,
        **other,
    )


def _whole(name: str, value: int) -> None:
    if not 1 <= value <= 10_000_000:
        raise SafelightError(f"--{name} {value}: expected 1 to 10000000")
