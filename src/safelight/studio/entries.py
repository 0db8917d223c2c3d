"""What stands in the form's fields: as a Request, and of a recipe."""

from __future__ import annotations

from typing import Any

from safelight.controls import blank
from safelight.errors import SafelightError
from safelight.families.control import CONTROL, IP_ADAPTER
from safelight.request import Request
from safelight.request_pictures import (
    INPUTS,
    REFERENCES,
    digest_key,
    each,
    inputs_in,
    setting_of,
)
from safelight.sampling import SAMPLERS
from safelight.settings import Setting, settings_of
from safelight.sizes import own_size
from safelight.studio.easel import painted
from safelight.studio.suits import EXAMPLE, SIZE, Suits

OWN = "the model's own"

_PLACED = (
    *("prompt", "negative_prompt", "sampler", "steps", "guidance_scale", "count", "seed"),
    *("width", "height", "schedule", "spacing", "eta", "strength"),
)
"""The settings that have a place of their own on the form, in the order of its fields."""


WORDS = (
    *("prompt_syntax", "emphasis", "clip_skip", "loras", "lora_unmatched", "embeddings", "styles"),
    "dynamic_prompts",
)
"""The settings that say what a prompt means; `words.js` adds choosers to their fields."""


_DIGESTS = tuple(map(digest_key, INPUTS))


def further_settings(request_type: type[Request]) -> list[Setting]:
    """Return the settings whose fields the form derives from their description."""
    return [
        setting
        for name, setting in settings_of(request_type).items()
        if name not in (*_PLACED, "unconditional") and setting.kind is not None
    ]


def request(
    prompt: str,
    negative_prompt: str,
    sampler: str,
    steps: int | None,
    guidance_scale: float,
    count: int,
    seed: str,
    width: int | None,
    height: int | None,
    schedule: str,
    spacing: str,
    eta: float,
    strength: str,
    *rest: Any,
    suits: Suits,
) -> Request:
    """Return the Request of the form's values. Settings that the model does not read are left out.

    rest: the values of `Form.further`, the reference pictures and the editor's picture (as
    `read_easels` returns them), how often it is enlarged, and both of each control image and of the
    prompt's picture. suits: of the model
    that is to draw.

    Without width and height, the picture to start from or, without one, the control image is
    resized to about the model's own area. An empty prompt without such a picture becomes EXAMPLE.
    Raises SafelightError for invalid values.
    """
    if not (isinstance(seed, str) and seed.strip().isdecimal() and len(seed) < 100):
        raise SafelightError(f"seed must be a whole number, not {str(seed)[:20]!r}: see “New seed”")
    settings: dict[str, Any] = {
        "prompt": prompt,
        "negative_prompt": negative_prompt,
        "sampler": sampler,
        "steps": steps,
        "guidance_scale": guidance_scale,
        "count": count,
        "seed": int(seed),
        "width": None if suits.fixed_size else width or None,
        "height": None if suits.fixed_size else height or None,
        "schedule": None if schedule == OWN else schedule,
        "spacing": None if spacing == OWN else spacing,
        "eta": eta,
    }
    further = further_settings(Request)
    more, (referred, *easels) = rest[: len(further)], rest[len(further) :]
    picture, enlarged, *controls, prompted, prompt_enlarged = easels
    image, mask = painted(picture, enlarged)
    guiding = [painted(*both)[0] for both in zip(controls[::2], controls[1::2], strict=True)]
    if not suits.guided:
        guiding = []
    elif suits.reads is None:  # a model elsewhere, which may have as many ControlNets
        guiding = [one for one in guiding if one is not None]
    else:
        guiding = guiding[: suits.guides]
    guide = next((one for one in guiding if one is not None), None)
    prompting = painted(prompted, prompt_enlarged)[0] if suits.prompted else None
    idle = {*(CONTROL if guide is None else ()), *(IP_ADAPTER if prompting is None else ())}
    for setting, value in zip(further, more, strict=True):
        if not suits.has(setting) or setting.name in idle:
            continue
        settings |= _entered(setting, value)
    sized = guide if image is None else image
    if not suits.uses_prompt:
        if prompt or negative_prompt or image is not None or referred:
            raise SafelightError(
                "this model takes no prompt: leave both prompts and the picture empty"
            )
        settings["unconditional"] = True
    elif empty(prompt) and sized is None and prompting is None and not referred:
        settings["prompt"] = EXAMPLE
    if image is not None:
        settings |= _entered(settings_of(Request)["strength"], strength)
    if sized is not None and not (width or height):
        native = suits.size or SIZE
        near = own_size(sized.size, native)
        settings |= {"width": near[0], "height": near[1]}
    others = {"control_image": guide, "ip_adapter_image": prompting, REFERENCES: referred or None}
    if guide is not None and len(guiding) > 1:
        others["control_image"] = tuple(one or blank() for one in guiding)
        scale = CONTROL[1]
        asked = settings.get(scale, settings_of(Request)[scale].default)
        settings[scale] = _without_picture(asked, [one is None for one in guiding])
    return Request(**settings).with_pictures(image, mask, **others)


