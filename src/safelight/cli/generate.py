"""`safelight generate`: words, and perhaps a picture, into pictures."""

from typing import TYPE_CHECKING, Annotated

import typer
from typer import Option

from safelight.cli import options
from safelight.cli.loading import load
from safelight.cli.output import StepBar, say, warn
from safelight.errors import SafelightError

if TYPE_CHECKING:
    from pathlib import Path

    from safelight.result import Result


def generate(
    prompt: options.Prompt = None,
    negative_prompt: options.NegativePrompt = None,
    width: options.Width = None,
    height: options.Height = None,
    steps: options.Steps = None,
    guidance_scale: options.GuidanceScale = None,
    seed: options.Seed = None,
    count: Annotated[
        int | None,
        Option(help="1 to 64 pictures, of seed, seed + 1, … [1].", show_default=False),
    ] = None,
    sampler: options.Sampler = None,
    schedule: options.Schedule = None,
    spacing: options.Spacing = None,
    model: options.Model = None,
    image: options.Picture = None,
    mask: options.Mask = None,
    strength: options.Strength = None,
    eta: options.Eta = None,
    unconditional: options.Unconditional = False,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    low_memory: options.LowMemory = False,
    out: Annotated[
        str,
        Option(
            help="A .png file (name-1.png, name-2.png… for several), or a folder for "
            "safelight-<seed>.png.",
        ),
    ] = ".",
    overwrite: options.Overwrite = False,
    show: Annotated[
        bool, Option("--show", help="Open the pictures in the system's viewer.")
    ] = False,
    as_json: Annotated[
        bool, Option("--json", help="Print paths, seeds, settings, warnings and timings as JSON.")
    ] = False,
) -> None:
    """Make pictures from words, and perhaps a picture.

    Prints the path of each picture; its recipe is inside the file.
    """
    if prompt is None and not unconditional:
        raise SafelightError('PROMPT is missing: try safelight generate "a red apple"')

    from safelight.picture import check_writable, output_paths

    request = options.request(
        prompt=prompt,
        negative_prompt=negative_prompt,
        width=width,
        height=height,
        steps=steps,
        guidance_scale=guidance_scale,
        seed=seed,
        count=count,
        sampler=sampler,
        schedule=schedule,
        spacing=spacing,
        strength=strength,
        eta=eta,
        unconditional=unconditional,
        image=image,
        mask=mask,
    )

    seeds = range(request.seed, request.seed + request.count)
    need = (request.width or 512) * (request.height or 512) * 4 * request.count
    paths = output_paths(out, seeds, overwrite=overwrite)
    for path in paths:
        check_writable(path, overwrite=overwrite, need=need)

    with StepBar(request.count) as on_step:
        loaded = load(
            options.model_for(request, model),
            device=device,
            dtype=dtype,
            low_memory=low_memory,
        )
        run = loaded.stream(request)
        try:
            for step in run:
                # Each as it is made: Ctrl-C loses the one that is not.
                _save(run.made, paths, overwrite=overwrite)
                on_step(step)
        except KeyboardInterrupt:
            for path in run.made.paths if run.made else ():
                say(path)
            raise
    _save(run.result, paths, overwrite=overwrite)
    _report(run.result, as_json=as_json, show=show)


def _save(result: "Result | None", paths: "list[Path]", *, overwrite: bool) -> None:
    """Write the pictures that have been added."""
    if result is not None:
        for i in range(len(result.paths), len(result.images)):
            result.save_one(i, paths[i], overwrite=overwrite)


def _report(result: "Result", *, as_json: bool, show: bool) -> None:
    for warning in result.warnings:
        warn(warning)
    if as_json:
        say(result.to_json())
    else:
        for path in result.paths:
            say(path)
    if show:
        for path in result.paths:
            _open(str(path))


def _open(path: str) -> None:
    try:
        failed = typer.launch(path) != 0
    except OSError:
        failed = True
    if failed:
        warn(f"no viewer opened {path}: open it by hand")
