"""Recipes: the settings that make a picture again, stored inside its PNG.

A PNG holds two of them: exact JSON of our own in the text `safelight`, and AUTOMATIC1111's text
`parameters`, which other programs read.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from safelight.controls import Guide, guides_of
from safelight.errors import SafelightError
from safelight.hires import infotext
from safelight.picture import name_of, opened, reason
from safelight.pixels import resized
from safelight.request import Request
from safelight.settings import settings_of
from safelight.upscaling.names import LANCZOS

MAX_RECIPE = 256 * 1024

IP_ADAPTER_MODULE = "ip-adapter-auto"
"""What the web UI's ControlNet extension calls the reading of a picture for an IP-Adapter."""

_IP_ADAPTER = re.compile(r"ip[-_]?adapter")

_LATENT = {"noise": "latent noise", "nothing": "latent nothing"}
"""The web UI's words for what the masked part begins with, where they are not ours."""

USED = (
    *("model", "parts", "vae", "refiner", "controlnet", "ip_adapter", "image_encoder"),
    "upscaler",
)
"""The keys of a recipe that name files, each by name and SHA-256.

`parts` and `controlnet` may be lists of them.
"""

MAX_PARTS = 32
"""The most files that a recipe names."""


def png_texts(recipe: dict[str, Any]) -> dict[str, str]:
    """Return the PNG texts, by keyword, of a recipe (`Result.recipe`)."""
    return {
        "parameters": recipe_text(recipe),
        "safelight": json.dumps(recipe, ensure_ascii=False),
    }


def recipe_text(recipe: dict[str, Any]) -> str:
    """Return a recipe (`Result.recipe`) in AUTOMATIC1111's text `parameters`.

    It has the prompt, a line with the negative prompt if there is one, and a line of
    `Key: value` pairs. Settings other than steps, scale and seed stand there where they differ
    from their defaults.
    """
    from safelight.sampling import SAMPLERS

    settings, model = recipe["settings"], recipe["model"]
    sampler = settings["sampler"]
    told = {
        s.about.infotext: settings.get(s.name)
        for s in settings_of(Request).values()
        if s.about.infotext and settings.get(s.name) != (s.default if s.kind else None)
    }
    pairs = {
        "Steps": settings["steps"],
        "Sampler": SAMPLERS[sampler].a1111 or sampler,
        "Schedule type": (settings["schedule"] or "").capitalize(),
        "CFG scale": settings["guidance_scale"],
        "Seed": settings["seed"],
        "Size": "{}x{}".format(*first_size(settings, recipe["size"])),
        "Model hash": model["sha256"][:10],
        "Model": model["name"],
    }
    if refiner := recipe.get("refiner"):
        pairs |= {
            "Refiner": f"{refiner['name']} [{refiner['sha256'][:10]}]",
            "Refiner switch at": settings["refiner_start"],
        }
    nets = listed_files(recipe.get("controlnet"))
    guides = guides_of(settings, len(nets)) if nets else []
    units = [_unit(net, "none", guide) for net, guide in zip(nets, guides, strict=True)]
    if adapter := recipe.get("ip_adapter"):  # the same extension draws with both
        prompts = Guide(*(settings[f"ip_adapter_{end}"] for end in ("scale", "start", "end")))
        units.append(_unit(adapter, IP_ADAPTER_MODULE, prompts))
    pairs |= {f"ControlNet {place}": unit for place, unit in enumerate(units)}
    if vae := recipe.get("vae"):
        pairs |= {"VAE hash": vae["sha256"][:10], "VAE": vae["name"]}
    if embeddings := recipe.get("embeddings"):
        hashes = (f"{_plain(one['name'])}: {one['sha256'][:12]}" for one in embeddings)
        pairs["TI hashes"] = ", ".join(hashes)
    if settings.get("prompt_syntax") == "a1111" and settings.get("emphasis") != "original":
        pairs["Emphasis"] = settings["emphasis"].replace("-", " ").capitalize()
    pairs |= {name: value for name, value in told.items() if name not in pairs}
    if is_cropped(settings):
        pairs["Inpaint area"] = "Only masked"
    if (content := pairs.get("Masked content")) in _LATENT:
        pairs["Masked content"] = _LATENT[content]
    pairs |= infotext(settings)
    if "enlarged" in recipe and "Hires upscale" not in pairs:
        pairs["Hires resize"] = "{}x{}".format(*recipe["enlarged"])
        pairs["Hires upscaler"] = LANCZOS
    pairs |= postprocessed(recipe.get("upscaled", []))
    pairs["Version"] = f"Safelight {recipe['safelight']}"
    loras = recipe.get("loras", [])
    if loras:
        pairs["Lora hashes"] = ", ".join(f"{_plain(one['name'])}: {one['hash']}" for one in loras)
    lines = [settings["prompt"] + "".join(_tag(one) for one in loras if not one["in_prompt"])]
    if settings["negative_prompt"]:
        lines.append(f"Negative prompt: {settings['negative_prompt']}")
    lines.append(
        ", ".join(
            f"{key}: {_quoted(value)}" for key, value in pairs.items() if value not in (None, "")
        )
    )
    return "\n".join(lines)


