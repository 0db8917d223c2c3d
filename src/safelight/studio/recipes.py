"""Read the settings stored in a picture by Safelight or by another program."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any, get_args

from safelight.errors import SafelightError
from safelight.hires import steps_to_take
from safelight.keywords import MaskContent
from safelight.picture import opened
from safelight.recipe import is_ip_adapter, parse_recipe_text, read_recipe
from safelight.request_pictures import MAX_CONTROLS, MAX_PICTURES, digest_key, inputs_of
from safelight.sampler_names import SPACINGS, sampler_and_schedule
from safelight.sampling import SAMPLERS
from safelight.server.caged import exif_comment
from safelight.server.decoder import Sent
from safelight.sizes import SIDE_STEP
from safelight.studio.nets import named, pairs_of, recorded
from safelight.upscaling.names import LANCZOS

_PLAIN = ("", "normal", "automatic", "uniform")
"""Other programs' names of a model's own schedule."""

_SPACINGS = {**SPACINGS, "ddim_uniform": "leading"}
"""The names of its spacings, ComfyUI's included."""

_SETTINGS = {
    "Sampler": "sampler",
    "Schedule type": "schedule",
    "Steps": "steps",
    "CFG scale": "guidance_scale",
    "Seed": "seed",
    "Clip skip": "clip_skip",
    "Eta": "eta",
    "Denoising strength": "strength",
    "Mask blur": "mask_blur",
    "Masked area padding": "mask_padding",
    "Masked content": "mask_content",
}
"""Our settings, by AUTOMATIC1111's names of them."""

_UNITS = tuple(f"ControlNet {place}" for place in range(MAX_CONTROLS + 1))
"""The names of what the web UI's ControlNet extension writes of its first units."""

_OF_UNIT = {"weight": "scale", "guidance start": "start", "guidance end": "end"}
"""The ends of our settings' names, by the extension's names."""

_APART = (
    *("Model", "Model hash", "VAE", "VAE hash", "Hashes", "Lora hashes", "TI hashes"),
    *("Version", "Prompt syntax", "Emphasis", "Size", "Inpaint area", *_UNITS),
)
"""Names that are not settings, or are read elsewhere."""


_HIRES = ("Denoising strength", "Hires upscale", "Hires resize", "Hires steps")
"""What AUTOMATIC1111 writes of a second pass, besides its upscaler."""

UNTOLD = 0.75
"""The web UI's strength of a second pass."""


def settings_in(sent: Sent, name: str) -> dict[str, Any]:
    """Return `recipe_settings` of a file's bytes and `controlnets_in`, for a decoder's process.

    name: not used.
    """
    data = sent.take()
    return {"settings": recipe_settings(data), "controlnets": controlnets_in(data)}


def controlnets_in(data: bytes) -> list[str]:
    """Return the names of the ControlNets of the recipe in a picture, in order."""
    try:
        recipe = read_recipe(data)
    except SafelightError:
        try:
            recipe = _commented(data)
        except SafelightError:
            recipe = None
    if recipe is None:
        return []
    if "safelight" in recipe:
        return recorded(recipe)
    pairs = recipe["parameters"]
    return named([pairs[unit] for unit in _UNITS if unit in pairs])[:MAX_CONTROLS]


