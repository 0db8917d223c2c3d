"""`safelight generate`: make pictures from a prompt, and perhaps from a picture."""

from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Option

from safelight.cli import options
from safelight.cli.groups import Loading, spread
from safelight.cli.output import StepBar, say, warn
from safelight.errors import SafelightError
from safelight.families.control import NETWORKS
from safelight.interrupt import ctrl_c_waits
from safelight.request_pictures import each
from safelight.sizes import drawable_size, own_size, unlike_native

if TYPE_CHECKING:
    from pathlib import Path

    from safelight.request import Request
    from safelight.result import Result

SMALL, LITTLE_MORE = 1 / 4, 1.25
"""Sizes of a smaller share of a model's own pixels are warned of; those of few more are not."""


@spread
def generate(
    settings: dict[str, Any],
    *,
    model: options.Model = None,
    loading: Loading,
    out: Annotated[
        str,
        Option(
            "--out",
            "-o",
            help="A .png, .jpg or .webp file (name-1.png, name-2.png… for several; {seed} in it "
            "is the seed), or a folder for safelight-<seed>.png.",
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
    """Make pictures from a prompt, and perhaps from a picture.

    Prints the path of each picture; its recipe is inside the file.
    """
    options.check_prompt(settings, 'generate "a red apple"')

    from safelight.picture import check_writable, output_paths

    settings = loading.with_words(settings)
    request = options.request_of(settings)
    name = options.model_for(request, model)
    fitted = _fitted(request, name, loading.models_dir)  # before the model is loaded: that is slow
    _check_networks(loading, request)
    seeds = range(request.seed, request.seed + request.count)
    need = _pixels(request) * 4 * request.count
    paths = output_paths(out, seeds, overwrite=overwrite)
    for path in paths:
        check_writable(path, overwrite=overwrite, need=need)

    with StepBar(request.count) as on_step:
        loaded = loading.load(name)
        told = ""
        if loaded.family.areas is None:  # others draw more sizes well; their result tells
            told = _warn_of_size(fitted, loaded.name, loaded.native_size)
        run = loaded.stream(request)
        try:
            for step in run:
                # Each picture is saved once it is made: Ctrl-C or an error loses only the
                # unfinished one.
                _save(run.made, paths, overwrite=overwrite)
                on_step(step)
            _save(run.result, paths, overwrite=overwrite)
        except BaseException as error:
            try:
                _save(run.made, paths, overwrite=overwrite)
            except SafelightError as lost:
                if str(lost) != str(error):
                    warn(str(lost))
            if run.made is not None and run.made.paths:
                _print(run.made, as_json=as_json)
            raise
    _report(run.result, told, as_json=as_json, show=show)


def _fitted(request: "Request", model: str, models_dir: str | None) -> "Request":
    """Return the request with its pictures at the size to draw; errors name the model's own."""
    try:
        return request.fitted()
    except SafelightError:
        from safelight import weights

        native = None
        with suppress(SafelightError):
            native = weights.inspect(model, models_dir=models_dir)["native_size"]
        return request.fitted(native)


def _pixels(request: "Request") -> int:
    """Return about how many pixels each picture has."""
    if request.is_cropped and request.image is not None:
        return request.image.width * request.image.height
    return int((request.width or 512) * (request.height or 512) * request.hires_scale**2)


def _check_networks(loading: Loading, request: "Request") -> None:
    """Raise SafelightError for a picture without the network that reads it; warn of the reverse."""
    given = loading.keywords
    for picture, network, kind in NETWORKS:
        shown, option = (f"--{name.replace('_', '-')}" for name in (picture, network))
        nets, pictures = (len(each(one)) for one in (given[network], getattr(request, picture)))
        if pictures and not nets:
            raise SafelightError(f"{shown} needs {kind}: give one with {option}", field=picture)
        if nets and not pictures:
            warn(f"{option} does nothing without {shown}")
        elif nets != pictures:
            raise SafelightError(
                f"{shown} must be given once for each {option}, {nets} times, not {pictures}",
                field=picture,
            )


def _warn_of_size(request: "Request", model: str, native: tuple[int, int]) -> str:
    """Warn before the work if the size is far from the model's own.

    request: with its pictures at the size to draw. Returns the warning of the result that says the
    same; empty if nothing was printed.
    """
    if request.sized_by is not None:
        width, height = request.sized_by.size
    else:
        width, height = native
    width, height = request.width or width, request.height or height
    times = width * height / (native[0] * native[1])
    too_large = times > LITTLE_MORE and drawable_size((width, height), native) != (width, height)
    if not too_large and times >= SMALL:
        return ""
    cost = f" and takes over {int(times)} times as long" if times >= 2 else ""
    do = "leave out --width and --height"
    if request.sized_by is not None:
        do = "give --width {} --height {}".format(*own_size((width, height), native))
    warn(
        f"{model} was trained on {native[0]}x{native[1]}: {width}x{height} will hardly show "
        f"what was asked for{cost}; {do}, or enlarge the result"
    )
    return unlike_native(model, native, (width, height))


def _save(result: "Result | None", paths: "list[Path]", *, overwrite: bool) -> None:
    """Write the pictures that have been added; Ctrl-C waits until each is written and counted."""
    if result is not None:
        for i in range(len(result.paths), len(result.images)):
            with ctrl_c_waits():
                result.save_one(i, paths[i], overwrite=overwrite)


def _report(result: "Result", told: str, *, as_json: bool, show: bool) -> None:
    """Print warnings and paths. told: the warning that has been printed in other words."""
    for warning in result.warnings:
        if warning != told:
            warn(warning)
    _print(result, as_json=as_json)
    if show:
        for path in result.paths:
            _open(str(path))


def _print(result: "Result", *, as_json: bool) -> None:
    for line in [result.to_json()] if as_json else result.paths:
        say(line)


def _open(path: str) -> None:
    try:
        failed = typer.launch(path) != 0
    except OSError:
        failed = True
    if failed:
        warn(f"no viewer opened {path}: open it by hand")
