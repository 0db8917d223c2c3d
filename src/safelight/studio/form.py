"""The form of a picture's settings: its fields, and how they look for a model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import gradio as gr

from safelight.defaults import OPTIONAL
from safelight.families.control import CONTROL, IP_ADAPTER
from safelight.hires import HIRES
from safelight.region import INPAINTING
from safelight.request import MAX_PROMPT, Request
from safelight.request_basics import draw_seed
from safelight.request_pictures import PICTURES
from safelight.sampling import SAMPLERS
from safelight.sampling.schedule import SCHEDULES, SPACINGS
from safelight.settings import Setting, settings_of
from safelight.studio.easel import editor, references
from safelight.studio.entries import OWN, WORDS, further_settings, steps_of
from safelight.studio.parts import plain, problem, status
from safelight.studio.suits import Suits

_NAMES = {"ddpm": "DDPM", "dpmpp_2s": "DPM++ 2S", "deis": "DEIS", "tcd": "TCD"}
"""Usual names of the samplers that web UIs do not have."""


def sampler_choices(suits: Suits) -> list[tuple[str, str]]:
    """Return label and name of each sampler that a model takes.

    An example is ("DPM++ 2M (dpmpp_2m)", "dpmpp_2m").
    """
    return [
        (f"{SAMPLERS[name].a1111 or _NAMES.get(name, name)} ({name})", name)
        for name in suits.samplers
    ]


def label_of(setting: Setting) -> str:
    """Return the label of a setting's field."""
    label = setting.label.replace("ip adapter", "IP-Adapter").replace("clip skip", "CLIP skip")
    label = label.replace("lora", "LoRA")
    return label[0].upper() + label[1:]


def info_of(setting: Setting) -> str:
    """Return the hint below a setting's field: its description with the labels of other fields."""
    known = settings_of(Request)

    def named(found: re.Match[str]) -> str:
        name = found[1] or found[0]
        if name in PICTURES:
            return "the picture"
        return f"“{label_of(known[name])}”" if name in known else found[0]

    info = re.sub(r"`(\w+)`|\b[a-z]+_\w+", named, setting.description)
    # Gradio sets what double underscores enclose in bold letters, in code as well.
    return re.sub(r"`__(\w+)__`", r"`\1` between double underscores", info)


def field_of(setting: Setting, value: Any, suits: Suits) -> Any:
    """Return the field of a setting: a list, a checkbox, a slider or a box, by its description."""
    about: dict[str, Any] = {
        "label": label_of(setting),
        "info": info_of(setting),
        "elem_id": setting.name,
        "visible": suits.has(setting),
    }
    if setting.choices:
        choices = [OWN, *setting.choices] if setting.optional else list(setting.choices)
        return gr.Dropdown(choices, value=value or OWN, **about)
    if setting.kind is bool:
        return gr.Checkbox(value, **about)
    if setting.kind is tuple:
        about["info"] += "; one a line"
    if setting.kind in (str, tuple):
        return gr.Textbox(setting.text(value), max_length=MAX_PROMPT, **about)
    if setting.several and suits.guides > 1:
        about["info"] = f"{setting.description}; one number, or one for each, with commas"
        return gr.Textbox(setting.text(value), max_lines=1, max_length=40, **about)
    if setting.optional:  # an empty gr.Number is 0 as soon as it is shown
        about["placeholder"] = setting.left_out
        return gr.Textbox(value, max_lines=1, max_length=20, **about)
    if setting.about.slider is not None:
        low, high, step = setting.about.slider
        return gr.Slider(low, high, value, step=step, **about)
    return gr.Number(value, **about)


