"""The commands samplers, models, inspect and verify."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from safelight.cli import options
from safelight.cli.loading import load
from safelight.cli.output import StepBar, note, pairs, printable, say, table
from safelight.errors import SafelightError

PNG_SIGNATURE, JPEG_SIGNATURE = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"

Json = Annotated[bool, Option("--json", help="Print JSON.")]


def samplers(as_json: Json = False) -> None:
    """List the samplers, with the names they have elsewhere."""
    from safelight.sampling import SAMPLERS

    if as_json:
        known = [
            {
                "name": sampler.name,
                "steps": sampler.steps,
                "a1111": sampler.a1111,
                "diffusers": sampler.diffusers,
                "schedules": sampler.schedules,
                "spacings": sampler.spacings,
                "eta": sampler.eta,
                "summary": sampler.summary,
            }
            for sampler in SAMPLERS.values()
        ]
        say(json.dumps(known, ensure_ascii=False))
        return
    rows = [(s.name, str(s.steps), s.a1111 or "", s.summary) for s in SAMPLERS.values()]
    for line in table([("NAME", "STEPS", "IN WEB UIS", "WHAT IT IS"), *rows]):
        say(line)


def models(
    models_dir: options.ModelsDir = None,
    everything: Annotated[
        bool,
        Option("--all", help="LoRAs, embeddings, ControlNets and the like of the folder, too."),
    ] = False,
    as_json: Json = False,
) -> None:
    """List the models on this machine.

    They are those that ship, in the hub cache, and in the models folder. Family, size and
    precision come from the headers of the files.
    """
    from safelight.weights.catalog import catalog
    from safelight.weights.library import open_library

    listed = list(catalog(open_library(models_dir), everything=everything))
    if as_json:
        say(json.dumps([each.to_dict() for each in listed], ensure_ascii=False))
        return
    rows = [
        (
            each.kind,
            each.name,
            each.family or "?",
            f"{each.bytes / 1e9:.2f} GB" if each.bytes >= 1e8 else f"{each.bytes / 1e6:.1f} MB",
            ", ".join(each.dtypes),
            each.why_not or each.where,
        )
        for each in listed
    ]
    kept = rows if everything else [row[1:] for row in rows]
    head = ("KIND", "NAME", "FAMILY", "SIZE", "PRECISION", "WHERE")
    for line in table([head if everything else head[1:], *kept]):
        say(printable(line))


def inspect(
    file: Annotated[str, Argument(help="A PNG, a checkpoint, a model's folder or name.")],
    models_dir: options.ModelsDir = None,
    everything: Annotated[
        bool, Option("--all", help="Of a recipe, the settings at their default, too.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show a PNG's recipe, or what a checkpoint holds.

    For a checkpoint: its family, size and precision, without loading it.
    """
    found = _recipe_or_checkpoint(file, models_dir)
    if as_json:
        say(json.dumps(found, ensure_ascii=False))
        return
    if not everything and isinstance(settings := found.get("settings"), dict):
        from safelight.request import Request
        from safelight.settings import unlike_defaults

        found = {**found, "settings": unlike_defaults(Request, settings)}
    for line in pairs(found):
        say(line)


def _recipe_or_checkpoint(file: str, models_dir: str | None) -> dict[str, Any]:
    if _is_picture(file):
        from safelight.recipe import read_recipe

        return read_recipe(file)
    from safelight import weights

    return weights.inspect(file, models_dir=models_dir)


def _is_picture(file: str) -> bool:
    """Return whether a file is a picture that Safelight writes; only a PNG carries a recipe."""
    try:
        if not Path(file).is_file():
            return False
        with Path(file).open("rb") as opened:
            head = opened.read(12)
        webp = head.startswith(b"RIFF") and head.endswith(b"WEBP")
        return webp or head.startswith((PNG_SIGNATURE, JPEG_SIGNATURE))
    except (OSError, ValueError):
        return False  # not a file's name: a model's, or weights.inspect gives the error