def first_size(
    settings: dict[str, Any], size: Sequence[int | None]
) -> tuple[int | None, int | None]:
    """Return the size that the web UI gives of a picture: what the model drew first.

    size: the picture's, None if it is not known. Where there is a second pass, the first size is
    that of the first pass, and where the part around a mask is drawn alone, that of the part.
    """
    width, height = size
    if settings.get("hires_scale", 1) == 1 and not is_cropped(settings):
        return width, height
    return settings.get("width") or width, settings.get("height") or height


def is_cropped(settings: dict[str, Any]) -> bool:
    """Return whether a recipe's settings draw the part around a mask alone."""
    return settings.get("mask_padding") is not None and settings.get("mask_sha256") is not None


def is_ip_adapter(module: str, model: str) -> bool:
    """Return whether a unit of the ControlNet extension is for an IP-Adapter, by its names."""
    return any(_IP_ADAPTER.search(name.casefold()) for name in (module, model))


def _unit(used: dict[str, str], module: str, guide: Guide) -> str:
    """Return what the web UI's ControlNet extension writes of a unit."""
    told = (
        f"Module: {module}",
        f"Model: {used['name']} [{used['sha256'][:8]}]",
        f"Weight: {guide.scale:g}",
        f"Guidance Start: {guide.start:g}",
        f"Guidance End: {guide.end:g}",
    )
    return ", ".join(told)


def _tag(lora: dict[str, Any]) -> str:
    """Return a LoRA as a prompt of the web UI has it: the text encoder's weight comes first."""
    weights = dict.fromkeys(f"{lora[key]:g}" for key in ("text_weight", "weight"))
    return f" <lora:{_plain(lora['name'])}:{':'.join(weights)}>"


def _plain(name: str) -> str:
    """Return a name without the marks that separate names in the web UI's text."""
    return re.sub(r"[:,<>]", "", name)


def enlarge(
    image: Image.Image, recipe: dict[str, Any], size: tuple[int, int]
) -> tuple[Image.Image, dict[str, Any]]:
    """Return a picture at another size, by Lanczos, and its recipe with that size noted."""
    if image.size == size:
        return image, recipe
    return resized(image, size), {**recipe, "enlarged": list(size)}


