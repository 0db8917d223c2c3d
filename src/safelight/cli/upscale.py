"""`safelight upscale`: enlarge pictures with an upscaler's network."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from safelight.cli import options
from safelight.cli.loading import import_torch
from safelight.cli.output import bar, say, warn
from safelight.errors import SafelightError

if TYPE_CHECKING:
    from safelight.upscaling.upscaler import Upscaler

_BRACE = "\ue000"
"""A private letter that stands for the "{" of a picture's name."""


def upscale(
    pictures: Annotated[list[str], Argument(help="PNG, JPEG or WebP files.")],
    upscaler: Annotated[
        str,
        Option(
            "--upscaler",
            "-u",
            help="A file (.pth, .safetensors), a name in the models folder, or Lanczos.",
        ),
    ],
    scale: Annotated[
        float | None,
        Option(help="How many times as large [as the upscaler enlarges].", show_default=False),
    ] = None,
    out: Annotated[
        str,
        Option(
            "--out",
            "-o",
            help="A .png, .jpg or .webp file ({name} in it is the picture's own), or a folder for "
            "<name>-upscaled.png.",
        ),
    ] = ".",
    tile: Annotated[
        int | None,
        Option(help="Pixels of a tile's side; fewer take less memory [320].", show_default=False),
    ] = None,
    device: options.Device = "auto",
    models_dir: options.ModelsDir = None,
    overwrite: options.Overwrite = False,
    as_json: Annotated[
        bool, Option("--json", help="Print paths, sizes and the upscaler as JSON.")
    ] = False,
) -> None:
    """Enlarge pictures with an upscaler, such as Real-ESRGAN.

    A PNG keeps its recipe, and what was done is added. Prints the path of each picture.
    """
    from safelight.picture import check_writable, open_picture, save_picture
    from safelight.upscaling.names import TILE, check_installed, is_lanczos, passes, scaled
    from safelight.upscaling.record import entry, noted

    lanczos = is_lanczos(upscaler)
    if not lanczos:
        check_installed()
    elif scale is None:
        raise SafelightError("--scale is missing: Lanczos has none of its own")
    paths = _paths(pictures, out, overwrite=overwrite)
    for path in paths:
        check_writable(path, overwrite=overwrite)
    sizes = [open_picture(picture).size for picture in pictures]  # before the network is loaded
    texts = [_texts(picture) for picture in pictures]
    for size in sizes if scale is not None else ():
        assert scale is not None
        scaled(size, scale)
    import_torch()
    from safelight.upscaling.upscaler import load_upscaler, upscaled

    network: Upscaler | None = None
    if not lanczos:
        network = load_upscaler(upscaler, device=device, models_dir=models_dir)
    side = TILE if tile is None else tile
    used = None if network is None else network.used
    times = 1 if network is None else network.scale
    wanted = [scaled(size, scale or times) for size in sizes]
    for size, large in zip(sizes, wanted, strict=True) if network is not None else ():
        passes(size, times, large)  # of all pictures, before the first is written
    written: list[dict[str, Any]] = []
    try:
        for name, path, found, size in zip(pictures, paths, texts, wanted, strict=True):
            picture = open_picture(name)
            with _TileBar(Path(name).name) as on_tile:
                made = upscaled(picture, network, size, tile=side, on_tile=on_tile)
            done = entry(used, picture.size, size, side)
            save_picture(made, path, noted(found, done), overwrite=overwrite)
            written.append({"path": str(path), "picture": name, **done})
            if not as_json:
                say(path)
    finally:
        if as_json and written:  # of those that are there, if another one fails
            say(json.dumps({"pictures": written}, ensure_ascii=False))


def _texts(picture: str) -> dict[str, str]:
    """Return the texts of a picture that are kept, and warn of a recipe that is not."""
    from safelight.recipe import read_texts
    from safelight.upscaling.record import entry, noted

    found: dict[str, str] = {}
    try:
        found = read_texts(picture)
        noted(found, entry(None, (8, 8), (8, 8)))
    except SafelightError as error:
        warn(f"the recipe of {Path(picture).name[-60:]} is left out: {error}")
        found.pop("safelight", None)
    return found


def _paths(pictures: list[str], out: str, *, overwrite: bool) -> list[Path]:
    """Return where the enlarged pictures are written, all of them different."""
    from safelight.picture import output_paths

    names = [Path(picture).stem for picture in pictures]
    found: list[Path] = []
    for name in names:
        # A picture's own name is put in as it is, "{seed}" in it, too.
        held = out.replace("{name}", name.replace("{", _BRACE))
        path = output_paths(held, [0], overwrite=True)[0]
        path = Path(str(path).replace(_BRACE, "{"))
        if path.name == "safelight-0.png" and Path(out).name != path.name:  # a folder was given
            path = path.with_name(f"{name}-upscaled.png")
            number = 2
            while path in found or (path.exists() and not overwrite):
                path, number = path.with_name(f"{name}-upscaled-{number}.png"), number + 1
        if path in found:
            raise SafelightError(
                f"--out names one file for several pictures ({path.name[:60]}): "
                "put {name} into it, or give a folder"
            )
        found.append(path)
    return found


class _TileBar:
    """A progress bar on stderr that counts tiles; shown on terminals only."""

    def __init__(self, name: str) -> None:
        self._name, self._bar = name, bar()

    def __enter__(self) -> Any:
        if self._bar is None:
            return lambda made, tiles: None
        task = self._bar.add_task(self._name, total=None)
        self._bar.start()
        shown = self._bar
        return lambda made, tiles: shown.update(task, completed=made, total=tiles)

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
