"""The Request that a body of AUTOMATIC1111's API means.

Request checks ranges; this module handles that API's names, and pictures in base64. A field that is
not supported gives a warning, not an error: clients send fields that they do not need.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from fastapi import HTTPException
from PIL import Image, ImageOps

from safelight.defaults import defaults_of, level_of
from safelight.errors import SafelightError
from safelight.families.control import CONTROL, IP_ADAPTER
from safelight.recipe import parse_recipe_text
from safelight.request import Request
from safelight.request_pictures import REFERENCES
from safelight.sampling import SAMPLERS
from safelight.sampling.schedule import SCHEDULES
from safelight.server.apis.sdapi_bodies import (
    Asked,
    ImageToImage,
    Sent,
    TextToImage,
    plain_number,
)
from safelight.server.apis.sdapi_control import without_pictures
from safelight.server.apis.sdapi_hires import second_pass
from safelight.server.apis.sdapi_names import (
    OVERRIDES,
    SPACINGS,
    automatic_schedule,
    find_sampler,
    find_scheduler,
    sampler_label,
    scheduler_label,
)
from safelight.server.bodies import attached, pictures_sent
from safelight.server.sizes import enlarging_note, fit_to_model
from safelight.settings import settings_of
from safelight.sizes import MIN_SIDE, SIDE_STEP, allowed_size

if TYPE_CHECKING:
    from safelight.weights.plan import Plan


def understand(
    body: TextToImage | ImageToImage,
    plan: Plan | None,
    sent: Sent | None = None,
) -> Asked:
    """Return the request of a body. It resizes pictures: call it in a thread.

    sent: the pictures of an ImageToImage; without them everything else is checked. plan: the
    model, whose best settings (`defaults_of`) replace that API's defaults where the body says
    nothing; None if only another machine has the model, whose worker fills them in.

    Raises SafelightError, or HTTPException with AUTOMATIC1111's status for unknown names.
    """
    if body.script_name not in (None, "", "None"):
        raise HTTPException(422, f"Script {body.script_name!r:.60} not found")
    settings, warnings = _settings(body, plan)
    warnings += _ignored(body)
    request = Request(**settings)
    if isinstance(body, ImageToImage) and sent is not None:
        # The sides are checked by now: pictures get resized to them.
        if plan is not None and plan.family.only_edits and sent.mask is None:
            request = request.without("strength").with_pictures(reference_images=(sent.image,))
            warnings.append(f"denoising_strength: {plan.name} edits as the prompt says, without it")
        else:
            pictures, more = _pictures(body, request, sent)
            shown = pictures.pop("image"), pictures.pop("mask")
            request = request.replace(**pictures).with_pictures(*shown)
            warnings += more
    return Asked(request, None, warnings, _echo(body))


def fitted(asked: Asked, model: str, native: tuple[int, int], plan: Plan | None = None) -> Asked:
    """Return the request at a size that a model can draw.

    native: the size it draws best. plan: the model's, None if it is not known.
    """
    request, size = fit_to_model(asked.request, native, plan)
    warnings = asked.warnings + enlarging_note(asked.request, request, size, model, native)
    return replace(asked, request=request, size=size, warnings=warnings)


# --- settings ------------------------------------------------------------------------------------

_NUMBERS = {"steps": "steps", "guidance_scale": "cfg_scale"}
"""Settings that models have defaults for, with that API's names of them."""