def postprocessed(done: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return AUTOMATIC1111's pairs for the enlargements that a recipe notes; it has the last."""
    if not done:
        return {}
    return {
        "Postprocess upscale by": f"{done[-1]['scale']:g}",
        "Postprocess upscaler": _plain(done[-1]["name"]),
    }


def _quoted(value: object) -> str:
    text = str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
    return json.dumps(text, ensure_ascii=False) if any(c in text for c in ',:\n"') else text


def parse_recipe_text(text: str) -> dict[str, Any]:
    """Return the parts of a `parameters` text: prompt, negative_prompt, and the pairs as strings.

    A value that is JSON, as those of `Hashes` and `Civitai resources` are, stays as it is written.
    Takes time linear in the length of any text. Raises SafelightError if there is no line of pairs
    at its end.
    """
    body, _, last = text.strip("\n").rpartition("\n")
    pairs: dict[str, str] = {}
    at, tries_json = 0, True
    while (colon := last.find(": ", at)) >= 0:
        key, at = last[at:colon].strip(" ,"), colon + 2
        if last.startswith('"', at):
            try:
                value, at = json.JSONDecoder().raw_decode(last, at)
            except ValueError:
                break
            value = value.encode(errors="replace").decode()  # no lone surrogates
        else:
            end = _json_end(last, at) if tries_json and last.startswith(("{", "["), at) else None
            if end is None:
                # Only one try may fail: each may read the whole rest.
                tries_json = tries_json and not last.startswith(("{", "["), at)
                comma = last.find(",", at)
                end = comma if comma >= 0 else len(last)
            value, at = last[at:end].strip(), end
        pairs[key] = value
    if "Steps" not in pairs:
        raise SafelightError("its text `parameters` has no line that begins with 'Steps: '")
    prompt, _, negative = f"\n{body}".partition("\nNegative prompt: ")
    return {"prompt": prompt.removeprefix("\n"), "negative_prompt": negative, "parameters": pairs}


def _json_end(text: str, at: int) -> int | None:
    """Return where the JSON that begins at a place ends; None if it is none, or more follows."""
    try:
        # Numbers stay text: long ones take more than linear time.
        _, end = json.JSONDecoder(parse_int=str, parse_float=str).raw_decode(text, at)
    except (ValueError, RecursionError):
        return None
    after = text[end : end + 1]
    return end if after in ("", ",") else None


def read_recipe(source: str | Path | bytes) -> dict[str, Any]:
    """Return the recipe inside a PNG: ours (`Result.recipe`), else that of the web UI's text.

    The second kind is what `parse_recipe_text` returns, and has no key `safelight`. Raises
    SafelightError if the file is no PNG, is broken, or carries neither.
    """
    name = name_of(source, "picture")
    with opened(source, name) as image:
        if not isinstance(image, PngImagePlugin.PngImageFile):
            raise SafelightError(f"{name} must be a PNG to carry a recipe, not {image.format}")
        texts = _texts(image, name)
    ours, theirs = texts.get("safelight"), texts.get("parameters")
    if ours is not None:
        return parsed(ours, name)
    if theirs is None:
        raise SafelightError(f"{name} carries no recipe: neither Safelight's own nor `parameters`")
    try:
        return parse_recipe_text(theirs)
    except SafelightError as error:
        raise SafelightError(f"{name} carries no recipe: {error}") from None


def read_texts(source: str | Path | bytes) -> dict[str, str]:
    """Return the texts of a picture that hold a recipe: `safelight`, `parameters`, both or none.

    They are not checked: `safelight` may be another program's. Raises SafelightError as
    `read_recipe` does for a broken PNG and one of too long a recipe.
    """
    name = name_of(source, "picture")
    with opened(source, name) as image:
        if not isinstance(image, PngImagePlugin.PngImageFile):
            return {}
        texts = _texts(image, name)
    return {key: texts[key] for key in ("parameters", "safelight") if key in texts}


def _texts(image: PngImagePlugin.PngImageFile, name: str) -> dict[str, str]:
    """Return the texts of a PNG. Raises SafelightError if it is broken, or its recipe too long."""
    try:
        texts = image.text
    except Exception as error:  # decoders of broken files raise anything
        raise SafelightError(f"{name} is damaged or cut off ({reason(error)})") from None
    if len(texts.get("safelight") or texts.get("parameters") or "") > MAX_RECIPE:
        raise SafelightError(f"{name} has a recipe of more than {MAX_RECIPE >> 10} KiB")
    return {key: str(text) for key, text in texts.items()}


def listed_files(used: Any) -> list[Any]:
    """Return the files under a key of a recipe as a list: none, one, or several."""
    if used is None:
        return []
    return used if isinstance(used, list) else [used]


def parsed(text: str, name: str = "the picture") -> dict[str, Any]:
    """Return the recipe of a PNG's text `safelight`. Raises SafelightError if it is not ours."""
    try:
        recipe = json.loads(text)
        if not isinstance(recipe["settings"], dict) or not isinstance(recipe["model"], dict):
            raise TypeError
        used = [one for key in USED for one in listed_files(recipe.get(key))]
        if len(used) > MAX_PARTS:
            raise TypeError
        names = [part[key] for part in used for key in ("name", "sha256")]
        for value in (recipe["safelight"], *names):
            if not isinstance(value, str):
                raise TypeError
    except (ValueError, TypeError, KeyError, RecursionError):
        raise SafelightError(f"{name} has a recipe that Safelight did not write") from None
    return recipe
