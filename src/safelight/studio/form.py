"""The settings of a picture, as fields on the page: read into a Request, set from a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image, ImageOps

from safelight.errors import SafelightError
from safelight.picture import as_rgb, opened, reason
from safelight.request import MAX_PROMPT, Request, draw_seed
from safelight.sampling import SAMPLERS
from safelight.sampling.schedule import SCHEDULES, SPACINGS
from safelight.server.hub import Hub
from safelight.sizes import allowed_size
from safelight.studio.parts import plain, problem

OWN = "the model's own"
NATIVE = "0 is the model's own"
EASEL = 512
"""Pixels: smaller pictures are shown enlarged, so that a brush can hit something."""

_WHOLE = Image.Resampling.NEAREST


class Form:
    """Made within a gr.Blocks, where its fields are to stand.

    defaults: sampler, steps and guidance scale that the model draws best with, if it says.
    """

    def __init__(self, defaults: Mapping[str, Any]) -> None:
        first = Request(sampler="dpmpp_2m").replace(**defaults)
        self.prompt = gr.Textbox(
            label="Prompt",
            placeholder="three teddy bears on a yellow background",
            lines=2,
            max_length=MAX_PROMPT,
            elem_id="prompt",
        )
        self.negative_prompt = gr.Textbox(
            label="Negative prompt", info="what to keep away from", max_length=MAX_PROMPT
        )
        self.draw = gr.Button("Draw", variant="primary", elem_id="draw")
        self.problem = problem("make")
        with gr.Row():
            self.sampler = gr.Dropdown(list(SAMPLERS), value=first.sampler, label="Sampler")
            steps = first.steps or SAMPLERS[first.sampler].steps
            self.steps = gr.Slider(1, 150, steps, step=1, label="Steps")
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
        with gr.Accordion("Size and schedule", open=False):
            with gr.Row():
                self.width = gr.Number(0, label="Width", info=NATIVE, min_width=100)
                self.height = gr.Number(0, label="Height", info=NATIVE, min_width=100)
            with gr.Row():
                self.schedule = gr.Dropdown(
                    [OWN, *SCHEDULES], value=OWN, label="Schedule", info="where the steps stop"
                )
                self.spacing = gr.Dropdown(
                    [OWN, *SPACINGS], value=OWN, label="Spacing", info="how they are spread"
                )
            self.eta = gr.Slider(
                0, 1, 0, step=0.05, label="Eta", info="noise that ddim and tcd add at each step"
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
                eraser=gr.Eraser(default_size=40),  # its own is a fiftieth of the picture
                height=460,
                elem_id="easel",
            )
            self.strength = gr.Slider(
                0.05, 1, 0.7, step=0.05, label="Strength", info="1 keeps nothing of the picture"
            )
        self.enlarged = gr.State(1)
        plain(*self.fields[:-1])
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
            self.spacing,
            self.eta,
            self.strength,
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
    picture: Any,
    enlarged: int,
    *,
    hub: Hub,
) -> Request:
    """What to ask of the hub's model: a picture to start from is brought near to its own size if
    width and height are empty. Raises SafelightError, with a sentence, for what cannot be.
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
        "width": width or None,
        "height": height or None,
        "schedule": None if schedule == OWN else schedule,
        "spacing": None if spacing == OWN else spacing,
        "eta": eta,
    }
    image, mask = _painted(picture, enlarged)
    if hub.info.kind == "pixels":
        if prompt or negative_prompt or image is not None:
            raise SafelightError(
                "this model draws from noise alone: leave both prompts and the picture empty"
            )
        settings["unconditional"] = True
    if image is not None:
        settings |= {"image": image, "mask": mask, "strength": strength}
        if not (width or height):
            native = hub.native_size
            scale = ((native[0] * native[1]) / (image.width * image.height)) ** 0.5
            near = allowed_size((round(image.width * scale), round(image.height * scale)))
            settings |= {"width": near[0], "height": near[1]}
    return Request(**settings)


def _painted(picture: Any, enlarged: int) -> tuple[Image.Image | None, Image.Image | None]:
    """What the editor holds: the picture, and the mask, if anything is painted. What `on_easel`
    enlarged is made small again, so that it is the same picture to the last pixel.
    """
    if picture is None or picture.background is None:
        return None, None
    image, alpha = _opened(picture.background.path)
    if alpha is not None and alpha.getbbox() is None:  # an empty canvas is transparent
        return None, None
    painted = np.zeros((image.height, image.width), bool)
    for layer in picture.layers or ():
        _, alpha = _opened(layer.path)
        if alpha is not None:
            painted |= np.asarray(alpha.resize(image.size)) > 127
    mask = Image.fromarray(painted.astype(np.uint8) * 255) if painted.any() else None
    small = image.resize((image.width // enlarged, image.height // enlarged), _WHOLE)
    if small.resize(image.size, _WHOLE).tobytes() != image.tobytes():  # another picture since then
        return image, mask
    return small, mask and mask.resize(small.size, _WHOLE)


def _opened(path: str | Path) -> tuple[Image.Image, Image.Image | None]:
    """A picture as RGB, transparency on white, and how opaque it is."""
    try:
        with opened(path, "the picture") as image:
            upright = ImageOps.exif_transpose(image)
            clear = upright.has_transparency_data
            return as_rgb(upright), upright.convert("RGBA").getchannel("A") if clear else None
    except SafelightError:
        raise
    except Exception as error:  # decoders of broken files raise anything
        raise SafelightError(f"the picture is damaged or cut off ({reason(error)})") from None


def shown(settings: dict[str, Any]) -> tuple[list[Any], list[str]]:
    """The values of a Form's fields for the settings of a recipe, but for the picture that it began
    with (see `on_easel`), and what of them cannot be had, each in a sentence. settings may be
    anything: files come from strangers.
    """
    known: dict[str, Any] = {}
    told: list[str] = []
    for name, value in settings.items():
        if name in ("image_sha256", "mask_sha256") or value is None:
            continue
        try:
            Request(**{str(name): value})
            known[name] = value
        except SafelightError as error:
            told.append(str(error))
    for name in ("unconditional", "count"):  # as this server's model is; and it is of one picture
        known.pop(name, None)
    asked = Request(**known)
    values = [
        asked.prompt,
        asked.negative_prompt,
        asked.sampler,
        asked.steps or SAMPLERS[asked.sampler].steps,
        asked.guidance_scale,
        1,
        str(asked.seed),
        asked.width or 0,
        asked.height or 0,
        asked.schedule or OWN,
        asked.spacing or OWN,
        asked.eta,
        asked.strength or 0.7,
    ]
    return values, told


def on_easel(
    image: Image.Image | None, mask: Image.Image | None = None
) -> tuple[dict[str, Any] | None, int]:
    """The editor's value for a picture and what was painted on it, and how often it is enlarged."""
    if image is None:
        return None, 1
    times = max(1, EASEL // max(image.size))
    size = (image.width * times, image.height * times)
    layers = []
    if mask is not None:
        layer = Image.new("RGBA", size, (255, 90, 54, 0))
        layer.putalpha(mask.convert("L").resize(size, _WHOLE))
        layers.append(layer)
    background = image.convert("RGBA").resize(size, _WHOLE)
    return {"background": background, "layers": layers, "composite": None}, times