def _settings(
    body: TextToImage | ImageToImage, plan: Plan | None
) -> tuple[dict[str, Any], list[str]]:
    said = body.model_fields_set
    defaults = None if plan is None else defaults_of(plan.family, plan.notes)
    level = {} if plan is None else _level(body, plan)
    named = {"sampler"} if body.sampler_name or "sampler_index" in said else set[str]()
    named |= {ours for ours, theirs in _NUMBERS.items() if theirs in said}
    # Leave out settings that the level of `fast`, or a worker elsewhere, fills in.
    left_out = {"sampler", *_NUMBERS} - named
    if defaults is not None:
        left_out &= level.keys()
    name, schedule, spacing, warnings = _sampler(body, defaults, level, named="sampler" in named)
    sampler = None if name is None else SAMPLERS[name]
    if sampler is not None and sampler.noisy and body.eta not in (None, 1):
        warnings.append(
            f"eta: {sampler_label(sampler.name)} always draws all of its noise, as with 1"
        )
    settings = {
        "prompt": body.prompt,
        "negative_prompt": body.negative_prompt,
        "styles": body.styles,
        "seed": None if body.seed == -1 else body.seed,
        "count": body.batch_size * body.n_iter,
        "sampler": name,
        "schedule": schedule,
        # Clients send eta 1 with every sampler; only samplers with an eta get it.
        "eta": (body.eta or 0.0) if sampler is not None and sampler.eta else 0.0,
    }
    for side in ("width", "height"):
        asked = drawn = getattr(body, side)
        if asked is not None and asked > MIN_SIDE and asked % SIDE_STEP:
            drawn = asked - asked % SIDE_STEP
            warnings.append(f"{side}: {drawn}, the multiple of {SIDE_STEP} below {asked}")
        settings[side] = drawn
    for ours, theirs in _NUMBERS.items():
        value = getattr(body, theirs)
        settings[ours] = value if ours in named else (defaults or {}).get(ours, value)
    if isinstance(body, ImageToImage):
        settings["strength"] = body.denoising_strength
        settings |= _inpainting(body) if body.mask else {}
    else:
        # A level of `fast` has its own number of steps.
        steps = level.get("steps") if "steps" in left_out else settings["steps"]
        more, told = second_pass(body, (settings["width"], settings["height"]), plan, name, steps)
        settings |= more
        warnings += told
    if (share := body.refiner_switch_at) is not None:
        settings["refiner_start"] = share
    for name, ours in OVERRIDES.items():
        if (value := body.override_settings.get(name)) is not None:
            settings[ours] = plain_number(value)
    own = _own(body, settings)
    if spacing is not None:
        own.setdefault("spacing", spacing)
    # Clients of this API write prompts as AUTOMATIC1111 reads them.
    own.setdefault("prompt_syntax", "a1111")
    if own["prompt_syntax"] == "a1111" and "emphasis" not in own:
        own |= _emphasis(body.override_settings.get("emphasis"))
    return {n: v for n, v in (settings | own).items() if n not in left_out}, warnings


def _sampler(
    body: TextToImage | ImageToImage,
    defaults: Mapping[str, Any] | None,
    level: Mapping[str, Any],
    *,
    named: bool,
) -> tuple[str | None, str | None, str | None, list[str]]:
    """Return our names of the sampler, of its schedule and of its spacing, and warnings.

    The sampler is None if only a worker elsewhere knows it. named: whether the body names one.
    """
    scheduler, warnings = find_scheduler(body.scheduler), list[str]()
    if scheduler is None:
        told = f"{body.scheduler!r:.60} is not here, Automatic is used; GET schedulers lists others"
        scheduler, warnings = "automatic", [f"scheduler: {told}"]
    if not named and defaults is None:
        if scheduler in (*SCHEDULES, *SPACINGS):
            what = "needs a sampler_name, as the model's own sampler is not known here"
            warnings.append(f"scheduler: {what}; the model's is used")
        return None, None, None, warnings
    best = {**(defaults or {}), **level}
    automatic = joined = None
    if named or "sampler" not in best:
        label = body.sampler_name or body.sampler_index
        name, joined = find_sampler(label)
        # If the model's own default is this sampler, it is meant with the model's own schedule. The
        # defaults of a model elsewhere are not known.
        if defaults is not None and name != defaults.get("sampler"):
            automatic = automatic_schedule(label, name)
    else:
        name = best["sampler"]
    theirs = {"automatic": automatic, **{name: name for name in SCHEDULES}}
    schedule = joined or theirs.get(scheduler)
    spacing = None if joined else SPACINGS.get(scheduler)
    sampler = SAMPLERS[name]
    if (schedule or spacing) in (None, *sampler.schedules, *sampler.spacings):
        return name, schedule, spacing, warnings
    lacking = schedule or scheduler_label(scheduler)
    told = f"scheduler: {sampler_label(name)} has no {lacking}; the model's is used"
    return name, None, None, [*warnings, told]


