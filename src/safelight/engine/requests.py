"""The jobs and the result of a request."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from safelight.adapters.asked import asked_of
from safelight.adapters.embeddings import record
from safelight.defaults import LEVELS, is_distilled, level_of
from safelight.engine.control import guides_any, read_control
from safelight.engine.ip_adapter import counts, read_prompted
from safelight.engine.job import Job, prepare
from safelight.engine.references import read_references
from safelight.engine.refining import Second, table_of
from safelight.engine.shortcuts import Kept, Shortcuts, remark, shortened
from safelight.families.base import Conditioning
from safelight.families.control import check_networks
from safelight.families.references import check_references, size_to_draw
from safelight.hires import check_model, final_size
from safelight.machine import describe_machine
from safelight.picture import to_tensor
from safelight.prompt.dynamic import draw
from safelight.prompt.styles import apply_styles
from safelight.region import Canvas, drawn_mask, drawn_part, filled
from safelight.request import Request
from safelight.result import Result
from safelight.sampling import SAMPLERS
from safelight.settings import settings_of
from safelight.sizes import SIDE_STEP, drawable_size, is_small, unlike_native
from safelight.upscaling.names import is_lanczos

if TYPE_CHECKING:
    from safelight.adapters.select import Selection
    from safelight.families.conditioning import Cached
    from safelight.model import Model


def resolve_request(model: Model, request: Request) -> Request:
    """Return the request with the defaults of model and sampler filled in.

    Raises SafelightError when model and request do not fit.
    """
    family = model.family
    family.check_request(model, request)
    beside = {"controlnet": len(model.controlnets), "ip_adapter": model.ip_adapter is not None}
    check_networks(model.name, request, beside)
    check_model(model, request)
    check_references(model, request)
    if request.hires_scale > 1:
        model.upscalers.check(request.hires_upscaler, "hires_upscaler")
    request = shortened(request, model).with_defaults(model.defaults)
    # A recipe with None would draw the picture again with the model's own values.
    whole = {"guidance_start": 0.0, "guidance_end": 1.0}
    filled: dict[str, Any] = {
        name: value
        for name, value in whole.items()
        if name in model.defaults and getattr(request, name) is None
    }
    if request.steps is None:
        filled["steps"] = SAMPLERS[request.sampler].steps
    request = request.fitted(model.native_size)
    if not family.fixed_size:
        given = request.sized_by
        own = size_to_draw(model, request) or model.native_size
        width, height = own if given is None else given.size
        filled |= {"width": request.width or width, "height": request.height or height}
    filled["strength"] = request.strength_taken
    return request.replace(**filled)


def new_result(model: Model, asked: Request, resolved: Request, exact: bool = True) -> Result:
    """Return the result of a request, without pictures yet, with its warnings.

    exact: each call of the network holds one picture.
    """
    seeds = [resolved.seed + i for i in range(resolved.count)]
    prompted = {} if resolved.ip_adapter_image is None else model.image_prompts
    result = Result(
        images=[],
        seeds=seeds,
        settings=resolved.to_dict(),
        model=model.name,
        sha256=model.sha256,
        device=str(model.device),
        dtype=model.precision,
        drawn={"exact": exact, **describe_machine(model.device)},
        parts=model.other_parts,
        vae=model.other_vae,
        prediction_type=model.prediction_type,
        refiner=(
            None
            if model.refiner is None
            else {"name": model.refiner.name, "sha256": model.refiner.sha256}
        ),
        controlnet=None if resolved.control_image is None else model.control,
        ip_adapter=prompted.get("ip_adapter"),
        image_encoder=prompted.get("image_encoder"),
    )
    if resolved.hires_scale > 1 and not is_lanczos(resolved.hires_upscaler):
        result.upscaler = model.upscalers.used(resolved.hires_upscaler)
        # By name: a path would tell about this machine.
        result.settings["hires_upscaler"] = result.upscaler["name"]
    if resolved.dynamic_prompts or resolved.styles:
        texts = list(_styled(model, resolved))
        for seed in seeds:
            drawn = draw(texts, seed, model.wildcards_dir) if resolved.dynamic_prompts else texts
            result.words[seed] = tuple(drawn)
    result.warnings += _warnings(model, asked, resolved)
    # Each picture may have its own prompts.
    for words in dict.fromkeys(map(result.words.get, seeds)):
        same = [seed for seed in seeds if result.words.get(seed) == words]
        one = with_drawn(resolved, result, same[0])
        chosen = model.embeddings.choose(one, result.warnings)
        result.warnings += model.family.warnings(model.embeddings.model(chosen), one)
        records = tuple(record(embedding) for embedding in chosen if not embedding.is_bundled)
        result.embeddings |= dict.fromkeys(same, records)
    result.warnings[:] = dict.fromkeys(result.warnings)
    return result


def select_loras(
    model: Model, request: Request, result: Result, seed: int, own: Selection | None
) -> Selection | None:
    """Return the LoRAs of one picture of a resolved request, or None; note them in the result.

    own: those loaded with the model. Raises SafelightError for one that does not fit.
    """
    asked, warnings = asked_of(request)
    result.warnings += [warning for warning in warnings if warning not in result.warnings]
    if not asked and own is None:
        return None
    selection = model.adapters.choose(asked, request.lora_unmatched, after=own)
    result.loras[seed] = selection.records
    # As names, which tell nothing about this machine.
    result.settings["loras"] = [str(one) for one in selection.asked if not one.tagged]
    result.warnings += [said for said in selection.warnings if said not in result.warnings]
    return selection if selection.key else None


def with_drawn(resolved: Request, result: Result, seed: int) -> Request:
    """Return the request of one picture, with its prompts as they were drawn."""
    if seed not in result.words:
        return resolved
    prompt, negative = result.words[seed]
    return resolved.replace(
        prompt=prompt, negative_prompt=negative, dynamic_prompts=False, styles=()
    )


def _styled(model: Model, request: Request) -> tuple[str, str]:
    """Return both prompts with the words of the styles around them."""
    return apply_styles(model.styles, request.styles, request.prompt, request.negative_prompt)


def _warnings(model: Model, asked: Request, resolved: Request) -> list[str]:
    """Return warnings about a request, one line each."""
    found = list(model.warnings)
    filled = asked.with_defaults(model.defaults)
    if _ignores_guidance(model, resolved):  # a larger scale would not help: see `_without_effect`
        filled = filled.replace(negative_prompt="")
    found += filled.unused_settings(model.defaults.get("guidance_scale", 7.5))
    if unavailable := remark(asked, resolved):
        found.append(unavailable)
    if asked.fast and model.family.shortcuts and not _level_helps(model, asked, resolved):
        found.append(f"fast {asked.fast} changes nothing with {model.name} here: leave it out")
    read_by_family = model.family.reads(
        model.refiner and model.refiner.family,
        model.controlnet is not None,
        model.ip_adapter is not None,
    )
    for name, setting in settings_of(type(asked)).items():
        read = not setting.about.some_models or name in read_by_family
        if not read and getattr(asked, name) != setting.default:
            found.append(f"{name} does nothing with {model.name}: leave it out")
    pictured = (
        (resolved.control_image, guides_any, "control_image guides no step: see control"),
        (resolved.ip_adapter_image, counts, "ip_adapter_image counts at no step: see ip_adapter"),
    )
    for picture, counted, told in pictured:
        if picture is not None:
            rows = len(table_of(model, resolved)[0].rows)
            if not any(counted(resolved, row, rows) for row in range(rows)):
                found.append(f"{told}_scale, _start and _end")
    found += _without_effect(model, asked, resolved)
    if (mask := drawn_mask(resolved)[0]) is not None and mask.getbbox() is not None:
        cell = model.family.factor(model)
        if to_tensor(mask)[..., ::cell, ::cell].max() < 0:  # the pixels that count
            found.append(
                "mask has so little white that the model does not see it, and hardly anything is "
                f"repainted: paint at least {cell}x{cell} pixels white"
            )
    width, height = resolved.width, resolved.height
    if asked.width is None and asked.height is None and resolved.was_resized:
        found.append(f"image was resized to {width}x{height}: sides are multiples of {SIDE_STEP}")
    if width and height and not _draws_size(model, width, height):
        found.append(unlike_native(model.name, model.native_size, (width, height)))
    if resolved.hires_scale > 1 and width is not None and height is not None:
        whole = final_size(resolved, model.native_size)
        # Others draw a second pass well at any size: the first has settled what is where.
        if drawable_size(whole, model.native_size) != whole and is_small(model.native_size):
            size, own = "{}x{}".format(*whole), "{}x{}".format(*model.native_size)
            found.append(
                f"{model.name} was trained on {own} alone: its second pass, at {size}, may spoil "
                "the picture; enlarge the result instead"
            )
    if _is_untaught(model, resolved):
        told = ", ".join(f"{name} {value}" for name, value in model.defaults.items())
        found.append(
            f"{model.name} was taught to draw with {told}; with other settings it draws worse"
        )
    return found


def _draws_size(model: Model, width: int, height: int) -> bool:
    """Return whether a model draws a size as well as its own."""
    if (width, height) == model.native_size:
        return True
    if model.family.areas is None:
        return False
    least, most = model.family.areas
    return least <= width * height / math.prod(model.native_size) <= most


def _is_untaught(model: Model, resolved: Request) -> bool:
    """Return whether a model was distilled for other settings."""
    wanted = model.defaults
    if is_distilled(model.notes):
        return any(getattr(resolved, name) != value for name, value in wanted.items())
    if not model.family.distilled:
        return False
    # Published models that were distilled take other samplers, and some more steps, well.
    unguided = wanted["guidance_scale"] <= 1 and not model.family.takes_guidance(model)
    guided = unguided and resolved.guidance_scale > 1
    return guided or (resolved.steps or 0) > 2 * wanted["steps"]


def _level_helps(model: Model, asked: Request, resolved: Request) -> bool:
    """Return whether a level of `fast` changes anything."""
    usual = {"cache_every": 1, "guidance_start": 0.0, "linears": "plain", **model.defaults}
    level = level_of(asked.fast, model.family, model.notes)
    if resolved.guidance_scale <= 1 or _ignores_guidance(model, resolved):
        level.pop("guidance_start", None)
    return any(getattr(resolved, name) == value != usual.get(name) for name, value in level.items())


def _ignores_guidance(model: Model, resolved: Request) -> bool:
    """Return whether a negative prompt and bounds of guidance change nothing.

    That is so where guidance is an input of the network, and of the refiner's if one draws.
    """
    refiner = None if resolved.refiner_start == 1 else model.refiner
    models = [model] if refiner is None else [model, refiner]
    return all(one.family.takes_guidance(one) for one in models)


def _without_effect(model: Model, asked: Request, resolved: Request) -> list[str]:
    """Return warnings about settings that do nothing, given the request's other settings."""
    found: list[str] = []
    if asked.clip_skip is not None and "clip_skip" not in model.family.conditioned_on:
        found.append(f"clip_skip does nothing with {model.name}: leave it out")
    if not model.uses_prompt:
        if asked.guidance_scale not in (1, 7.5) and not asked.unconditional:
            found.append(f"guidance_scale does nothing with {model.name}: leave it out")
        return found
    if model.scheduler.is_flow and asked.spacing is not None:
        found.append(f"spacing does nothing with {model.name}: leave it out")
    if asked.cache_branch and resolved.cache_every in (None, 1):
        found.append("cache_branch does nothing without cache_every: try cache_every 2")
    if _ignores_guidance(model, resolved) and asked.negative_prompt:
        found.append(f"negative_prompt does nothing with {model.name}: leave it out")
    for name, everything in (("guidance_start", 0), ("guidance_end", 1)):
        # A server fills in the values of the level or the model: nobody asked for those.
        filled = (LEVELS.get(asked.fast, {}).get(name), model.defaults.get(name))
        unasked = getattr(asked, name) in (None, everything, *filled)
        if _ignores_guidance(model, resolved) and not unasked:
            found.append(f"{name} does nothing with {model.name}: leave it out")
        elif resolved.guidance_scale <= 1 and not unasked:
            found.append(f"{name} does nothing at guidance_scale 1 or less: leave it out")
    return found


