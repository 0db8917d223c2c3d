"""The settings of a picture, as fields on the page: read into a Request, set from a recipe."""

from __future__ import annotations

from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from safelight.errors import SafelightError
from safelight.request import Request, allowed_size, draw_seed
from safelight.samplers import SAMPLERS
from safelight.schedule import SCHEDULES
from safelight.studio.parts import problem

OWN = "the model's own"
NATIVE = "0 is the model's own"
EASEL = 512
"""Pixels: smaller pictures are shown enlarged, so that a brush can hit something."""


class Form:
    """Made within a gr.Blocks, where its fields are to stand."""

    def __init__(self) -> None:
        self.prompt = gr.Textbox(
            label="Prompt",
            placeholder="three teddy bears on a yellow background",
            lines=2,
            max_length=16384,
            elem_id="prompt",
        )
        self.negative_prompt = gr.Textbox(
            label="Negative prompt", info="what to keep away from", max_length=16384
        )
        self.draw = gr.Button("Draw", variant="primary", elem_id="draw")
        self.problem = problem("make")
        with gr.Row():
            self.sampler = gr.Dropdown(list(SAMPLERS), value="dpmpp_2m", label="Sampler")
            self.steps = gr.Slider(1, 150, 20, step=1, label="Steps")
        with gr.Row():
            self.guidance_scale = gr.Slider(0, 30, 7.5, step=0.5, label="Guidance scale")
            self.count = gr.Slider(1, 16, 1, step=1, label="Pictures")
        with gr.Row():
            self.seed = gr.Textbox(
                str(draw_seed()), label="Seed", max_length=20, max_lines=1, scale=2, min_width=150
            )
            self.keep = gr.Checkbox(False, label="Keep it", scale=1, min_width=100)
            self.die = gr.Button("New seed", scale=1, min_width=100)
        with gr.Accordion("Size and schedule", open=False), gr.Row():
            self.width = gr.Number(0, label="Width", info=NATIVE, precision=0, min_width=100)
            self.height = gr.Number(0, label="Height", info=NATIVE, precision=0, min_width=100)
            self.schedule = gr.Dropdown(
                [OWN, *SCHEDULES], value=OWN, label="Schedule", info="where the steps stop"
            )
        with gr.Accordion("Change a picture", open=False) as self.change:
            gr.HTML(
                "<p>Drop a picture in to start from it. Paint over a part, and only that part is "
                "drawn anew.</p>"
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
                height=460,
                elem_id="easel",
            )
            self.strength = gr.Slider(
                0.05, 1, 0.7, step=0.05, label="Strength", info="1 keeps nothing of the picture"
            )
        self.die.click(lambda: str(draw_seed()), outputs=self.seed, show_progress="hidden")

    @property
    def fields(self) -> list[Any]:
        """In the order that `request` takes their values, and `shown` gives them."""
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
            self.strength,
            self.picture,
        ]


def request(
    prompt: str,
    negative_prompt: str,
    sampler: str,
    steps: int,
    guidance_scale: float,
    count: int,
    seed: str,
    width: int | None,
    height: int | None,
    schedule: str,
    strength: float,
    picture: Any,
    *,
    native: tuple[int, int] = (512, 512),
) -> Request:
    """native: the model's own size, which a picture to start from is brought near to if width and
    height are empty. Raises SafelightError, with a sentence, for what cannot be.
    """
    if not seed.strip().isdecimal():
        raise SafelightError(f"seed must be a whole number, not {seed[:20]!r}: see “New seed”")
    settings: dict[str, Any] = {
        "prompt": prompt,
        "negative_prompt": negative_prompt,
        "sampler": sampler,
        "steps": int(steps),
        "guidance_scale": float(guidance_scale),
        "count": int(count),
        "seed": int(seed),
        "width": int(width) if width else None,
        "height": int(height) if height else None,
        "schedule": None if schedule == OWN else schedule,
    }
    image, mask = _painted(picture)
    if image is not None:
        settings |= {"image": image, "mask": mask, "strength": float(strength)}
        if not (width or height):
            scale = ((native[0] * native[1]) / (image.width * image.height)) ** 0.5
            near = allowed_size((round(image.width * scale), round(image.height * scale)))
            settings |= {"width": near[0], "height": near[1]}
    return Request(**settings)


def _painted(picture: Any) -> tuple[Image.Image | None, Image.Image | None]:
    """What the editor holds: the picture, and the mask, if anything is painted."""
    if picture is None or picture["background"] is None:
        return None, None
    background = picture["background"]
    if background.getextrema()[-1] == (0, 0):  # an empty canvas is transparent
        return None, None
    painted = np.zeros((background.height, background.width), bool)
    for layer in picture["layers"]:
        alpha = layer.convert("RGBA").getchannel("A").resize(background.size)
        painted |= np.asarray(alpha) > 127
    mask = Image.fromarray(painted.astype(np.uint8) * 255) if painted.any() else None
    return background.convert("RGB"), mask


def shown(settings: dict[str, Any], *, keep: bool = True) -> list[Any]:
    """The values of a Form's fields for the settings of a recipe, but for its picture."""
    default = Request.model_fields

    def of(name: str) -> Any:
        value = settings.get(name)
        return default[name].get_default() if value is None else value

    sampler = of("sampler")
    if sampler not in SAMPLERS:
        raise SafelightError(f"there is no sampler {sampler!r:.40} here")
    return [
        of("prompt"),
        of("negative_prompt"),
        sampler,
        of("steps") or SAMPLERS[sampler].steps,
        of("guidance_scale"),
        1,
        str(settings.get("seed", "") if keep else draw_seed()),
        settings.get("width") or 0,
        settings.get("height") or 0,
        of("schedule") or OWN,
        of("strength") or 0.7,
        gr.skip(),
    ]


def on_easel(image: Image.Image, mask: Image.Image | None = None) -> dict[str, Any]:
    """The value of the editor for a picture, and what was painted on it."""
    times = max(1, EASEL // max(image.size))
    size = (image.width * times, image.height * times)
    background = image.convert("RGBA").resize(size, Image.Resampling.NEAREST)
    layers = []
    if mask is not None:
        layer = Image.new("RGBA", size, (255, 90, 54, 0))
        layer.putalpha(mask.convert("L").resize(size, Image.Resampling.NEAREST))
        layers.append(layer)
    return {"background": background, "layers": layers, "composite": None}
