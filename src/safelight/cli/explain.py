"""`safelight explain`: a page that shows how one picture came to be."""

from typing import Annotated, Any

from typer import Option

from safelight.cli import options
from safelight.cli.groups import Loading, spread
from safelight.cli.output import StepBar, say, warn
from safelight.errors import SafelightError


@spread
def explain(
    settings: dict[str, Any],
    *,
    model: options.Model = None,
    loading: Loading,
    out: Annotated[str, Option("--out", "-o", help="The .html file to write.")] = "explain.html",
    overwrite: options.Overwrite = False,
) -> None:
    """Make a page that shows how one picture came to be.

    It shows the picture step by step. Prints the path of the page: one file that a browser opens
    without fetching anything.
    """
    options.check_prompt(settings, 'explain "a cat above a pizza"')
    settings = loading.with_words(settings)
    request = options.request_of(settings)
    from safelight.paths import expanded
    from safelight.picture import check_writable, save_whole

    if not out.lower().endswith((".html", ".htm")):
        raise SafelightError(f"out must be name.html, not {out[-100:]!r}")
    out = str(expanded(out))
    check_writable(out, overwrite=overwrite, need=2**24)
    with StepBar(1) as on_step:
        loaded = loading.load(options.model_for(request, model))
        # Imported only now: they import PyTorch, during which Ctrl-C has to wait.
        from safelight.explain.page import page
        from safelight.explain.watch import watch

        story = watch(loaded, request, on_step=on_step)
    for warning in story.result.warnings:
        warn(warning)
    html = page(story).encode()
    save_whole(out, lambda file: file.write(html), overwrite=overwrite)
    say(out)