def verify(
    png: Annotated[str, Argument(help="A PNG that Safelight made.")],
    model: Annotated[
        str | None, Option(help="Where the model is [its name in the recipe].", show_default=False)
    ] = None,
    parts: Annotated[
        list[str] | None,
        Option(help="What the model took parts from, if anything.", show_default=False),
    ] = None,
    vae: Annotated[
        str | None, Option(help="Where the other autoencoder is, if any.", show_default=False)
    ] = None,
    refiner: Annotated[
        str | None, Option(help="Where the refiner is, if any.", show_default=False)
    ] = None,
    controlnet: Annotated[
        list[str] | None, Option(help="Where each ControlNet is, if any.", show_default=False)
    ] = None,
    ip_adapter: Annotated[
        str | None, Option(help="Where the IP-Adapter is, if any.", show_default=False)
    ] = None,
    image_encoder: Annotated[
        str | None, Option(help="Where its image encoder is, if any.", show_default=False)
    ] = None,
    lora: Annotated[
        list[str] | None, Option(help="The file of a LoRA, if any.", show_default=False)
    ] = None,
    embedding: Annotated[
        list[str] | None, Option(help="The file of an embedding, if any.", show_default=False)
    ] = None,
    upscaler: Annotated[
        list[str] | None, Option(help="The file of an upscaler, if any.", show_default=False)
    ] = None,
    image: Annotated[
        str | None, Option(help="The picture it started from, if any.", show_default=False)
    ] = None,
    mask: Annotated[
        str | None, Option(help="The mask it was made with, if any.", show_default=False)
    ] = None,
    control_image: Annotated[
        list[str] | None, Option(help="Each picture that guided it, if any.", show_default=False)
    ] = None,
    ip_adapter_image: Annotated[
        str | None, Option(help="The picture that was a prompt, if any.", show_default=False)
    ] = None,
    reference: Annotated[
        list[str] | None,
        Option(help="A picture that it refers to, if any, in their order.", show_default=False),
    ] = None,
    models_dir: options.ModelsDir = None,
    device: Annotated[
        str | None, Option(help="Another device than the recipe's.", show_default=False)
    ] = None,
    dtype: Annotated[
        str | None, Option(help="Another precision than the recipe's.", show_default=False)
    ] = None,
) -> None:
    """Make a picture again from its recipe.

    Prints the largest difference of any pixel, 0 to 255, and why a difference is expected. The exit
    code is 0 if there is none, or if it is within the bound for a picture that a server drew with
    others; else it is 1.
    """
    import safelight
    from safelight import machine
    from safelight.adapters.recorded import recorded_files
    from safelight.picture import largest_difference, open_picture, open_pictures
    from safelight.recipe import USED, enlarge, listed_files, read_recipe
    from safelight.request_pictures import by_input, inputs_in, setting_of
    from safelight.settings import settings_of
    from safelight.upscaling.record import checked
    from safelight.weights.library import open_library

    recipe = read_recipe(png)
    if "safelight" not in recipe:
        raise SafelightError(
            f"{png[-100:]!r} has another program's recipe: only Safelight's own can be made again"
        )
    if "grid" in recipe:
        raise SafelightError(
            f"{png[-100:]!r} is a grid of several pictures: verify takes one picture"
        )
    picture, later = open_picture(png), checked(recipe)
    given: dict[str, Any] = {"image": image, "mask": mask, "control_image": control_image or None}
    given |= {"ip_adapter_image": ip_adapter_image, "reference_images": reference}
    there = by_input(given)
    missing = {setting_of(n) for n in inputs_in(recipe["settings"]) if n not in there}
    try:
        request = safelight.Request.from_dict(recipe["settings"], **open_pictures(given))
    except SafelightError as error:
        if error.field not in missing:
            raise
        option = settings_of(safelight.Request)[error.field].option
        raise SafelightError(f"{error}: give it with {option}", field=error.field) from None
    used = {key: recipe.get(key) for key in USED}
    with StepBar(count=1) as on_step:
        try:
            loaded = load(
                model or _recorded("model", used["model"], models_dir) or "",
                parts=parts or _all_recorded("parts", used["parts"], models_dir),
                vae=vae or _recorded("vae", used["vae"], models_dir),
                refiner=refiner or _recorded("refiner", used["refiner"], models_dir),
                controlnet=controlnet
                or _all_recorded("controlnet", used["controlnet"], models_dir),
                ip_adapter=ip_adapter or _recorded("ip_adapter", used["ip_adapter"], models_dir),
                image_encoder=image_encoder,  # else the one that the adapter finds
                models_dir=models_dir,
                prediction_type=recipe.get("prediction_type"),
                device=device or recipe.get("device", "auto"),
                dtype=dtype or recipe.get("dtype", "auto"),
                # A stranger's picture must not choose gigabytes to download, nor name files of this
                # machine.
                download=model is not None,
                takes_paths=False,
            )
        except SafelightError as error:
            raise SafelightError(
                f"{error}; --model, --parts, --vae, --refiner, --controlnet, --ip-adapter, "
                "--device and --dtype take the place of the recipe's"
            ) from None
        _check_used("model", used["model"], loaded.sha256)
        _check_parts(used["parts"], loaded.other_parts)
        _check_used("vae", used["vae"], (loaded.other_vae or {}).get("sha256"))
        second = None if loaded.refiner is None else loaded.refiner.sha256
        _check_used("refiner", used["refiner"], second)
        _check_controlnets(used["controlnet"], loaded.control)
        for kind in ("ip_adapter", "image_encoder"):
            _check_used(kind, used[kind], loaded.image_prompts.get(kind, {}).get("sha256"))
        library = open_library(models_dir)
        loaded.lora_files = recorded_files(recipe, "lora", library, lora or ())
        loaded.embedding_files = recorded_files(recipe, "embedding", library, embedding or ())
        loaded.library = None  # else the prompt's words could find newer embeddings
        recorded = machine.recorded_machine(recipe)
        networks = {"upscalers": [*later, *listed_files(used["upscaler"])]}
        networks = recorded_files(networks, "upscaler", library, upscaler or ())
        if networks:
            loaded.upscalers.files = networks
        with machine.threads_of(recorded):
            result = loaded.generate(request, on_step=on_step)
            again = result.images[0]
            if not later and recipe.get("enlarged") == list(picture.size):
                again, _ = enlarge(again, recipe, picture.size)
            if later:
                from safelight.upscaling.upscaler import repeated

                where = device or recipe.get("device", "auto")
                again = repeated(again, later, networks, recipe.get("enlarged"), where)
    difference = largest_difference(picture, again)
    say(difference)
    if not difference:
        raise typer.Exit(0)
    others = ("safelight", "device", "dtype")
    here = {**result.drawn, **{key: result.recipe()[key] for key in others}}
    before = {**recorded, **{key: recipe.get(key) for key in others}} if recorded else {}
    bound, why = machine.expected_difference(before, here, result.dtype)
    note(why)
    raise typer.Exit(0 if bound is not None and difference <= bound else 1)


