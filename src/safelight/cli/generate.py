"""`safelight generate`: words, and perhaps a picture, into pictures."""

from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from safelight.cli.loading import load
from safelight.cli.output import StepBar, say, warn
from safelight.errors import SafelightError

if TYPE_CHECKING:
    from pathlib import Path

    from safelight.request import Result

Model = Annotated[
    str | None,
    Option(
        help="A model's name, a diffusers folder, a .safetensors file or a hub id "
        "[embedded; with --unconditional embedded-unconditional].",
        show_default=False,
    ),
]
Device = Annotated[str, Option(help="Where to compute: auto, cpu, mps or cuda.")]
Dtype = Annotated[str, Option(help="Precision: auto, float32, bfloat16 or float16.")]


def generate(
    prompt: Annotated[
        str | None, Argument(help='What to draw, as in "a red apple".', show_default=False)
    ] = None,
    negative_prompt: Annotated[
        str | None, Option(help="What to keep out of the picture.", show_default=False)
    ] = None,
    width: Annotated[
        int | None,
        Option(
            help="64 to 2048 pixels, a multiple of 8 [the model's; with --image its own].",
            show_default=False,
        ),
    ] = None,
    height: Annotated[int | None, Option(help="As --width.", show_default=False)] = None,
    steps: Annotated[
        int | None, Option(help="1 to 1000 [as many as the sampler needs].", show_default=False)
    ] = None,
    guidance_scale: Annotated[
        float | None,
        Option(help="How closely to follow the words, 0 to 100 [7.5].", show_default=False),
    ] = None,
    seed: Annotated[
        int | None,
        Option(help="The same seed gives the same picture [drawn at random].", show_default=False),
    ] = None,
    count: Annotated[
        int | None,
        Option(help="1 to 64 pictures, of seed, seed + 1, … [1].", show_default=False),
    ] = None,
    sampler: Annotated[
        str | None, Option(help="One of `safelight samplers` [pndm].", show_default=False)
    ] = None,
    schedule: Annotated[
        str | None,
        Option(help="karras, exponential or beta [the model's own].", show_default=False),
    ] = None,
    spacing: Annotated[
        str | None,
        Option(help="leading, linspace or trailing [the model's own].", show_default=False),
    ] = None,
    model: Model = None,
    image: Annotated[
        str | None, Option(help="A picture to start from.", show_default=False)
    ] = None,
    mask: Annotated[
        str | None,
        Option(help="With --image: white where to repaint, black to keep.", show_default=False),
    ] = None,
    strength: Annotated[
        float | None,
        Option(
            help="With --image: how much to change, above 0 up to 1 [0.8; 1 with --mask].",
            show_default=False,
        ),
    ] = None,
    eta: Annotated[
        float | None, Option(help="Fresh noise in ddim, 0 to 1 [0].", show_default=False)
    ] = None,
    unconditional: Annotated[
        bool, Option("--unconditional", help="Draw from noise alone, without words.")
    ] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    low_memory: Annotated[
        bool, Option("--low-memory", help="On the CPU: large weights in a file, not in memory.")
    ] = False,
    out: Annotated[
        str,
        Option(
            help="A .png file (name-1.png, name-2.png… for several), or a folder for "
            "safelight-<seed>.png.",
        ),
    ] = ".",
    overwrite: Annotated[bool, Option("--overwrite", help="Replace files that exist.")] = False,
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

    import safelight
    from safelight.picture import check_writable, open_mask, open_picture, output_paths

    given: dict[str, Any] = {
        "prompt": prompt,
        "negative_prompt": negative_prompt,
        "width": width,
        "height": height,
        "steps": steps,
        "guidance_scale": guidance_scale,
        "seed": seed,
        "count": count,
        "sampler": sampler,
        "schedule": schedule,
        "spacing": spacing,
        "strength": strength,
        "eta": eta,
        "unconditional": unconditional,
        "image": None if image is None else open_picture(image, "image"),
        "mask": None if mask is None else open_mask(mask),
    }
    request = safelight.Request(**{k: v for k, v in given.items() if v is not None})

    seeds = range(request.seed, request.seed + request.count)
    need = (request.width or 512) * (request.height or 512) * 4 * request.count
    paths = output_paths(out, seeds, overwrite=overwrite)
    for path in paths:
        check_writable(path, overwrite=overwrite, need=need)

    default = "embedded-unconditional" if unconditional else "embedded"
    with StepBar(request.count) as on_step:
        loaded = load(
            default if model is None else model,
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