def latents_of(model: Model, request: Request) -> tuple[int, ...]:
    """Return the shape of the latents of a resolved request."""
    width, height = request.width, request.height
    size = model.native_size if width is None or height is None else (width, height)
    return model.family.latent_shape(model, size)


def create_job(
    model: Model,
    request: Request,
    conditioning: Conditioning,
    seed: int,
    of_refiner: Conditioning | None = None,
    cached: Cached | None = None,
) -> Job:
    """Return the job of one picture of a resolved request.

    of_refiner: the conditioning of the model's refiner, if it has one. cached: keeps what is read
    of pictures that are prompts or references.
    """
    table, mine = table_of(model, request)
    whole, (request, region) = request, drawn_part(request)
    width, height, image = request.width, request.height, request.image
    if image is not None and request.mask is not None and request.mask_content == "fill":
        image = filled(image, request.mask)
    size = model.native_size if width is None or height is None else (width, height)
    job = prepare(
        model,
        table,
        conditioning,
        seed,
        size,
        image=image,
        mask=request.mask,
        strength=1.0 if request.strength is None else request.strength,
        content=request.mask_content,
    )
    if whole.image is not None and whole.mask is not None:
        job.canvas = Canvas(whole.image, whole.mask, region, whole.mask_blur)
    job.steps = model.family.steps_taken(request)
    job.kept = Kept(Shortcuts.of(request))
    job.control = read_control(model, request)
    job.prompted = read_prompted(model, request, conditioning.evaluations, cached)
    job.references = read_references(model, request, cached)
    if model.refiner is not None and of_refiner is not None and mine < len(table.rows):
        job.second = Second(model.refiner, mine, of_refiner)
    return job