def _recorded(kind: str, used: dict[str, str] | None, models_dir: str | None) -> str | None:
    """Return the path in the models folder of a recipe's model or the like, or its name.

    kind: a key of the recipe, of `safelight.recipe.USED`.

    The recipe may be a stranger's, so no file outside the models folder is opened for it. A folder
    in the working directory counts only if it has exactly this name.

    Raises SafelightError if the name could only be a path.
    """
    from safelight.weights.digest import digest_file
    from safelight.weights.find import BUILT_IN, is_cached, on_disk
    from safelight.weights.hub_names import hub_name
    from safelight.weights.library import PARTS, open_library

    if used is None:
        return None
    library, name, sha256 = open_library(models_dir), used["name"], used["sha256"]
    looked = kind if kind in ("vae", "controlnet", "ip_adapter") else "model"
    installed = None
    if kind == "parts" and library is not None:
        homes = (*PARTS, "model", "image_encoder")
        looked = next((home for home in homes if library.matches(name, home)), "")
        if not looked:
            looked = "model"
            installed = next((e for e in library.tokenizers() if e.name == name), None)
    if looked == "model" and name in BUILT_IN:
        return name
    here = on_disk(name)
    plain = Path(name).name == name and name != ".." and not name.startswith("~")
    hub = hub_name(name)
    own = plain and here is not None and here.path.is_dir()  # what generate takes first
    if installed is not None:  # no file is hashed for a tokenizer
        return name if own else str(installed.path)
    if library is not None:
        named = library.matches(name, looked)
        # A folder's hash is made of all its files when they are loaded.
        folder = next((e for e in named if e.path.is_dir()), None)
        right = (e for e in named if e.path.is_file() and digest_file(e.path).sha256 == sha256)
        found = next(right, None)
        # A model of the hub is a folder, too, and by_hash reads all files once.
        if found is None and folder is None and not (hub and is_cached(hub, kind)):
            homes = PARTS if kind == "parts" else (looked,)
            found = next(filter(None, (library.by_hash(sha256, home) for home in homes)), None)
        if found is None and not own:  # the check of its hash says what is wrong
            found = folder or next(iter(named), None)
        if found is not None:
            return str(found.path)
    if not (own or (here is None and (plain or hub is not None))):
        raise SafelightError(
            f"the recipe's {kind} {name[:60]!r} is in no models folder, and is not opened as a path"
        )
    return name


