"""`safelight explain`: how one picture came to be, as a page."""

from typing import Annotated

from typer import Option

from safelight.cli import options
from safelight.cli.loading import load
from safelight.cli.output import StepBar, say, warn
from safelight.errors import SafelightError


def explain(
    prompt: options.Prompt = None,
    negative_prompt: options.NegativePrompt = None,
    width: options.Width = None,
    height: options.Height = None,
    steps: options.Steps = None,
    guidance_scale: options.GuidanceScale = None,
    seed: options.Seed = None,
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
    out: Annotated[str, Option(help="The .html file to write.")] = "explain.html",
    overwrite: options.Overwrite = False,
) -> None:
    """Make one picture and a page that shows how it came to be, step by step.

    Prints the path of the page: one file, to be opened in a browser, which fetches nothing.
    """
    if prompt is None and not unconditional:
        raise SafelightError('PROMPT is missing: try safelight explain "a cat above a pizza"')
    request = options.request(
        prompt=prompt,
        negative_prompt=negative_prompt,
        width=width,
        height=height,
        steps=steps,
        guidance_scale=guidance_scale,
        seed=seed,
        sampler=sampler,
        schedule=schedule,
        spacing=spacing,
        strength=strength,
        eta=eta,
        unconditional=unconditional,
        image=image,
        mask=mask,
    )
    from safelight.picture import check_writable, save_whole

    if not out.lower().endswith((".html", ".htm")):
        raise SafelightError(f"out must be name.html, not {out[-100:]!r}")
    check_writable(out, overwrite=overwrite, need=2**24)
    with StepBar(1) as on_step:
        loaded = load(
            options.model_for(request, model), device=device, dtype=dtype, low_memory=low_memory
        )
        # Not before: they import PyTorch, in which Ctrl-C has to wait.
        from safelight.explain.page import page
        from safelight.explain.watch import watch

        story = watch(loaded, request, on_step=on_step)
    for warning in story.result.warnings:
        warn(warning)
    html = page(story).encode()
    save_whole(out, lambda file: file.write(html), overwrite=overwrite)
    say(out)