def recipe_settings(source: str | Path | bytes) -> dict[str, Any]:
    """Return the settings of a Request that the picture stores.

    Reads Safelight's recipes, AUTOMATIC1111's text, and what sd-parsers knows. An entry of
    AUTOMATIC1111's text that is no setting keeps its name. Raises SafelightError for a picture
    without any of them.
    """
    # Read bytes, so that errors do not show the uploaded file's name, which the user does not know.
    data = source if isinstance(source, bytes) else Path(source).read_bytes()
    try:
        recipe = read_recipe(data)
    except SafelightError as error:
        if (found := _parsed(data)) is not None:
            return found
        if (recipe := _commented(data)) is None:
            raise error
    if "safelight" in recipe:
        return recipe["settings"]
    pairs = recipe["parameters"]
    ours = pairs.get("Version", "").startswith("Safelight ")
    names = dict(_SETTINGS)
    # Safelight writes "Hires resize" of pictures that are enlarged alone.
    twice = {"Hires upscale"} if ours else {"Hires upscale", "Hires resize"}
    if again := bool(pairs.keys() & twice):
        del names["Denoising strength"]  # that of the second pass
    given = {"sampler": "", "schedule": ""} | {
        name: pairs[pair] for pair, name in names.items() if pair in pairs
    }
    given["width"], _, given["height"] = pairs.get("Size", "").partition("x")
    found = _settings(recipe["prompt"], recipe["negative_prompt"], given)
    # Safelight names the prompt syntax only if it is not "plain".
    found["prompt_syntax"] = pairs.get("Prompt syntax", "plain" if ours else "a1111")
    if "Emphasis" in pairs:
        found["emphasis"] = pairs["Emphasis"].lower().replace(" ", "-")
    if ours and found["prompt_syntax"] != "a1111":
        found |= _networks(found, pairs)
    found |= _guided([pairs[unit] for unit in _UNITS if unit in pairs])
    found |= _area(pairs, found)
    read = (*names, *_APART)
    if again:
        found |= (second := _second_pass(pairs, found))
        read = (*read, *(_HIRES if second else ()))
    others = {name: v for name, v in pairs.items() if name not in read}
    upscaler = others.get("Hires upscaler", "")
    if again and (upscaler == LANCZOS or "hires_upscaler" in found):
        del others["Hires upscaler"]
    return others | found


def _area(pairs: dict[str, str], found: dict[str, Any]) -> dict[str, Any]:
    """Return the padding around a mask, None if the pairs say that the whole picture is drawn."""
    area = pairs.get("Inpaint area", "").lower()
    if area == "only masked":
        return {"mask_padding": found.get("mask_padding", 0)}
    return {"mask_padding": None} if area and "mask_padding" in found else {}