def _without_picture(scale: Any, empty: list[bool]) -> Any:
    """Return control_scale, 0 for each ControlNet whose picture is empty."""
    scales = each(scale) * (len(empty) if len(each(scale)) == 1 else 1)
    if len(scales) != len(empty) or not any(empty):
        return scale
    return tuple(0.0 if off else one for one, off in zip(scales, empty, strict=True))


def _entered(setting: Setting, value: Any) -> dict[str, Any]:
    """Return a setting's value by its name; nothing if its field leaves it out."""
    if isinstance(value, str) and setting.kind is tuple:
        value = tuple(filter(None, map(str.strip, value.splitlines())))
    elif isinstance(value, str) and setting.kind in (int, float):
        if not value.strip():  # an emptied field means the default
            return {}
        value = setting.parse(value.strip())
    return {} if setting.optional and value in (None, "", OWN) else {setting.name: value}


def steps_of(request: Request) -> int:
    """Return the steps that a request takes."""
    return request.steps or SAMPLERS[request.sampler].steps


def empty(prompt: Any) -> bool:
    """Whether a prompt is text without a letter."""
    return isinstance(prompt, str) and not prompt.strip()


def says_more(settings: dict[str, Any]) -> bool:
    """Return whether a recipe changes settings of `Form.words`.

    Those fields count the tokens, and a section that was never open has no fields on the page.
    """
    known = settings_of(Request)
    return any(settings.get(n) and settings[n] != known[n].default for n in WORDS)


def shown(settings: dict[str, Any], suits: Suits) -> tuple[list[Any], list[str]]:
    """Return values of a Form's fields for a recipe, and a sentence for each unusable setting.

    Pictures are left out (see `on_easel`). settings may hold anything: files come
    from strangers. suits: of the model that is to draw.
    """
    known: dict[str, Any] = {}
    told: list[str] = []
    others: list[str] = []
    for name, value in settings.items():
        # The server's model decides the first two; a recipe is one picture's.
        if name in (*_DIGESTS, "unconditional", "count") or value is None:
            continue
        if name not in settings_of(Request):
            others.append(str(name)[:40])
            continue
        try:
            Request(**known, **{name: value})
            known[name] = value
        except SafelightError as error:
            told.append(str(error))
    pictures = [setting_of(name) for name in inputs_in(settings)]
    guides = pictures.count(CONTROL[0])
    if guides and not suits.guided:
        told.append("the control image needs a ControlNet, which this model does not have")
        known = {name: value for name, value in known.items() if name not in CONTROL}
    elif guides > suits.guides or any(len(each(known.get(n))) > suits.guides for n in CONTROL):
        told.append(f"with this model the page takes {suits.guides} control image, not {guides}")
        known = {name: value for name, value in known.items() if name not in CONTROL}
    if IP_ADAPTER[0] in pictures and not suits.prompted:
        told.append("the prompt's picture needs an IP-Adapter, which this model does not have")
        known = {name: value for name, value in known.items() if name not in IP_ADAPTER}
    if REFERENCES in pictures and not suits.edits:
        told.append("this model edits no pictures: those of the recipe are left out")
    asked = Request(**known)
    for name, setting in settings_of(Request).items():
        if getattr(asked, name) != setting.default and not suits.has(setting):
            told.append(f"{name} does nothing with this model")
    if asked.sampler not in suits.samplers:
        if "sampler" in known:
            told.append(f"the sampler {asked.sampler} is not for this model")
        asked = asked.model_copy(update={"sampler": suits.first().sampler})
    if others:
        more = ", …" if len(others) > 8 else ""
        told.append(f"there is no setting {', '.join(others[:8])}{more}")
    values = [
        asked.prompt,
        asked.negative_prompt,
        asked.sampler,
        steps_of(asked),
        asked.guidance_scale,
        1,
        str(asked.seed),
        asked.width or 0,
        asked.height or 0,
        asked.schedule or OWN,
        asked.spacing or OWN,
        asked.eta,
        asked.strength,
        *(s.text(getattr(asked, s.name)) for s in further_settings(Request)),
    ]
    return values, told
