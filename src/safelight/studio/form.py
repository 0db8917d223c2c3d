"""The form of a picture's settings: fields, their values as a Request, a recipe as their values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr

from safelight.defaults import OPTIONAL
from safelight.errors import SafelightError
from safelight.families.control import CONTROL
from safelight.request import MAX_PROMPT, Request
from safelight.request_fields import PICTURES, draw_seed
from safelight.sampling import SAMPLERS
from safelight.sampling.schedule import SCHEDULES, SPACINGS
from safelight.settings import Setting, settings_of
from safelight.sizes import allowed_size
from safelight.studio.easel import painted
from safelight.studio.parts import plain, problem, status
from safelight.studio.suits import EXAMPLE, SIZE, Suits

OWN = "the model's own"

_NAMES = {"ddpm": "DDPM", "dpmpp_2s": "DPM++ 2S", "deis": "DEIS", "tcd": "TCD"}
"""Usual names of the samplers that web UIs do not have."""


def sampler_choices() -> list[tuple[str, str]]:
    """Return label and name of each sampler, such as ("DPM++ 2M (dpmpp_2m)", "dpmpp_2m")."""
    return [
        (f"{one.a1111 or _NAMES.get(name, name)} ({name})", name) for name, one in SAMPLERS.items()
    ]


_PLACED = (
    *("prompt", "negative_prompt", "sampler", "steps", "guidance_scale", "count", "seed"),
    *("width", "height", "schedule", "spacing", "eta", "strength"),
)
"""The settings that have a place of their own on the form, in the order of its fields."""


_WORDS = (
    *("prompt_syntax", "emphasis", "clip_skip", "loras", "lora_unmatched", "embeddings", "styles"),
    "dynamic_prompts",
)
"""The settings that say what a prompt means; `words.js` adds choosers to their fields."""


_DIGESTS = tuple(f"{name}_sha256" for name in PICTURES)


def further_settings(request_type: type[Request]) -> list[Setting]:
    """Return the settings whose fields the form derives from their description."""
    return [
        setting
        for name, setting in settings_of(request_type).items()
        if name not in (*_PLACED, *CONTROL, "unconditional") and setting.kind is not None
    ]


def control(setting: Setting, value: Any, suits: Suits) -> Any:
    """Return the field of a setting: a list, a checkbox, a slider or a box, by its description."""
    about: dict[str, Any] = {
        "label": setting.label.capitalize().replace("Lora", "LoRA"),
        "info": setting.description,
        "elem_id": setting.name,
        "visible": suits.has(setting),
    }
    if setting.choices:
        choices = [OWN, *setting.choices] if setting.optional else list(setting.choices)
        return gr.Dropdown(choices, value=value or OWN, **about)
    if setting.kind is bool:
        return gr.Checkbox(value, **about)
    if setting.kind is tuple:
        about["info"] = f"{setting.description}; one a line"
    if setting.kind in (str, tuple):
        return gr.Textbox(setting.text(value), max_length=MAX_PROMPT, **about)
    if setting.optional:  # an empty gr.Number is 0 as soon as it is shown
        about["placeholder"] = setting.left_out
        return gr.Textbox(value, max_lines=1, max_length=20, **about)
    if setting.about.slider is not None:
        low, high, step = setting.about.slider
        return gr.Slider(low, high, value, step=step, **about)
    return gr.Number(value, **about)


class Form:
    """The fields; create it inside a gr.Blocks.

    suits: of the model that is chosen first. request_type: the class whose settings the form shows.
    """

    def __init__(self, suits: Suits, request_type: type[Request] = Request) -> None:
        first = suits.first(request_type)
        self.prompt = gr.Textbox(
            label="Prompt",
            placeholder=suits.placeholder,
            lines=2,
            max_length=MAX_PROMPT,
            elem_id="prompt",
        )
        self.negative_prompt = gr.Textbox(
            label="Negative prompt",
            info="what to keep out of the picture",
            max_length=MAX_PROMPT,
            elem_id="negative",
        )
        gr.HTML('<p class="count"></p>', elem_id="count")
        self.draw = gr.Button("Draw", variant="primary", elem_id="draw")
        self.problem, self.status = problem("make"), status("make")
        with gr.Row():
            self.sampler = gr.Dropdown(
                sampler_choices(), value=first.sampler, label="Sampler", min_width=220
            )
            self.steps = gr.Slider(1, 150, _steps(first), step=1, label="Steps")
        with gr.Row():
            scale = first.guidance_scale
            self.guidance_scale = gr.Slider(0, 30, scale, step=0.5, label="Guidance scale")
            self.count = gr.Slider(1, 16, 1, step=1, label="Pictures")
        with gr.Row():
            self.seed = gr.Textbox(
                str(draw_seed()), label="Seed", max_length=20, max_lines=1, scale=2, min_width=150
            )
            self.keep = gr.Checkbox(False, label="Keep it", scale=1, min_width=100)
            self.die = gr.Button("New seed", scale=1, min_width=100)
        settings = {setting.name: setting for setting in further_settings(request_type)}
        made: dict[str, Any] = {}
        with gr.Accordion("Prompt, LoRAs and embeddings", open=False) as self.words:
            made |= {
                n: control(settings[n], getattr(first, n), suits) for n in _WORDS if n in settings
            }
        with gr.Accordion("Size and schedule", open=False):
            with gr.Row():
                side: dict[str, Any] = {"min_width": 100, "visible": not suits.fixed_size}
                self.width = gr.Number(0, label="Width", info=suits.side(0), **side)
                self.height = gr.Number(0, label="Height", info=suits.side(1), **side)
            with gr.Row():
                self.schedule = gr.Dropdown(
                    [OWN, *SCHEDULES], value=OWN, label="Schedule", info="noise levels of the steps"
                )
                self.spacing = gr.Dropdown(
                    [OWN, *SPACINGS], value=OWN, label="Spacing", info="how timesteps are spread"
                )
            self.eta = gr.Slider(
                0, 1, 0, step=0.05, label="Eta", info="fresh noise in each step of DDIM and TCD"
            )
            rest = [name for name in settings if name not in made]
            made |= {name: control(settings[name], getattr(first, name), suits) for name in rest}
        self.further = [made[name] for name in settings]
        self.fast = made["fast"]
        self.levelled = [self.sampler, self.steps, made["guidance_start"]]
        """The fields that a level of `fast` sets; see `level_of`. They show what is drawn."""
        self._partly = [s for s in settings.values() if s.about.some_models]
        self.adapted = [
            *(self.prompt, self.width, self.height),
            *(made[setting.name] for setting in self._partly),
        ]
        """The fields that differ between models; see `looks`."""
        with gr.Accordion("Change a picture", open=False) as self.change:
            gr.HTML(
                "<p>Drop a picture to start from. Paint over a part of it to redraw only that "
                "part.</p>"
            )
            self.picture = gr.ImageEditor(
                label="Picture and mask",
                type="pil",
                image_mode="RGBA",
                format="png",
                sources=("upload", "clipboard"),
                transforms=(),
                layers=False,
                brush=gr.Brush(default_size=40, colors=["#ff5a36"], color_mode="fixed"),
                eraser=gr.Eraser(default_size=40),  # Gradio's default is a fiftieth of the picture
                height=460,
                elem_id="easel",
            )
            self.strength = gr.Slider(
                0.05, 1, 0.7, step=0.05, label="Strength", info="1 keeps nothing of the picture"
            )
        self.enlarged = gr.State(1)
        plain(*self.fields[:-1])
        self.die.click(lambda: str(draw_seed()), outputs=self.seed, show_progress="hidden")

    def looks(self, suits: Suits, fast: int = 0) -> list[dict[str, Any]]:
        """Return how each field of `adapted` looks for a model, as keywords of gr.update.

        Width and height get 0, the model's own size. Where guidance begins and ends gets the
        model's values at a level of `fast`.
        """
        first = suits.first(fast=fast)
        shown = {"value": 0, "visible": not suits.fixed_size}
        own = {name: {"value": getattr(first, name)} for name in OPTIONAL}
        return [
            {"placeholder": suits.placeholder},
            *({"info": suits.side(place), **shown} for place in (0, 1)),
            *({"visible": suits.has(s), **own.get(s.name, {})} for s in self._partly),
        ]

    @property
    def best(self) -> list[Any]:
        """The fields that a model has its own best values for; see `best_of`."""
        return [self.sampler, self.steps, self.guidance_scale]

    @staticmethod
    def best_of(suits: Suits, fast: int) -> list[Any]:
        """Return the values of `best` for a model at a level of `fast`."""
        first = suits.first(fast=fast)
        return [first.sampler, _steps(first), first.guidance_scale]

    @staticmethod
    def level_of(suits: Suits, fast: Any) -> list[Any]:
        """Return the values of `levelled` for a model. Raises SafelightError for a bad level."""
        asked = suits.first(fast=fast)
        return [asked.sampler, _steps(asked), asked.guidance_start]

    def filled(self, values: Sequence[Any], suits: Suits) -> list[Any]:
        """Return updates of `fields`: their values, and the looks of those that differ by model."""
        looks = {id(one): look for one, look in zip(self.adapted, self.looks(suits), strict=True)}
        return [
            gr.update(**looks[id(one)] | {"value": value}) if id(one) in looks else value
            for one, value in zip(self.fields, values, strict=True)
        ]

    @property
    def fields(self) -> list[Any]:
        """All fields, in the order of the arguments of `request` and the values of `shown`."""
        return [
            self.prompt,
            self.negative_prompt,
            self.sampler,
            self.steps,
            self.guidance_scale,
            self.count,
            self.seed,
            self.width,
            self.height,
            self.schedule,
            self.spacing,
            self.eta,
            self.strength,
            *self.further,
            self.picture,
            self.enlarged,
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
    strength: float,
    *rest: Any,
    suits: Suits,
) -> Request:
    """Return the Request of the form's values. Settings that the model does not read are left out.

    rest: the values of `Form.further`, the editor's picture (as `read_easel` returns it) and how
    often it is enlarged. suits: of the model that is to draw.

    Without width and height, a picture to start from is resized to about the model's own area. An
    empty prompt without such a picture becomes EXAMPLE. Raises SafelightError for invalid values.
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
    *more, picture, enlarged = rest
    for setting, value in zip(further_settings(Request), more, strict=True):
        if not suits.has(setting):
            continue
        if isinstance(value, str) and setting.kind is tuple:
            value = tuple(filter(None, map(str.strip, value.splitlines())))
        elif isinstance(value, str) and setting.kind in (int, float):
            value = setting.parse(value.strip())
        if not (setting.optional and value in (None, "", OWN)):
            settings[setting.name] = value
    image, mask = painted(picture, enlarged)
    if not suits.uses_prompt:
        if prompt or negative_prompt or image is not None:
            raise SafelightError(
                "this model takes no prompt: leave both prompts and the picture empty"
            )
        settings["unconditional"] = True
    elif empty(prompt) and image is None:
        settings["prompt"] = EXAMPLE
    if image is not None:
        settings["strength"] = strength
        if not (width or height):
            native = suits.size or SIZE
            scale = ((native[0] * native[1]) / (image.width * image.height)) ** 0.5
            near = allowed_size((round(image.width * scale), round(image.height * scale)))
            settings |= {"width": near[0], "height": near[1]}
    return Request(**settings).with_pictures(image, mask)