def _level(body: TextToImage | ImageToImage, plan: Plan) -> Mapping[str, Any]:
    """Return the settings that the body's level of `fast` stands for; empty if it is no level."""
    fast = (body.model_extra or {}).get("fast")
    return level_of(fast, plan.family, plan.notes) if isinstance(fast, int) else {}


def _emphasis(label: object) -> dict[str, Any]:
    """Return the setting of AUTOMATIC1111's option `emphasis`, such as "No norm"."""
    return {} if label is None else {"emphasis": str(label).strip().lower().replace(" ", "-")}


def _own(body: TextToImage | ImageToImage, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings that this API has no field for, under Safelight's names."""
    extra = body.model_extra or {}
    known = settings_of(Request).items()
    own = {name for name, one in known if one.kind and not one.about.a1111}
    own -= {*settings, *CONTROL, *IP_ADAPTER}
    return {name: extra[name] for name in extra if name in own}


def _ignored(body: TextToImage | ImageToImage) -> list[str]:
    vae = body.override_settings.get("sd_vae")
    taken = ("sd_model_checkpoint", "emphasis", "sd_vae", *OVERRIDES)
    overrides = [name for name in body.override_settings if name not in taken]
    scripts = [
        name
        for name, script in body.alwayson_scripts.items()
        if not (name.casefold() == "controlnet" and isinstance(script, dict))
        and (cast("dict[str, Any]", script).get("args") if isinstance(script, dict) else script)
    ]
    found = [
        (body.subseed_strength > 0, "subseed_strength: a picture is drawn from its seed alone"),
        (
            body.seed_resize_from_h > 0 or body.seed_resize_from_w > 0,
            "seed_resize_from: noise is drawn at the picture's own size",
        ),
        (body.restore_faces, "restore_faces: faces stay as they were drawn"),
        (body.tiling, "tiling: the picture's edges will not meet"),
        (body.s_churn > 0, "s_churn: no noise is added to samplers that have none"),
        (body.s_noise != 1, "s_noise: noise has its usual strength, as with 1"),
        (body.s_min_uncond > 0, "s_min_uncond: the negative prompt counts in every step"),
        (body.refiner_checkpoint, "refiner_checkpoint: it is given when the server is started"),
        (body.infotext, "infotext: settings are read from the fields alone"),
        (
            vae not in (None, "Automatic", "None"),
            "override_settings: sd_vae is chosen when the server is started, with --vae",
        ),
        (overrides, f"override_settings: these do nothing here: {_listed(overrides)}"),
        *(
            (
                name in (body.model_extra or {}),
                f"{name}: here it is the image of a unit of alwayson_scripts.controlnet",
            )
            for name in (CONTROL[0], IP_ADAPTER[0])
        ),
        (scripts, f"alwayson_scripts: these are not here: {_listed(scripts)}"),
    ]
    if isinstance(body, ImageToImage) and body.initial_noise_multiplier != 1:
        found.append((True, "initial_noise_multiplier: noise has its usual strength, as with 1"))
    return [text for asked, text in found if asked]


def _listed(names: list[str]) -> str:
    return ", ".join(f"{name!r:.40}" for name in names[:10])


# --- pictures ------------------------------------------------------------------------------------


def describe(texts: dict[str, str]) -> dict[str, Any]:
    """Return the answer to png-info for a picture's texts, with or without a recipe."""
    texts = dict(texts)
    text = texts.pop("parameters", "")
    try:
        read = parse_recipe_text(text)
    except SafelightError:
        return {"info": text, "items": texts, "parameters": {}}
    pairs = {"Prompt": read["prompt"], "Negative prompt": read["negative_prompt"]}
    pairs |= read["parameters"]
    if "Size" in pairs:
        pairs["Size-1"], _, pairs["Size-2"] = pairs.pop("Size").partition("x")
    return {"info": text, "items": texts, "parameters": pairs}


def first_picture(body: ImageToImage) -> str:
    """Return the picture to start from, as it was sent."""
    if not body.init_images:
        raise HTTPException(404, "Init image not found")
    if len(body.init_images) > 1:
        raise SafelightError(f"init_images must hold one picture, not {len(body.init_images)}")
    return body.init_images[0]


def references_of(body: TextToImage | ImageToImage) -> dict[str, list[bytes]]:
    """Return the pictures of the further field reference_images of a body, as `pictures_sent`."""
    return pictures_sent({REFERENCES: (body.model_extra or {}).get(REFERENCES) or None})


def _pictures(body: ImageToImage, request: Request, sent: Sent) -> tuple[dict[str, Any], list[str]]:
    """Return the settings image, mask, width and height, and warnings.

    If no side is requested, the picture keeps its own size, or gets the nearest allowed size of the
    same proportions.
    """
    image = sent.image
    mask, warnings = None, list[str]()
    if sent.mask is not None:
        mask = ImageOps.invert(sent.mask) if body.inpainting_mask_invert else sent.mask
        if mask.size != image.size:
            warnings.append("mask: resized to the size of the picture")
            mask = mask.resize(image.size, Image.Resampling.NEAREST)
    width, height = request.width, request.height
    if mask is not None and body.inpaint_full_res:
        pass  # width and height are those of the part that is drawn
    elif width is None and height is None:
        width, height = allowed_size(image.size)
    elif width is not None and height is not None and body.resize_mode in (1, 2):
        # The engine does plain resizing, mode 0, and single sides.
        fit = ImageOps.fit if body.resize_mode == 1 else ImageOps.pad
        if min(image.size) * min(width / image.width, height / image.height) < 1:
            raise SafelightError(
                f"init_images has a picture of {image.width}x{image.height}, too narrow to be "
                f"brought to {width}x{height}: crop it first"
            )
        image = fit(image, (width, height), Image.Resampling.LANCZOS)
        if mask is not None:
            mask = fit(mask, (width, height), Image.Resampling.NEAREST)
    if body.resize_mode == 3:
        warnings.append("resize_mode 3: the picture is resized, not its latents, as with 0")
    return {"image": image, "mask": mask, "width": width, "height": height}, warnings


_CONTENTS = ("fill", "original", "noise", "nothing")
"""Our names of what the masked part begins with, in the order of that API's numbers."""


def _inpainting(body: ImageToImage) -> dict[str, Any]:
    """Return the settings of inpainting, for a body with a mask."""
    found: dict[str, Any] = {"mask_blur": float(body.mask_blur)}
    if body.inpaint_full_res:
        found["mask_padding"] = body.inpaint_full_res_padding
    if body.denoising_strength < 1:  # at 1 it begins with noise alone
        found["mask_content"] = _CONTENTS[body.inpainting_fill]
    return found


def _echo(body: TextToImage | ImageToImage) -> dict[str, Any]:
    """Return the body with that API's defaults. NaN in fields that nobody reads becomes null."""
    again = isinstance(body, ImageToImage) and body.include_init_images
    hidden = {"init_images", "mask"} if isinstance(body, ImageToImage) and not again else set[str]()
    hidden |= {REFERENCES} & (body.model_extra or {}).keys()
    if again and isinstance(body, ImageToImage):
        body = body.model_copy(update={"init_images": [_again(one) for one in body.init_images]})
        body = body.model_copy(update={"mask": body.mask and _again(body.mask)})
    body = body.model_copy(update={"alwayson_scripts": without_pictures(body.alwayson_scripts)})
    try:
        return json.loads(body.model_dump_json(exclude=hidden)) | dict.fromkeys(hidden)
    except ValueError:
        raise SafelightError(
            "the body must have text without lone surrogates, nested at most 200 deep"
        ) from None


def _again(text: str) -> str:
    """Return a picture as it was sent, also one that was taken out of a large body."""
    data = attached(text)
    return text if data is None else base64.b64encode(data).decode()