def _new_seed(told: Any) -> tuple[str, Any]:
    """Return a seed, and the problem without what it said of the old one."""
    return str(draw_seed()), "" if str(told).startswith("seed must") else gr.skip()


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
                sampler_choices(suits), value=first.sampler, label="Sampler", min_width=220
            )
            self.steps = gr.Slider(1, 150, steps_of(first), step=1, label="Steps")
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
            made |= self._made(settings, WORDS, first, suits)
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
            apart = (*made, *CONTROL, *IP_ADAPTER, *HIRES, *INPAINTING)
            rest = [name for name in settings if name not in apart]
            made |= self._made(settings, rest, first, suits)
        self.fast = made["fast"]
        self.levelled = [self.sampler, self.steps, made["guidance_start"]]
        """The fields that a level of `fast` sets; see `level_of`. They show what is drawn."""
        self._partly = [s for s in settings.values() if s.about.some_models or s.name in HIRES]
        sized: dict[str, Any] = {"open": False, "visible": not suits.fixed_size}
        with gr.Accordion("Second pass at a larger size", **sized) as self.second_pass:
            made |= self._made(settings, [n for n in HIRES if n in settings], first, suits)
        with gr.Accordion("Change a picture", open=False) as self.change:
            gr.HTML(
                "<p>Drop a picture to start from. Paint over a part of it to redraw only that "
                "part.</p>"
            )
            self.picture = editor("easel", "Picture and mask")
            self.strength = field_of(settings_of(request_type)["strength"], None, suits)
            made |= self._made(settings, [n for n in INPAINTING if n in settings], first, suits)
        with gr.Accordion(
            "Edit pictures", open=False, elem_id="editing", **self.editing(suits)
        ) as self.edit:
            gr.HTML(
                "<p>Drop one or more pictures. The prompt says what becomes different, or what "
                "comes from which picture.</p>"
            )
            self.references = references()
        with gr.Accordion(open=False, elem_id="guide", **self.guiding(suits)) as self.guide:
            several = suits.guides > 1
            each = " Each ControlNet has a picture; one without is off." if several else ""
            gr.HTML(
                "<p>Drop edges, a depth map or a pose, whichever the ControlNet reads. It holds "
                f"the composition to that picture.{each}</p>"
            )
            names = suits.controlnets if several else [""]
            self.controls = [
                editor(f"control-{i + 1}" if i else "control", f"Control image {name}".strip())
                for i, name in enumerate(names)
            ]
            made |= self._made(settings, [n for n in CONTROL if n in settings], first, suits)
        with gr.Accordion(
            open=False, elem_id="prompting", **self.prompting(suits)
        ) as self.prompted:
            gr.HTML(
                "<p>Drop a picture that is a prompt beside the words: its things and its style. "
                "The middle square of it is read.</p>"
            )
            self.prompt_picture = editor("image-prompt", "Picture of the prompt")
            made |= self._made(settings, [n for n in IP_ADAPTER if n in settings], first, suits)
        self.further = [made[name] for name in settings]
        self.adapted = [
            *(self.sampler, self.edit, self.guide, self.second_pass, self.prompted),
            *(self.prompt, self.width, self.height),
            *(made[setting.name] for setting in self._partly),
        ]
        """The parts that differ between models; see `looks`."""
        self.enlarged, self.prompt_enlarged = gr.State(1), gr.State(1)
        self.control_enlarged = [gr.State(1) for _ in self.controls]
        plain(*(one for one in self.fields if not isinstance(one, gr.State)))
        outputs = [self.seed, self.problem]
        self.die.click(_new_seed, self.problem, outputs, show_progress="hidden")

    def looks(self, suits: Suits, fast: int = 0) -> list[dict[str, Any]]:
        """Return how each part of `adapted` looks for a model, as keywords of gr.update.

        Width and height get 0, the model's own size. The sampler, and where guidance begins and
        ends, get the model's values at a level of `fast`.
        """
        first = suits.first(fast=fast)
        shown = {"value": 0, "visible": not suits.fixed_size}
        own = {name: {"value": getattr(first, name)} for name in OPTIONAL}
        return [
            {"choices": sampler_choices(suits), "value": first.sampler},
            self.editing(suits),
            self.guiding(suits),
            {"visible": not suits.fixed_size},
            self.prompting(suits),
            {"placeholder": suits.placeholder},
            *({"info": suits.side(place), **shown} for place in (0, 1)),
            *({"visible": suits.has(s), **own.get(s.name, {})} for s in self._partly),
        ]

    @staticmethod
    def editing(suits: Suits) -> dict[str, Any]:
        """Return how the section of the reference pictures looks for a model."""
        return {"visible": suits.edits}

    @staticmethod
    def guiding(suits: Suits) -> dict[str, Any]:
        """Return how the section of the control image looks for a model."""
        named = f" ({', '.join(suits.controlnets)})" if suits.controlnets else ""
        return {"label": f"Guide by a picture{named}", "visible": suits.guided}

    @staticmethod
    def prompting(suits: Suits) -> dict[str, Any]:
        """Return how the section of the prompt's picture looks for a model."""
        named = f" ({suits.ip_adapter})" if suits.ip_adapter else ""
        return {"label": f"Prompt with a picture{named}", "visible": suits.prompted}

    @staticmethod
    def _made(
        settings: dict[str, Setting], names: Sequence[str], first: Request, suits: Suits
    ) -> dict[str, Any]:
        """Return the fields of some settings, by name. first: has their values."""
        return {name: field_of(settings[name], getattr(first, name), suits) for name in names}

    @property
    def best(self) -> list[Any]:
        """Further fields that a model has its own best values for; see `best_of`."""
        return [self.steps, self.guidance_scale]

    @staticmethod
    def best_of(suits: Suits, fast: int) -> list[Any]:
        """Return the values of `best` for a model at a level of `fast`."""
        first = suits.first(fast=fast)
        return [steps_of(first), first.guidance_scale]

    @staticmethod
    def level_of(suits: Suits, fast: Any) -> list[Any]:
        """Return the values of `levelled` for a model. Raises SafelightError for a bad level."""
        asked = suits.first(fast=fast)
        return [asked.sampler, steps_of(asked), asked.guidance_start]

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
            self.references,
            *self.easel,
            *(part for easel in self.control_easels for part in easel),
            *self.prompt_easel,
        ]

    @property
    def editors(self) -> int:
        """How many editors it has."""
        return len(self.controls) + 2

    @property
    def easel(self) -> list[Any]:
        """The editor of the picture to start from, and how often it enlarges it."""
        return [self.picture, self.enlarged]

    @property
    def control_easels(self) -> list[list[Any]]:
        """Of each control image the editor, and how often it enlarges it."""
        return [[*both] for both in zip(self.controls, self.control_enlarged, strict=True)]

    @property
    def prompt_easel(self) -> list[Any]:
        """The editor of the prompt's picture, and how often it enlarges it."""
        return [self.prompt_picture, self.prompt_enlarged]