def _steps(request: Request) -> int:
    return request.steps or SAMPLERS[request.sampler].steps


def empty(prompt: Any) -> bool:
    """Whether a prompt is text without a letter."""
    return isinstance(prompt, str) and not prompt.strip()


def says_more(settings: dict[str, Any]) -> bool:
    """Return whether a recipe changes settings of `Form.words`.

    Those fields count the tokens, and a section that was never open has no fields on the page.
    """
    known = settings_of(Request)
    return any(settings.get(n) and settings[n] != known[n].default for n in _WORDS)


def shown(settings: dict[str, Any], suits: Suits) -> tuple[list[Any], list[str]]:
    """Return values of a Form's fields for a recipe, and a sentence for each unusable setting.

    The picture to start from is left out (see `on_easel`). settings may hold anything: files come
    from strangers. suits: of the model that is to draw.
    """
    known: dict[str, Any] = {}
    told: list[str] = []
    others: list[str] = []
    for name, value in settings.items():
        if name in _DIGESTS or value is None:
            continue
        if name not in settings_of(Request):
            others.append(str(name)[:40])
            continue
        try:
            Request(**{name: value})
            known[name] = value
        except SafelightError as error:
            told.append(str(error))
    if settings.get("control_image_sha256") is not None:
        told.append("control_image has no field here: draw with it on the command line or the API")
    # The server's model decides the first; a recipe is one picture's.
    for name in ("unconditional", "count", *CONTROL):
        known.pop(name, None)
    asked = Request(**known)
    for name, setting in settings_of(Request).items():
        if getattr(asked, name) != setting.default and not suits.has(setting):
            told.append(f"{name} does nothing with this model")
    if others:
        more = ", …" if len(others) > 8 else ""
        told.append(f"there is no setting {', '.join(others[:8])}{more}")
    values = [
        asked.prompt,
        asked.negative_prompt,
        asked.sampler,
        _steps(asked),
        asked.guidance_scale,
        1,
        str(asked.seed),
        asked.width or 0,
        asked.height or 0,
        asked.schedule or OWN,
        asked.spacing or OWN,
        asked.eta,
        asked.strength or 0.7,
        *(s.text(getattr(asked, s.name)) for s in further_settings(Request)),
    ]
    return values, told