def _all_recorded(kind: str, used: Any, models_dir: str | None) -> list[str] | None:
    """Return where the parts or the ControlNets of a recipe are; see `_recorded`."""
    from safelight.recipe import listed_files

    found = [_recorded(kind, one, models_dir) for one in listed_files(used)]
    return [path for path in found if path is not None] or None


def _check_parts(recorded: Any, taken: Any) -> None:
    """Raise SafelightError if a model took its parts from other files than those of a recipe."""
    from safelight.recipe import listed_files

    used, loaded = listed_files(recorded), listed_files(taken)
    if len(used) < 2 and len(loaded) < 2:
        sha256 = loaded[0]["sha256"] if loaded else None
        return _check_used("parts", used[0] if used else None, sha256)
    wanted, found = ({one["sha256"]: one["name"] for one in each} for each in (used, loaded))
    if wanted.keys() == found.keys():
        return None
    told = ", ".join(f"{name[:40]} ({sha[:10]}…)" for sha, name in wanted.items())
    raise SafelightError(
        f"parts must be {told or 'none'}, not {', '.join(name[:40] for name in found.values())}: "
        "give those that made the picture, each with --parts"
    )


def _check_controlnets(recorded: Any, taken: Any) -> None:
    """Raise SafelightError if a model's ControlNets are not those of a recipe, in its order."""
    from safelight.recipe import listed_files

    used, loaded = listed_files(recorded), listed_files(taken)
    if len(used) != len(loaded) and (used or len(loaded) > 1):
        told = ", ".join(f"{one['name'][:40]} ({one['sha256'][:10]}…)" for one in used) or "none"
        raise SafelightError(
            f"controlnet must be {told}, not {len(loaded)} of them: give those that made the "
            "picture, each with --controlnet, in the same order"
        )
    for place in range(max(len(used), len(loaded))):
        sha256 = loaded[place]["sha256"] if loaded else None
        _check_used("controlnet", used[place] if used else None, sha256)


def _check_used(kind: str, used: dict[str, str] | None, sha256: str | None) -> None:
    """Raise SafelightError if the loaded files are not those that made the picture."""
    wanted = None if used is None else used["sha256"]
    if wanted == sha256:
        return
    told = (
        "the model's own" if used is None else f"{used['name']} of SHA-256 {used['sha256'][:10]}…"
    )
    raise SafelightError(
        f"{kind} must be {told}, not {'its own' if sha256 is None else f'{sha256[:10]}…'}: "
        f"give the one that made the picture with --{kind.replace('_', '-')}"
    )