def _second_pass(pairs: dict[str, str], first: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of the second pass; empty if the pairs do not say its size.

    first: the settings of the first pass. The web UI names how many steps the second pass takes,
    where they are not as many as those of the first.
    """
    strength, steps = pairs.get("Denoising strength"), pairs.get("Hires steps", first.get("steps"))
    with suppress(ArithmeticError, KeyError, ValueError):
        scale = _times(pairs, first["width"], first["height"])
        found: dict[str, Any] = {"hires_scale": scale, "hires_strength": float(strength or UNTOLD)}
        if steps is not None:
            found["hires_steps"] = steps_to_take(int(steps), found["hires_strength"])
        upscaler = pairs.get("Hires upscaler", LANCZOS)
        if upscaler not in (LANCZOS, "None") and not upscaler.startswith("Latent"):
            found["hires_upscaler"] = upscaler
        return found
    return {}


def _times(pairs: dict[str, str], width: int, height: int) -> float:
    """Return how many times the second pass is larger than the first, of a width and height.

    Raises ValueError for a size of other proportions, which the web UI cut off.
    """
    if "Hires upscale" in pairs:
        return float(pairs["Hires upscale"])
    to = pairs["Hires resize"].partition("x")
    wide, high = int(to[0]), int(to[2])
    scale = max(wide / width, high / height)
    if max(abs(scale * width - wide), abs(scale * height - high)) > SIDE_STEP:
        raise ValueError(pairs["Hires resize"])
    return scale


def _guided(units: Sequence[str]) -> dict[str, Any]:
    """Return the settings of units. Their pictures are not stored: "" stands for the digests."""
    kinds: dict[str, list[dict[str, str]]] = {"control": [], "ip_adapter": []}
    for unit in units:
        pairs = pairs_of(unit)
        prompts = is_ip_adapter(pairs.get("module", ""), pairs.get("model", ""))
        kinds["ip_adapter" if prompts else "control"].append(pairs)
    found: dict[str, Any] = {}
    for kind, given in kinds.items():
        given = given[: MAX_PICTURES[f"{kind}_image"]]
        found |= {digest_key(name): "" for name in inputs_of(f"{kind}_image")[: len(given)]}
        for name, end in _OF_UNIT.items():
            with suppress(KeyError, ValueError):
                if values := [float(pairs[name]) for pairs in given]:
                    found[f"{kind}_{end}"] = values if len(values) > 1 else values[0]
    return found


def _networks(settings: dict[str, Any], pairs: dict[str, str]) -> dict[str, Any]:
    """Return prompt, LoRAs and embeddings of Safelight's own text, outside of A1111's syntax.

    `recipe_text` appends the LoRAs to the prompt as tags, which `plain` reads as words. The other
    syntaxes read them as LoRAs, so there they stay in the prompt.
    """
    found: dict[str, Any] = {}
    if "Lora hashes" in pairs and settings["prompt_syntax"] == "plain":
        # Each LoRA has one tag at the end. Tags before these are words of the prompt.
        count = len(pairs["Lora hashes"].split(", "))
        prompt, *tags = settings["prompt"].rsplit(" <lora:", count)
        parts = [tag.removesuffix(">").split(":") for tag in tags]
        # A tag has the text encoder's weight first, the setting has it last.
        loras = [":".join([name, *reversed(weights)]) for name, *weights in parts]
        found = {"prompt": prompt, "loras": loras}
    if "TI hashes" in pairs:
        hashes = pairs["TI hashes"].split(", ")
        found["embeddings"] = [one.partition(":")[0] for one in hashes]
    return found


def _commented(data: bytes) -> dict[str, Any] | None:
    """Return the recipe that AUTOMATIC1111 writes into a JPEG's or WebP's comment.

    Returns None for a PNG without one. Raises SafelightError for another file without one.
    """
    with opened(data, "picture") as image:
        kind, text = image.format, exif_comment(image)
    try:
        return parse_recipe_text(text)
    except SafelightError:
        if kind == "PNG":
            return None
        raise SafelightError(
            f"the picture carries no recipe: its {kind} file has no comment with settings"
        ) from None


def _parsed(data: bytes) -> dict[str, Any] | None:
    """Return the settings that sd-parsers finds, as in ComfyUI's graph, or None."""
    from sd_parsers import ParserManager
    from sd_parsers.data import Generators
    from sd_parsers.parsers import MANAGED_PARSERS, AUTOMATIC1111Parser

    # AUTOMATIC1111's text is read by Safelight itself.
    parsers = [one for one in MANAGED_PARSERS if one is not AUTOMATIC1111Parser]
    try:
        info = ParserManager(managed_parsers=parsers).parse(BytesIO(data))
        if info is None or not info.samplers:
            return None
        # Not `full_prompt`: Fooocus's is a list, with the words of its styles.
        prompt, negative = (
            ", ".join(map(str, texts)) for texts in (info.prompts, info.negative_prompts)
        )
    except Exception:  # parsers of broken files raise anything
        return None
    sampler = info.samplers[0]
    given = info.metadata | sampler.parameters
    # Fooocus writes its size as "(896, 1152)".
    width, _, height = str(given.get("resolution", "")).strip("()").partition(", ")
    found = _settings(
        prompt,
        negative,
        {
            "sampler": sampler.name,
            "schedule": given.get("scheduler", ""),
            "steps": given.get("steps"),
            "guidance_scale": given.get("cfg_scale"),
            "seed": given.get("seed"),
            "width": given.get("width", width),
            "height": given.get("height", height),
        },
    )
    if info.generator == Generators.COMFYUI:
        found["prompt_syntax"] = "comfy"
    return found


def _settings(prompt: str, negative_prompt: str, given: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"prompt": prompt, "negative_prompt": negative_prompt}
    known = sampler_and_schedule(str(given["sampler"]))
    # An unknown sampler stays, so that the form can report it.
    found["sampler"], joined = known or (given["sampler"] or None, "")
    schedule = "_".join(str(given["schedule"]).lower().split()) or joined
    spacing = _SPACINGS.get(schedule or "")
    if known and spacing in SAMPLERS[known[0]].spacings:
        found["spacing"], schedule = spacing, None
    found["schedule"] = None if schedule in _PLAIN else schedule
    numbers = {"steps": int, "guidance_scale": float, "seed": int, "clip_skip": int}
    numbers |= {"eta": float, "strength": float, "width": int, "height": int}
    numbers |= {"mask_blur": float, "mask_padding": int}
    for name, kind in numbers.items():
        try:
            found[name] = kind(given[name])
        except (KeyError, TypeError, ValueError, OverflowError):
            continue
    content = str(given.get("mask_content", "")).lower().removeprefix("latent ")
    if content in get_args(MaskContent):
        found["mask_content"] = content
    return found
